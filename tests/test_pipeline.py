"""PixelREPAPipeline: class labels to images."""

import json
import math
import re

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
    IPNDMScheduler,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    UniPCMultistepScheduler,
)
from diffusers.hooks import FasterCacheConfig, SeaCacheConfig, TextKVCacheConfig
from diffusers.schedulers.scheduling_minimax_h3 import MiniMaxH3Scheduler
from PIL import Image

from pixelrepa_diffusers import JiTFlowMatchScheduler, JiTTransformer2DModel, PixelREPAPipeline


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
NAMES = {
    0: "tench, Tinca tinca",
    1: "goldfish, Carassius auratus",
    2: "great white shark, white shark",
    3: "crane",
    4: "crane",
    5: "hammerhead, hammerhead shark",
}


SHALLOW = {"num_layers": 2, "in_context_start": 1}


def seed(number=0):
    return torch.Generator().manual_seed(number)


def noise(*shape):
    return torch.randn(*(shape or (2, 3, 16, 16)), generator=seed(1))


def assert_close(actual, expected):
    # Loaded weights begin elsewhere in memory than made ones, which decides the last bits of a product.
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def sample(pipeline, labels=(1, 2), steps=4, **arguments):
    """The raw float32 images."""
    return pipeline(list(labels), num_inference_steps=steps, output_type="latent", **arguments).images


@pytest.fixture
def evaluations():
    """Records (batch size, t, labels) of every call of a pipeline's transformer."""

    def record(pipeline):
        calls = []
        pipeline.transformer.register_forward_pre_hook(
            lambda module, arguments: calls.append((arguments[0].shape[0], float(arguments[1]), arguments[2].tolist()))
        )
        return calls

    return record


# Labels


@pytest.mark.parametrize(
    "labels, ids",
    [
        (3, [3]),
        ([0, 9], [0, 9]),
        ((1, 2), [1, 2]),
        (np.int64(4), [4]),
        ([np.int32(4), 5], [4, 5]),
        (np.array([1, 2]), [1, 2]),
        (torch.tensor(7), [7]),
        (torch.tensor([7, 8], dtype=torch.uint8), [7, 8]),
        ("goldfish", [1]),
        ("Carassius auratus", [1]),
        ("goldfish, Carassius auratus", [1]),
        (["white shark", 0, "hammerhead"], [2, 0, 5]),
        ([[1], ["goldfish"]], [1, 1]),
        (torch.tensor([[1], [2]]), [1, 2]),
        ([torch.tensor(1), np.array([2])], [1, 2]),
    ],
    ids=repr,
)
def test_labels_are_ids_names_or_synonyms_alone_or_listed(make_pipeline, labels, ids):
    assert make_pipeline(id2label=NAMES).get_label_ids(labels) == ids


@pytest.mark.parametrize(
    "labels, message",
    [
        (10, "Class id 10 is out of range: this model knows the ids 0 to 9"),
        ([1, -1], "Class id -1 is out of range"),
        (1000, "Class id 1000"),
        ([], "`class_labels` is empty"),
        (torch.tensor([], dtype=torch.long), "`class_labels` is empty"),
        ("golfish", r"no class called 'golfish'. The nearest names: 'goldfish'"),
        ("HAMMERHEAD", r"The nearest names: 'hammerhead'"),
        ("zzzzzz", r"no class called 'zzzzzz'. See `pipe.config.id2label`"),
        ("crane", r"'crane' stands for the classes \[3, 4\]; give the id"),
        ([1, []], "`class_labels` is empty"),
        (True, "must be integers or names, .* got True"),
        ([False], "must be integers or names, .* got False"),
        (1.0, r"must be integers or names, .* got 1.0 \(float\)"),
        (torch.tensor([0.5]), "must be integers or names, .* got 0.5"),
        (torch.tensor([True]), "must be integers or names, .* got True"),
        (None, "must be integers or names, .* got None"),
        ({1: 2}, r"got {1: 2} \(dict\)"),
    ],
    ids=repr,
)
def test_labels_that_cannot_be_are_refused_before_any_model_call(make_pipeline, evaluations, labels, message):
    pipeline = make_pipeline(id2label=NAMES)
    calls = evaluations(pipeline)
    with pytest.raises(ValueError, match=message):
        pipeline(labels)
    assert calls == []


