"""Mistakes that users make: each ends a command with one line and status 2, or a public call with a message that says what to do."""

import json
import shutil

import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from training_runs import TEACHER, TRAINER, arguments, load_script

import pixelrepa_diffusers as package
from pixelrepa_diffusers import cli, commands
from pixelrepa_diffusers.commands import (  # noqa: F401
    convert_checkpoint,
    evaluate,
    generate,
    prepare_dataset,
    prepare_reference,
    probe_alignment,
    publish,
)
from pixelrepa_diffusers.training.arguments import parse_arguments


@pytest.fixture(scope="module")
def places(make_pipeline, image_folder, finished_run, tmp_path_factory):
    """Folders that the command lines below name in braces."""
    root = tmp_path_factory.mktemp("places")
    make_pipeline(id2label={0: "tabby, cat", 1: "dog"}).save_pretrained(root / "pipeline")
    (root / "empty").mkdir()
    (root / "loose").mkdir()
    Image.new("RGB", (8, 8)).save(root / "loose" / "a.png")
    shutil.copytree(image_folder, root / "damaged")
    (root / "damaged" / "class1" / "3.png").write_bytes(b"not an image")
    (root / "garbage.pth").write_bytes(b"not a checkpoint")
    (root / "unknown.yaml").write_text("learning_rates: 1")
    return {path.stem: path for path in root.iterdir()} | {
        "root": root,
        "images": image_folder,
        "run": finished_run,
        "published": TEACHER.parent / "checkpoint-last.pth",
        "teacher": TEACHER,
        "config": root / "unknown.yaml",
    }


