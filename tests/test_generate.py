"""pipelines/generate.py: images that depend on class, seed and settings alone, and say how to make them again."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training_runs import launch_two
from transformers import HfArgumentParser

from pixelrepa_diffusers import JiTFlowMatchScheduler, JiTTransformer2DModel, PixelREPAPipeline
from pixelrepa_diffusers.commands.generate import GenerateArguments, main, parse_seeds
from pixelrepa_diffusers.sampling import SCHEDULERS, compile_transformer, seeded


SCRIPT = Path(__file__).parents[1] / "pipelines" / "generate.py"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A saved pipeline with ten named classes, every weight random: a fresh adaLN-zero model ignores its labels."""
    torch.manual_seed(0)
    transformer = JiTTransformer2DModel(
        sample_size=16, patch_size=4, num_layers=2, num_attention_heads=2, attention_head_dim=8, bottleneck_dim=8,
        in_context_len=2, in_context_start=1, num_classes=10,
    )  # fmt: skip
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("pipeline")
    names = {index: f"digit {index}, d{index}" for index in range(10)}
    PixelREPAPipeline(transformer, JiTFlowMatchScheduler(), names, guidance_scale=2.0).save_pretrained(folder)
    return str(folder)


def arguments(*options) -> GenerateArguments:
    return HfArgumentParser(GenerateArguments).parse_args_into_dataclasses([str(option) for option in options])[0]


def generate(pipeline, output_dir, *options, labels=(1, "d3", 7), seeds=("0-2", 9)):
    return main(
        arguments(
            "--pipeline", pipeline, "--output_dir", output_dir, "--num_inference_steps", 3,
            "--class_labels", *labels, "--seeds", *seeds, *options,
        )
    )  # fmt: skip


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).glob("*.png")}


def test_one_image_for_every_class_and_seed_and_a_grid(pipeline, tmp_path):
    paths = generate(pipeline, tmp_path / "out")
    expected = [f"{label:04d}_{seed:06d}.png" for label in (1, 3, 7) for seed in (0, 1, 2, 9)]
    assert [path.name for path in paths] == expected
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*expected, "grid.png", "arguments.json", ".lock"}
    assert all(pixels(path).shape == (16, 16, 3) for path in paths)
    assert len({pixels(path).tobytes() for path in paths}) == len(paths)
    grid = pixels(tmp_path / "out" / "grid.png")
    assert grid.shape[0] > 3 * 16 and grid.shape[1] > 4 * 16  # a row per class, a column per seed


def test_images_are_the_pipelines_own(pipeline, tmp_path):
    def drawn(**settings) -> np.ndarray:
        generator = torch.Generator().manual_seed(5)
        return np.asarray(pipe("d3", generator=generator, num_inference_steps=3, **settings).images[0])

    pipe = PixelREPAPipeline.from_pretrained(pipeline)
    path = generate(pipeline, tmp_path / "defaults", labels=["digit 3"], seeds=[5])[0]
    np.testing.assert_array_equal(pixels(path), drawn())

    options = ("--scheduler", "euler", "--guidance_scale", 4.0, "--guidance_interval", 0.0, 0.6)
    path = generate(pipeline, tmp_path / "options", *options, labels=["digit 3"], seeds=[5])[0]
    pipe.scheduler = SCHEDULERS["euler"]()
    wanted = drawn(guidance_scale=4.0, guidance_interval=(0.0, 0.6))
    np.testing.assert_array_equal(pixels(path), wanted)
    for other in ({"guidance_scale": 4.0}, {"guidance_interval": (0.0, 0.6)}):
        assert not np.array_equal(drawn(**other), wanted)


def test_files_are_equal_byte_for_byte_whatever_the_batch_size(pipeline, tmp_path):
    generate(pipeline, tmp_path / "one", "--batch_size", 1)
    generate(pipeline, tmp_path / "four", "--batch_size", 4)
    generate(pipeline, tmp_path / "five", "--batch_size", 5)
    assert files(tmp_path / "one") == files(tmp_path / "four") == files(tmp_path / "five")