def test_a_name_without_class_names_is_refused(make_pipeline):
    with pytest.raises(ValueError, match="has no class names, so 'tench' cannot be looked up; give ids from 0 to 9"):
        make_pipeline()("tench")


@pytest.mark.parametrize(
    "names, message",
    [
        ({10: "ten"}, "key 10; its keys are class ids from 0 to 9"),
        ({-1: "minus one"}, "key -1"),
        ({"one": "1"}, "key 'one'"),
        ({"01": "one"}, "key '01'"),
        ({True: "one"}, "key True"),
        ({1: "one", "1": "uno"}, "two entries for class 1"),
        ({1: 1}, r"`id2label\[1\]` must be a name, got 1"),
        ({1: ["one", "uno"]}, r"`id2label\[1\]` must be a name"),
        ({1: " , "}, r"`id2label\[1\]` must be a name"),
        (["zero", "one"], "must be a dictionary of class ids to names, got list"),
    ],
    ids=str,
)
def test_class_names_that_cannot_be_are_refused(make_pipeline, names, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline(id2label=names)


# Other bad input


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_inference_steps": 0}, "`num_inference_steps` must be an integer of at least 1, got 0"),
        ({"num_inference_steps": 2.0}, "got 2.0"),
        ({"num_inference_steps": True}, "got True"),
        ({"guidance_scale": -1.0}, "`guidance_scale` must be a finite number of at least 0"),
        ({"guidance_scale": math.nan}, "`guidance_scale`"),
        ({"guidance_scale": "3"}, "`guidance_scale`"),
        ({"guidance_scale": True}, "`guidance_scale`"),
        ({"guidance_interval": (0.7, 0.3)}, r"0 ≤ low < high ≤ 1 .*got \(0.7, 0.3\)"),
        ({"guidance_interval": (0.5, 0.5)}, "0 ≤ low < high ≤ 1"),
        ({"guidance_interval": (-0.1, 1.0)}, "0 ≤ low < high ≤ 1"),
        ({"guidance_interval": (0.1, 1.1)}, "0 ≤ low < high ≤ 1"),
        ({"guidance_interval": (0.1, math.nan)}, "0 ≤ low < high ≤ 1"),
        ({"guidance_interval": (0.1,)}, r"pair \(low, high\)"),
        ({"guidance_interval": 0.1}, r"pair \(low, high\)"),
        ({"guidance_interval": ("0.1", "1.0")}, "pair of numbers"),
        ({"latents": torch.zeros(2, 3, 8, 8)}, r"shape \(2, 3, 16, 16\), got \(2, 3, 8, 8\)"),
        ({"latents": torch.zeros(1, 3, 16, 16)}, r"got \(1, 3, 16, 16\)"),
        ({"latents": torch.zeros(2, 1, 16, 16)}, r"got \(2, 1, 16, 16\)"),
        ({"latents": np.zeros((2, 3, 16, 16))}, "got ndarray"),
        ({"latents": torch.full((2, 3, 16, 16), math.inf)}, "not finite"),
        ({"generator": [torch.Generator()]}, "1 generators were given for 2 images"),
        ({"generator": (torch.Generator(), torch.Generator())}, "`generator` must be a `torch.Generator` or a list"),
        ({"generator": 0}, "`generator` must be"),
        ({"output_type": "jpeg"}, '`output_type` must be "pil", "np", "pt" or "latent"'),
        ({"callback_on_step_end_tensor_inputs": ["prediction"]}, r"may name \['latents'\], got \['prediction'\]"),
    ],
    # Not by their values: generators print their addresses, which differ between test processes.
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_arguments_that_cannot_be_are_refused_before_any_model_call(make_pipeline, evaluations, arguments, message):
    pipeline = make_pipeline()
    calls = evaluations(pipeline)
    with pytest.raises(ValueError, match=message):
        pipeline([1, 2], **arguments)
    assert calls == []


