"""PixelREPAPipeline: class labels to images."""

import json

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    UniPCMultistepScheduler,
)
from diffusers.hooks import FasterCacheConfig, SeaCacheConfig
from diffusers.schedulers.scheduling_minimax_h3 import MiniMaxH3Scheduler
from tiny import files

from pixelrepa_diffusers import JiTFlowMatchScheduler, JiTTransformer2DModel, PixelREPAPipeline


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
NAMES = {0: "tench, Tinca tinca", 1: "goldfish, Carassius auratus", 2: "great white shark, white shark"}
NAMES |= {3: "crane", 4: "crane", 5: "hammerhead, hammerhead shark"}
SHALLOW = {"num_layers": 2, "in_context_start": 1}


def seed(number=0):
    return torch.Generator().manual_seed(number)


NOISE = torch.randn(2, 3, 16, 16, generator=seed(1))


def by_class(value):
    return type(value).__name__


def assert_close(actual, expected):
    # Loaded weights have another memory alignment, which changes the last bits of a matrix product.
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def sample(pipeline, labels=(1, 2), steps=4, **arguments):
    """Raw float32 images, from fixed noise unless a generator is given."""
    if "generator" not in arguments:
        arguments.setdefault("latents", NOISE)
    return pipeline(list(labels), num_inference_steps=steps, output_type="latent", **arguments).images


def load(folder, **arguments):
    pipeline = PixelREPAPipeline.from_pretrained(folder, **arguments)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def record_calls(pipeline):
    """A list that receives (batch size, t, labels) of every model call."""
    calls = []
    pipeline.transformer.register_forward_pre_hook(
        lambda module, arguments: calls.append((arguments[0].shape[0], float(arguments[1]), arguments[2].tolist()))
    )
    return calls


# Labels


@pytest.mark.parametrize(
    "labels, ids",
    [
        (3, [3]),
        ((1, np.int32(4)), [1, 4]),
        (torch.tensor([[7], [8]], dtype=torch.uint8), [7, 8]),
        ("goldfish, Carassius auratus", [1]),
        (["white shark", 0, "hammerhead"], [2, 0, 5]),
    ],
    ids=repr,
)
def test_labels_are_ids_names_or_synonyms(make_pipeline, labels, ids):
    assert make_pipeline(id2label=NAMES).get_label_ids(labels) == ids


