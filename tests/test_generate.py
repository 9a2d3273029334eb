"""commands/generate.py: images depend on class, seed and settings alone, and record how to make them again."""

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training_runs import in_two_processes

from pixelrepa_diffusers import JiTFlowMatchScheduler, JiTTransformer2DModel, PixelREPAPipeline
from pixelrepa_diffusers.cli import parse
from pixelrepa_diffusers.commands.generate import GenerateArguments, main, select_classes
from pixelrepa_diffusers.sampling import SCHEDULERS, compile_transformer, describe_pipeline, seeded


@pytest.fixture(scope="module")
def pipeline(make_pipeline, tmp_path_factory):
    """A saved pipeline with ten named classes."""
    folder = tmp_path_factory.mktemp("pipeline")
    names = {index: f"digit {index}, d{index}" for index in range(10)}
    make_pipeline({"num_layers": 2, "in_context_start": 1}, id2label=names, guidance_scale=2.0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(make_transformer, tmp_path_factory):
    """What the trainer writes that sampling reads: the model and its first EMA, with different weights."""
    run = tmp_path_factory.mktemp("run")
    folder = run / "checkpoint-5"
    for seed, name in enumerate(("transformer", "transformer_ema_0.9")):
        make_transformer(seed=seed, num_classes=3).save_pretrained(folder / name)
    settings = {"id2label": {"0": "a", "1": "b", "2": "c"}, "guidance_scale": 3.0, "guidance_interval": [0.2, 0.8]}
    progress = {"arguments": {"ema_decays": [0.9, 0.5]}, "pipeline": settings}
    (folder / "progress.json").write_text(json.dumps(progress))
    return folder


def generate(pipeline, output_dir, *options, labels=(1, "d3", 7), seeds=("0-2", 9)) -> list[Path]:
    given = ["--pipeline", pipeline, "--output_dir", output_dir, "--num_inference_steps", 3, "--seeds", *seeds]
    words = [*given, *(["--class_labels", *labels] if labels else []), *options]
    return main(parse(GenerateArguments, "", [str(word) for word in words]))


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).glob("*.png")}


def test_one_image_per_class_and_seed_and_a_grid(pipeline, tmp_path, capsys):
    paths = generate(pipeline, tmp_path)
    expected = [f"{label:04d}_{seed:06d}.png" for label in (1, 3, 7) for seed in (0, 1, 2, 9)]
    assert [path.name for path in paths] == expected
    assert {path.name for path in tmp_path.iterdir()} == {*expected, "grid.png", "arguments.json", ".lock"}
    assert "12 images" in capsys.readouterr().out
    assert len({pixels(path).tobytes() for path in paths}) == len(paths)
    height, width, _ = pixels(tmp_path / "grid.png").shape
    assert height > 3 * 16 and width > 4 * 16  # a row per class, a column per seed


def test_images_equal_those_of_the_pipeline_and_arguments_json_records_them(pipeline, tmp_path):
    def sample(**settings) -> np.ndarray:
        return np.asarray(pipe("d3", generator=seeded([5]), num_inference_steps=3, **settings).images[0])

    pipe = PixelREPAPipeline.from_pretrained(pipeline)
    path = generate(pipeline, tmp_path / "defaults", labels=["digit 3"], seeds=[5])[0]
    np.testing.assert_array_equal(pixels(path), sample())
    record = json.loads((tmp_path / "defaults" / "arguments.json").read_text())
    assert record["class_labels"] == {"3": "digit 3, d3"} and record["seeds"] == [5]
    assert (record["guidance_scale"], record["guidance_interval"]) == (2.0, [0.1, 1.0])
    assert record["scheduler"]["_class_name"] == "JiTFlowMatchScheduler"
    assert record["versions"]["torch"] == torch.__version__ and record["device"] == "cpu"

    options = ("--scheduler", "euler", "--guidance_scale", 4.0, "--guidance_interval", 0.0, 0.6)
    path = generate(pipeline, tmp_path / "options", *options, labels=["digit 3"], seeds=[5])[0]
    pipe.scheduler = SCHEDULERS["euler"]()
    expected = sample(guidance_scale=4.0, guidance_interval=(0.0, 0.6))
    np.testing.assert_array_equal(pixels(path), expected)
    for other in ({"guidance_scale": 4.0}, {"guidance_interval": (0.0, 0.6)}):
        assert not np.array_equal(sample(**other), expected)


