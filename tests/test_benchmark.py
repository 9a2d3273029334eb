"""The benchmarks: what they count is right, and the published arithmetic is the same function, slower."""

import json
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from training_runs import load_script
from transformers import HfArgumentParser

from pixelrepa_diffusers import JiTFlowMatchScheduler, JiTTransformer2DModel, PixelREPAPipeline
from pixelrepa_diffusers.adapter import MaskedTransformerAdapter


published = load_script("benchmarks/published.py")
StepClock = published.StepClock
adapter_flops = published.adapter_flops
format_table = published.format_table
median_ratio = published.median_ratio
time_interleaved = published.time_interleaved
transformer_flops = published.transformer_flops
with_published_arithmetic = published.with_published_arithmetic
sampling_benchmark = load_script("benchmarks/sampling.py")


CPU = torch.device("cpu")


@pytest.fixture
def transformer():
    """Every weight random: a fresh adaLN-zero model is a function of almost nothing."""
    torch.manual_seed(0)
    model = JiTTransformer2DModel(
        sample_size=16, patch_size=4, num_layers=3, num_attention_heads=2, attention_head_dim=8, bottleneck_dim=6,
        in_context_len=2, in_context_start=1, num_classes=5,
    )  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def counted(module, *inputs) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*inputs)
    return counter.get_total_flops()


def test_the_formulas_count_what_torch_counts(transformer):
    # The twin, because torch does not count the CPU's fused attention.
    inputs = torch.randn(1, 3, 16, 16), torch.tensor([0.5]), torch.tensor([1])
    assert transformer_flops(transformer) == counted(with_published_arithmetic(transformer), *inputs)
    for teacher_dim in (16, 24):  # without and with a projection
        adapter = MaskedTransformerAdapter(16, 2, teacher_dim, grid_size=4, in_context_len=2, num_classes=5)
        inputs = torch.randn(1, 16, 16), torch.tensor([0.5]), torch.tensor([1])
        assert adapter_flops(adapter) == counted(with_published_arithmetic(adapter), *inputs)


def test_the_published_arithmetic_is_the_same_function_of_the_same_weights(transformer):
    twin = with_published_arithmetic(transformer)
    inputs = torch.randn(2, 3, 16, 16), torch.tensor([0.2, 0.8]), torch.tensor([1, 5])
    torch.testing.assert_close(twin(*inputs).sample, transformer(*inputs).sample, rtol=1e-5, atol=1e-5)
    assert all(mine is theirs for mine, theirs in zip(twin.parameters(), transformer.parameters(), strict=True))
    assert {type(p).__name__ for p in twin.attn_processors.values()} == {"PublishedAttnProcessor"}
    assert {type(p).__name__ for p in transformer.attn_processors.values()} == {"JiTAttnProcessor"}


def test_functions_take_turns_and_ratios_are_of_the_same_turn():
    calls = []
    seconds = time_interleaved({n: lambda n=n: calls.append(n) for n in "ab"}, CPU, repeats=2, warmup=1)
    assert "".join(calls) == "ababab"
    assert [len(values) for values in seconds.values()] == [2, 2]
    assert median_ratio([1.0, 20.0, 3.0], [2.0, 40.0, 6.0]) == 0.5


def test_a_clock_knows_each_part_of_a_step():
    clock = StepClock(CPU)
    for _ in range(3):
        clock.mark(None)
        clock.mark("forward")
        clock.mark("backward")
    assert list(clock.medians()) == ["forward", "backward"]
    assert all(seconds >= 0 for seconds in clock.medians().values())


def test_a_table_says_what_was_not_measured():
    table = format_table([{"name": "a", "GiB": 1.23456}, {"name": "longer", "GiB": None}])
    assert table.splitlines() == ["name    GiB", "a       1.235", "longer  not measured"]


# ------------------------------------------------------------------------------------------------------------- training


def training_report(tmp_path, *options) -> dict:
    from benchmark import BenchmarkArguments, main

    argv = ["--presets", "JiT-Digits/4", "--num_classes", "10", "--num_rounds", "1", "--memory", "no",
            "--output_dir", tmp_path, *options]  # fmt: skip
    return main(HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses([str(word) for word in argv])[0])


def test_training_rows_split_the_step_and_compare_the_arithmetics(tmp_path, capsys):
    report = training_report(tmp_path, "--batch_sizes", 2, "--teacher", "none", "--objectives", "pixelrepa", "none")
    rows = report["steps"]
    assert [(row["objective"], row["arithmetic"]) for row in rows] == [
        ("pixelrepa", "ours"), ("pixelrepa", "published"), ("none", "ours"), ("none", "published"),
    ]  # fmt: skip
    for row in rows:
        parts = sum(row[part] for part in ("forward", "backward", "optimizer", "ema"))
        assert 0 < parts <= row["step s"]
        assert row["images/s"] == pytest.approx(2 / row["step s"])
        assert row["MFU"] == pytest.approx(row["step_tflop"] / row["step s"] / row["peak_tflops"])
        assert row["loss_difference"] < 1e-5 and row["gradient_difference"] < 1e-4
        assert (row["ratio"] is None) == (row["arithmetic"] == "published")
    assert rows[0]["step_tflop"] > rows[2]["step_tflop"]  # the adapter's work
    assert json.loads((tmp_path / "benchmark.json").read_text())["steps"] == rows
    assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    assert "of the published arithmetic's time" in capsys.readouterr().out


