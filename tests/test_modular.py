"""The modular pipeline makes the images of the standard pipeline, with any guider of diffusers and blocks of one's own."""

import copy
import shutil

import pytest
import torch
from diffusers import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    FirstBlockCacheConfig,
    LayerSkipConfig,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
    TangentialClassifierFreeGuidance,
    UniPCMultistepScheduler,
)
from diffusers.modular_pipelines import InputParam, ModularPipelineBlocks, OutputParam
from tiny import files

from pixelrepa_diffusers import (
    JiTFlowMatchScheduler,
    JiTGuidanceHead,
    PixelREPABlocks,
    PixelREPAModularPipeline,
    PixelREPAPipeline,
)


LABELS, STEPS = ["goldfish", 3], 4
SETTINGS = {
    "id2label": {0: "tench", 1: "goldfish"},
    "guidance_scale": 2.0,
    "guidance_interval": (0.2, 0.7),
    "self_guidance_scale": 0.5,
    "self_guidance_interval": (0.0, 0.6),
    "autoguidance_scale": 1.5,
}
PLAIN = {"self_guidance_scale": 0, "autoguidance_scale": 1}


def seeds() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in (0, 1)]


def sample(pipe, **arguments) -> torch.Tensor:
    arguments = {"class_labels": LABELS, "num_inference_steps": STEPS, "output_type": "latent", **arguments}
    if isinstance(pipe, PixelREPAPipeline):
        return pipe(generator=seeds(), **arguments).images
    return pipe(generator=seeds(), output="images", **arguments)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    # The standard pipeline computes both halves of a guided batch in one model call.
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def saved(make_pipeline, make_transformer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    make_pipeline(
        guidance_head=JiTGuidanceHead.from_transformer(make_transformer(seed=1)),
        guidance_transformer=make_transformer(seed=2),
        **SETTINGS,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def standard(saved) -> PixelREPAPipeline:
    pipe = PixelREPAPipeline.from_pretrained(saved)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load(folder) -> PixelREPAModularPipeline:
    pipe = PixelREPAModularPipeline.from_pretrained(folder)
    pipe.load_components()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def modular(saved) -> PixelREPAModularPipeline:
    return load(saved)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        PLAIN,
        {"image": torch.linspace(0, 1, 768).view(1, 3, 16, 16), "strength": 0.5},
        {"guidance_interval": (0, 1)},
        {"guidance_scale": 1, "num_inference_steps": 1},
        {"latents": torch.linspace(-1, 1, 1536).view(2, 3, 16, 16)},
    ],
    ids=lambda arguments: ", ".join(arguments),
)
def test_the_default_guider_makes_the_images_of_the_standard_pipeline(standard, modular, arguments):
    assert_close(sample(modular, **arguments), sample(standard, **arguments))