def test_batch_size_and_process_count_change_no_byte(pipeline, tmp_path):
    for size in (1, 5):
        generate(pipeline, tmp_path / str(size), "--batch_size", size)
    in_two_processes(generate, pipeline, tmp_path / "two", "--batch_size", 3)
    assert files(tmp_path / "1") == files(tmp_path / "5") == files(tmp_path / "two")


def test_the_command_in_a_png_makes_it_again(pipeline, make_transformer, tmp_path):
    second = tmp_path / "second"
    make_transformer(seed=1, num_layers=2, in_context_start=1).save_pretrained(second)
    options = ("--scheduler", "euler", "--guidance_scale", 1.5, "--guidance_interval", 0.2, 0.9)
    options += ("--guidance_transformer", second, "--autoguidance_scale", 2)
    path = generate(pipeline, tmp_path / "first", *options)[6]
    with Image.open(path) as image:
        text = image.text
    assert (text["class_id"], text["class_name"], text["seed"]) == ("3", "digit 3, d3", "2")
    assert (text["guidance_scale"], text["guidance_interval"]) == ("1.5", "[0.2, 0.9]")
    assert json.loads(text["scheduler"])["solver"] == "euler"
    program, *argv = shlex.split(text["command"])
    assert program == "pixelrepa-generate"
    again = main(parse(GenerateArguments, "", [*argv[:-1], str(tmp_path / "again")]))
    assert [file.read_bytes() for file in again] == [path.read_bytes()]
    without = generate(pipeline, tmp_path / "without", *options, "--autoguidance_scale", 1)[6]
    assert not np.array_equal(pixels(without), pixels(path))


def test_all_schedulers_approach_the_same_image(pipeline, tmp_path):
    options = ("--num_inference_steps", 25, "--guidance_scale", 1)
    reference = generate(pipeline, tmp_path / "reference", *options, labels=[4], seeds=[0])[0]
    for scheduler in SCHEDULERS:
        path = generate(pipeline, tmp_path / scheduler, *options, "--scheduler", scheduler, labels=[4], seeds=[0])[0]
        assert np.abs(pixels(path).astype(int) - pixels(reference)).mean() < 4, scheduler


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_makes_nearly_the_same_image(pipeline, tmp_path, dtype):
    reference = generate(pipeline, tmp_path / "float32", labels=[4], seeds=[0])[0]
    path = generate(pipeline, tmp_path / dtype, "--dtype", dtype, labels=[4], seeds=[0])[0]
    assert 0 < np.abs(pixels(path).astype(int) - pixels(reference)).mean() < 6


@pytest.mark.parametrize(
    ("labels", "ids"),
    [
        (["all"], range(10)),
        (["2-4", "d1", "9,6-7,3"], [2, 3, 4, 1, 9, 6, 7]),
        (["d3", "3"], [3]),
    ],
)
def test_class_labels_are_names_ids_ranges_or_all(pipeline, labels, ids):
    assert select_classes(labels, describe_pipeline(pipeline)) == list(ids)


def test_list_classes_prints_ids_and_names_only(pipeline, tmp_path, capsys):
    assert generate(pipeline, tmp_path / "out", "--list_classes", labels=None) == []
    assert capsys.readouterr().out.splitlines() == [f"{index} digit {index}, d{index}" for index in range(10)]
    assert not (tmp_path / "out").exists()


def test_a_single_class_needs_no_class_labels_and_many_images_make_no_grid(make_pipeline, tmp_path, capsys):
    make_pipeline({"num_classes": 1}).save_pretrained(tmp_path / "pipeline")
    paths = generate(tmp_path / "pipeline", tmp_path / "out", "--max_grid_images", 1, labels=None, seeds=["0-1"])
    assert [path.name for path in paths] == ["0000_000000.png", "0000_000001.png"]
    assert not (tmp_path / "out" / "grid.png").exists() and "no grid.png" in capsys.readouterr().out