def test_two_processes_write_the_files_of_one(pipeline, tmp_path):
    generate(pipeline, tmp_path / "one", "--batch_size", 3)
    words = ["--pipeline", pipeline, "--output_dir", str(tmp_path / "two"), "--num_inference_steps", "3"]
    words += ["--class_labels", "1", "d3", "7", "--seeds", "0-2", "9", "--batch_size", "3"]
    launch_two(SCRIPT, words, tmp_path / "two" / "arguments.json")
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_an_image_says_how_to_make_it_again(pipeline, tmp_path):
    options = ("--scheduler", "euler", "--guidance_scale", 1.5, "--guidance_interval", 0.2, 0.9)
    path = generate(pipeline, tmp_path / "first", *options)[6]
    with Image.open(path) as image:
        text = image.text
    assert (text["class_id"], text["class_name"], text["seed"]) == ("3", "digit 3, d3", "2")
    assert (text["guidance_scale"], text["guidance_interval"], text["num_inference_steps"]) == (
        "1.5",
        "[0.2, 0.9]",
        "3",
    )
    assert json.loads(text["scheduler"])["solver"] == "euler"
    assert text["pipeline"] == pipeline

    command = shlex.split(text["command"])
    assert command[:2] == ["python", "pipelines/generate.py"]
    again = main(arguments(*command[2:-2], "--output_dir", tmp_path / "again"))
    assert [file.read_bytes() for file in again] == [path.read_bytes()]


def test_the_record_holds_what_the_defaults_resolved_to(pipeline, tmp_path):
    generate(pipeline, tmp_path, labels=["d3"], seeds=["4-5"])
    record = json.loads((tmp_path / "arguments.json").read_text())
    assert record["class_labels"] == {"3": "digit 3, d3"} and record["seeds"] == [4, 5]
    assert record["guidance_scale"] == 2.0 and record["guidance_interval"] == [0.1, 1.0]
    assert record["scheduler"]["_class_name"] == "JiTFlowMatchScheduler"
    assert record["versions"]["torch"] == torch.__version__ and record["device"] == "cpu"


def test_every_scheduler_draws_nearly_the_image_of_many_heun_steps(pipeline, tmp_path):
    options = ("--num_inference_steps", 50, "--guidance_scale", 1)
    reference = generate(pipeline, tmp_path / "reference", *options, labels=[4], seeds=[0])[0]
    for scheduler in SCHEDULERS:
        made = generate(pipeline, tmp_path / scheduler, *options, "--scheduler", scheduler, labels=[4], seeds=[0])[0]
        assert np.abs(pixels(made).astype(int) - pixels(reference)).mean() < 4, scheduler
        record = json.loads((tmp_path / scheduler / "arguments.json").read_text())
        assert record["scheduler"]["_class_name"] == type(SCHEDULERS[scheduler]()).__name__


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_network_in_half_precision_draws_nearly_the_same_image(pipeline, tmp_path, dtype):
    reference = generate(pipeline, tmp_path / "float32", labels=[4], seeds=[0])[0]
    made = generate(pipeline, tmp_path / dtype, "--dtype", dtype, labels=[4], seeds=[0])[0]
    difference = np.abs(pixels(made).astype(int) - pixels(reference)).mean()
    assert 0 < difference < 6


def test_seeds_are_numbers_lists_and_ranges():
    assert parse_seeds(["0-2", "9", "4,6-7"]) == [0, 1, 2, 9, 4, 6, 7]


@pytest.mark.parametrize("seeds", [["3-1"], ["x"], ["-1"], ["1.5"], ["0-2", "1"], [str(2**63)]])
def test_seeds_that_make_no_sense_are_refused(seeds):
    with pytest.raises(ValueError, match="--seeds"):
        parse_seeds(seeds)