@pytest.mark.parametrize(
    "id2label, labels, message",
    [
        (NAMES, 10, "Class id 10 is out of range: the class ids are 0 to 9"),
        (NAMES, [1, -1], "Class id -1 is out of range"),
        (NAMES, [], "`class_labels` is empty"),
        (NAMES, None, "`class_labels` is required"),
        (NAMES, "golfish", "The nearest names: 'goldfish'"),
        (NAMES, "HAMMERHEAD", "The nearest names: 'hammerhead'"),
        (NAMES, "zzzzzz", "The first names"),
        (NAMES, "crane", r"shared by the classes \[3, 4\]"),
        (None, "tench", "no class names to look up 'tench'"),
        ({10: "ten"}, 1, "key 10; its keys must be class ids from 0 to 9"),
    ],
)
def test_labels_and_names_that_do_not_fit_are_refused(make_pipeline, id2label, labels, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline(id2label=id2label)(labels)


def test_a_model_with_one_class_needs_no_label_and_has_no_guidance(make_pipeline):
    pipeline = make_pipeline({"num_classes": 1}, guidance_scale=3.0, guidance_interval=(0.0, 1.0))
    calls = record_calls(pipeline)
    images = pipeline(num_inference_steps=4, latents=NOISE[:1], output_type="latent").images
    assert torch.equal(images, sample(pipeline, [0], latents=NOISE[:1], guidance_scale=1.0))
    assert {(size, tuple(labels)) for size, _, labels in calls} == {(1, (0,))}


# Other arguments


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_inference_steps": 0}, "`num_inference_steps` must be at least 1"),
        ({"guidance_scale": -1.0}, "`guidance_scale` must be at least 0"),
        ({"guidance_interval": (0.7, 0.3)}, r"`guidance_interval` must satisfy .* got \(0.7, 0.3\)"),
        ({"guidance_interval": (0.1,)}, "`guidance_interval` must satisfy"),
        ({"latents": torch.zeros(1, 3, 16, 16)}, r"shape \(2, 3, 16, 16\), got \(1, 3, 16, 16\)"),
        ({"generator": [torch.Generator()]}, "1 generators for 2 images"),
        ({"callback_on_step_end_tensor_inputs": ["prediction"]}, r"may only name \['latents'\]"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_refused_before_any_model_call(make_pipeline, arguments, message):
    pipeline = make_pipeline()
    calls = record_calls(pipeline)
    with pytest.raises(ValueError, match=message):
        pipeline([1, 2], **arguments)
    assert calls == []


def test_numpy_numbers_are_accepted_and_saved(make_pipeline):
    settings = {"guidance_scale": np.float32(2.0), "guidance_interval": (np.float64(0.1), np.float32(1.0))}
    pipeline = make_pipeline(**settings)
    json.loads(pipeline.to_json_string())
    assert torch.equal(sample(pipeline), sample(make_pipeline(), steps=np.int64(4), **settings))


# Results


def test_every_output_type_is_the_same_image(make_pipeline):
    pipeline = make_pipeline()
    raw = sample(pipeline)
    pt, array, pil = (
        pipeline([1, 2], num_inference_steps=4, latents=NOISE, output_type=kind).images for kind in ("pt", "np", "pil")
    )
    torch.testing.assert_close(pt, (raw / 2 + 0.5).clamp(0, 1))
    assert np.array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    assert np.array_equal(np.stack(pil), (255 * array).round().astype(np.uint8))
    (images,) = pipeline([1, 2], num_inference_steps=4, latents=NOISE, output_type="latent", return_dict=False)
    assert torch.equal(images, raw)


@pytest.mark.parametrize("channels, bands", [(1, ("L",)), (4, ("R", "G", "B", "A"))])
def test_other_channel_counts_give_images(make_pipeline, channels, bands):
    assert make_pipeline({"in_channels": channels})(1, num_inference_steps=2).images[0].getbands() == bands


def test_seeds_repeat_and_a_call_changes_no_configuration(make_pipeline):
    pipeline = make_pipeline(guidance_scale=2.0)
    before = pipeline.to_json_string(), dict(pipeline.scheduler.config), dict(pipeline.transformer.config)
    first = sample(pipeline, generator=seed())
    assert torch.equal(sample(pipeline, generator=seed()), first)
    assert not torch.equal(sample(pipeline, generator=seed(1)), first)
    sample(pipeline, guidance_scale=1.0, guidance_interval=(0.2, 0.3))
    assert before == (pipeline.to_json_string(), dict(pipeline.scheduler.config), dict(pipeline.transformer.config))


def test_with_one_generator_per_image_an_image_does_not_depend_on_its_batch(make_pipeline):
    pipeline, labels = make_pipeline(guidance_scale=2.0), [1, 2, 3, 4, 5]
    together = sample(pipeline, labels, generator=[seed(label) for label in labels])
    alone = torch.cat([sample(pipeline, [label], generator=[seed(label)]) for label in labels])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    single = torch.cat([sample(pipeline, [label], generator=seed(label)) for label in labels])
    assert torch.equal(alone, single)


def test_latents_are_unit_noise_multiplied_by_the_noise_scale(make_pipeline):
    one, two = (make_pipeline({"noise_scale": scale}) for scale in (1.0, 2.0))
    latents = NOISE.clone()
    assert torch.equal(sample(one, latents=2 * latents), sample(two, latents=latents))
    assert torch.equal(latents, NOISE)
    drawn = torch.randn(2, 3, 16, 16, generator=seed())
    assert torch.equal(sample(two, generator=seed()), sample(two, latents=drawn))


# Guidance


@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_guidance_is_the_published_formula_in_one_batched_model_call(make_pipeline, scale):
    pipeline = make_pipeline(scheduler=JiTFlowMatchScheduler(solver="euler"))
    calls = record_calls(pipeline)
    images = sample(pipeline, [1, 2], steps=1, guidance_scale=scale, guidance_interval=(0.0, 1.0))
    assert calls == [(4, 0.0, [1, 2, 10, 10])]

    transformer = pipeline.transformer
    with torch.no_grad():
        velocity, null = (
            transformer.velocity(transformer(NOISE, 0.0, torch.tensor(labels)).sample, NOISE, 0.0)
            for labels in ([1, 2], [10, 10])
        )
    torch.testing.assert_close(images, NOISE + null + scale * (velocity - null), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "interval, guided",
    [
        # t = 0, 0.1, …, 0.9: strict bounds, except that low = 0 includes the start
        ((0.0, 1.0), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ((0.3, 0.7), [4, 5, 6]),
        ((0.25, 0.75), [3, 4, 5, 6, 7]),
        ((0.9, 1.0), []),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "scheduler", [JiTFlowMatchScheduler(solver="euler"), FlowMatchEulerDiscreteScheduler()], ids=by_class
)
def test_the_batch_doubles_only_inside_the_guidance_interval(make_pipeline, scheduler, interval, guided):
    pipeline = make_pipeline(SHALLOW, scheduler=scheduler)
    calls = record_calls(pipeline)
    sample(pipeline, steps=10, guidance_scale=2.0, guidance_interval=interval)
    assert [size for size, _, _ in calls] == [4 if index in guided else 2 for index in range(10)]


def test_saved_guidance_is_the_default_of_a_call(make_pipeline):
    plain = make_pipeline()
    saved = make_pipeline(guidance_scale=3.0, guidance_interval=(0.2, 0.8))
    guided = sample(plain, guidance_scale=3.0, guidance_interval=(0.2, 0.8))
    assert torch.equal(sample(saved), guided)
    assert torch.equal(sample(saved, guidance_scale=1), sample(plain))
    assert not torch.equal(guided, sample(plain))


# The denoising loop


@pytest.mark.parametrize(
    "scheduler, nfe",
    [
        (JiTFlowMatchScheduler(), 11),
        (JiTFlowMatchScheduler(solver="euler"), 6),
        (FlowMatchEulerDiscreteScheduler(), 6),
        (FlowMatchHeunDiscreteScheduler(), 11),
        (UniPCMultistepScheduler(**FLOW), 6),
        (DPMSolverMultistepScheduler(**FLOW), 6),
    ],
    ids=by_class,
)
def test_the_progress_bar_counts_steps_not_model_calls(make_pipeline, monkeypatch, scheduler, nfe):
    pipeline = make_pipeline(scheduler=scheduler)
    calls, bars, make_bar = record_calls(pipeline), [], pipeline.progress_bar
    monkeypatch.setattr(pipeline, "progress_bar", lambda **kwargs: bars.append(make_bar(**kwargs)) or bars[-1])
    pipeline.set_progress_bar_config(disable=False)
    sample(pipeline, steps=6, guidance_scale=1.0, guidance_interval=(0.0, 1.0))
    assert len(calls) == pipeline.num_timesteps == nfe
    assert {size for size, _, _ in calls} == {2}
    assert (bars[0].n, bars[0].total) == (6, 6)


def test_a_callback_sees_and_replaces_the_latents(make_pipeline):
    pipeline, seen = make_pipeline(), []

    def callback(pipe, index, timestep, tensors):
        assert pipe is pipeline and pipe.current_timestep == timestep
        assert tensors["latents"].dtype == torch.float32
        seen.append(float(timestep))
        return {"latents": torch.zeros_like(tensors["latents"])} if index == pipe.num_timesteps - 1 else {}

    assert sample(pipeline, steps=3, callback_on_step_end=callback).abs().max() == 0
    assert seen == pipeline.scheduler.timesteps.tolist()
    assert pipeline.current_timestep is None


def test_a_callback_can_disable_guidance_and_interrupt_for_one_call(make_pipeline):
    settings = {"guidance_scale": 2.0, "guidance_interval": (0.0, 1.0)}
    pipeline = make_pipeline(scheduler=JiTFlowMatchScheduler(solver="euler"), **settings)
    calls = record_calls(pipeline)

    def callback(pipe, index, timestep, tensors):
        pipe._guidance_scale = 2.0 if index < 2 else 1.0
        pipe._interrupt = index == 4
        return tensors

    sample(pipeline, steps=6, callback_on_step_end=callback)
    sample(pipeline, steps=6)
    assert [size for size, _, _ in calls] == [4, 4, 4, 2, 2, *[4] * 6]


# Dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_half_precision_error_of_a_sample_is_that_of_one_forward_pass(make_pipeline, tmp_path, dtype):
    pipeline, dtypes = make_pipeline(SHALLOW), set()
    latents, labels = torch.cat([NOISE, -NOISE]), torch.arange(4)
    pipeline.transformer.save_pretrained(tmp_path)
    half = make_pipeline(JiTTransformer2DModel.from_pretrained(tmp_path, dtype=dtype))
    half.transformer.register_forward_pre_hook(lambda module, arguments: dtypes.add(arguments[0].dtype))

    def error(run):
        return (run(half) - run(pipeline)).float().square().mean().sqrt().item()

    with torch.no_grad():
        one_forward = max(
            error(lambda pipe, t=t: pipe.transformer(latents, t, labels).sample) for t in (0.0, 0.5, 1.0)
        )
    errors = [error(lambda pipe, n=n: sample(pipe, labels.tolist(), n, latents=latents)) for n in (10, 40)]
    # Measured with a float32 state: 0.6 to 1.1 of one forward pass, decreasing with the number of steps
    assert dtypes == {torch.float32}
    assert max(errors) < 1.5 * one_forward and errors[1] < 1.2 * errors[0]


# Other schedulers


@pytest.mark.parametrize("steps", [1, 10])
def test_flow_match_euler_uses_the_grid_of_the_method(make_pipeline, steps):
    pipeline = make_pipeline(SHALLOW, guidance_scale=2.0, scheduler=JiTFlowMatchScheduler(solver="euler"))
    expected = sample(pipeline, steps=steps)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    torch.testing.assert_close(sample(pipeline, steps=steps), expected, rtol=0, atol=2e-6)


@pytest.fixture(scope="module")
def limit(make_pipeline):
    """A pipeline, and the images that its Heun steps converge to."""
    pipeline = make_pipeline(SHALLOW, guidance_scale=2.0)
    return pipeline, sample(pipeline, steps=150)


@pytest.mark.parametrize(
    "scheduler",
    [
        JiTFlowMatchScheduler(solver="euler"),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        FlowMatchHeunDiscreteScheduler(),
        UniPCMultistepScheduler(**FLOW),
        DPMSolverMultistepScheduler(**FLOW, solver_order=3, euler_at_final=True),
        DPMSolverSinglestepScheduler(**FLOW, lower_order_final=True),
        DEISMultistepScheduler(**FLOW),
    ],
    ids=by_class,
)
def test_every_flow_scheduler_converges_to_the_same_image(limit, scheduler):
    pipeline, expected = limit
    pipeline.scheduler = scheduler
    errors = [(sample(pipeline, steps=steps) - expected).abs().max().item() for steps in (10, 100)]
    assert errors[1] < 0.06
    assert errors[1] < 0.3 * errors[0]


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(),
        DPMSolverMultistepScheduler(prediction_type="flow_prediction"),
        UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="epsilon"),
        MiniMaxH3Scheduler(),
    ],
    ids=by_class,
)
def test_schedulers_without_flow_matching_are_refused(make_pipeline, scheduler):
    with pytest.raises(ValueError, match=f"{by_class(scheduler)} is not set up for flow matching"):
        make_pipeline(scheduler=scheduler)(1)


# Saving and loading


def test_a_pipeline_survives_saving_and_loading_twice(make_pipeline, tmp_path):
    pipeline = make_pipeline(id2label=NAMES, guidance_scale=2.5, guidance_interval=(0.2, 0.9))
    pipeline.save_pretrained(tmp_path / "one")
    load(tmp_path / "one").save_pretrained(tmp_path / "two")
    one, two = (files(tmp_path / name) for name in ("one", "two"))
    assert one == two  # in particular, no path of this machine
    assert {name for name in one if name.endswith(".py")} == {
        "modular_pixelrepa.py",
        "pipeline_pixelrepa.py",
        "transformer/transformer_jit.py",
        "scheduler/scheduling_jit.py",
    }
    index = json.loads(one["model_index.json"])
    assert index["_class_name"] == ["pipeline_pixelrepa", "PixelREPAPipeline"]
    assert index["transformer"] == ["transformer_jit", "JiTTransformer2DModel"]
    assert index["scheduler"] == ["scheduling_jit", "JiTFlowMatchScheduler"]

    loaded = load(tmp_path / "two")
    assert loaded.config.id2label == {str(key): name for key, name in NAMES.items()}
    assert (loaded.config.guidance_scale, loaded.config.guidance_interval) == (2.5, [0.2, 0.9])
    assert_close(sample(loaded, ["goldfish", 2]), sample(pipeline))


def test_components_and_settings_can_be_given_to_from_pretrained_and_from_pipe(make_pipeline, tmp_path):
    saved_scheduler, scheduler = UniPCMultistepScheduler(**FLOW), FlowMatchEulerDiscreteScheduler()
    pipeline = make_pipeline(scheduler=saved_scheduler, id2label=NAMES, guidance_scale=2.5)
    pipeline.save_pretrained(tmp_path)
    assert type(load(tmp_path).scheduler) is UniPCMultistepScheduler
    same = PixelREPAPipeline.from_pipe(pipeline)
    assert same.transformer is pipeline.transformer
    assert same.get_label_ids("goldfish") == [1] and same.config.guidance_scale == 2.5
    for changed in (
        load(tmp_path, transformer=pipeline.transformer, scheduler=scheduler, guidance_scale=4.0),
        PixelREPAPipeline.from_pipe(pipeline, scheduler=scheduler, guidance_scale=4.0),
    ):
        assert changed.transformer is pipeline.transformer and changed.scheduler is scheduler
        assert changed.get_label_ids("goldfish") == [1] and changed.config.guidance_scale == 4.0


def test_a_pipeline_with_a_compiled_transformer_can_be_saved(make_pipeline, tmp_path):
    pipeline = make_pipeline()
    pipeline.transformer = torch.compile(pipeline.transformer, backend="eager")
    pipeline.save_pretrained(tmp_path)
    assert type(load(tmp_path).transformer) is JiTTransformer2DModel


# Caches


EXACT = {"taylor_factors_dtype": torch.float32}
WHOLE_MODEL = {"cache_identifiers": ["final_layer"], "skip_predict_identifiers": [r".*_blocks\.\d+"]}
CACHES = {
    "first block": lambda pipeline: FirstBlockCacheConfig(threshold=0.1),
    "MagCache": lambda pipeline: MagCacheConfig(mag_ratios=torch.ones(39), num_inference_steps=39, threshold=0.5),
    "TaylorSeer": lambda pipeline: TaylorSeerCacheConfig(cache_interval=3, **EXACT),
    "TaylorSeer, whole model": lambda pipeline: TaylorSeerCacheConfig(cache_interval=2, **EXACT, **WHOLE_MODEL),
    "pyramid attention broadcast": lambda pipeline: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: pipeline.current_timestep.item()
    ),
    "SeaCache": lambda pipeline: SeaCacheConfig(
        raw_vision_callback=lambda module, args, kwargs: list(args[0].unsqueeze(2))
    ),
}