@pytest.mark.parametrize("settings", [{"guidance_scale": -1.0}, {"guidance_interval": (1.0, 0.1)}], ids=str)
def test_saved_guidance_is_checked_when_the_pipeline_is_made(make_pipeline, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        make_pipeline(**settings)


def test_numpy_numbers_are_numbers(make_pipeline):
    pipeline = make_pipeline(guidance_scale=np.float32(2.0), guidance_interval=(np.float64(0.1), np.float32(1.0)))
    json.loads(pipeline.to_json_string())
    images = sample(pipeline, latents=noise())
    same = sample(
        make_pipeline(),
        steps=np.int64(4),
        guidance_scale=np.float64(2.0),
        guidance_interval=[np.float32(0.1), 1],
        latents=noise(),
    )
    assert torch.equal(images, same)


# Results


def test_every_output_type_is_the_same_image(make_pipeline):
    pipeline = make_pipeline()
    raw = sample(pipeline, latents=noise())
    pt, array, pil = (
        pipeline([1, 2], num_inference_steps=4, latents=noise(), output_type=kind).images
        for kind in ("pt", "np", "pil")
    )
    assert raw.shape == pt.shape == (2, 3, 16, 16)
    assert array.shape == (2, 16, 16, 3)
    torch.testing.assert_close(pt, (raw / 2 + 0.5).clamp(0, 1))
    assert np.array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    assert all(isinstance(image, Image.Image) and image.size == (16, 16) for image in pil)
    assert np.array_equal(np.stack(pil), (255 * array).round().astype(np.uint8))


def test_a_tuple_holds_what_the_output_holds(make_pipeline):
    pipeline = make_pipeline()
    output = pipeline([1, 2], num_inference_steps=2, latents=noise(), output_type="latent")
    (images,) = pipeline([1, 2], num_inference_steps=2, latents=noise(), output_type="latent", return_dict=False)
    assert torch.equal(output.images, images)


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channel_counts_give_images(make_pipeline, channels):
    pipeline = make_pipeline({"in_channels": channels})
    images = pipeline([1, 2], num_inference_steps=2).images
    assert [image.getbands() for image in images] == [("L",) if channels == 1 else ("R", "G", "B", "A")] * 2


def test_a_seed_repeats_and_the_saved_configuration_does_not_change(make_pipeline):
    pipeline = make_pipeline(guidance_scale=2.0)
    before = pipeline.to_json_string(), dict(pipeline.scheduler.config), dict(pipeline.transformer.config)
    first = sample(pipeline, generator=seed())
    assert torch.equal(sample(pipeline, generator=seed()), first)
    assert not torch.equal(sample(pipeline, generator=seed(1)), first)
    sample(pipeline, guidance_scale=1.0, guidance_interval=(0.2, 0.3))
    assert before == (pipeline.to_json_string(), dict(pipeline.scheduler.config), dict(pipeline.transformer.config))


def test_with_a_generator_for_each_an_image_does_not_depend_on_its_batch(make_pipeline):
    pipeline = make_pipeline(guidance_scale=2.0)
    labels = [1, 2, 3, 4, 5]
    together = sample(pipeline, labels, generator=[seed(label) for label in labels])
    alone = [sample(pipeline, [label], generator=[seed(label)]) for label in labels]
    single = [sample(pipeline, [label], generator=seed(label)) for label in labels]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)
    assert torch.equal(torch.cat(alone), torch.cat(single))


def test_latents_are_unit_noise_that_the_models_noise_scale_multiplies(make_pipeline):
    pipelines = [make_pipeline({"noise_scale": scale}) for scale in (1.0, 2.0)]
    one, two = (sample(pipeline, latents=noise()) for pipeline in pipelines)
    assert not torch.allclose(one, two, atol=1e-2)
    assert torch.equal(sample(pipelines[0], latents=2 * noise()), two)
    drawn = torch.randn(2, 3, 16, 16, generator=seed())
    assert torch.equal(sample(pipelines[1], generator=seed()), sample(pipelines[1], latents=drawn))


def test_latents_given_are_left_alone(make_pipeline):
    latents = noise()
    sample(make_pipeline(), latents=latents)
    assert torch.equal(latents, noise())


# Guidance


