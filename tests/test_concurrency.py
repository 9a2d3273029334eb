"""Two runs at the same time: in one folder the second is refused, with one cache both succeed."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from standin_hub import StandInHub
from test_hub import log_in
from training_runs import ROOT, TEACHER, ended, fork, load_script
from transformers import HfArgumentParser

from pixelrepa_diffusers import PixelREPAPipeline
from pixelrepa_diffusers.commands import convert_checkpoint, evaluate, generate
from pixelrepa_diffusers.evaluation import FeatureMoments, FeatureStatistics, VisionEncoderNetwork, extract
from pixelrepa_diffusers.files import only_writer, write_atomically
from pixelrepa_diffusers.hub import publish_folder


prepare_teacher = load_script("examples/digits/prepare_teacher.py")
train_pixelrepa = load_script("training/train_pixelrepa.py")


PUBLISHED = TEACHER.parent / "checkpoint-last.pth"


@pytest.fixture(scope="module")
def pipeline(make_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    make_pipeline(guidance_scale=2.0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    network, moments = VisionEncoderNetwork.from_pretrained(TEACHER, image_size=28), FeatureMoments()
    images = torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    moments.update(extract(network, images)["features"])
    path = tmp_path_factory.mktemp("reference") / "real.npz"
    FeatureStatistics.from_moments(moments).save(path)
    return path


def parsed(kind, *words):
    return HfArgumentParser(kind).parse_args_into_dataclasses([str(word) for word in words])[0]


@pytest.fixture
def commands(pipeline, reference):
    """output path → what writes it, for each script that writes a folder or file."""

    def generating(output):
        words = ("--pipeline", pipeline, "--output_dir", output, "--class_labels", 1, "--seeds", "0-3")
        generate.main(parsed(generate.GenerateArguments, *words, "--num_inference_steps", 2, "--overwrite"))

    def evaluating(output):
        words = ["--pipeline", pipeline, "--output_dir", output, "--metrics", "fd_teacher", "--teacher", TEACHER]
        words += ["--teacher_image_size", 28, "--teacher_reference", reference, "--num_samples", 20]
        evaluate.main(parsed(evaluate.EvaluateArguments, *words, "--num_inference_steps", 2))

    def converting(output):
        words = ("--checkpoint_path", PUBLISHED, "--output_dir", output, "--in_context_start", 2)
        convert_checkpoint.main(parsed(convert_checkpoint.ConvertArguments, *words))

    def converting_back(output):
        words = ("--to_original", "--pipeline", pipeline, "--output_path", output)
        convert_checkpoint.main(parsed(convert_checkpoint.ConvertArguments, *words))

    def preparing_the_teacher(output):
        prepare_teacher.main(prepare_teacher.PrepareTeacherArguments(output_dir=str(output), steps=1))

    return {
        "prepare the teacher": preparing_the_teacher,
        "generate": generating,
        "evaluate": evaluating,
        "convert": converting,
        "convert back": converting_back,
    }


@pytest.mark.parametrize("name", ["prepare the teacher", "generate", "evaluate", "convert", "convert back"])
def test_while_one_run_writes_the_second_is_refused_and_names_the_place(commands, tmp_path, name):
    output = tmp_path / "out"
    place = tmp_path / ".out.incomplete" if name.startswith("convert") else output
    with only_writer(place):
        (place / "half").write_bytes(b"of the first run")
        with pytest.raises(RuntimeError, match=rf"Another run is writing to {place}"):
            commands[name](output)
        assert [path.name for path in place.iterdir() if path.name != ".lock"] == ["half"]
    (place / "half").unlink()
    commands[name](output)
    assert output.exists()


@pytest.mark.parametrize("name", ["generate", "evaluate", "convert", "convert back"])
def test_of_runs_started_together_one_succeeds_and_the_others_do_or_are_refused(commands, tmp_path, name):
    command, alone, together = commands[name], tmp_path / "alone" / "out", tmp_path / "together" / "out"
    together.parent.mkdir()
    assert ended(fork(lambda: command(alone), tmp_path / "log"), 120) == 0, (tmp_path / "log").read_text()
    logs = [tmp_path / f"log{number}" for number in range(3)]
    children = [fork(lambda: command(together), log) for log in logs]
    statuses = [ended(child, 120) for child in children]
    assert set(statuses) <= {0, 1} and 0 in statuses, [log.read_text()[-1000:] for log in logs]
    for status, log in zip(statuses, logs, strict=True):
        assert status == 0 or "Another run is writing to" in log.read_text() or "exists" in log.read_text()

    def content(folder: Path) -> dict[str, bytes]:
        """Without what names the folder or the time."""
        files = [path for path in folder.parent.rglob("*") if path.is_file() and path.name != ".lock"]
        return {
            str(path.relative_to(folder.parent)): path.read_bytes() if path.suffix not in (".json", ".out") else b""
            for path in files
        }

    one, other = content(alone), content(together)
    if name == "convert back":
        loaded = [torch.load(path, weights_only=False) for path in (alone, together)]
        assert loaded[0]["model"].keys() == loaded[1]["model"].keys()
        assert all(torch.equal(loaded[0]["model"][key], loaded[1]["model"][key]) for key in loaded[0]["model"])
        assert one.keys() == other.keys()
    else:
        assert one == other
    if name == "evaluate":
        records = [json.loads((path / "metrics.json").read_text()) for path in (alone, together)]
        assert records[0]["metrics"] == records[1]["metrics"]


TWO_TRAININGS = """
import os, signal, sys
from pathlib import Path
from training_runs import arguments, ended, fork, train, write_images