@pytest.mark.parametrize(
    "scheduler",
    [
        JiTFlowMatchScheduler(solver="euler"),
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_schedulers_and_saved_settings_are_swapped_as_components_and_configs(make_pipeline, modular, scheduler):
    modular.update_components(scheduler=scheduler, guidance_scale=3.0, guidance_interval=[0.3, 1.0])
    expected = make_pipeline(
        modular.transformer,
        copy.deepcopy(scheduler),
        id2label=SETTINGS["id2label"],
        guidance_scale=3.0,
        guidance_interval=(0.3, 1),
    )
    assert_close(sample(modular, **PLAIN), sample(expected))


def record_labels(pipe) -> list[list[int]]:
    """A list that receives the labels of every model call."""
    batches = []
    pipe.transformer.register_forward_pre_hook(lambda module, inputs: batches.append(inputs[2].tolist()))
    return batches


def test_null_labels_are_used_inside_the_interval_only(modular):
    batches = record_labels(modular)
    sample(modular, guidance_interval=(0.2, 0.7), **PLAIN)
    # Heun calls the model at t = 0, ¼, ¼, ½, ½, ¾, ¾.
    assert batches == [[1, 3]] + [[1, 3], [10, 10]] * 4 + [[1, 3]] * 2


def test_start_and_stop_of_a_guider_are_fractions_of_the_steps(modular):
    batches = record_labels(modular)
    modular.update_components(guider=ClassifierFreeGuidance(guidance_scale=2.0, start=0.25, stop=0.75))
    sample(modular, **PLAIN)
    # two model calls in each of the steps 1 and 2 of 4
    assert batches == [[1, 3]] * 2 + [[1, 3], [10, 10]] * 4 + [[1, 3]]


def test_projected_guidance_without_projection_is_classifier_free_guidance(standard, modular):
    arguments = {"guidance_scale": 2.0, "adaptive_projected_guidance_rescale": 0.0}
    modular.update_components(guider=AdaptiveProjectedGuidance(eta=1.0, **arguments))
    expected = sample(standard, guidance_interval=(0, 1))
    assert_close(sample(modular), expected)  # with self-guidance and autoguidance
    modular.update_components(guider=AdaptiveProjectedGuidance(eta=0.0, **arguments))
    assert (sample(modular) - expected).abs().max() > 0.01


def test_skip_layer_guidance_moves_away_from_the_model_without_the_block(modular):
    config = LayerSkipConfig(indices=[1])
    guider = SkipLayerGuidance(
        2.0, skip_layer_guidance_scale=1.5, skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0, skip_layer_config=config
    )  # fmt: skip
    modular.update_components(guider=guider, scheduler=JiTFlowMatchScheduler(solver="euler"))
    noise = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    result = modular(
        class_labels=[3], latents=noise, num_inference_steps=2, output_type="latent", output="images", **PLAIN
    )

    transformer, without = modular.transformer, copy.deepcopy(modular.transformer)
    del without.transformer_blocks[1]
    sample, null = noise, torch.tensor([10])
    with torch.no_grad():
        for time in (0.0, 0.5):
            conditional, unconditional, skipped = (
                model.velocity(model(sample, time, label).sample, sample, time)
                for model, label in (
                    (transformer, torch.tensor([3])),
                    (transformer, null),
                    (without, torch.tensor([3])),
                )
            )
            velocity = unconditional + 2.0 * (conditional - unconditional)
            if time > 0:  # diffusers begins after the first step
                velocity = velocity + 1.5 * (conditional - skipped)
            sample = sample + 0.5 * velocity
    assert_close(result, sample)


class Recorder(ModularPipelineBlocks):
    """A user's block of the denoising loop."""

    description = "Records the noisy images."
    inputs = [InputParam("latents", required=True)]
    intermediate_outputs = [OutputParam("path")]

    def __call__(self, components, block_state, i, t):
        block_state.path = [*getattr(block_state, "path", []), block_state.latents.clone()]
        return components, block_state


class Negative(ModularPipelineBlocks):
    """A user's block of the pipeline."""

    description = "Inverts the images."
    inputs = [InputParam("latents", required=True)]
    intermediate_outputs = [OutputParam("latents")]

    def __call__(self, components, state):
        block_state = self.get_block_state(state)
        block_state.latents = -block_state.latents
        self.set_block_state(state, block_state)
        return components, state


def with_blocks(folder):
    blocks = PixelREPABlocks()
    blocks.sub_blocks["denoise"].sub_blocks.insert("recorder", Recorder(), 0)
    blocks.sub_blocks.insert("negative", Negative(), 4)
    pipe = blocks.init_pipeline(folder)
    pipe.load_components()
    return pipe


def test_blocks_of_a_user_run_inside_and_outside_the_loop(standard, saved):
    state = with_blocks(saved)(class_labels=LABELS, generator=seeds(), num_inference_steps=STEPS, output_type="latent")
    assert_close(state.images, -sample(standard))
    assert len(state.path) == 2 * STEPS - 1
    assert torch.equal(state.path[0], torch.cat([torch.randn(1, 3, 16, 16, generator=seed) for seed in seeds()]))


def test_cfg_zero_star_leaves_the_noise_unchanged_in_the_first_step(saved):
    pipe = with_blocks(saved)
    pipe.update_components(guider=ClassifierFreeZeroStarGuidance(guidance_scale=2.0))
    path = pipe(class_labels=LABELS, num_inference_steps=STEPS, generator=seeds(), output="path")
    assert torch.equal(path[2], path[0])  # after both model calls of a Heun step
    assert not torch.equal(path[4], path[2])


ATTENTION_SCORES = LayerSkipConfig(indices=[0], skip_attention=False, skip_attention_scores=True, skip_ff=False)
ATTENTION = LayerSkipConfig(indices=[0], skip_ff=False)


@pytest.mark.parametrize(
    "guider",
    [
        TangentialClassifierFreeGuidance(2.0),
        AutoGuidance(2.0, auto_guidance_config=LayerSkipConfig(indices=[1])),
        PerturbedAttentionGuidance(2.0, perturbed_guidance_config=ATTENTION_SCORES, perturbed_guidance_stop=1.0),
        SkipLayerGuidance(2.0, skip_layer_config=ATTENTION, skip_layer_guidance_stop=1.0),
    ],
    ids=lambda guider: type(guider).__name__,
)
def test_other_guiders_have_an_effect_and_leave_the_transformer_as_it_was(modular, guider):
    plain = sample(modular, **PLAIN)
    default = modular.guider
    modular.update_components(guider=ClassifierFreeGuidance(2.0))
    guided = sample(modular, **PLAIN)
    modular.update_components(guider=guider)
    images = sample(modular, **PLAIN)
    assert images.isfinite().all() and (images - guided).abs().max() > 1e-3
    modular.update_components(guider=default)
    assert torch.equal(sample(modular, **PLAIN), plain)


def test_caches_keep_the_batches_of_a_guider_apart(modular):
    computed = []
    modular.transformer.transformer_blocks[-1].attn.register_forward_hook(lambda *_: computed.append(1))
    modular.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))  # one computation, then the cached residual
    sample(modular, guidance_interval=(0, 1), **PLAIN)
    assert len(computed) == 2


def test_mistakes_are_refused(saved, modular):
    with pytest.raises(ValueError, match="load_components"):
        PixelREPABlocks().init_pipeline(saved)(class_labels=1)
    with pytest.raises(ValueError, match="no class called 'gold fish'"):
        sample(modular, class_labels="gold fish")
    modular.update_components(guidance_head=None)
    with pytest.raises(ValueError, match=r"self_guidance_scale.* needs"):
        sample(modular)
    sample(modular, **PLAIN)
    modular.update_components(guider=ClassifierFreeGuidance())
    with pytest.raises(ValueError, match="arguments of the default guider"):
        sample(modular, guidance_scale=2.0, **PLAIN)


def test_a_saved_modular_pipeline_is_the_folder_of_the_standard_pipeline(saved, modular, tmp_path):
    modular.save_pretrained(tmp_path / "again")
    assert files(tmp_path / "again") == files(saved)

    modular.update_components(guidance_scale=4.0)
    modular.save_pretrained(tmp_path / "changed")
    assert PixelREPAPipeline.from_pretrained(tmp_path / "changed").config.guidance_scale == 4.0


def test_folders_without_modular_files_load_with_the_package(standard, saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "old", ignore=shutil.ignore_patterns("modular_*"))
    assert_close(sample(load(folder)), sample(standard))