@pytest.mark.parametrize(
    "options, message",
    [
        (("--class_labels", "dg3"), "nearest names"),
        (("--class_labels", "10"), "out of range"),
        (("--class_labels", "3", "d3"), "more than once"),
        (("--num_inference_steps", "0"), "num_inference_steps"),
        (("--batch_size", "0"), "batch_size"),
        (("--max_grid_images", "-1"), "max_grid_images"),
        (("--guidance_scale", "nan"), "guidance_scale"),
        (("--guidance_interval", "0.9", "0.1"), "guidance_interval"),
        (("--guidance_interval", "0.9"), "guidance_interval"),
    ],
)
def test_bad_arguments_are_refused_before_the_weights_are_read(pipeline, tmp_path, options, message):
    config_only = tmp_path / "config-only"
    for name in ("model_index.json", "transformer/config.json"):
        (config_only / name).parent.mkdir(parents=True, exist_ok=True)
        (config_only / name).write_bytes((Path(pipeline) / name).read_bytes())
    with pytest.raises(ValueError, match=message):
        generate(str(config_only), tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_existing_files_are_kept_unless_told_otherwise(pipeline, tmp_path):
    path = generate(pipeline, tmp_path, labels=[1], seeds=[0])[0]
    path.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="--overwrite"):
        generate(pipeline, tmp_path, labels=[2, 1], seeds=[0])
    assert path.read_bytes() == b"mine"
    assert not (tmp_path / "0002_000000.png").exists()
    generate(pipeline, tmp_path, "--overwrite", labels=[2, 1], seeds=[0])
    assert pixels(path).shape == (16, 16, 3)


def test_too_many_images_for_a_grid_make_none_and_say_so(pipeline, tmp_path, capsys):
    generate(pipeline, tmp_path, "--max_grid_images", 3, labels=[1], seeds=["0-3"])
    assert not (tmp_path / "grid.png").exists()
    assert "No grid.png" in capsys.readouterr().out


def test_compiled_blocks_draw_the_same_image(pipeline, tmp_path, monkeypatch):
    # Traced in full; generating machine code would take a minute on a CPU and is the model's matter.
    calls = []
    compile_blocks = JiTTransformer2DModel.compile_repeated_blocks
    monkeypatch.setattr(
        JiTTransformer2DModel,
        "compile_repeated_blocks",
        lambda self, **kwargs: (calls.append(kwargs), compile_blocks(self, **kwargs, backend="eager")),
    )
    plain = generate(pipeline, tmp_path / "plain", "--guidance_scale", 1, labels=[1], seeds=[0])[0]
    assert not calls
    compiled = generate(pipeline, tmp_path / "compiled", "--compile", "--guidance_scale", 1, labels=[1], seeds=[0])[0]
    assert calls == [{"fullgraph": True}]
    np.testing.assert_array_equal(pixels(compiled), pixels(plain))


def test_the_whole_network_compiled_draws_the_same_image_in_one_graph_for_each_batch_size(make_pipeline, monkeypatch):
    """What CUDA graphs replay; recording them takes a GPU."""
    torch._dynamo.reset()
    graphs, compile_whole = [], JiTTransformer2DModel.compile

    def trace(self, mode, **settings):
        assert mode == "reduce-overhead"
        compile_whole(self, backend=lambda graph, _: graphs.append(graph) or graph, **settings)

    monkeypatch.setattr(JiTTransformer2DModel, "compile", trace)
    pipeline = make_pipeline(guidance_scale=2.0, guidance_interval=(0.3, 1.0))
    plain = pipeline([1, 2], generator=seeded([0, 1]), num_inference_steps=4, output_type="np").images
    compile_transformer(pipeline.transformer, cuda_graphs=True)
    images = [
        pipeline([1, 2], generator=seeded([0, 1]), num_inference_steps=4, output_type="np").images for _ in range(2)
    ]
    assert len(graphs) == 2  # outside the guidance interval, and inside
    pipeline([1, 2, 3], generator=seeded([0, 1, 2]), num_inference_steps=4)
    assert len(graphs) == 4  # none is for any size: such a graph could not be recorded
    for again in images:
        np.testing.assert_array_equal(again, plain)


def test_cuda_graphs_without_a_gpu_are_refused_before_anything_is_written(pipeline, tmp_path):
    with pytest.raises(ValueError, match="--cuda_graphs needs a GPU, this run is on cpu"):
        generate(pipeline, tmp_path / "images", "--cuda_graphs", labels=[1], seeds=[0])
    assert not (tmp_path / "images").exists()