def run(monkeypatch, capsys, main) -> str:
    """The message that ends a command after a user's mistake; argparse prints its usage before it."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    return printed[printed.rindex("error: ") :]


GENERATE = "generate --pipeline {pipeline} --class_labels 0 --num_inference_steps 1 --output_dir {root}/generated"
EVALUATE = "evaluate --pipeline {pipeline} --num_inference_steps 1 --output_dir {root}/evaluated"
COMMANDS = [
    ("generate --pipeline {root}/missing --class_labels 0", "There is no folder"),
    ("generate --pipeline me/missing --class_labels 0", "neither a folder"),
    ("generate --pipeline {run} --class_labels 0", "pipeline"),
    (GENERATE + " --class_label 1", "unrecognized arguments"),
    (GENERATE + " --class_labels taby", "'tabby'"),
    (GENERATE + " --class_labels 10", "out of range"),
    (GENERATE + " --seeds x", "--seeds"),
    (GENERATE + " --num_inference_steps 0", "--num_inference_steps must be at least 1"),
    (GENERATE + " --guidance_interval 0.9 0.1", "guidance_interval"),
    (GENERATE + " --guidance_scale nan", "guidance_scale"),
    (GENERATE + " --scheduler ddim", "invalid choice"),
    (GENERATE + " --cuda_graphs", "--cuda_graphs needs a GPU"),
    ("evaluate --metrics fid --output_dir {root}/evaluated", "--pipeline or --images"),
    (EVALUATE + " --metrics fd_teacher --num_samples 10", "--teacher"),
    (EVALUATE + " --metrics fd_teacher --num_samples 10 --teacher {teacher} --teacher_image_size 28", "_reference"),
    (EVALUATE + " --metrics inception_score --num_samples 11", "multiple of the model's 10 classes"),
    ("evaluate --metrics inception_score --images {empty} --output_dir {root}/evaluated", "No images"),
    ("prepare_reference --network {teacher} --output_file {root}/x.npz --resolution 8", "exactly one source"),
    ("prepare_reference --network {teacher} --output_file {root}/x.npz --resolution 8 --train_data_dir {empty}", "{empty}"),
    ("prepare_dataset --train_data_dir {images} --output_dir {images} --resolution 8", "exists already"),
    ("prepare_dataset --train_data_dir {loose} --output_dir {root}/x --resolution 8", "--unconditional"),
    ("prepare_dataset --train_data_dir {damaged} --output_dir {root}/x --resolution 8", "Bad image"),
    ("convert_checkpoint --checkpoint_path {garbage} --output_dir {root}/x", "cannot be read as a PyTorch checkpoint"),
    ("convert_checkpoint --checkpoint_path {published} --output_dir {images}", "not empty"),
    ("convert_checkpoint --checkpoint_path {published} --output_dir {root}/x", "in_context_start"),
    ("convert_checkpoint --to_original --pipeline {empty} --output_path {root}/x.pth", "no model_index.json"),
    ("publish {empty} me/x", "no model_index.json"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "phrase"), COMMANDS, ids=[command for command, _ in COMMANDS])
def test_mistake_ends_a_command_with_one_line(command, phrase, places, monkeypatch, capsys):
    name, *words = (word.format(**places) for word in command.split())
    monkeypatch.setattr("sys.argv", [name, *words])
    message = run(monkeypatch, capsys, getattr(commands, name).cli)
    assert phrase.format(**places) in message


TRAIN = [
    ({"train_data_dir": None}, "exactly one source"),
    ({"train_data_dir": "{root}/missing"}, "No such file or directory"),
    ({"train_data_dir": "{loose}"}, "--unconditional"),
    ({"dataset_name": "{images}"}, "exactly one source"),
    ({"label_column": "kind"}, "belongs to --dataset_name"),
    ({"learning_rates": 1}, "unrecognized arguments"),
    ({"config": "{config}"}, "learning_rates"),
    ({"learning_rate": -1}, "--learning_rate must be greater than 0"),
    ({"mask_ratio": 1.5}, "--mask_ratio"),
    ({"preset": "JiT-X/16"}, "JiT-B/16"),
    ({"patch_size": 5}, "multiple of `patch_size` 5"),
    ({"resolution": 6}, "multiple of `patch_size` 4"),
    ({"train_batch_size": 25}, "do not fill one global batch"),
    ({"teacher_model_name_or_path": "{root}/missing"}, "--teacher_model_name_or_path"),
    ({"mixed_precision": "fp16"}, "not supported on CPU"),
    ({"output_dir": "{run}"}, "already holds checkpoint-6"),
    ({"resume_from_checkpoint": "checkpoint-4"}, "does not exist"),
    ({"train_data_dir": "{damaged}"}, "Bad image"),
    ({"learning_rate": 1e30, "lr_warmup_steps": 0}, "is not finite"),
    ({"hub_model_id": "me/x"}, "--push_to_hub"),
    ({"streaming": True}, "--max_train_steps"),
]


@pytest.mark.parametrize(("changes", "phrase"), TRAIN, ids=[json.dumps(changes) for changes, _ in TRAIN])
def test_mistake_ends_training_with_one_line(changes, phrase, places, tmp_path, monkeypatch, capsys):
    settings = {"train_data_dir": places["images"], "output_dir": tmp_path / "out"}
    if "streaming" in changes:
        settings["max_train_steps"] = None
    for name, value in changes.items():
        settings[name] = value.format(**places) if isinstance(value, str) else value
    words = arguments(settings.pop("train_data_dir"), settings.pop("output_dir"), **settings)
    main = load_script(TRAINER).main
    message = run(monkeypatch, capsys, lambda: cli.run(lambda: main(parse_arguments(words))))
    assert phrase in message


def adapter(**changes):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "teacher_dim": 6, "grid_size": 4, "num_classes": 10}
    return package.MaskedTransformerAdapter(**{**sizes, **changes})


CALLS = {
    "sample_size does not fit": (lambda pipe: package.JiTTransformer2DModel(sample_size=17, patch_size=4), "multiple"),
    "unknown preset": (lambda pipe: package.get_preset("JiT-B"), "JiT-B/16"),
    "unknown name": (lambda pipe: pipe("catt"), "'cat'"),
    "no labels": (lambda pipe: pipe([]), "empty"),
    "label out of range": (lambda pipe: pipe(10), "0 to 9"),
    "interval": (lambda pipe: pipe(0, guidance_interval=(0.9, 0.1)), "guidance_interval"),
    "generators": (lambda pipe: pipe([0, 1], generator=[torch.Generator()]), "1 generators for 2 images"),
    "latents": (lambda pipe: pipe(0, latents=torch.zeros(1, 3, 8, 8)), r"\(1, 3, 16, 16\)"),
    "scheduler": (lambda pipe: with_scheduler(pipe, DDIMScheduler())(0), "flow matching"),
    "projector": (lambda pipe: package.PixelREPAObjective(pipe.transformer, adapter(hidden_size=32)), "hidden_size"),
    "weights": (lambda pipe: package.load_original_checkpoint(TEACHER.parent / "checkpoint-last.pth", "ema3"), "ema1"),
}  # fmt: skip


def with_scheduler(pipe, scheduler):
    return package.PixelREPAPipeline(pipe.transformer, scheduler)


@pytest.mark.parametrize("mistake", CALLS)
def test_mistake_in_a_public_call_says_what_is_allowed(mistake, make_pipeline):
    call, phrase = CALLS[mistake]
    with pytest.raises(ValueError, match=phrase):
        call(make_pipeline(id2label={0: "tabby, cat", 1: "dog"}))