def test_a_training_checkpoint_samples_its_first_ema(checkpoint, tmp_path):
    path = generate(checkpoint, tmp_path / "ema", labels=["b"], seeds=[0])[0]
    ema = JiTTransformer2DModel.from_pretrained(checkpoint / "transformer_ema_0.9")
    expected = PixelREPAPipeline(ema, JiTFlowMatchScheduler())(1, 3.0, (0.2, 0.8), 3, seeded([0])).images[0]
    np.testing.assert_array_equal(pixels(path), np.asarray(expected))

    old = shutil.copytree(checkpoint, tmp_path / "checkpoint-5", ignore=shutil.ignore_patterns("*ema*"))
    (old / "progress.json").write_text('{"arguments": {"ema_decays": [0.9]}}')  # neither EMAs nor class names
    assert len(generate(old, tmp_path / "old", labels=[2], seeds=[0])) == 1


def test_a_wrong_path_is_answered_with_the_right_one(checkpoint, pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    run_folder = shutil.copytree(checkpoint.parent, tmp_path / "run")
    shutil.copytree(pipeline, run_folder / "pipeline")
    (tmp_path / "model.pth").touch()
    for path, answer in (
        (checkpoint.parent, r"training run: pass .*checkpoint-5"),
        (run_folder, r"training run: pass .*run/pipeline"),
        (tmp_path / "model.pth", "pixelrepa-convert"),
        ("outputs/mistyped", "neither a folder with a pipeline nor"),
    ):
        with pytest.raises(OSError, match=answer):
            describe_pipeline(path)


def test_existing_files_are_kept_without_overwrite(pipeline, tmp_path):
    path = generate(pipeline, tmp_path, labels=[1], seeds=[0])[0]
    path.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="--overwrite"):
        generate(pipeline, tmp_path, labels=[2, 1], seeds=[0])
    assert path.read_bytes() == b"mine" and not (tmp_path / "0002_000000.png").exists()
    generate(pipeline, tmp_path, "--overwrite", labels=[2, 1], seeds=[0])
    assert pixels(path).shape == (16, 16, 3)


def test_compiled_blocks_make_the_same_image(pipeline, tmp_path, monkeypatch):
    # Traced in full; machine code would take a minute on a CPU.
    calls, compile_blocks = [], JiTTransformer2DModel.compile_repeated_blocks

    def trace(self, **kwargs):
        calls.append(kwargs)
        compile_blocks(self, **kwargs, backend="eager")

    monkeypatch.setattr(JiTTransformer2DModel, "compile_repeated_blocks", trace)
    plain = generate(pipeline, tmp_path / "plain", "--guidance_scale", 1, labels=[1], seeds=[0])[0]
    assert not calls
    compiled = generate(pipeline, tmp_path / "compiled", "--compile", "--guidance_scale", 1, labels=[1], seeds=[0])[0]
    assert calls == [{"fullgraph": True}]
    np.testing.assert_array_equal(pixels(compiled), pixels(plain))


def test_cuda_graphs_trace_one_static_graph_per_batch_size(make_pipeline, monkeypatch):
    # The guided batch is twice the unguided one.
    torch._dynamo.reset()
    graphs, compile_whole = [], JiTTransformer2DModel.compile

    def trace(self, mode, **settings):
        assert mode == "reduce-overhead"
        compile_whole(self, backend=lambda graph, _: graphs.append(graph) or graph, **settings)

    def sample() -> np.ndarray:
        return pipeline([1, 2], generator=seeded([0, 1]), num_inference_steps=4, output_type="np").images

    monkeypatch.setattr(JiTTransformer2DModel, "compile", trace)
    shallow = {"num_layers": 2, "in_context_start": 1}
    pipeline = make_pipeline(shallow, guidance_scale=2.0, guidance_interval=(0.3, 1.0))
    plain = sample()
    compile_transformer(pipeline.transformer, cuda_graphs=True)
    np.testing.assert_array_equal(sample(), plain)
    np.testing.assert_array_equal(sample(), plain)
    assert len(graphs) == 2