def test_only_our_optimizer_is_fused_and_measuring_leaves_the_weights(tmp_path):
    from benchmark import Bench, BenchmarkArguments, Setting, Trainee

    args = BenchmarkArguments(device="cpu", teacher="none")
    bench = Bench(args, Setting("JiT-Digits/4", "pixelrepa", 2, 10, "no", "no", "default", "no"))
    before = [parameter.clone() for parameter in bench.objective.parameters()]
    for arithmetic in ("ours", "published"):
        trainee = Trainee(bench, arithmetic)
        trainee.step()
        assert all(state["step"] == 1 for state in trainee.optimizer.state.values())
        assert all(group["fused"] is (arithmetic == "ours" or None) for group in trainee.optimizer.param_groups)
    assert all(map(torch.equal, before, bench.objective.parameters()))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the claim is about a machine without a GPU")
def test_a_device_that_is_not_there_is_said_in_the_table(tmp_path, capsys):
    report = training_report(tmp_path, "--batch_sizes", 2, "--teacher", "none", "--device", "cuda")
    assert all(row["reason"] for row in report["steps"])
    assert "not measured" in capsys.readouterr().out
    assert not (tmp_path / "benchmark.png").exists()


def test_reading_is_timed_by_data_set_size(tmp_path):
    report = training_report(tmp_path, "--presets", "no", "--data_sizes", 3, 6)
    assert report["steps"] == []
    assert [row["images"] for row in report["data"]] == [3, 6]
    assert all(row["images/s per core"] > 0 for row in report["data"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"presets": ["JiT-X/16"]}, "--presets may be JiT-B/16"),
        ({"arithmetic": ["fast"]}, "--arithmetic may be ours, published"),
        ({"batch_sizes": [0]}, "--batch_sizes must be at least 1"),
        ({"num_rounds": 0}, "must be at least 1"),
    ],
)
def test_training_settings_that_cannot_be_measured_are_refused(given, message):
    from benchmark import BenchmarkArguments

    with pytest.raises(ValueError, match=message):
        BenchmarkArguments(**given)


# ------------------------------------------------------------------------------------------------------------- sampling


def sampling_report(tmp_path, *options) -> dict:
    argv = ["--output_dir", tmp_path, "--num_rounds", 1, "--batch_size", 2, *options]
    parser = HfArgumentParser(sampling_benchmark.BenchmarkArguments)
    return sampling_benchmark.main(parser.parse_args_into_dataclasses([str(word) for word in argv])[0])


def test_sampling_both_ways_gives_the_same_images_with_fewer_passes(tmp_path):
    report = sampling_report(tmp_path, "--preset", "JiT-Digits/4", "--num_inference_steps", 10)
    ours, published = report["speed"]
    # Heun's evaluations at t = 0, 0.1, 0.1 are outside (0.1, 1); the other 16 of 19 are guided.
    assert (ours["evaluations"], ours["passes per image"], published["passes per image"]) == (19, 35, 38)
    assert ours["rmse to published"] < 1e-4
    assert ours["ratio"] > 0 and published["ratio"] == 1


def test_solvers_and_caches_are_measured_against_the_exact_images(tmp_path, transformer):
    folder = tmp_path / "pipeline"
    PixelREPAPipeline(transformer, JiTFlowMatchScheduler(), guidance_scale=2.0).save_pretrained(folder)
    report = sampling_report(
        tmp_path, "--pipeline", folder, "--num_inference_steps", 8, "--solvers", "heun", "euler", "unipc", "dpmpp_2m",
        "--evaluations", 5, 9, "--reference_steps", 5, 40, "--caches",
    )  # fmt: skip
    by_solver = {(row["solver"], row["evaluations"]): row for row in report["solvers"]}
    assert set(by_solver) == {(s, n) for s in ("heun", "euler", "unipc", "dpmpp_2m") for n in (5, 9)}
    assert by_solver["heun", 9]["rmse to 5-step Heun"] == 0  # it is that solution
    assert by_solver["euler", 9]["rmse to 40-step Heun"] < by_solver["euler", 5]["rmse to 40-step Heun"]
    assert [row["cache"] for row in report["caches"]] == list(sampling_benchmark.CACHES)
    assert all(row["ratio"] > 0 and math.isfinite(row["rmse"]) for row in report["caches"])
    assert json.loads((tmp_path / "benchmark.json").read_text())["solvers"] == report["solvers"]
    assert (tmp_path / "benchmark.png").exists()


def test_sampling_settings_that_cannot_be_measured_are_refused():
    arguments = sampling_benchmark.BenchmarkArguments
    for given, message in (
        ({}, "exactly one of --pipeline and --preset"),
        ({"preset": "JiT-B/16", "caches": True}, "random weights do not have"),
        ({"pipeline": "folder", "solvers": ["rk4"]}, "--solvers may be heun"),
        ({"preset": "JiT-B/16", "batch_size": 0}, "--batch_size must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            arguments(**given)
