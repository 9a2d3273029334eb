"""Mistakes that users make: each ends a command with one line and status 2, and nothing is written."""

import json
import shutil

import pytest
from PIL import Image
from tiny import encoder, random_images, reference_of
from training_runs import TEACHER, TRAINER, arguments, load_script

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
    (root / "pipeline/transformer/diffusion_pytorch_model.safetensors").unlink()  # no mistake is found so late
    reference_of(encoder(), random_images(40)).save(root / "real.npz")
    (root / "empty").mkdir()
    (root / "loose").mkdir()
    Image.new("RGB", (8, 8)).save(root / "loose" / "a.png")
    shutil.copytree(image_folder, root / "damaged")
    (root / "damaged" / "class1" / "3.png").write_bytes(b"not an image")
    (root / "garbage.pth").write_bytes(b"not a checkpoint")
    return {path.stem: path for path in root.iterdir()} | {
        "root": root,
        "out": root / "out",
        "images": image_folder,
        "run": finished_run,
        "published": TEACHER.parent / "checkpoint-last.pth",
        "teacher": TEACHER,
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


GENERATE = "generate --pipeline {pipeline} --output_dir {out} --num_inference_steps 1 "
EVALUATE = "evaluate --pipeline {pipeline} --output_dir {out} --num_inference_steps 1 --num_samples 40 "
TEACHER_METRIC = EVALUATE + "--metrics fd_teacher --teacher {teacher} --teacher_image_size 28 --teacher_reference "
SCORED = TEACHER_METRIC + "{real} "
REFERENCE = "prepare_reference --network {teacher} --output_file {out}.npz --resolution 8 "
PREPARE = "prepare_dataset --output_dir {out} --resolution 8 "
CONVERT = "convert_checkpoint --output_dir {out} --checkpoint_path "
COMMANDS = [
    ("generate --pipeline {root}/missing --class_labels 0", "There is no folder"),
    ("generate --pipeline {run} --class_labels 0", "pipeline"),
    (GENERATE, "--list_classes"),
    (GENERATE + "--class_labels taby", "'tabby'"),
    (GENERATE + "--class_labels 10", "out of range"),
    (GENERATE + "--class_labels 3-1", "--class_labels: '3-1'"),
    (GENERATE + "--class_labels 0 --seeds x", "--seeds: 'x'"),
    (GENERATE + "--class_labels 0 --guidance_interval 0.9 0.1", "guidance_interval"),
    (GENERATE + "--class_labels 0 --guidance_scale nan", "guidance_scale"),
    (GENERATE + "--class_labels 0 --cuda_graphs", "--cuda_graphs needs a GPU"),
    ("evaluate --metrics fid --output_dir {out}", "--pipeline or --images"),
    ("evaluate --metrics inception_score --images {empty} --output_dir {out}", "No images"),
    (EVALUATE + "--metrics fid --images {images}", "either --pipeline or --images"),
    (EVALUATE + "--metrics fid", "--inception_reference"),
    (EVALUATE + "--metrics fd_teacher", "--teacher"),
    (EVALUATE + "--metrics inception_score --num_samples 11", "multiple of the model's 10 classes"),
    (TEACHER_METRIC + "{root}/missing.npz", "missing.npz"),
    (SCORED + "--guidance_intervals 0.5", "LOW:HIGH"),
    (SCORED + "--guidance_intervals 0.9:0.1", "guidance_interval"),
    (SCORED + "--guidance_scales 2 2.0", "same name"),
    (SCORED + "--transformers nowhere", "--transformers"),
    (REFERENCE, "exactly one source"),
    (REFERENCE + "--train_data_dir {empty}", "{empty}"),
    (REFERENCE + "--train_data_dir {images} --output_file {out}.pt", "ends in .npz"),
    (REFERENCE + "--train_data_dir {images} --num_samples 25", "only 24 images"),
    (REFERENCE + "--train_data_dir {damaged} --image_size 28 --dataloader_num_workers 1", "error: Bad image {damaged}"),
    (PREPARE + "--train_data_dir {images} --output_dir {images}", "exists already"),
    (PREPARE + "--train_data_dir {loose}", "--unconditional"),
    (PREPARE + "--train_data_dir {damaged}", "Bad image"),
    (CONVERT + "{garbage}", "cannot be read as a PyTorch checkpoint"),
    (CONVERT + "{published} --in_context_start 4", "in_context_start"),
    (CONVERT + "{published} --in_context_start 2 --guidance_interval 0.9 0.1", "guidance_interval"),
    (CONVERT + "{published} --in_context_start 2 --id2label {garbage}", "not a JSON object"),
    ("convert_checkpoint --checkpoint_path {published}", "--output_dir needed without"),
    ("convert_checkpoint --to_original --pipeline {empty} --output_path {out}.pth", "no model_index.json"),
    ("publish {empty} me/x", "no model_index.json"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "phrase"), COMMANDS, ids=[command for command, _ in COMMANDS])
def test_mistake_ends_a_command_with_one_line(command, phrase, places, monkeypatch, capsys):
    name, *words = (word.format(**places) for word in command.split())
    monkeypatch.setattr("sys.argv", [name, *words])
    before = sorted(places["root"].glob("[!.]*"))
    message = run(monkeypatch, capsys, getattr(commands, name).cli)
    assert phrase.format(**places) in message
    assert sorted(places["root"].glob("[!.]*")) == before  # nothing is written


TRAIN = [
    ({"train_data_dir": None}, "exactly one source"),
    ({"train_data_dir": "{root}/missing"}, "No such file or directory"),
    ({"train_data_dir": "{loose}"}, "--unconditional"),
    ({"dataset_name": "{images}"}, "exactly one source"),
    ({"label_column": "kind"}, "belongs to --dataset_name"),
    ({"patch_size": 5}, "multiple of `patch_size` 5"),
    ({"resolution": 6}, "multiple of `patch_size` 4"),
    ({"train_batch_size": 25}, "do not fill one global batch"),
    ({"teacher_model_name_or_path": "{root}/missing"}, "--teacher_model_name_or_path"),
    ({"guidance_interval": [0.9, 0.1]}, "guidance_interval"),
    ({"report_to": ["tensorboard", "dvclive"]}, "--report_to dvclive: not installed"),
    ({"pretrained_model_name_or_path": "{root}"}, "neither a pipeline nor a checkpoint"),
    ({"dry_run": True, "dry_run_processes": 4, "train_batch_size": 8}, "24 images do not fill"),
    ({"mixed_precision": "fp16"}, "not supported on CPU"),
    ({"cuda_graphs": True}, "--cuda_graphs needs --compile"),
    ({"compile": True, "cuda_graphs": True}, "--cuda_graphs needs a GPU"),
    ({"output_dir": "{run}"}, "already holds checkpoint-6"),
    ({"resume_from_checkpoint": "checkpoint-4"}, "does not exist"),
    ({"train_data_dir": "{damaged}"}, "Bad image"),
    ({"train_data_dir": "{damaged}", "dataloader_num_workers": 1}, "error: Bad image"),
    ({"learning_rate": 1e30, "lr_warmup_steps": 0}, "is not finite"),
]


@pytest.mark.parametrize(("changes", "phrase"), TRAIN, ids=[json.dumps(changes) for changes, _ in TRAIN])
def test_mistake_ends_training_with_one_line(changes, phrase, places, tmp_path, monkeypatch, capsys):
    settings = {"train_data_dir": places["images"], "output_dir": tmp_path / "out"}
    for name, value in changes.items():
        settings[name] = value.format(**places) if isinstance(value, str) else value
    words = arguments(settings.pop("train_data_dir"), settings.pop("output_dir"), **settings)
    main = load_script(TRAINER).main
    message = run(monkeypatch, capsys, lambda: cli.run(lambda: main(parse_arguments(words))))
    assert phrase in message
    assert not [*tmp_path.glob("out/checkpoint-*"), *tmp_path.glob("out/pipeline")]