def test_guidance_is_the_published_formula_in_one_batched_call(make_pipeline, evaluations):
    pipeline = make_pipeline(scheduler=JiTFlowMatchScheduler(solver="euler"))
    calls = evaluations(pipeline)
    images = sample(pipeline, [1, 2], steps=1, latents=noise(), guidance_scale=3.0, guidance_interval=(0.0, 1.0))
    assert calls == [(4, 0.0, [1, 2, 10, 10])]

    z, transformer = noise(), pipeline.transformer
    with torch.no_grad():
        velocity, null = (
            transformer.velocity(transformer(z, 0.0, torch.tensor(labels)).sample, z, 0.0)
            for labels in ([1, 2], [10, 10])
        )
    torch.testing.assert_close(images, z + null + 3.0 * (velocity - null), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "interval, guided",
    [
        # t = 0, 0.1, …, 0.9: strict bounds, except that low = 0 includes the start.
        ((0.0, 1.0), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ((0.1, 1.0), [2, 3, 4, 5, 6, 7, 8, 9]),
        ((0.0, 0.1), [0]),
        ((0.3, 0.7), [4, 5, 6]),
        ((0.25, 0.75), [3, 4, 5, 6, 7]),
        ((0.9, 1.0), []),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "scheduler",
    [JiTFlowMatchScheduler(solver="euler"), FlowMatchEulerDiscreteScheduler()],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_the_batch_doubles_strictly_inside_the_interval_alone(make_pipeline, evaluations, scheduler, interval, guided):
    pipeline = make_pipeline(scheduler=scheduler)
    calls = evaluations(pipeline)
    sample(pipeline, steps=10, guidance_scale=2.0, guidance_interval=interval)
    assert [index for index, (size, _, _) in enumerate(calls) if size == 4] == guided
    assert {size for size, _, _ in calls} <= {2, 4}


def test_bounds_on_the_grid_are_compared_in_float32_as_published(make_pipeline, evaluations):
    pipeline = make_pipeline(SHALLOW)
    calls = evaluations(pipeline)
    for steps in (10, 49, 50):
        grid = torch.linspace(0.0, 1.0, steps + 1)
        for low, high in ((grid[steps // 10], grid[-2]), (grid[3], grid[7])):
            calls.clear()
            low, high = low.item(), high.item()
            sample(pipeline, steps=steps, guidance_scale=2.0, guidance_interval=(low, high))
            times = torch.tensor([time for _, time, _ in calls])
            assert set(times.tolist()) <= set(grid.tolist())
            assert [size == 4 for size, _, _ in calls] == ((times < high) & (times > low)).tolist()


@pytest.mark.parametrize(
    "scheduler",
    [
        JiTFlowMatchScheduler(),
        FlowMatchEulerDiscreteScheduler(),
        FlowMatchHeunDiscreteScheduler(),
        UniPCMultistepScheduler(**FLOW),
        DPMSolverMultistepScheduler(**FLOW),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_guidance_scale_one_never_doubles_the_batch(make_pipeline, evaluations, scheduler):
    pipeline = make_pipeline(scheduler=scheduler)
    calls = evaluations(pipeline)
    sample(pipeline, guidance_scale=1.0, guidance_interval=(0.0, 1.0))
    assert {(size, tuple(labels)) for size, _, labels in calls} == {(2, (1, 2))}


def test_one_class_never_doubles_the_batch_and_says_so(make_pipeline, evaluations, monkeypatch):
    pipeline = make_pipeline({"num_classes": 1})
    calls = evaluations(pipeline)
    unguided = sample(pipeline, [0, 0], latents=noise())
    # diffusers' loggers do not propagate, so pytest's caplog would see nothing.
    warnings = []
    module = __import__(type(pipeline).__module__, fromlist=["logger"])
    monkeypatch.setattr(module.logger, "warning", warnings.append)
    guided = sample(pipeline, [0, 0], latents=noise(), guidance_scale=3.0, guidance_interval=(0.0, 1.0))
    assert torch.equal(guided, unguided)
    assert {size for size, _, _ in calls} == {2}
    assert len(warnings) == 1
    assert "`guidance_scale=3.0` has no effect" in warnings[0]


def test_saved_guidance_is_used_unless_a_call_names_another(make_pipeline):
    plain = make_pipeline()
    saved = make_pipeline(guidance_scale=3.0, guidance_interval=(0.2, 0.8))
    named = sample(plain, latents=noise(), guidance_scale=3.0, guidance_interval=(0.2, 0.8))
    assert torch.equal(sample(saved, latents=noise()), named)
    assert torch.equal(sample(saved, latents=noise(), guidance_scale=1), sample(plain, latents=noise()))
    assert not torch.equal(named, sample(plain, latents=noise()))


# The loop


@pytest.mark.parametrize(
    "scheduler, evaluated",
    [
        (JiTFlowMatchScheduler(), 11),
        (JiTFlowMatchScheduler(solver="euler"), 6),
        (FlowMatchEulerDiscreteScheduler(), 6),
        (FlowMatchHeunDiscreteScheduler(), 11),
        (UniPCMultistepScheduler(**FLOW), 6),
        (DPMSolverMultistepScheduler(**FLOW), 6),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, int) else str(value),
)
def test_the_progress_bar_counts_steps_whatever_the_evaluations(
    make_pipeline, evaluations, monkeypatch, scheduler, evaluated
):
    pipeline = make_pipeline(scheduler=scheduler)
    calls, bars = evaluations(pipeline), []
    make_bar = pipeline.progress_bar
    monkeypatch.setattr(pipeline, "progress_bar", lambda **kw: bars.append(make_bar(**kw)) or bars[-1])
    pipeline.set_progress_bar_config(disable=False)
    sample(pipeline, steps=6)
    assert len(calls) == pipeline.num_timesteps == evaluated
    assert (bars[0].n, bars[0].total) == (6, 6)


def test_a_callback_sees_and_replaces_the_latents(make_pipeline):
    pipeline, seen = make_pipeline(), []

    def callback(pipe, index, timestep, tensors):
        assert pipe is pipeline
        assert set(tensors) == {"latents"}
        assert tensors["latents"].dtype == torch.float32
        assert pipe.current_timestep == timestep
        seen.append((index, float(timestep)))
        if index == pipe.num_timesteps - 1:
            return {"latents": torch.zeros_like(tensors["latents"])}
        return tensors

    assert sample(pipeline, steps=3, callback_on_step_end=callback).abs().max() == 0
    assert [index for index, _ in seen] == [0, 1, 2, 3, 4]
    assert [time for _, time in seen] == pipeline.scheduler.timesteps.tolist()
    assert pipeline.current_timestep is None


def test_a_callback_may_return_nothing_of_interest(make_pipeline):
    pipeline = make_pipeline()
    expected = sample(pipeline, latents=noise())
    assert torch.equal(sample(pipeline, latents=noise(), callback_on_step_end=lambda *_: {}), expected)
    kept = sample(pipeline, latents=noise(), callback_on_step_end=lambda *_: {}, callback_on_step_end_tensor_inputs=[])
    assert torch.equal(kept, expected)


def test_a_callback_can_turn_guidance_off(make_pipeline, evaluations):
    pipeline = make_pipeline(scheduler=JiTFlowMatchScheduler(solver="euler"))
    calls = evaluations(pipeline)

    def callback(pipe, index, timestep, tensors):
        if index == 2:
            pipe._guidance_scale = 1.0
        return tensors

    sample(pipeline, steps=6, guidance_scale=2.0, guidance_interval=(0.0, 1.0), callback_on_step_end=callback)
    assert [size for size, _, _ in calls] == [4, 4, 4, 2, 2, 2]
    assert pipeline.guidance_scale == 1.0
    sample(pipeline, guidance_scale=2.0)
    assert pipeline.guidance_scale == 2.0


def test_a_callback_can_interrupt(make_pipeline, evaluations):
    pipeline = make_pipeline()
    calls = evaluations(pipeline)

    def callback(pipe, index, timestep, tensors):
        pipe._interrupt = index == 1
        return tensors

    assert sample(pipeline, steps=6, callback_on_step_end=callback).isfinite().all()
    assert len(calls) == 2
    calls.clear()
    sample(pipeline, steps=6)
    assert len(calls) == 11


# Numbers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_as_one_forward_does_however_many_steps(make_pipeline, tmp_path, dtype):
    pipeline = make_pipeline(SHALLOW)
    transformer, latents, labels = pipeline.transformer, noise(4, 3, 16, 16), torch.arange(4)
    transformer.save_pretrained(tmp_path)
    half = make_pipeline(JiTTransformer2DModel.from_pretrained(tmp_path, dtype=dtype))

    def rms(difference):
        return difference.float().square().mean().sqrt().item()

    with torch.no_grad():
        one_forward = max(
            rms(half.transformer(latents, t, labels).sample - transformer(latents, t, labels).sample)
            for t in (0.0, 0.5, 1.0)
        )
    errors = []
    for steps in (10, 30, 90):
        images = sample(half, labels.tolist(), steps, latents=latents)
        assert images.dtype == torch.float32
        assert images.isfinite().all()
        errors.append(rms(images - sample(pipeline, labels.tolist(), steps, latents=latents)))
    # Measured, float32 state: 0.6 to 1.1 of one forward, falling with the steps.
    assert max(errors) < 1.5 * one_forward
    assert errors[2] < 1.1 * errors[1] < 1.2 * errors[0]


def test_the_state_stays_float32_in_a_pipeline_cast_to_bfloat16(make_pipeline):
    pipeline = make_pipeline(guidance_scale=2.0).to(torch.bfloat16)
    states = []
    pipeline.transformer.register_forward_pre_hook(lambda module, arguments: states.append(arguments[0].dtype))
    images = sample(
        pipeline, callback_on_step_end=lambda pipe, i, t, tensors: states.append(tensors["latents"].dtype) or tensors
    )
    assert set(states) == {torch.float32}
    assert images.dtype == torch.float32


# Other schedulers


@pytest.mark.parametrize("steps", [1, 10, 50])
def test_flow_match_euler_walks_the_methods_grid(make_pipeline, steps):
    pipeline = make_pipeline(guidance_scale=2.0, scheduler=JiTFlowMatchScheduler(solver="euler"))
    expected = sample(pipeline, steps=steps, latents=noise())
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    torch.testing.assert_close(sample(pipeline, steps=steps, latents=noise()), expected, rtol=0, atol=2e-6)


@pytest.fixture(scope="module")
def limit(make_pipeline):
    """A pipeline, and the image its Heun steps converge to."""
    pipeline = make_pipeline(SHALLOW, guidance_scale=2.0)
    return pipeline, sample(pipeline, steps=150, latents=noise())


@pytest.mark.parametrize(
    "scheduler",
    [
        JiTFlowMatchScheduler(solver="euler"),
        FlowMatchEulerDiscreteScheduler(),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        FlowMatchHeunDiscreteScheduler(),
        UniPCMultistepScheduler(**FLOW),
        UniPCMultistepScheduler(**FLOW, solver_order=3),
        DPMSolverMultistepScheduler(**FLOW),
        DPMSolverMultistepScheduler(**FLOW, solver_order=3, euler_at_final=True),
        DPMSolverSinglestepScheduler(**FLOW, lower_order_final=True),
        DEISMultistepScheduler(**FLOW),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_every_flow_scheduler_converges_to_the_same_image(limit, scheduler):
    pipeline, expected = limit
    pipeline.scheduler = scheduler
    errors = [(sample(pipeline, steps=steps, latents=noise()) - expected).abs().max().item() for steps in (10, 100)]
    assert errors[1] < 0.06
    assert errors[1] < 0.3 * errors[0]


def test_the_smallest_sigma_of_dpm_solver_may_stay_in_the_image(make_pipeline):
    pipeline = make_pipeline(scheduler=DPMSolverMultistepScheduler(**FLOW, final_sigmas_type="sigma_min"))
    assert sample(pipeline, steps=20).isfinite().all()


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(),
        DPMSolverMultistepScheduler(),
        DPMSolverMultistepScheduler(prediction_type="flow_prediction"),
        UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="epsilon"),
        IPNDMScheduler(),
        MiniMaxH3Scheduler(),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_a_scheduler_that_does_not_integrate_flows_is_refused_before_any_model_call(
    make_pipeline, evaluations, scheduler
):
    pipeline = make_pipeline(scheduler=scheduler)
    calls = evaluations(pipeline)
    with pytest.raises(ValueError, match=f"{type(scheduler).__name__} is not set up for flow matching"):
        pipeline(1)
    assert calls == []


# Saving and loading


def test_a_pipeline_survives_saving_and_loading_twice(make_pipeline, tmp_path):
    pipeline = make_pipeline(id2label=NAMES, guidance_scale=2.5, guidance_interval=(0.2, 0.9))
    expected = sample(pipeline, latents=noise())
    pipeline.save_pretrained(tmp_path / "one")
    PixelREPAPipeline.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    loaded = PixelREPAPipeline.from_pretrained(tmp_path / "two")
    loaded.set_progress_bar_config(disable=True)
    assert (tmp_path / "one" / "model_index.json").read_text() == (tmp_path / "two" / "model_index.json").read_text()
    assert loaded.config.id2label == {str(key): name for key, name in NAMES.items()}
    assert (loaded.config.guidance_scale, loaded.config.guidance_interval) == (2.5, [0.2, 0.9])
    assert_close(sample(loaded, ["goldfish", 2], latents=noise()), expected)
    assert type(loaded) is PixelREPAPipeline
    assert type(loaded.transformer) is JiTTransformer2DModel
    assert type(loaded.scheduler) is JiTFlowMatchScheduler


def test_a_saved_pipeline_names_and_holds_its_own_code(make_pipeline, tmp_path):
    make_pipeline().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline_pixelrepa", "PixelREPAPipeline"]
    assert index["transformer"] == ["transformer_jit", "JiTTransformer2DModel"]
    assert index["scheduler"] == ["scheduling_jit", "JiTFlowMatchScheduler"]
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.py")} == {
        "pipeline_pixelrepa.py",
        "transformer/transformer_jit.py",
        "scheduler/scheduling_jit.py",
    }


@pytest.mark.parametrize(
    "scheduler",
    [
        JiTFlowMatchScheduler(solver="euler"),
        UniPCMultistepScheduler(**FLOW),
        DPMSolverMultistepScheduler(**FLOW),
        FlowMatchEulerDiscreteScheduler(shift=2.0),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_a_swapped_scheduler_is_saved_and_loaded(make_pipeline, tmp_path, scheduler):
    pipeline = make_pipeline()
    pipeline.scheduler = scheduler
    expected = sample(pipeline, latents=noise())
    pipeline.save_pretrained(tmp_path)
    loaded = PixelREPAPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.scheduler) is type(scheduler)
    assert_close(sample(loaded, latents=noise()), expected)


def test_variants_shards_and_types_load_through_the_pipeline(make_pipeline, tmp_path):
    pipeline = make_pipeline()
    expected = sample(pipeline, latents=noise())
    pipeline.save_pretrained(tmp_path, variant="fp16", max_shard_size="20KB")
    assert len(list((tmp_path / "transformer").glob("*.fp16-*.safetensors"))) > 2
    loaded = PixelREPAPipeline.from_pretrained(tmp_path, variant="fp16", dtype=torch.bfloat16)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.dtype == torch.bfloat16
    assert loaded.transformer.conditioning.time_embedding.linear_1.weight.dtype == torch.float32
    assert (sample(loaded, latents=noise()) - expected).abs().max() < 0.1


def test_components_can_be_given_when_loading(make_pipeline, tmp_path):
    pipeline = make_pipeline(id2label=NAMES)
    pipeline.save_pretrained(tmp_path)
    euler = JiTFlowMatchScheduler(solver="euler")
    loaded = PixelREPAPipeline.from_pretrained(
        tmp_path, transformer=pipeline.transformer, scheduler=euler, guidance_scale=4.0
    )
    assert loaded.transformer is pipeline.transformer
    assert loaded.scheduler is euler
    assert loaded.config.guidance_scale == 4.0


def test_from_pipe_shares_components_and_keeps_the_settings(make_pipeline):
    pipeline = make_pipeline(id2label=NAMES, guidance_scale=2.5)
    other = PixelREPAPipeline.from_pipe(pipeline)
    assert other.transformer is pipeline.transformer
    assert other.get_label_ids("goldfish") == [1]
    assert other.config.guidance_scale == 2.5
    changed = PixelREPAPipeline.from_pipe(pipeline, scheduler=FlowMatchEulerDiscreteScheduler(), guidance_scale=1.0)
    assert isinstance(changed.scheduler, FlowMatchEulerDiscreteScheduler)
    assert changed.config.guidance_scale == 1.0


def test_a_compiled_transformer_can_be_saved(make_pipeline, tmp_path):
    pipeline = make_pipeline()
    pipeline.transformer = torch.compile(pipeline.transformer, backend="eager")
    pipeline.save_pretrained(tmp_path)
    loaded = PixelREPAPipeline.from_pretrained(tmp_path)
    assert type(loaded.transformer) is JiTTransformer2DModel


# Offloading and caches


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_group_offloading_changes_nothing(make_pipeline, offload_type):
    pipeline = make_pipeline(guidance_scale=2.0)
    expected = sample(pipeline, latents=noise())
    pipeline.enable_group_offload(
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type=offload_type,
        num_blocks_per_group=1,
    )
    assert torch.equal(sample(pipeline, latents=noise()), expected)


def middle_of_the_schedule(pipeline):
    return lambda: pipeline.current_timestep.item()


CACHES = {
    "first block": lambda pipeline: FirstBlockCacheConfig(threshold=0.1),
    "MagCache": lambda pipeline: MagCacheConfig(mag_ratios=torch.ones(39), num_inference_steps=39, threshold=0.5),
    "TaylorSeer": lambda pipeline: TaylorSeerCacheConfig(cache_interval=3, taylor_factors_dtype=torch.float32),
    "TaylorSeer, whole model": lambda pipeline: TaylorSeerCacheConfig(
        cache_interval=2,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=["final_layer"],
        skip_predict_identifiers=[r".*_blocks\.\d+"],
    ),
    "pyramid attention broadcast": lambda pipeline: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=middle_of_the_schedule(pipeline)
    ),
    "SeaCache": lambda pipeline: SeaCacheConfig(
        raw_vision_callback=lambda module, args, kwargs: list(args[0].unsqueeze(2))
    ),
}


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 0.7)], ids=str)
@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_saves_work_changes_little_and_leaves_nothing_behind(make_pipeline, cache, interval):
    pipeline = make_pipeline({"in_context_start": 1}, guidance_scale=2.0, guidance_interval=interval)
    work = []
    pipeline.transformer.transformer_blocks[1].attn.to_q.register_forward_pre_hook(lambda *_: work.append(1))

    def run():
        work.clear()
        return sample(pipeline, steps=20, latents=noise()), len(work)

    expected, full = run()
    pipeline.transformer.enable_cache(CACHES[cache](pipeline))
    images, cached = run()
    assert full == 39
    assert cached < 32
    assert 0 < (images - expected).abs().max() < 0.5
    # A call that ended early leaves a state the next call must not see.
    with pytest.raises(ZeroDivisionError):
        sample(
            pipeline, steps=20, latents=-noise(), callback_on_step_end=lambda pipe, index, *_: {"x": 1 // (9 - index)}
        )
    assert torch.equal(run()[0], images)
    pipeline.transformer.disable_cache()
    again, undone = run()
    assert undone == full
    assert torch.equal(again, expected)


@pytest.mark.parametrize(
    "config, reason",
    [
        (FasterCacheConfig(current_timestep_callback=lambda: 500), "every evaluation to be guided"),
        (TextKVCacheConfig(), "no text"),
        (TaylorSeerCacheConfig(use_lite_mode=True), "`proj_out`"),
        (SeaCacheConfig(), "`raw_vision_callback`"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_a_cache_that_does_not_fit_is_refused(make_transformer, config, reason):
    transformer = make_transformer()
    with pytest.raises(ValueError, match=f"{type(config).__name__} does not fit this model: .*{reason}"):
        transformer.enable_cache(config)
    assert not transformer.is_cache_enabled


def test_the_class_names_every_cache_that_fits():
    named = set(re.findall(r"`(\w+Config)`", JiTTransformer2DModel.__doc__))
    assert named == {type(make(None)).__name__ for make in CACHES.values()}
