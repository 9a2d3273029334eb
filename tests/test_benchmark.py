"""The benchmarks: their counts are right, and the published arithmetic is the same function."""

import json
import math

import pytest
import torch
from training_runs import load_script

from pixelrepa_diffusers.cli import parse


published = load_script("benchmarks/published.py")
sampling = load_script("benchmarks/sampling.py")
training = load_script("benchmarks/training.py")
gpu_report = load_script("benchmarks/gpu_report.py")
CPU = torch.device("cpu")


def report(benchmark, tmp_path, *options) -> dict:
    argv = ["--output_dir", tmp_path, "--num_rounds", 1, *options]
    return benchmark.main(parse(benchmark.BenchmarkArguments, "", [str(word) for word in argv]))


def test_the_published_arithmetic_is_the_same_function_of_the_same_weights(make_transformer):
    transformer = make_transformer()
    twin = published.with_published_arithmetic(transformer)
    inputs = torch.randn(2, 3, 16, 16), torch.tensor([0.2, 0.8]), torch.tensor([1, 5])
    torch.testing.assert_close(twin(*inputs).sample, transformer(*inputs).sample, rtol=1e-5, atol=1e-5)
    assert all(own is other for own, other in zip(twin.parameters(), transformer.parameters(), strict=True))
    assert {type(processor).__name__ for processor in transformer.attn_processors.values()} == {"JiTAttnProcessor"}


def test_functions_take_turns_and_ratios_compare_the_same_turn():
    calls = []
    seconds = published.time_interleaved({n: lambda n=n: calls.append(n) for n in "ab"}, CPU, repeats=2, warmup=1)
    assert "".join(calls) == "ababab"
    assert [len(values) for values in seconds.values()] == [2, 2]
    assert published.median_ratio([1.0, 20.0, 3.0], [2.0, 40.0, 6.0]) == 0.5


DIGITS = ("--presets", "JiT-Digits/4", "--num_classes", 10, "--memory", "no", "--batch_sizes", 2, "--teacher", "none")


def test_training_rows_split_the_step_and_compare_the_arithmetics(tmp_path):
    rows = report(training, tmp_path, *DIGITS, "--objectives", "pixelrepa", "none")["steps"]
    assert [(row["objective"], row["arithmetic"]) for row in rows] == [
        ("pixelrepa", "ours"), ("pixelrepa", "published"), ("none", "ours"), ("none", "published"),
    ]  # fmt: skip
    for row in rows:
        assert 0 < sum(row[part] for part in training.PARTS) <= row["step s"]
        assert row["images/s"] == pytest.approx(2 / row["step s"])
        assert row["MFU"] == pytest.approx(row["step_tflop"] / row["step s"] / row["peak_tflops"])
        assert row["loss_difference"] < 1e-5 and row["gradient_difference"] < 1e-4
        assert (row["ratio"] is None) == (row["arithmetic"] == "published")
    assert rows[0]["step_tflop"] > rows[2]["step_tflop"]  # the adapter's work
    assert json.loads((tmp_path / "benchmark.json").read_text())["steps"] == rows


def test_measuring_leaves_the_weights_and_fuses_only_our_optimizer():
    args = training.BenchmarkArguments(teacher="none")
    bench = training.Bench(args, training.Setting("JiT-Digits/4", "pixelrepa", 2, 10, "no", "no", "native"))
    before = [parameter.clone() for parameter in bench.objective.parameters()]
    for arithmetic in ("ours", "published"):
        trainee = training.Trainee(bench, arithmetic)
        trainee.step()
        assert all(group["fused"] is (arithmetic == "ours" or None) for group in trainee.optimizer.param_groups)
    assert all(map(torch.equal, before, bench.objective.parameters()))


def test_a_setting_that_cannot_run_gets_its_reason(tmp_path, capsys):
    rows = report(training, tmp_path, *DIGITS, "--attention_backends", "no_such_backend")["steps"]
    assert len(rows) == 2 and all("no_such_backend" in row["reason"] for row in rows)
    assert "not measured: " in capsys.readouterr().out


