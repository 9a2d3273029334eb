"""Self-guidance by a head and autoguidance by a second transformer: formulas, costs, saving, and settings that are refused."""

import copy

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from tiny import TEACHER_IMAGE_SIZE, encoder, files, random_images, reference_of
from torch.utils.flop_counter import FlopCounterMode
from training_runs import TEACHER

from pixelrepa_diffusers import JiTFlowMatchScheduler, JiTGuidanceHead, PixelREPAPipeline
from pixelrepa_diffusers.cli import parse
from pixelrepa_diffusers.commands import evaluate
from pixelrepa_diffusers.commands.evaluate import EvaluateArguments
from pixelrepa_diffusers.hub import published_files, weights_sha256


LABELS, STEPS = [1, 2], 4


def sample(pipeline, **settings) -> torch.Tensor:
    generator = [torch.Generator().manual_seed(seed) for seed in range(len(LABELS))]
    settings = {"num_inference_steps": STEPS, "output_type": "latent", **settings}
    return pipeline(LABELS, generator=generator, **settings).images


@pytest.fixture(scope="module")
def head(make_transformer) -> JiTGuidanceHead:
    """A head at depth 3, with other weights than the transformer's."""
    return JiTGuidanceHead.from_transformer(make_transformer(seed=1), depth=3).eval()


@pytest.fixture(scope="module")
def guided(make_pipeline, head) -> PixelREPAPipeline:
    return make_pipeline(guidance_head=head, self_guidance_scale=0.5, guidance_scale=1.5)


def test_head_at_the_last_block_repeats_the_transformer(make_transformer):
    # Without class tokens the head's block sees what the transformer's last block sees.
    transformer = make_transformer(in_context_len=0)
    head = JiTGuidanceHead.from_transformer(transformer, depth=3)
    noisy, time, labels = torch.randn(2, 3, 16, 16), torch.tensor([0.2, 0.9]), torch.tensor([3, 10])
    output = transformer(noisy, time, labels, return_alignment_states=True, alignment_depth=3)
    torch.testing.assert_close(head(output.alignment_states, time, labels), output.sample, atol=1e-5, rtol=1e-5)


def test_scale_zero_gives_the_bits_of_a_pipeline_without_a_head(make_pipeline, guided):
    assert torch.equal(
        sample(guided, self_guidance_scale=0), sample(make_pipeline(guided.transformer, guidance_scale=1.5))
    )
    assert not torch.equal(sample(guided), sample(guided, self_guidance_scale=0))


def test_self_guidance_and_autoguidance_act_on_both_halves_before_classifier_free_guidance(
    make_pipeline, make_transformer, head
):
    transformer, weak = make_transformer(), make_transformer(seed=2, num_layers=3)
    pipeline = make_pipeline(transformer, JiTFlowMatchScheduler(solver="euler"), guidance_head=head)
    pipeline.register_modules(guidance_transformer=weak)
    noise = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    result = pipeline(
        3, guidance_scale=2, guidance_interval=(0, 1), self_guidance_scale=0.5, autoguidance_scale=3,
        num_inference_steps=1, latents=noise, output_type="latent",
    ).images  # fmt: skip

    images = {}
    for label in (3, 10):  # at t = 0 the velocity is x̂ − z
        label, time = torch.tensor([label]), torch.zeros(1)
        output = transformer(noise, time, label, return_alignment_states=True, alignment_depth=3)
        strong, middle = output.sample, head(output.alignment_states, time, label)
        images[label.item()] = strong + 0.5 * (strong - middle) + 2 * (strong - weak(noise, time, label).sample)
    torch.testing.assert_close(result, images[10] + 2 * (images[3] - images[10]), atol=1e-4, rtol=1e-4)


def test_the_head_runs_only_inside_its_interval(guided, head):
    calls = []
    handle = head.register_forward_hook(lambda module, inputs, output: calls.append(inputs[1].item()))
    sample(guided, self_guidance_interval=(0.3, 0.8))  # Heun on a grid of 1/4
    handle.remove()
    assert calls == [0.5, 0.5, 0.75, 0.75]


def test_a_pipeline_with_head_and_second_transformer_survives_save_load_save(guided, make_transformer, tmp_path):
    pipeline = PixelREPAPipeline(
        **guided.components | {"guidance_transformer": make_transformer(seed=2)},
        self_guidance_scale=0.25,
        self_guidance_interval=(0.2, 0.9),
        autoguidance_scale=1.5,
    )
    pipeline.save_pretrained(tmp_path / "one")
    again = PixelREPAPipeline.from_pretrained(tmp_path / "one")
    again.save_pretrained(tmp_path / "two")
    assert files(tmp_path / "one") == files(tmp_path / "two")
    folders = {path.name for path in (tmp_path / "one").iterdir() if path.is_dir()}
    assert folders == {"guidance_head", "guidance_transformer", "scheduler", "transformer"}
    assert again.config.self_guidance_interval == [0.2, 0.9]
    assert torch.equal(sample(again), sample(pipeline))
    assert torch.equal(sample(PixelREPAPipeline.from_pipe(again)), sample(pipeline))