@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_saves_work_changes_little_and_leaves_nothing_behind(make_pipeline, cache):
    pipeline = make_pipeline({"in_context_start": 1}, guidance_scale=2.0, guidance_interval=(0.3, 0.7))
    work = []
    pipeline.transformer.transformer_blocks[1].attn.to_q.register_forward_pre_hook(lambda *_: work.append(1))

    def run(**arguments):
        work.clear()
        return sample(pipeline, steps=20, **arguments), len(work)

    expected, full = run()
    pipeline.transformer.enable_cache(CACHES[cache](pipeline))
    images, cached = run()
    assert full == 39 and cached < 32
    assert 0 < (images - expected).abs().max() < 0.5
    # A call that raises must not influence the next one.
    with pytest.raises(ZeroDivisionError):
        run(latents=-NOISE, callback_on_step_end=lambda pipe, index, *_: {"x": 1 // (9 - index)})
    assert torch.equal(run()[0], images)
    pipeline.transformer.disable_cache()
    again, undone = run()
    assert undone == full and torch.equal(again, expected)


@pytest.mark.parametrize(
    "config, reason",
    [
        (FasterCacheConfig(current_timestep_callback=lambda: 500), "guidance at every step"),
        (TaylorSeerCacheConfig(use_lite_mode=True), "`proj_out`"),
        (SeaCacheConfig(), "`raw_vision_callback`"),
    ],
    ids=by_class,
)
def test_caches_that_do_not_fit_are_refused(make_transformer, config, reason):
    transformer = make_transformer()
    with pytest.raises(ValueError, match=f"{type(config).__name__} does not fit this model: .*{reason}"):
        transformer.enable_cache(config)
    assert not transformer.is_cache_enabled