folder = Path(sys.argv[1])
data, run = write_images(folder / "images"), folder / "run"
words = arguments(data, run, max_train_steps=100_000, checkpointing_steps=5, resume_from_checkpoint="latest")

def wait_for_checkpoints(number):
    while len(list(run.glob("checkpoint-*"))) < number:
        assert ended(first, 0.05) is None, (folder / "first").read_text()

first = fork(lambda: train(words), folder / "first")
wait_for_checkpoints(1)
assert ended(fork(lambda: train(words), folder / "second"), 60) == 1
assert f"Another run is writing to {run}" in (folder / "second").read_text()
wait_for_checkpoints(len(list(run.glob("checkpoint-*"))) + 1)
os.kill(first, signal.SIGTERM)
assert ended(first, 60) == 0
assert "Stopped by SIGTERM" in (folder / "first").read_text()
"""


def test_a_second_training_into_the_same_folder_is_refused_and_the_first_goes_on(tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, "-c", TWO_TRAININGS, str(tmp_path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-3000:]


def test_processes_that_download_a_repository_into_one_cache_at_once_all_load_it(pipeline, tmp_path, monkeypatch):
    def draw(**options) -> torch.Tensor:
        pipe = PixelREPAPipeline.from_pretrained(**options)
        seeds = [torch.Generator().manual_seed(0)]
        return pipe([3], num_inference_steps=2, generator=seeds, output_type="pt").images

    def save_drawn(name: str, **options) -> int:
        return fork(lambda: torch.save(draw(**options), tmp_path / f"{name}.pt"), tmp_path / f"{name}.log")

    repository = {"pretrained_model_name_or_path": "me/digits", "cache_dir": tmp_path / "cache"}
    with StandInHub() as hub:
        log_in(hub, monkeypatch)
        publishing = fork(lambda: publish_folder(pipeline, "me/digits"), tmp_path / "log")
        assert ended(publishing, 60) == 0, (tmp_path / "log").read_text()
        children = [save_drawn(f"{number}", **repository) for number in range(3)]
        # In a child as well: the last bits of a sum depend on the number of threads.
        children.append(save_drawn("expected", pretrained_model_name_or_path=pipeline))
        statuses = [ended(child, 120) for child in children]
    assert statuses == [0, 0, 0, 0], [log.read_text()[-1000:] for log in tmp_path.glob("*.log")]
    expected = torch.load(tmp_path / "expected.pt")
    assert all(torch.equal(torch.load(tmp_path / f"{number}.pt"), expected) for number in range(3))
    assert not list((tmp_path / "cache").rglob("*.incomplete"))


def test_conversions_that_come_and_go_never_touch_each_others_files(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "taken").touch()  # so that each has a whole folder to tidy up

    def save(folder: Path) -> None:
        (folder / "transformer").mkdir(parents=True)
        for number in range(5):
            (folder / "transformer" / str(number)).write_bytes(b"whole")

    def converting() -> None:
        for _ in range(100):
            with contextlib.suppress(FileExistsError, RuntimeError):  # the place is taken, another run writes
                convert_checkpoint.write_beside(target, save)

    logs = [tmp_path / f"log{number}" for number in range(3)]
    statuses = [ended(child, 120) for child in [fork(converting, log) for log in logs]]
    assert statuses == [0, 0, 0], [log.read_text()[-1000:] for log in logs]
    assert {path.name for path in tmp_path.iterdir()} == {"out", *(log.name for log in logs)}


def test_a_killed_writer_leaves_a_folder_that_the_next_one_takes_and_tidies(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()

    def write_and_die() -> None:
        with only_writer(folder):
            write_atomically(folder / "a.png", lambda path: (path.write_bytes(b"half"), os.kill(os.getpid(), 9)))

    assert ended(fork(write_and_die, tmp_path / "log"), 60) == -9
    assert [path.suffix for path in folder.iterdir() if path.name != ".lock"] == [".incomplete"]
    with only_writer(folder):
        assert [path.name for path in folder.iterdir()] == [".lock"]
