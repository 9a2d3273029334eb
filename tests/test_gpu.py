"""On a GPU: every precision, compilation, CUDA graphs, streams, offloading, resume and several processes change nothing."""

import subprocess
import sys

import pytest
import torch
from training_runs import ROOT, TRAINER, arguments, weights

from pixelrepa_diffusers.sampling import cast_transformer, compile_transformer
from pixelrepa_diffusers.training.draws import BatchDraws


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
DEVICE = "cuda"


def close_weights(one, other, rtol=1e-3, atol=1e-4):
    """Of two checkpoints; kernels of a GPU add in an order that varies."""
    torch.testing.assert_close(weights(one), weights(other), rtol=rtol, atol=atol)


def sample(pipeline) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    return pipeline([1, 3], generator=generators, num_inference_steps=4, output_type="latent").images.float().cpu()


@pytest.mark.parametrize("dtype, bound", [(torch.float16, 5e-3), (torch.bfloat16, 5e-2)])
@torch.no_grad()
def test_half_precision_predicts_nearly_the_float32_image(make_transformer, dtype, bound):
    transformer = make_transformer().to(DEVICE)
    inputs = torch.randn(4, 3, 16, 16).to(DEVICE), torch.rand(4).to(DEVICE), torch.arange(4).to(DEVICE)
    exact = transformer(*inputs).sample
    with torch.autocast(DEVICE, dtype):
        autocast = transformer(*inputs).sample
    cast_transformer(transformer, dtype)
    for image in (autocast, transformer(*inputs).sample):
        assert (image.float() - exact).norm() < bound * exact.norm()


def test_draws_are_those_of_a_cpu():
    draw, index = BatchDraws(0, 10, 16, -0.8, 0.8, 0.5, 0.5), torch.arange(64)
    cpu = draw(3, index, index % 10, torch.Size((3, 16, 16)))
    gpu = draw(3, index.to(DEVICE), (index % 10).to(DEVICE), torch.Size((3, 16, 16)))
    torch.testing.assert_close({name: value.cpu() for name, value in gpu.items()}, cpu)


@pytest.mark.parametrize("mixed_precision", ["bf16", "fp16"])
def test_mixed_precision_trains_nearly_the_same_weights(train, tmp_path, mixed_precision):
    for name in ("no", mixed_precision):
        train(tmp_path / name, max_train_steps=3, learning_rate=1e-4, mixed_precision=name)
    saved = [weights(tmp_path / run / "checkpoint-3") for run in ("no", mixed_precision)]
    plain, half = ({key: value for key, value in run.items() if key.startswith("transformer.")} for run in saved)
    torch.testing.assert_close(half, plain, rtol=0, atol=1e-3)  # at most three steps of Adam apart


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_compiled_training_and_cuda_graphs_give_the_same_weights(train, tmp_path, cuda_graphs):
    train(tmp_path / "plain", lr_warmup_steps=0)
    train(tmp_path / "compiled", lr_warmup_steps=0, compile=True, cuda_graphs=cuda_graphs)
    torch._dynamo.reset()
    close_weights(tmp_path / "plain/checkpoint-6", tmp_path / "compiled/checkpoint-6")


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_compiled_sampling_and_cuda_graphs_give_the_same_images(make_pipeline, cuda_graphs):
    pipeline = make_pipeline(guidance_scale=2.0).to(DEVICE)
    eager = sample(pipeline)
    compile_transformer(pipeline.transformer, cuda_graphs)
    for _ in range(3):  # recorded, then replayed
        torch.testing.assert_close(sample(pipeline), eager, rtol=1e-3, atol=1e-3)
    torch._dynamo.reset()


def test_offloading_gives_the_same_images(make_pipeline):
    expected = sample(make_pipeline(guidance_scale=2.0).to(DEVICE))
    for offload in ("enable_model_cpu_offload", "enable_sequential_cpu_offload"):
        pipeline = make_pipeline(guidance_scale=2.0)
        getattr(pipeline, offload)()
        torch.testing.assert_close(sample(pipeline), expected, rtol=1e-3, atol=1e-3)


def test_a_resumed_run_ends_like_an_uninterrupted_one(train, tmp_path):
    train(tmp_path / "straight")
    train(tmp_path / "resumed", max_train_steps=3)
    train(tmp_path / "resumed", resume_from_checkpoint="latest")
    close_weights(tmp_path / "straight/checkpoint-6", tmp_path / "resumed/checkpoint-6")


def test_a_filled_teacher_cache_trains_the_same_weights(train, tmp_path):
    for name in ("filling", "filled"):
        train(tmp_path / name, teacher_cache_dir=tmp_path / "cache", dataloader_num_workers=2)
    close_weights(tmp_path / "filling/checkpoint-6", tmp_path / "filled/checkpoint-6")


def launch(output_dir, data, monkeypatch, *launcher, **overrides):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    command = [sys.executable, *launcher, TRAINER, *arguments(data, output_dir, **overrides)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)


def test_streams_do_not_race(image_folder, tmp_path, monkeypatch):
    launch(tmp_path / "free", image_folder, monkeypatch)
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    launch(tmp_path / "blocking", image_folder, monkeypatch)
    close_weights(tmp_path / "free/checkpoint-6", tmp_path / "blocking/checkpoint-6")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_like_one(image_folder, tmp_path, monkeypatch):
    two = ("-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0")
    launch(tmp_path / "one", image_folder, monkeypatch, train_batch_size=8)
    launch(tmp_path / "two", image_folder, monkeypatch, *two, train_batch_size=4)
    close_weights(tmp_path / "one/checkpoint-6", tmp_path / "two/checkpoint-6")
