# make demo   train, sample and score PixelREPA on scanned digits, on any CPU, from nothing
# make test   everything CI runs
# make style  format and lint

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin
# Numbers of a few cores: more threads than cores only wait for each other.
export OMP_NUM_THREADS ?= 1

.PHONY: env demo test style clean-demo

env: $(VENV)/.installed

$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --quiet torch --constraint constraints.txt
	$(RUN)/pip install --quiet --editable ".[train,dev]" --constraint constraints.txt
	touch $@

test: env
	$(RUN)/pytest --numprocesses 2 --dist loadfile

style: env
	$(RUN)/ruff format .
	$(RUN)/ruff check --fix .

demo: OMP_NUM_THREADS = 2
demo: env outputs/demo/teacher
	$(RUN)/accelerate launch --config_file training/accelerate/cpu.yaml training/train_pixelrepa.py \
		--config training/configs/digits.yaml --resume_from_checkpoint latest
	$(RUN)/python training/score_digits.py --pipeline outputs/demo/run/pipeline --data_dir outputs/demo

outputs/demo/teacher: | env
	$(RUN)/python training/prepare_teacher.py --output_dir outputs/demo

clean-demo:
	rm -rf outputs/demo
