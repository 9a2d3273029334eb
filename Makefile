# make demo          train, sample and score PixelREPA on scanned digits: any CPU, no download
# make test          run everything CI runs
# make style         format and lint
# make test-wheel    build the wheel, install it into an empty environment and try its commands
# make test-matrix   run the suite with the lowest and the newest versions that setup.py allows: hours, many GB

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin
# The suite runs two processes; more threads than cores slow each other down.
export OMP_NUM_THREADS ?= 1

.PHONY: env demo test test-wheel test-matrix style clean-demo

env: $(VENV)/.installed

$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --quiet torch --constraint constraints.txt
	$(RUN)/pip install --quiet --editable ".[train,dev]" --constraint constraints.txt
	touch $@

test: env
	$(RUN)/pytest --numprocesses 2 --dist loadfile

# Run from an empty folder, so that nothing is imported from the repository.
test-wheel:
	rm -rf .wheel
	$(PYTHON) -m venv .wheel/env
	.wheel/env/bin/pip wheel --quiet --no-deps --wheel-dir .wheel .
	.wheel/env/bin/pip install --quiet --constraint constraints.txt .wheel/*.whl
	cp tests/try_wheel.py .wheel
	cd .wheel && env/bin/python try_wheel.py

# Interpreter and version resolution; uv finds or fetches the interpreter.
MATRIX ?= 3.10:lowest-direct 3.13:highest
test-matrix: env
	$(RUN)/pip install --quiet uv
	for cell in $(MATRIX); do \
		python=$${cell%%:*} resolution=$${cell##*:} folder=.matrix/$$python-$${cell##*:}; \
		$(RUN)/uv venv --quiet --clear --python $$python $$folder && \
		$(RUN)/uv pip install --quiet --python $$folder --resolution $$resolution --editable ".[train,dev]" && \
		$$folder/bin/pytest --numprocesses 2 --dist loadfile || exit 1; \
	done

style: env
	$(RUN)/ruff format .
	$(RUN)/ruff check --fix .

demo: OMP_NUM_THREADS = 2
demo: env outputs/demo/teacher
	$(RUN)/accelerate launch --config_file training/accelerate/cpu.yaml training/train_pixelrepa.py \
		--config training/configs/digits.yaml --resume_from_checkpoint latest
	$(RUN)/python examples/digits/score_digits.py --pipeline outputs/demo/run/pipeline --data_dir outputs/demo

outputs/demo/teacher: | env
	$(RUN)/python examples/digits/prepare_teacher.py --output_dir outputs/demo

clean-demo:
	rm -rf outputs/demo
