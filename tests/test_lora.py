"""Training of LoRA layers: what is trained, saved, resumed and loaded into a pipeline."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from pixelrepa_diffusers import PixelREPAPipeline
from pixelrepa_diffusers.training.arguments import TrainingArguments


def sample(pipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline([1], generator=generator, num_inference_steps=2, output_type="latent").images


@pytest.fixture(scope="module")
def settings(finished_run) -> dict:
    return {
        "pretrained_model_name_or_path": finished_run / "pipeline", "lora_rank": 2, "learning_rate": 0.3,
        "lr_warmup_steps": 0, "max_train_steps": 4, "checkpointing_steps": 2, "ema_decays": [0.5], "validation_steps": 0,
    }  # fmt: skip


@pytest.fixture(scope="module")
def tuned(train, settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "run"
    train(folder, **settings)
    return folder


def test_lora_weights_on_the_pretrained_pipeline_are_the_exported_pipeline(tuned, finished_run):
    exported = PixelREPAPipeline.from_pretrained(tuned / "pipeline")
    pipeline = PixelREPAPipeline.from_pretrained(finished_run / "pipeline")
    plain = sample(pipeline)
    pipeline.load_lora_weights(tuned / "pipeline" / "lora", adapter_name="photos")
    torch.testing.assert_close(sample(pipeline), sample(exported), rtol=0, atol=1e-5)
    pipeline.set_adapters("photos", 0.0)
    assert torch.equal(sample(pipeline), plain)
    assert (sample(exported) - plain).abs().max() > 1e-3


def test_only_the_attention_changes(tuned, finished_run):
    before, after = (
        load_file(folder / "pipeline/transformer/diffusion_pytorch_model.safetensors")
        for folder in (finished_run, tuned)
    )
    changed = {name.rpartition(".attn.")[2] for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert changed == {"to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight"}


def test_checkpoints_can_be_sampled_and_resumed_bit_exactly(train, settings, tuned, tmp_path):
    shutil.copytree(tuned / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    train(tmp_path / "run", **settings, resume_from_checkpoint="latest")
    for name in ("lora", "lora_ema_0.5", "transformer", "transformer_ema_0.5", "adapter"):
        straight, resumed = (
            load_file(next((run / "checkpoint-4" / name).glob("*.safetensors"))) for run in (tuned, tmp_path / "run")
        )
        assert all(torch.equal(straight[key], resumed[key]) for key in straight), name
    with pytest.raises(ValueError, match="--lora_rank 2 → None"):
        train(
            tmp_path / "run", **{**settings, "lora_rank": None, "max_train_steps": 6}, resume_from_checkpoint="latest"
        )


def test_lora_needs_a_pipeline_with_the_classes_of_the_data(train, settings, image_folder, tmp_path):
    with pytest.raises(ValueError, match="--lora_rank needs --pretrained_model_name_or_path"):
        TrainingArguments(lora_rank=2)
    shutil.copytree(next(image_folder.iterdir()), tmp_path / "data" / "one")
    with pytest.raises(ValueError, match="--lora_rank keeps the 3 classes"):
        train(tmp_path / "run", tmp_path / "data", **settings)