def test_reading_is_timed_by_folder_and_by_size(tmp_path, image_folder):
    options = ("--presets", "no", "--train_data_dirs", image_folder, "--data_sizes", 3, 6)
    result = report(training, tmp_path, *options)
    assert result["steps"] == []
    assert [row["images"] for row in result["data"]] == [24, 3, 6]
    assert all(row["images/s per core"] > 0 for row in result["data"])


def test_sampling_both_ways_gives_the_same_images_with_fewer_passes(tmp_path):
    options = ("--preset", "JiT-Digits/4", "--num_inference_steps", 10, "--batch_size", 2)
    ours, reference = report(sampling, tmp_path, *options)["speed"]
    # Heun evaluates at t = 0, 0.1, 0.1 outside the interval (0.1, 1); the other 16 of 19 evaluations are guided.
    assert (ours["NFE"], ours["passes per image"], reference["passes per image"]) == (19, 35, 38)
    assert ours["rmse to published"] < 1e-4
    assert ours["ratio"] > 0 and reference["ratio"] == 1


def test_solvers_and_caches_are_compared_with_the_exact_images(tmp_path, make_pipeline):
    make_pipeline(guidance_scale=2.0).save_pretrained(tmp_path / "pipeline")
    result = report(
        sampling, tmp_path, "--pipeline", tmp_path / "pipeline", "--num_inference_steps", 8, "--batch_size", 2,
        "--solvers", "heun", "euler", "dpmpp_2m", "--evaluations", 5, 9, "--reference_steps", 5, 40, "--caches",
    )  # fmt: skip
    by_solver = {(row["solver"], row["NFE"]): row for row in result["solvers"]}
    assert set(by_solver) == {(solver, nfe) for solver in ("heun", "euler", "dpmpp_2m") for nfe in (5, 9)}
    assert by_solver["heun", 9]["rmse to 5-step Heun"] == 0
    assert by_solver["euler", 9]["rmse to 40-step Heun"] < by_solver["euler", 5]["rmse to 40-step Heun"]
    assert [row["cache"] for row in result["caches"]] == list(sampling.CACHES)
    assert all(row["ratio"] > 0 and math.isfinite(row["rmse"]) for row in result["caches"])
    assert json.loads((tmp_path / "benchmark.json").read_text())["solvers"] == result["solvers"]


@pytest.mark.parametrize(
    "options, message",
    [
        ((), "exactly one of --pipeline and --preset"),
        (("--preset", "JiT-Digits/4", "--caches"), "mean nothing for random weights"),
    ],
)
def test_sampling_settings_without_meaning_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        report(sampling, tmp_path, *options)


def test_the_report_keeps_measured_cells_and_measures_the_others(tmp_path, capsys):
    def measure(*options) -> dict:
        argv = ["--output_dir", str(tmp_path), "--stages", *options]
        return gpu_report.main(parse(gpu_report.ReportArguments, "", argv))

    (draws,) = measure("host", "--cells", "draws")["stages"]["host"].values()
    result = measure("host", "training", "sampling", "--cells", "draws|checkpointed|eager$", "--minutes", "1")
    assert result["stages"]["host"]["draws of 128 images"] == draws
    steps = result["stages"]["training"]["JiT-Digits/4, batch 4, no teacher, checkpointed"]["rows"]
    assert [row["gradient_checkpointing"] for row in steps] == ["yes", "yes"]
    assert all(row["images/s"] > 0 for row in steps) and draws["rows"][0]["host ms"] > 0
    assert (tmp_path / "training.png").exists() and (tmp_path / "sampling.png").exists()
    assert "| draws of 128 images |" in capsys.readouterr().out


def test_performance_page_shows_its_report():
    report = json.loads((gpu_report.DOCS / "report.json").read_text())
    assert gpu_report.BEGIN + gpu_report.render(report) + gpu_report.END in gpu_report.PAGE.read_text()