def test_self_guidance_works_with_a_compiled_head_and_in_bfloat16(guided):
    pipeline = copy.deepcopy(guided)
    pipeline.guidance_head.compile(fullgraph=True, backend="eager")
    expected = sample(guided, num_inference_steps=1, guidance_scale=1)
    torch.testing.assert_close(sample(pipeline, num_inference_steps=1, guidance_scale=1), expected, atol=1e-4, rtol=0)
    half = copy.deepcopy(guided).to(torch.bfloat16)
    assert 0 < (sample(half) - sample(guided)).abs().mean() < 0.2


def test_bad_settings_are_refused(make_pipeline, make_transformer, guided, head):
    with pytest.raises(ValueError, match="needs a `guidance_head`"):
        sample(make_pipeline(), self_guidance_scale=0.5)
    with pytest.raises(ValueError, match="its num_classes is 10, the transformer's is 7"):
        make_pipeline({"num_classes": 7}, guidance_head=head)
    with pytest.raises(ValueError, match=r"after 3 blocks.*\[0, 2\]"):
        make_pipeline({"num_layers": 3}, guidance_head=head)
    with pytest.raises(ValueError, match="`self_guidance_scale` must be at least 0"):
        sample(guided, self_guidance_scale=-1)
    with pytest.raises(ValueError, match="`self_guidance_interval` must satisfy"):
        sample(guided, self_guidance_interval=(0.5, 0.5))
    with pytest.raises(ValueError, match="needs a `guidance_transformer`"):
        sample(guided, autoguidance_scale=2)
    with pytest.raises(ValueError, match="guidance transformer has num_classes 7, the transformer 10"):
        make_pipeline(guidance_transformer=make_transformer(num_classes=7))
    pipeline = copy.deepcopy(guided)
    pipeline.transformer.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(ValueError, match="disable_cache"):
        sample(pipeline)


def test_a_pipeline_with_a_head_is_published_whole(guided, tmp_path):
    guided.save_pretrained(tmp_path)
    files = published_files(tmp_path, "me/digits")
    head = {
        f"guidance_head/{name}" for name in ("config.json", "guidance_jit.py", "diffusion_pytorch_model.safetensors")
    }
    assert head < files.keys()
    assert "self-guidance (arXiv 2607.29122) of the scale\n0.5" in files["README.md"].decode()
    (tmp_path / "guidance_head/guidance_jit.py").unlink()
    with pytest.raises(FileNotFoundError, match="it has no guidance_head"):
        published_files(tmp_path, "me/digits")


def test_evaluate_sweeps_self_guidance_and_autoguidance(guided, make_transformer, tmp_path):
    guided.save_pretrained(tmp_path / "pipeline")
    make_transformer(seed=2).save_pretrained(tmp_path / "weak")
    reference_of(encoder(), random_images(20)).save(tmp_path / "reference.npz")
    words = {
        "pipeline": tmp_path / "pipeline", "metrics": "fd_teacher", "teacher": TEACHER, "num_samples": 20,
        "teacher_image_size": TEACHER_IMAGE_SIZE, "teacher_reference": tmp_path / "reference.npz",
        "num_inference_steps": 2, "guidance_transformer": tmp_path / "weak", "output_dir": tmp_path / "out",
    }  # fmt: skip
    words = [word for name, value in words.items() for word in (f"--{name}", str(value))]
    words += ["--self_guidance_scales", "0", "0.5", "--autoguidance_scales", "1", "2"]
    records = evaluate.main(parse(EvaluateArguments, "", words))
    assert [record.get("self_guidance_scale", 0) for record in records] == [0, 0, 0.5, 0.5]
    assert len({record["metrics"]["fd_teacher"] for record in records}) == 4
    assert (tmp_path / "out/self-0.5_auto-2/metrics.json").exists()
    assert records[0]["guidance_transformer_sha256"] == weights_sha256(tmp_path / "weak")


def test_the_head_costs_at_most_a_block_and_the_final_layer(make_transformer):
    transformer = make_transformer(num_layers=6, num_attention_heads=4, attention_head_dim=32, in_context_len=0)
    head = JiTGuidanceHead.from_transformer(transformer)
    noisy, time, labels = torch.randn(8, 3, 16, 16), torch.full((8,), 0.5), torch.zeros(8, dtype=torch.long)
    with FlopCounterMode(display=False) as whole:
        states = transformer(noisy, time, labels, return_alignment_states=True, alignment_depth=3).alignment_states
    with FlopCounterMode(display=False) as added:
        head(states, time, labels)
    counts = {name.partition(".")[2]: sum(ops.values()) for name, ops in whole.get_flop_counts().items()}
    allowed = counts["transformer_blocks.0"] + counts["final_layer"] + counts["conditioning"]
    assert 0 < added.get_total_flops() <= allowed < 0.25 * whole.get_total_flops()
