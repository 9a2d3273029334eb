"""Every public way in refuses what it cannot take, by name: the value that was given, and what is allowed or to be done.

A refusal comes out of this project's own code, not from deep inside a library, before anything is computed or written.
"""

import json
import math
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torch.nn as nn
import yaml
from diffusers import DDIMScheduler
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from training_runs import TEACHER, arguments, load_script, write_images
from transformers import HfArgumentParser

from pixelrepa_diffusers import JiTFlowMatchScheduler, JiTTransformer2DModel, PixelREPAPipeline, get_preset
from pixelrepa_diffusers import evaluation as metrics
from pixelrepa_diffusers.adapter import ConvProjector, MaskedTransformerAdapter, MLPProjector
from pixelrepa_diffusers.commands import (
    convert_checkpoint,
    evaluate,
    generate,
    prepare_dataset,
    prepare_reference,
    probe_alignment,
    publish,
)
from pixelrepa_diffusers.conversion import load_original_checkpoint
from pixelrepa_diffusers.ema import ConstantDecayEMA
from pixelrepa_diffusers.evaluation import (
    FeatureBank,
    FeatureMoments,
    FeatureStatistics,
    InceptionNetwork,
    InceptionScoreSums,
    VisionEncoderNetwork,
    finished_record,
    frechet_distance,
    precision_recall,
    stack_images,
)
from pixelrepa_diffusers.images import center_crop_adm, make_grid, to_uint8
from pixelrepa_diffusers.objective import PixelREPAObjective, draw_keep_mask, draw_timesteps, drop_labels
from pixelrepa_diffusers.teacher import SemanticTeacher
from pixelrepa_diffusers.training.arguments import parse_arguments
from pixelrepa_diffusers.training.data import DataArguments, ImageLoader, open_source


benchmark = load_script("benchmarks/sampling.py")
prepare_teacher = load_script("examples/digits/prepare_teacher.py")
run_ablation = load_script("examples/digits/run_ablation.py")
score_digits = load_script("examples/digits/score_digits.py")
train_pixelrepa = load_script("training/train_pixelrepa.py")


ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = Path(__file__).parent / "fixtures" / "reference_a" / "checkpoint-last.pth"
NAN, INF = math.nan, math.inf
MANY = 10**9


def refused(named: str, call, error: type[Exception] = ValueError) -> None:
    """`call` ends in an `error` whose message has `named` (a pattern) in it, and which our own code raised."""
    with pytest.raises(error, match=f"(?s){named}") as caught:
        call()
    place = Path(caught.traceback[-1].path).resolve()
    assert any(place.is_relative_to(ROOT / part) for part in ("src", "training", "pipelines")), f"raised in {place}"


def shown(value) -> str:
    return re.escape(repr(value))


def bad(*changes: tuple[dict, str]):
    """Cases of keyword arguments and what their refusal says."""
    return pytest.mark.parametrize(
        "given, named", changes, ids=[f"{number}-{'-'.join(given)}" for number, (given, _) in enumerate(changes)]
    )


# -------------------------------------------------------------------------------------------- the transformer


@bad(
    *(({name: value}, rf"`{name}` must be a positive integer of at most \d+, got {shown(value)}")
      for name in ("sample_size", "patch_size", "in_channels", "num_layers", "num_attention_heads", "num_classes")
      for value in (0, -1, True, "16", 4.0, NAN, None, MANY)),
    *(({"attention_head_dim": value}, rf"`attention_head_dim` must be a .*integer.*, got {shown(value)}") for value in (0, 8.0)),
    *(({"bottleneck_dim": value}, f"`bottleneck_dim` must be a .*integer.*, got {shown(value)}") for value in (0, False)),
    ({"attention_head_dim": 6}, "`attention_head_dim` must be a multiple of 4 .* got 6"),
    ({"patch_size": 5}, "`patch_size` must divide `sample_size`: 16 is not a multiple of 5.* 15 and 20"),
    ({"patch_size": 32}, "`patch_size` must divide `sample_size`: 16 is not a multiple of 32"),
    ({"sample_size": 17}, "`patch_size` must divide `sample_size`: 17.* 16 and 20"),
    *(({"in_context_len": value}, f"`in_context_len` must be an integer of at least 0, .* got {shown(value)}")
      for value in (-1, 1.0, True, MANY)),
    *(({"in_context_start": value}, f"`in_context_start` must name one of the 4 blocks, 0 to 3, got {shown(value)}")
      for value in (-1, 4, 2.0, True, None)),
    *(({"dropout": value}, rf"`dropout` must lie in \[0, 1\), got {shown(value)}") for value in (-0.1, 1, NAN, INF, True)),
    *(({"t_eps": value}, rf"`t_eps` must lie in \(0, 1\), got {shown(value)}") for value in (0, 1, -0.05, NAN, True)),
    *(({name: value}, f"`{name}` must be positive and finite, got {shown(value)}")
      for name in ("noise_scale", "norm_eps") for value in (0, -1.0, NAN, INF, "1", None, True)),
    *(({"mlp_ratio": value}, f"`mlp_ratio` must be a positive number of at most 1024 .* got {shown(value)}")
      for value in (0, -4.0, 1e-3, NAN, INF, "4", True)),
)  # fmt: skip
def test_a_transformer_of_impossible_settings_is_refused(make_transformer, given, named):
    refused(named, lambda: make_transformer(**given))


LABELS = torch.tensor([1, 2])
IMAGES = torch.zeros(2, 3, 16, 16)


@bad(
    ({"hidden_states": IMAGES.to(torch.uint8)}, "`hidden_states` must be a floating point tensor.* got torch.uint8"),
    ({"hidden_states": IMAGES.numpy()}, "`hidden_states` must be a floating point tensor.* got ndarray"),
    ({"hidden_states": None}, "`hidden_states` must be a floating point tensor.* got NoneType"),
    ({"hidden_states": IMAGES[:, :1]}, r"\(batch_size, 3, 16, 16\), got \(2, 1, 16, 16\)"),
    ({"hidden_states": IMAGES[0]}, r"\(batch_size, 3, 16, 16\), got \(3, 16, 16\)"),
    ({"hidden_states": IMAGES[..., :8]}, r"\(batch_size, 3, 16, 16\), got \(2, 3, 16, 8\)"),
    ({"timestep": torch.zeros(3)}, r"`timestep` must be one time or have the shape \(2,\).* got \(3,\)"),
    ({"timestep": torch.zeros(2, 1)}, r"`timestep` must be one time or have the shape \(2,\).* got \(2, 1\)"),
    ({"timestep": "0.5"}, r"`timestep` must be a number or a tensor of times t in \[0, 1\], got '0.5'"),
    ({"timestep": None}, "`timestep` must be a number .* got None"),
    ({"timestep": True}, "`timestep` must be a number .* got True"),
    ({"class_labels": [1, 2]}, r"`class_labels` must be a tensor of class ids, got \[1, 2\]"),
    ({"class_labels": None}, "`class_labels` must be a tensor of class ids, got None"),
    ({"class_labels": LABELS.float()}, "`class_labels` must be integers .* got torch.float32"),
    ({"class_labels": LABELS.bool()}, "`class_labels` must be integers .* got torch.bool"),
    ({"class_labels": LABELS[:1]}, r"`class_labels` must have the shape \(2,\), .* got \(1,\)"),
    ({"alignment_depth": 4}, r"`alignment_depth` must lie in \[0, 3\] .* got 4"),
    ({"alignment_depth": 1.5}, r"`alignment_depth` must lie in \[0, 3\] .* got 1.5"),
)
def test_a_transformer_call_of_wrong_inputs_is_refused(make_transformer, given, named):
    arguments = {"hidden_states": IMAGES, "timestep": 0.5, "class_labels": LABELS, **given}
    refused(named, lambda: make_transformer()(**arguments))


@bad(
    (
        {"prediction": IMAGES[:1]},
        r"`prediction` and `sample` must have one shape, got \(1, 3, 16, 16\) and \(2, 3, 16",
    ),
    ({"timestep": torch.zeros(3)}, r"`timestep` must be one time or have the shape \(2,\).* got \(3,\)"),
)
def test_a_velocity_of_wrong_inputs_is_refused(make_transformer, given, named):
    arguments = {"prediction": IMAGES, "sample": IMAGES, "timestep": 0.5, **given}
    refused(named, lambda: make_transformer().velocity(**arguments))


# --------------------------------------------------------------------------------------------------- the scheduler


@bad(
    *(({"num_train_timesteps": value}, f"`num_train_timesteps` must be a positive integer .* got {value}")
      for value in (0, -1, True, 1000.0, NAN, None, MANY)),
    *(({"solver": value}, f'`solver` must be "heun" or "euler", got {shown(value)}') for value in ("rk4", "", None, 2)),
)  # fmt: skip
def test_a_scheduler_of_impossible_settings_is_refused(given, named):
    refused(named, lambda: JiTFlowMatchScheduler(**given))


@bad(
    *(({"steps": value}, f"`num_inference_steps` must be an integer of at least 1, got {shown(value)}")
      for value in (-3, 2.5, NAN, "5", True, None, [5])),
    *(({"begin": value}, f"`begin_index` must be an integer from 0 to 2, got {shown(value)}")
      for value in (-1, 3, 1.0, True, None, "0")),
    ({"timestep": 123.0}, "123.0 is not one of this scheduler's timesteps; .* from 1000 to 500"),
    ({"timestep": NAN}, "nan is not one of this scheduler's timesteps"),
    ({"timestep": 1}, "`timestep` must be an entry of `scheduler.timesteps`, not an index, got 1"),
    ({"model_output": IMAGES[:1]}, r"`model_output` and `sample` must have one shape, got \(1, 3, 16, 16\) and \(2"),
    ({"noise": IMAGES[:1]}, r"`noise` and `sample` must have one shape, got \(1, 3, 16, 16\) and \(2, 3, 16, 16\)"),
    ({"noise": IMAGES, "timestep": torch.zeros(3)}, r"`timestep` must be one number or have .* \(2,\).* got \(3,\)"),
)  # fmt: skip
def test_a_scheduler_call_of_wrong_inputs_is_refused(given, named):
    scheduler = JiTFlowMatchScheduler()

    def call():
        scheduler.set_timesteps(given.get("steps", 2) if "steps" in given else 2)
        if "begin" in given:
            scheduler.set_begin_index(given["begin"])
        elif "noise" in given:
            scheduler.scale_noise(IMAGES, given.get("timestep", 500.0), given["noise"])
        else:
            scheduler.step(given.get("model_output", IMAGES), given.get("timestep", 1000.0), IMAGES)

    refused(named, call)


# ---------------------------------------------------------------------------------------------------- the pipeline


@bad(
    ({"transformer": None}, "`transformer` must be a JiTTransformer2DModel, got NoneType"),
    ({"transformer": nn.Linear(1, 1)}, "`transformer` must be a JiTTransformer2DModel, got Linear, .* no sample_size"),
    ({"transformer": JiTFlowMatchScheduler()}, "`transformer` must be .* got JiTFlowMatchScheduler"),
    ({"scheduler": None}, "`scheduler` must be a JiTFlowMatchScheduler .* got NoneType"),
    ({"scheduler": "heun"}, "`scheduler` must be a JiTFlowMatchScheduler .* got str"),
    *(({"guidance_scale": value}, f"`guidance_scale` must be a finite number of at least 0 .* got {shown(value)}")
      for value in (-1, NAN, INF, True, "2", None, [2.0])),
    *(({"guidance_interval": value}, f"`guidance_interval` must be a pair .* got {shown(value)}")
      for value in ((0.1,), (0.1, 0.5, 1.0), 0.5, None, ("0", "1"), (False, True), [])),
    *(({"guidance_interval": value}, r"`guidance_interval` must satisfy 0 ≤ low < high ≤ 1 .* got")
      for value in ((0.9, 0.1), (0.5, 0.5), (-0.1, 1), (0, 1.1), (NAN, 1), (0, INF))),
    ({"id2label": ["a"]}, "`id2label` must be a dictionary of class ids to names, got list"),
    ({"id2label": {10: "ten"}}, "`id2label` has the key 10; its keys are class ids from 0 to 9"),
    ({"id2label": {1.0: "one"}}, "`id2label` has the key 1.0; its keys are class ids from 0 to 9"),
    ({"id2label": {1: None}}, r"`id2label\[1\]` must be a name, got None"),
    ({"id2label": {1: ""}}, r"`id2label\[1\]` must be a name, got ''"),
)  # fmt: skip
def test_a_pipeline_of_impossible_parts_is_refused(make_transformer, given, named):
    arguments = {"transformer": make_transformer(), "scheduler": JiTFlowMatchScheduler(), **given}
    refused(named, lambda: PixelREPAPipeline(**arguments))


@bad(
    *(({"class_labels": value}, f"Class id {label} is out of range: this model knows the ids 0 to 9")
      for value, label in ((10, 10), (-1, -1), ([0, 99], 99), (torch.tensor([0, 10]), 10), (10**30, 10**30))),
    *(({"class_labels": value}, f"`class_labels` must be integers or names, .* got {shown(label)}")
      for value, label in ((1.0, 1.0), (NAN, NAN), (True, True), (None, None), ([1, 2.5], 2.5), ({1}, {1}))),
    ({"class_labels": []}, "`class_labels` is empty; give one class id or name per image"),
    ({"class_labels": [1, "dog"]}, "There is no class called 'dog'. See `pipe.config.id2label`"),
    ({"class_labels": ["same", 1]}, r"The name 'same' stands for the classes \[1, 2\]; give the id"),
    *(({"guidance_scale": value}, f"`guidance_scale` must be a finite number .* got {shown(value)}")
      for value in (-0.1, -INF, True, "3")),
    *(({"guidance_interval": value}, "`guidance_interval` must") for value in ((1.0, 0.1), (0, 2), "01", (True, False))),
    *(({"num_inference_steps": value}, f"`num_inference_steps` must be an integer of at least 1, got {shown(value)}")
      for value in (0, -1, 2.0, NAN, True, "2", None)),
    *(({"output_type": value}, f'`output_type` must be "pil", "np", "pt" or "latent", got {shown(value)}')
      for value in ("jpeg", None, 0, ["pil"])),
    ({"latents": torch.zeros(1, 3, 16, 16)}, r"`latents` must be a tensor of the shape \(2, 3, 16, 16\), got \(1, 3"),
    ({"latents": torch.zeros(2, 3, 16)}, r"`latents` must be a tensor of the shape \(2, 3, 16, 16\), got \(2, 3, 16\)"),
    ({"latents": [1.0]}, "`latents` must be a tensor of the shape .* got list"),
    ({"latents": torch.zeros(2, 3, 16, 16, dtype=torch.int64)}, "`latents` must be floating point .* got torch.int64"),
    ({"latents": torch.full((2, 3, 16, 16), NAN)}, "`latents` contains values that are not finite; .* unit noise"),
    ({"generator": [torch.Generator()]}, "1 generators were given for 2 images; give one for each, or a single one"),
    ({"generator": []}, "0 generators were given for 2 images"),
    ({"generator": [torch.Generator(), 1]}, "`generator` must be a `torch.Generator` or a list of them, got"),
    ({"generator": 42}, "`generator` must be a `torch.Generator` or a list of them, got 42"),
    *(({"callback_on_step_end_tensor_inputs": value}, r"may name \['latents'\], got " + re.escape(repr(value)))
      for value in (["images"], None, "latents", [None])),
    ({"callback_on_step_end": 3}, "`callback_on_step_end` must be a function or None, got 3"),
)  # fmt: skip
def test_a_pipeline_call_of_wrong_inputs_is_refused_before_the_model_runs(make_pipeline, given, named):
    pipeline = make_pipeline(id2label={0: "zero", 1: "same", 2: "same"})
    pipeline.transformer.forward = None  # any evaluation would fail otherwise than expected
    refused(named, lambda: pipeline(**{"class_labels": [1, 2], **given}))


def test_a_callback_that_returns_nothing_is_told_so(make_pipeline):
    named = "`callback_on_step_end` must return the dictionary .* got NoneType"
    refused(named, lambda: make_pipeline()(0, num_inference_steps=1, callback_on_step_end=lambda *_: None))


def test_a_scheduler_that_does_not_integrate_flows_is_refused(make_pipeline):
    refused("DDIMScheduler is not set up for flow matching", lambda: make_pipeline(scheduler=DDIMScheduler())(0))


JUNK = st.one_of(
    st.none(), st.booleans(), st.text(max_size=3), st.lists(st.integers(), max_size=2), st.binary(max_size=2),
    st.floats(max_value=-1e-9), st.sampled_from([NAN, INF, -INF, 1j]), st.dictionaries(st.text(), st.none(), max_size=1),
)  # fmt: skip
PROPERTY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@PROPERTY
@given(
    name=st.sampled_from(["sample_size", "num_layers", "num_classes", "in_context_start", "t_eps", "mlp_ratio"]),
    value=JUNK,
)
def test_whatever_is_no_number_in_range_is_no_setting_of_a_transformer(make_transformer, name, value):
    refused(f"`{name}` must .*, got|`{name}` must .*; got", lambda: make_transformer(**{name: value}))


@PROPERTY
@given(
    name=st.sampled_from(["guidance_scale", "guidance_interval", "num_inference_steps", "output_type", "latents"]),
    value=JUNK.filter(lambda value: value is not None),
)
def test_whatever_is_of_another_kind_is_no_argument_of_a_pipeline(make_pipeline, name, value):
    refused(f"`{name}` must", lambda: make_pipeline().__call__(0, **{name: value}))


@PROPERTY
@given(label=st.one_of(st.integers(min_value=10), st.integers(max_value=-1), st.floats(), st.booleans(), st.binary()))
def test_whatever_is_no_class_is_refused_by_its_value(make_pipeline, label):
    refused(re.escape(repr(label)), lambda: make_pipeline().get_label_ids([0, label]))


# -------------------------------------------------------------------------- adapter, projectors, teacher, objective, EMA


PROJECTORS = {
    MaskedTransformerAdapter: {
        "hidden_size": 16, "num_attention_heads": 2, "teacher_dim": 12, "num_layers": 1, "grid_size": 4,
        "in_context_len": 2, "num_classes": 10,
    },
    MLPProjector: {"hidden_size": 16, "teacher_dim": 12, "projector_dim": 8},
    ConvProjector: {"hidden_size": 16, "teacher_dim": 12, "grid_size": 4},
}  # fmt: skip


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "16", NAN, None, MANY])
@pytest.mark.parametrize(
    "kind, name",
    [(kind, name) for kind, names in PROJECTORS.items() for name in names if name != "in_context_len"],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_projector_of_impossible_sizes_is_refused(kind, name, value):
    named = rf"`{name}` must be a positive integer of at most \d+, got {shown(value)}"
    refused(named, lambda: kind(**{**PROJECTORS[kind], name: value}))


@bad(
    ({"num_attention_heads": 3}, "`hidden_size` must be heads × a head width that is a multiple of 4 .* got 16 for 3"),
    ({"hidden_size": 20}, "`hidden_size` must be heads × .* got 20 for 2 heads"),
    ({"in_context_len": -1}, "`in_context_len` must be an integer of at least 0, .* got -1"),
    ({"mlp_ratio": 0.0}, "`mlp_ratio` must be a positive number .* got 0.0"),
)
def test_an_adapter_of_impossible_settings_is_refused(given, named):
    refused(named, lambda: MaskedTransformerAdapter(**{**PROJECTORS[MaskedTransformerAdapter], **given}))


TOKENS = torch.zeros(2, 16, 16)
KEEP = torch.ones(2, 16, dtype=torch.bool)


@pytest.mark.parametrize(
    "kind, change, named",
    [
        *((kind, {"hidden_states": TOKENS[..., :8]}, r"tokens \(batch_size, tokens, 16\), .* shape \(2, 16, 8\)")
          for kind in PROJECTORS),
        *((kind, {"hidden_states": TOKENS[0]}, r"tokens \(batch_size, tokens, 16\), .* shape \(16, 16\)")
          for kind in PROJECTORS),
        *((kind, {"hidden_states": TOKENS.long()}, "floating point tokens .* got torch.int64") for kind in PROJECTORS),
        *((kind, {"hidden_states": TOKENS[:, 1:]}, r"Expected 4×4 = 16 tokens .* got \(2, 15, 16\)")
          for kind in (MaskedTransformerAdapter, ConvProjector)),
        *((kind, {"keep_mask": KEEP}, "has no mask token: `keep_mask` must be None")
          for kind in (MLPProjector, ConvProjector)),
        (MaskedTransformerAdapter, {"keep_mask": KEEP.float()}, "`keep_mask` must be a bool tensor .* got torch.float32"),
        (MaskedTransformerAdapter, {"keep_mask": KEEP[:, 1:]}, r"`keep_mask` must .* \(2, 16\), got .* \(2, 15\)"),
        (MaskedTransformerAdapter, {"timestep": torch.zeros(3)}, r"`timestep` must .* \(2,\).* got \(3,\)"),
        (MaskedTransformerAdapter, {"class_labels": LABELS.float()}, "`class_labels` must be integers .* torch.float32"),
        (MaskedTransformerAdapter, {"class_labels": [1, 2]}, r"`class_labels` must be a tensor .* got \[1, 2\]"),
    ],
    ids=lambda value: getattr(value, "__name__", "") if isinstance(value, type) else "",
)  # fmt: skip
def test_a_projector_call_of_wrong_inputs_is_refused(kind, change, named):
    arguments = {"hidden_states": TOKENS, "timestep": torch.zeros(2), "class_labels": LABELS, **change}
    refused(named, lambda: kind(**PROJECTORS[kind])(**arguments))


@bad(
    *(({name: value}, f"`{name}` must be a positive integer of at most 65536, got {shown(value)}")
      for name in ("grid_size", "image_size") for value in (0, -4, True, 4.0, "4", None, MANY)),
    ({"grid_size": 5}, "`image_size` must be a multiple of `grid_size`, got 32 and 5"),
    ({"mode": "crop"}, "`mode` must be 'resample' or 'resize', got 'crop'"),
    ({"dtype": "bf16"}, "`dtype` must be a floating point torch.dtype or None, got 'bf16'"),
    ({"dtype": torch.int8}, "`dtype` must be a floating point torch.dtype or None, got torch.int8"),
)  # fmt: skip
def test_a_teacher_of_impossible_settings_is_refused(given, named):
    arguments = {"grid_size": 4, "image_size": 32, **given}
    refused(named, lambda: SemanticTeacher.from_pretrained(str(TEACHER), **arguments))


@bad(
    ({"image_std": (0.0, 1.0, 1.0)}, r"`image_std` positive and finite, got .*\(0.0, 1.0, 1.0\)"),
    ({"image_mean": (NAN, 0.5, 0.5)}, "`image_mean` must be finite .* got .*nan"),
    ({"image_mean": (0.5,)}, r"need 3 numbers each, got \(0.5,\)"),
)
def test_a_teacher_of_impossible_normalisation_is_refused(given, named):
    teacher = SemanticTeacher.from_pretrained(str(TEACHER), 4, 32)
    arguments = {"image_mean": (0.5,) * 3, "image_std": (0.5,) * 3, **given}
    refused(named, lambda: SemanticTeacher(teacher.model, 4, 32, **arguments))


@pytest.mark.parametrize(
    "images, named",
    [
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), r"floating point pixels in \[-1, 1\], got torch.uint8"),
        (torch.zeros(2, 1, 32, 32), r"square RGB images \(batch_size, 3, side, side\), got \(2, 1, 32, 32\)"),
        (torch.zeros(3, 32, 32), r"square RGB images .* got \(3, 32, 32\)"),
        (np.zeros((2, 3, 32, 32)), "a tensor of images, got ndarray"),
        (None, "a tensor of images, got NoneType"),
    ],
    ids=["type", "channels", "dimensions", "array", "none"],
)
def test_a_teacher_given_no_images_is_told_so(images, named):
    refused(named, lambda: SemanticTeacher.from_pretrained(str(TEACHER), 4, 32)(images))


@bad(
    ({"transformer": None}, "`transformer` must be a JiTTransformer2DModel, got NoneType"),
    ({"projector": nn.Linear(1, 1)}, "`projector` must be a MaskedTransformerAdapter, .* or None, got Linear"),
    ({"projector": MLPProjector(8, 12, 8)}, "The projector's `hidden_size` is 8; with this transformer it must be 16"),
    ({"projector": ConvProjector(16, 12, 8)}, "The projector's `grid_size` is 8; with this transformer it must be 4"),
    *(({"alignment_weight": value}, f"`alignment_weight` must be a finite number of at least 0, got {shown(value)}")
      for value in (-0.1, NAN, INF, True, "0.1", None)),
    *(({"spatial_norm": value}, f"`spatial_norm` must be a finite number .* or None, got {shown(value)}")
      for value in (-1.0, NAN, "0.8", True)),
    *(({"alignment_depth": value}, rf"`alignment_depth` must lie in \[0, 3\], got {shown(value)}")
      for value in (-1, 4, 1.5, "1")),
)  # fmt: skip
def test_an_objective_of_impossible_parts_is_refused(make_transformer, given, named):
    refused(named, lambda: PixelREPAObjective(**{"transformer": make_transformer(), **given}))


@bad(
    ({"pixel_values": IMAGES.to(torch.uint8)}, r"`pixel_values` must be floating point images in \[-1, 1\], .*uint8"),
    ({"noise": IMAGES[:1]}, r"`noise` must have the shape of `pixel_values`, \(2, 3, 16, 16\), got \(1, 3, 16, 16\)"),
    ({"timestep": torch.zeros(3)}, r"`timestep` must .* \(2,\).* got \(3,\)"),
    ({"class_labels": LABELS.float()}, "`class_labels` must be integers .* got torch.float32"),
    ({"teacher_features": torch.zeros(2, 16, 5)}, "were given, but there is no projector to align"),
)
def test_an_objective_call_of_wrong_inputs_is_refused(make_transformer, given, named):
    arguments = {
        "pixel_values": IMAGES, "class_labels": LABELS, "timestep": torch.zeros(2), "noise": torch.zeros_like(IMAGES),
        **given,
    }  # fmt: skip
    refused(named, lambda: PixelREPAObjective(make_transformer())(**arguments))


@pytest.mark.parametrize("value", [-0.1, 1.1, NAN, INF, "0.2", None, True], ids=repr)
@pytest.mark.parametrize(
    "name, draw",
    [
        ("mask_ratio", lambda value: draw_keep_mask(2, 4, torch.Generator(), value)),
        ("probability", lambda value: drop_labels(LABELS, 10, torch.Generator(), value)),
    ],
    ids=["keep mask", "labels"],
)
def test_a_probability_outside_zero_and_one_is_refused(name, draw, value):
    refused(rf"`{name}` must lie in \[0, 1\], got {shown(value)}", lambda: draw(value))


@bad(*(({name: value}, f"`{name}` must be a finite number.*, got {shown(value)}")
       for name in ("P_mean", "P_std") for value in (NAN, INF, "0.8", None)), ({"P_std": -1.0}, "at least 0, got -1.0"))  # fmt: skip
def test_a_distribution_of_times_that_is_none_is_refused(given, named):
    refused(named, lambda: draw_timesteps(2, torch.Generator(), **given))


@bad(
    *(({"decays": value}, rf"`decays` must be one or more distinct numbers in \[0, 1\), got {shown(value)}")
      for value in ((), 0.9, None, "0.9", (1.0,), (-0.1,), (NAN,), (0.9, 0.9), ("0.9",), (0.9, None))),
    *(({"update_every": value}, f"`update_every` must be an integer of at least 1, got {shown(value)}")
      for value in (0, -1, 1.0, True, "2", None)),
)  # fmt: skip
def test_averages_of_impossible_settings_are_refused(given, named):
    refused(named, lambda: ConstantDecayEMA(nn.Linear(1, 1), **given))


@pytest.mark.parametrize("state", [{}, {"averages": {}}, {"num_calls": 1}, {"averages": [], "num_calls": 1}], ids=str)
def test_averages_do_not_load_what_is_no_state_of_theirs(state):
    refused(
        r"Not the state of these averages: .* got \[", lambda: ConstantDecayEMA(nn.Linear(1, 1)).load_state_dict(state)
    )


# ----------------------------------------------------------------------------------------- metrics, statistics, images


EYE = {"mu": np.zeros(2), "sigma": np.eye(2)}


@bad(
    ({"mu": "mean"}, "mu and sigma must be arrays of numbers: .*'mean'"),
    ({"mu": None}, r"must have shapes \(D,\) and \(D, D\), got \(\) and \(2, 2\)|arrays of numbers"),
    ({"mu": np.zeros(3)}, r"must have shapes \(D,\) and \(D, D\), got \(3,\) and \(2, 2\)"),
    ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, r"must have shapes .* got \(0,\)"),
    ({"mu": np.array([NAN, 0])}, "mu contains NaN or infinite values"),
    ({"sigma": np.diag([1, INF])}, "sigma contains NaN or infinite values"),
    ({"sigma": np.array([[1, 0.5], [0, 1]])}, "sigma is not symmetric: .* differ by up to 0.5"),
    ({"count": 0}, "count must be an integer, .* at least 1, or None, got 0"),
    ({"count": "3"}, "count must be an integer, .* got '3'"),
    ({"count": 3, "features": np.zeros((2, 2))}, r"features must have shape .* \(3, 2\), got \(2, 2\)"),
)
def test_statistics_that_are_none_are_refused(given, named):
    refused(named, lambda: FeatureStatistics(**{**EYE, **given}))


@pytest.mark.parametrize(
    "call, named",
    [
        (lambda: metrics.load("kid"), "There is no metric 'kid'; there are fid, inception_score"),
        (lambda: metrics.load(None), "There is no metric None; there are fid"),
        (lambda: metrics.load("fid", batch_size=0), "batch_size must be an integer of at least 1, got 0"),
        (lambda: metrics.load("fid", batch_size=2.0), "batch_size must be an integer of at least 1, got 2.0"),
        (lambda: metrics.load("fid", network="inception"), "network must be a torch.nn.Module or None, got 'inception'"),
        (lambda: metrics.load("fid", num_process=2), "num_process .* must stay 1"),
        (lambda: metrics.load("fid").compute(features=np.eye(3)[:, :2], reference=None),
         "reference must be a FeatureStatistics or the path of one, got None"),
        (lambda: metrics.load("fid").add_batch(), "Give either images or features"),
        (lambda: FeatureMoments().update("features"), r"Batch 0: features must be numbers .*'features'"),
        (lambda: FeatureMoments().update(None), r"Batch 0: features must .*got \(\)|Batch 0: features must be numbers"),
        (lambda: FeatureMoments().update([[1.0], [1.0, 2.0]]), "Batch 0: features must be numbers"),
        (lambda: FeatureMoments().update(np.zeros(3)), r"Batch 0: features must have shape .* got \(3,\)"),
        (lambda: FeatureMoments().update([[NAN]]), "Batch 0: NaN or infinite features in 1 of 1 rows"),
        (lambda: FeatureBank(np.int64), "FeatureBank keeps a numpy floating point type .* got .*int64"),
        (lambda: FeatureBank("float16"), "FeatureBank keeps a numpy floating point type .* got 'float16'"),
        (lambda: FeatureBank().update([[1e6]]), "a feature of size 1e.06 does not fit float16"),
        (lambda: InceptionScoreSums(10, splits=0), "of 10 images cannot be taken in 0 splits"),
        (lambda: InceptionScoreSums(10, splits=11), "of 10 images cannot be taken in 11 splits"),
        (lambda: InceptionScoreSums(10, splits=2.5), "of 10 images cannot be taken in 2.5 splits"),
        (lambda: InceptionScoreSums(10, shuffle_seed=-1), "shuffle_seed must be an integer in .* got -1"),
        (lambda: InceptionScoreSums(10).update([[1.0]], [10]), "Image index 10 is not in 0 … 9"),
        (lambda: InceptionScoreSums(10).compute(), "Only 0 of 10 images were counted; index 0 is missing"),
        (lambda: precision_recall(np.eye(5), np.eye(5), k=0), "k=0 needs an integer 1 ≤ k"),
        (lambda: precision_recall(np.eye(5), np.eye(5), k=1.5), "k=1.5 needs an integer 1 ≤ k"),
        (lambda: precision_recall(np.eye(5), np.eye(5), k=5), "k=5 needs .* got 5 generated images"),
        (lambda: precision_recall(np.eye(5), np.eye(5)[:, :2]), "Generated features have width 5, real ones 2"),
        (lambda: frechet_distance(np.zeros(2), np.eye(2), np.zeros(3), np.eye(3)), "must have one width, got means"),
        (lambda: frechet_distance(np.zeros(2), -np.eye(2), np.zeros(2), np.eye(2)), "Not a covariance: eigenvalues"),
        (lambda: VisionEncoderNetwork.from_pretrained(TEACHER, image_size=30), "multiple of the .* pixels, got 30"),
        (lambda: VisionEncoderNetwork.from_pretrained(TEACHER, image_size=28.0), "multiple of the .* pixels, got 28.0"),
        (lambda: VisionEncoderNetwork.from_pretrained(TEACHER, image_size=28, pooling="max"), "got 'max'"),
        (lambda: InceptionNetwork(layer="64x"), 'layer must be "64", "192", "768" or "2048", got \'64x\''),
        (lambda: stack_images([]), r"Images must be RGB arrays \(H, W, 3\) of one size, got the shapes \[\]"),
        (lambda: stack_images([np.zeros((2, 2), np.uint8)]), r"RGB arrays .* got the shapes \[\(2, 2\)\]"),
        (lambda: center_crop_adm(Image.new("RGB", (4, 4)), 0), "size must be .* positive number of pixels, got 0"),
        (lambda: center_crop_adm(Image.new("RGB", (4, 4)), 2.0), "size must be an integer, .* got 2.0"),
        (lambda: center_crop_adm(Image.new("RGB", (4, 4)), "2"), "size must be an integer, .* got '2'"),
        (lambda: to_uint8(torch.zeros(1), (1.0, 1.0)), r"black < white, got \(1.0, 1.0\)"),
        (lambda: to_uint8(torch.full((1,), NAN)), "NaN or infinite values"),
        (lambda: make_grid([]), "needs at least one image"),
        (lambda: make_grid([Image.new("RGB", (2, 2))], columns=0), "columns must be an integer of at least 1, got 0"),
        (lambda: make_grid([Image.new("RGB", (2, 2))], columns=1.5), "columns must be an integer .* got 1.5"),
        (lambda: make_grid([Image.new("RGB", (2, 2))], ["a", "b"]), "Got 2 labels for 1 images"),
    ],
    ids=lambda value: "" if callable(value) else value[:30],
)  # fmt: skip
def test_metrics_and_images_refuse_what_they_cannot_take(call, named):
    refused(named, call)


@pytest.mark.parametrize("name", ["JiT-X/16", "", None, 16, ["JiT-B/16"]], ids=repr)
def test_an_unknown_preset_is_refused_with_the_known_ones(name):
    refused(rf"no preset {shown(name)}. Known presets: JiT-B/16", lambda: get_preset(name), KeyError)


# ------------------------------------------------------------------------------------------------- the training script


@pytest.mark.parametrize(
    "words, named",
    [
        *((f"--{name} {value}", rf"--{name} must be at least 1, got {value}")
          for name in ("train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_train_steps",
                       "adapter_layers", "checkpointing_steps", "checkpoints_total_limit", "logging_steps",
                       "num_validation_images", "validation_inference_steps", "ema_update_every", "eval_num_samples",
                       "eval_inference_steps", "eval_batch_size", "eval_image_size", "dry_run_processes")
          for value in (0, -1)),
        *((f"--{name} -1", f"--{name} must be at least 0, got -1")
          for name in ("validation_steps", "eval_steps", "lr_warmup_steps", "stop_alignment_after_step",
                       "dataloader_num_workers")),
        *((f"--{name} {value}", rf"--{name} is a probability in \[0, 1\], got {value}")
          for name in ("mask_ratio", "label_drop_prob") for value in (-0.1, 1.5, "nan", "inf")),
        *((f"--{name} {value}", rf"--{name} must be positive and finite, got {value}")
          for name in ("learning_rate", "adam_epsilon", "P_std") for value in ("nan", "inf", -1.0)),
        *((f"--{name} {value}", rf"--{name} must be finite and at least 0, got {value}")
          for name in ("alignment_weight", "spatial_norm", "adam_weight_decay") for value in ("nan", "inf", -1.0)),
        *((f"--{name} {value}", rf"--{name} must lie in \[0, 1\), got {value}")
          for name in ("adam_beta1", "adam_beta2") for value in ("nan", 1.0, -0.5)),
        ("--P_mean nan", "--P_mean must be finite, got nan"),
        ("--ema_decays 1.0", r"--ema_decays must be distinct numbers in \[0, 1\), got \[1.0\]"),
        ("--ema_decays 0.9 0.9", r"--ema_decays must be distinct numbers in \[0, 1\), got \[0.9, 0.9\]"),
        ("--ema_decays nan", "--ema_decays must be distinct numbers"),
        ("--max_grad_norm 0", "--max_grad_norm must be positive, got 0.0; leave it out"),
        ("--max_grad_norm nan", "--max_grad_norm must be positive, got nan"),
        ("--seed -1", r"--seed must lie in \[0, 2\^63\), got -1"),
        ("--seed 9223372036854775808", "--seed must lie in .* got 9223372036854775808"),
        ("--train_batch_size 1.5", "--train_batch_size/--train-batch-size: invalid int value: '1.5'"),
        ("--learning_rate fast", "--learning_rate/--learning-rate: invalid float value: 'fast'"),
        ("--use_ema maybe", "use.ema: Truthy value expected: got maybe"),
        ("--preset JiT-Z/1", "no preset 'JiT-Z/1'. Known presets: JiT-B/16"),
        ("--objective repo", "invalid choice: 'repo' .*choose from.*pixelrepa"),
        ("--lr_scheduler staircase", "invalid choice: 'staircase'"),
        ("--mixed_precision fp8", "invalid choice: 'fp8'"),
        ("--on_nonfinite ignore", "invalid choice: 'ignore'"),
        ("--eval_metrics kid", "invalid choice: 'kid'"),
        ("--lerning_rate 1", "unknown arguments: --lerning_rate 1"),
        ("--config nowhere.yaml", "--config nowhere.yaml is not a file"),
        ("--streaming", "give --max_train_steps and --lr_warmup_steps"),
        ("--teacher_cache_dir d --streaming --max_train_steps 1 --lr_warmup_steps 0", "needs --center_crop and no --str"),
        ("--push_checkpoints", "need --push_to_hub"),
    ],
    ids=lambda value: value.replace(" ", "=") if value.startswith("--") else "",
)  # fmt: skip
def test_a_training_flag_out_of_range_is_named_with_its_range(words, named, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(words.split())
    assert re.search(named, capsys.readouterr().err, re.DOTALL)


@pytest.mark.parametrize(
    "text, named",
    [
        (b"seed: [1", "no YAML file of `name: value` lines"),
        (b"a: b: c", "no YAML file of `name: value` lines"),
        (b"\xff\xfe\x00", "no YAML file of `name: value` lines"),
        (b"seed: 2024-13-45", "no YAML file of `name: value` lines"),
        (b"- seed", "must hold `name: value` lines, got list"),
        (b"42", "must hold `name: value` lines, got int"),
        (b"lerning_rate: 1", "unknown arguments: lerning_rate"),
        (b"1: 2", "unknown arguments: 1"),
        (b"seed: {a: 1}", "seed must be a value or a list of values, it holds a dict"),
        (b"ema_decays: [[0.9]]", "ema_decays must be a value or a list of values, it holds a list"),
        (b"seed: true", "invalid int value: 'True'"),
        (b"learning_rate: .nan", "--learning_rate must be positive and finite, got nan"),
        (b"ema_decays: []", "--ema_decays/--ema-decays: expected at least one argument"),
    ],
    ids=str,
)
def test_a_training_file_that_cannot_be_is_named(tmp_path, text, named, capsys):
    (tmp_path / "run.yaml").write_bytes(text)
    with pytest.raises(SystemExit):
        parse_arguments(["--config", str(tmp_path / "run.yaml")])
    message = capsys.readouterr().err
    assert re.search(named, message, re.DOTALL) and "Traceback" not in message


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("photos") / "data", per_class=2)


@bad(
    ({"num_layers": 0}, "`num_layers` must be a positive integer .* got 0"),
    ({"dropout": 1.0}, r"`dropout` must lie in \[0, 1\), got 1.0"),
    ({"noise_scale": "nan"}, "`noise_scale` must be positive and finite, got nan"),
    ({"t_eps": 0.0}, r"`t_eps` must lie in \(0, 1\), got 0.0"),
    ({"in_context_start": 3}, "`in_context_start` must name one of the 3 blocks, 0 to 2, got 3"),
    ({"alignment_depth": 3}, r"`alignment_depth` must lie in \[0, 2\], got 3"),
    ({"resolution": 18}, "18 is not a multiple of 4. Nearest sizes that fit: 16 and 20"),
    ({"resolution": 0}, "resolution must be at least 1, got 0"),
    ({"patch_size": 3}, "16 is not a multiple of 3"),
    ({"mixed_precision": "fp16"}, "--mixed_precision fp16 cannot be had on cpu"),
    ({"guidance_scale": -1.0}, "`guidance_scale` must be a finite number of at least 0 .* got -1.0"),
    ({"guidance_interval": [0.9, 0.1]}, r"0 ≤ low < high ≤ 1 .* got \(0.9, 0.1\)"),
    ({"guidance_interval": [0.1]}, r"`guidance_interval` must be a pair \(low, high\), got \[0.1\]"),
    ({"train_batch_size": 64}, "6 images do not fill one global batch of 64"),
    ({"num_classes": 2}, r"Label 2 of image .* is outside \[0, 2\)"),
    ({"train_data_dir": None}, "Give exactly one source of images: --train_data_dir FOLDER or --dataset_name NAME"),
    ({"dataset_name": "x"}, "Give exactly one source of images"),
    ({"num_attention_heads": 2, "attention_head_dim": 6}, "`attention_head_dim` must be a multiple of 4 .* got 6"),
)
def test_a_run_that_cannot_be_is_refused_before_anything_is_kept(photos, tmp_path, given, named):
    words = arguments(photos, tmp_path / "run", **given)
    refused(named, lambda: train_pixelrepa.main(parse_arguments(words)))
    assert not list(tmp_path.glob("run/[!.]*"))  # the lock alone


@pytest.mark.parametrize("resume", ["nowhere", "data"])
def test_a_checkpoint_that_is_none_is_refused_by_its_path(photos, tmp_path, resume):
    path = photos if resume == "data" else tmp_path / "nowhere"
    words = arguments(photos, tmp_path / "run", resume_from_checkpoint=path)
    error, named = (
        (ValueError, "its name must be checkpoint-N") if resume == "data" else (FileNotFoundError, "nowhere")
    )
    refused(named, lambda: train_pixelrepa.main(parse_arguments(words)), error)


# ---------------------------------------------------------------------------------------------------------- data


@bad(
    *(({name: value}, f"--{name} must be at least 1, got {value}")
      for name in ("num_classes", "max_train_samples", "shuffle_buffer_size") for value in (0, -1)),
    ({"train_data_dir": "nowhere"}, "--train_data_dir nowhere is not a folder"),
    ({"unconditional": True, "num_classes": 3}, "--unconditional means one class, got --num_classes 3"),
    *(({name: value}, f"--{name} belongs to --dataset_name")
      for name, value in (("streaming", True), ("data_files", ["a.tar"]), ("dataset_config_name", "all"),
                          ("dataset_split", "test"), ("image_column", "jpg"), ("label_column", "cls"))),
)  # fmt: skip
def test_data_arguments_that_contradict_are_refused(photos, given, named):
    values = DataArguments(**{"train_data_dir": str(photos), **given})
    refused(named, lambda: open_source(values), FileNotFoundError if "nowhere" in named else ValueError)


PICTURE = {"bytes": b"", "path": None}


@pytest.mark.parametrize(
    "columns, change, named",
    [
        ({"picture": [PICTURE], "label": [0]}, {}, "no column 'image', only .*picture.*: set --image_column"),
        ({"image": [PICTURE], "class": [0]}, {}, "no column 'label', only .*class.*: set --label_column"),
        ({"image": [1.5], "label": [0]}, {}, "'image' .* holds Value.*float64.*, not images or encoded bytes"),
        ({"image": ["a.png"], "label": [0]}, {}, "'image' .* holds Value.*string.*, not images or encoded bytes"),
        ({"image": [PICTURE], "label": [1.5]}, {}, "'label' holds double, not integer or string labels"),
        ({"image": [PICTURE], "label": [[1]]}, {}, "'label' holds .*list.*, not integer or string labels"),
        ({"image": [PICTURE], "label": [None]}, {}, "1 of 1 rows have no label in column 'label'"),
        ({"image": [PICTURE], "label": [-1]}, {}, r"Label -1 of image .* is outside \[0, "),
        ({"image": [PICTURE], "label": [5]}, {"num_classes": 3}, r"Label 5 of image .* is outside \[0, 3\)"),
        ({"image": [], "label": []}, {}, "holds no images|cannot be read as a data set .* damaged or empty"),
        ({"image": [PICTURE], "label": [0]}, {"streaming": True}, "drop --streaming"),
    ],
)
def test_columns_that_are_no_images_and_classes_are_refused(tmp_path, columns, change, named):
    features = None
    if columns.get("image") in ([PICTURE], []):
        features = {"image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}}
        label = datasets.Dataset.from_dict({"label": columns.get("label", columns.get("class"))}).features["label"]
        features |= {name: label for name in columns if name != "image"}
        if columns.get("label") in ([], [None]):
            features["label"] = datasets.Value("int64")
        features = datasets.Features(features)
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "set")
    refused(named, lambda: open_source(DataArguments(dataset_name=str(tmp_path / "set"), **change)))


def test_an_image_that_is_missing_from_its_row_is_named(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict({"image": [None], "label": [0]}, features=features).save_to_disk(tmp_path / "set")
    source = open_source(DataArguments(dataset_name=str(tmp_path / "set")))
    refused("Row 0 of the data has no image", lambda: source[0])


@bad(
    ({"resolution": 0}, "resolution must be at least 1, got 0"),
    ({"batch_size": -1}, "batch_size must be at least 1, got -1"),
    ({"accumulation_steps": 0}, "accumulation_steps must be at least 1, got 0"),
    ({"rank": 2}, "rank must be in .* got rank 2 of 1"),
    ({"seed": -1}, r"seed must be in \[0, 2\*\*64\), got -1"),
    ({"on_bad_image": "ignore"}, 'on_bad_image must be "error" or "skip", got \'ignore\''),
    ({"batch_size": 7}, "6 images do not fill one global batch of 7"),
)
def test_a_loader_of_impossible_settings_is_refused(photos, given, named):
    source = open_source(DataArguments(train_data_dir=str(photos)))
    refused(named, lambda: ImageLoader(source, **{"resolution": 16, "batch_size": 2, "seed": 0, **given}))


@pytest.fixture
def prepared(photos, tmp_path):
    """Stored images and what reads them after a change to their manifest."""
    folder = tmp_path / "prepared"
    options = prepare_dataset.PrepareArguments(str(folder), resolution=8, num_threads=1)
    prepare_dataset.main(DataArguments(train_data_dir=str(photos)), options)
    return folder


@pytest.mark.parametrize(
    "change, named",
    [
        ("{", "prepared.json is damaged: .* Prepare or copy"),
        ("[]", "must hold resolution, num_classes, class_names, files"),
        ("{}", "must hold resolution, num_classes, class_names, files"),
        ({"resolution": "8"}, "must hold resolution"),
        ({"files": {"nothing.arrow": 3}}, "nothing.arrow is missing or not 3 bytes long"),
        ({"files": {}}, "The files of .* are damaged"),
        ({"num_classes": 1}, r"Label \d of image .* is outside \[0, 1\)"),
        ({"resolution": 16}, "holds 192 bytes, an image of 16 pixels has 768: prepare the data again"),
    ],
    ids=str,
)
def test_a_prepared_folder_with_another_manifest_is_refused(prepared, change, named):
    path = prepared / "prepared.json"
    path.write_text(change if isinstance(change, str) else json.dumps({**json.loads(path.read_text()), **change}))
    refused(named, lambda: open_source(DataArguments(train_data_dir=str(prepared)))[0])


@bad(
    ({"resolution": 0}, "--resolution must be at least 1, got 0"),
    ({"num_threads": 0}, "--num_threads must be at least 1, got 0"),
    ({"output_dir": "data"}, "--output_dir .*data exists already: remove it or choose another"),
)
def test_a_preparation_that_cannot_be_leaves_nothing(photos, tmp_path, given, named):
    before = sorted(photos.rglob("*"))
    given = {**given, "output_dir": str(photos if "output_dir" in given else tmp_path / "out")}
    options = prepare_dataset.PrepareArguments(**given)
    refused(named, lambda: prepare_dataset.main(DataArguments(train_data_dir=str(photos)), options))
    assert sorted(photos.rglob("*")) == before and not list(tmp_path.iterdir())


@bad(({"steps": 0}, "--steps must be at least 1, got 0"), ({"seed": -1}, r"--seed must lie in \[0, 2\^63\), got -1"))
def test_a_teacher_that_cannot_be_trained_leaves_nothing(tmp_path, given, named):
    options = prepare_teacher.PrepareTeacherArguments(output_dir=str(tmp_path / "out"), **given)
    refused(named, lambda: prepare_teacher.main(options))
    assert not list(tmp_path.iterdir())


@bad(
    ({"num_images": 0}, "--num_images must be at least 1, got 0"),
    ({"batch_size": -1}, "--batch_size must be at least 1, got -1"),
    ({"num_inference_steps": 0}, "--num_inference_steps must be at least 1, got 0"),
    ({}, "--pipeline .*nowhere is not a saved pipeline's folder"),
)
def test_scores_that_cannot_be_are_refused(tmp_path, given, named):
    options = score_digits.ScoreArguments(str(tmp_path / "nowhere"), data_dir=str(tmp_path), **given)
    refused(named, lambda: score_digits.main(options), ValueError if given else FileNotFoundError)


ABLATION = {
    "output_dir": "out", "config": "c.yaml", "arms": {"none": {}}, "seeds": [0], "held_out_dir": "h", "teacher": "t",
}  # fmt: skip


@pytest.mark.parametrize(
    "change, named",
    [
        ("- a", "must hold `name: value` lines, got list"),
        ("", "must hold `name: value` lines, got NoneType"),
        ("a: [", "is no YAML file"),
        ("\x00", "is no YAML file"),
        ({"nonsense": 1}, r"unknown names \['nonsense'\]"),
        ({1: 1}, r"unknown names \['1'\]"),
        ({"arms": ["none"]}, r"`arms` must map names to objective arguments .* got \['none'\]"),
        ({"arms": {"none": None}}, "`arms` must map names to objective arguments"),
        ({"arms": {}}, "at least one arm"),
        ({"arms": {"..": {}}}, "An arm's name is a folder's, .* got '..'"),
        ({"arms": {"a/b": {}}}, "An arm's name is a folder's, .* got 'a/b'"),
        ({"arms": {3: {}}}, "An arm's name is a folder's, .* got 3"),
        ({"arms": {"long": {"max_train_steps": 9}}}, "sets max_train_steps, which is no objective argument"),
        ({"seeds": 0}, "`seeds` must be a list of integers, got 0"),
        ({"seeds": ["a"]}, r"`seeds` must be a list of integers, got \['a'\]"),
        ({"seeds": [1, 1]}, "no seed twice"),
        ({"arguments": [1]}, r"`arguments` must map names to values, got \[1\]"),
        ({"num_samples": 0}, "`num_samples` must be an integer of at least 1, got 0"),
        ({"batch_size": "8"}, "`batch_size` must be an integer of at least 1, got '8'"),
        ({"image_size": 2.5}, "`image_size` must be an integer of at least 1, got 2.5"),
    ],
    ids=str,
)
def test_an_ablation_that_cannot_be_is_refused(tmp_path, change, named):
    text = change if isinstance(change, str) else yaml.safe_dump({**ABLATION, **change})
    (tmp_path / "ablation.yaml").write_text(text)
    refused(named, lambda: run_ablation.read_config(tmp_path / "ablation.yaml"))


# ---------------------------------------------------------------------------------------------- the inference scripts


@pytest.fixture(scope="module")
def folder(make_pipeline, tmp_path_factory):
    path = tmp_path_factory.mktemp("pipeline") / "tiny"
    make_pipeline(id2label={0: "zero", 1: "../one"}).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def statistics(tmp_path_factory):
    path = tmp_path_factory.mktemp("statistics") / "real.npz"
    FeatureStatistics(np.zeros(24), np.eye(24), count=100).save(path)
    return path


def parsed(kind, values: dict):
    words = []
    for name, value in values.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return HfArgumentParser(kind).parse_args_into_dataclasses(words)[0]


@bad(
    *(({name: value}, f"--{name} must be at least 1, got {value}")
      for name in ("batch_size", "num_inference_steps") for value in (0, -1)),
    ({"max_grid_images": -1}, "--max_grid_images must be at least 0, got -1"),
    ({"seeds": "a"}, "--seeds: 'a' is neither a whole number such as 3 nor a range such as 0-7"),
    ({"seeds": "-1"}, "--seeds: '-1' is neither"),
    ({"seeds": "1.5"}, "--seeds: '1.5' is neither"),
    ({"seeds": "7-3"}, "--seeds: the range '7-3' ends before it starts"),
    ({"seeds": "9223372036854775808"}, "--seeds: '9223372036854775808' is too large"),
    ({"seeds": "0-99999999999"}, "--seeds: .*0-99999999999.* more than 1000000"),
    ({"seeds": "9" * 5000}, "--seeds: '9+.* is too large"),
    ({"seeds": ["1", "1"]}, r"--seeds: \[1\] given more than once"),
    ({"class_labels": "10"}, "Class id 10 is out of range: this model knows the ids 0 to 9"),
    ({"class_labels": "9" * 5000}, "There is no class called '9+'"),
    ({"class_labels": "-1"}, "There is no class called '-1'"),
    ({"class_labels": "dog"}, "There is no class called 'dog'"),
    ({"class_labels": ["0", "zero"]}, r"--class_labels: \['0', 'zero'\] names a class more than once \(ids \[0, 0\]\)"),
    ({"guidance_scale": "nan"}, "`guidance_scale` must be a finite number .* got nan"),
    ({"guidance_scale": -1}, "`guidance_scale` must be a finite number .* got -1.0"),
    ({"guidance_interval": ["0.9", "0.1"]}, r"0 ≤ low < high ≤ 1 .* got \(0.9, 0.1\)"),
    ({"guidance_interval": ["0.1"]}, r"`guidance_interval` must be a pair \(low, high\), got \[0.1\]"),
)  # fmt: skip
def test_generation_that_cannot_be_writes_nothing(folder, tmp_path, given, named):
    values = {"pipeline": folder, "class_labels": "0", "output_dir": tmp_path / "out", **given}
    words = [f"--{name}={value}" for name, value in values.items() if value == "-1" and name != "guidance_scale"]
    args = parsed(generate.GenerateArguments, {n: v for n, v in values.items() if f"--{n}={v}" not in words} | (
        {"class_labels": "0"} if words and "class_labels" in words[0] else {}))  # fmt: skip
    for word in words:  # argparse takes a lone -1 for a flag
        setattr(args, word[2:].partition("=")[0], ["-1"])
    refused(named, lambda: generate.main(args))
    assert not (tmp_path / "out").exists()


@bad(
    *(({name: 0}, f"--{name} must be at least 1, got 0") for name in ("batch_size", "chunk_size")),
    ({"max_grid_images": -1}, "--max_grid_images must be at least 0, got -1"),
    ({"num_samples": 45}, "must be a multiple of the model's 10 classes, .* got 45. The nearest is 40"),
    ({"num_samples": 0}, "must be a multiple of the model's 10 classes, .* got 0"),
    ({"num_samples": -10}, "must be a multiple of the model's 10 classes, .* got -10"),
    ({"seed": -1}, r"Seeds -1 … 38 must lie in \[0, 2\^63\)"),
    ({"num_inference_steps": 0}, "`num_inference_steps` must be an integer of at least 1, got 0"),
    ({"guidance_scales": "nan"}, "`guidance_scale` must be a finite number .* got nan"),
    ({"guidance_scales": ["1", "1.0"]}, "guidance-1 more than once: give each value once"),
    ({"guidance_intervals": "0.5"}, "--guidance_intervals: '0.5' is not LOW:HIGH"),
    ({"guidance_intervals": "a:b"}, "--guidance_intervals: 'a:b' is not LOW:HIGH"),
    ({"guidance_intervals": "1:0"}, r"0 ≤ low < high ≤ 1 .* got \(1.0, 0.0\)"),
    ({"images": "here"}, "Give either --pipeline or --images"),
    ({"metrics": "fid"}, "fid compares with reference statistics .* none are given. .*--inception_reference FILE"),
    ({"metrics": ["fd_teacher", "fd_teacher"]}, "must be different ones of fid"),
    ({"metrics": "precision_recall_teacher"}, "needs the reference's features, .* --keep_features"),
    ({"teacher_image_size": 30}, "image_size must be a multiple of the model's patch .* got 30"),
)  # fmt: skip
def test_an_evaluation_that_cannot_be_writes_nothing(folder, statistics, tmp_path, given, named):
    values = {
        "pipeline": folder, "output_dir": tmp_path / "out", "metrics": "fd_teacher", "teacher": TEACHER,
        "teacher_image_size": 28, "teacher_reference": statistics, "num_samples": 40, **given,
    }  # fmt: skip
    refused(named, lambda: evaluate.main(parsed(evaluate.EvaluateArguments, values)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["{", "[1]", "null", "\xff", '"text"', "1" * 5000], ids=lambda text: text[:8])
def test_a_record_of_an_evaluation_that_is_none_is_named(tmp_path, text):
    (tmp_path / "metrics.json").write_text(text, encoding="latin-1")
    named = "metrics.json (is not valid JSON|holds no settings but a .*): remove it to measure again"
    refused(named.replace("JSON|", r"JSON \(.*\)|"), lambda: finished_record(tmp_path / "metrics.json", {"seed": 0}))


@bad(
    *(({name: value}, f"--{name} must be at least {least}, got {value}")
      for name, value, least in (("batch_size", 0, 1), ("resolution", -1, 1), ("dataloader_num_workers", -1, 0))),
    ({"output_file": "stats.pt"}, "--output_file must end in .npz, got stats.pt"),
    ({"dataset_name": "x"}, "Give exactly one source of images"),
    ({"train_data_dir": "nowhere"}, "--train_data_dir: no folder nowhere"),
    ({"num_samples": 1}, "--num_samples: 1 images asked for, at least 2 are needed and 6 there"),
    ({"num_samples": 7}, "--num_samples: 7 images asked for, at least 2 are needed and 6 there"),
    ({"image_size": 30}, "image_size must be a multiple .* got 30"),
)  # fmt: skip
def test_a_reference_that_cannot_be_writes_nothing(photos, tmp_path, given, named):
    values = {
        "output_file": tmp_path / "out" / "real.npz", "train_data_dir": photos, "network": TEACHER, "image_size": 28,
        "cache_dir": tmp_path / "cache", "resolution": 16, **given,
    }  # fmt: skip
    error = FileNotFoundError if "nowhere" in named else ValueError
    refused(named, lambda: prepare_reference.main(parsed(prepare_reference.ReferenceArguments, values)), error)
    assert not (tmp_path / "out").exists()


@bad(
    *(({name: 0}, f"--{name} must be at least 1, got 0")
      for name in ("images_per_class", "max_classes", "num_inference_steps", "batch_size")),
    *(({"time": value}, f"--time {value} must lie between 0 and 1 on the grid") for value in (0.0, 1.0, "nan", 0.33)),
    ({"names": ["a", "b"]}, r"Give one name for each of the 1 pipelines, all different, got \['a', 'b'\]"),
    ({"images_per_class": 2}, "has 2 images: --images_per_class 2 nearest and as many farthest would overlap"),
    ({"data_dir": "nowhere"}, "--data_dir: no folder nowhere"),
    ({}, "images of 10 classes; .* images of 3 classes"),
)  # fmt: skip
def test_a_probe_that_cannot_be_writes_nothing(folder, photos, tmp_path, given, named):
    values = {
        "pipelines": folder, "data_dir": photos, "teacher": TEACHER, "output_dir": tmp_path / "out",
        "images_per_class": 1, "num_inference_steps": 10, **given,
    }  # fmt: skip
    error = FileNotFoundError if "nowhere" in named else ValueError
    refused(named, lambda: probe_alignment.main(parsed(probe_alignment.ProbeArguments, values)), error)
    assert not (tmp_path / "out").exists()


@bad(
    ({}, "Give exactly one of --pipeline and --preset"),
    ({"preset": "JiT-B/16", "pipeline": "p"}, "Give exactly one of --pipeline and --preset"),
    ({"preset": "JiT-B/16", "solvers": "rk4"}, "--solvers may be heun, .* got rk4"),
    ({"preset": "JiT-B/16", "batch_size": 0}, "--batch_size must be at least 1, got 0"),
    ({"preset": "JiT-B/16", "evaluations": 0}, r"--evaluations must be at least 1, got \[0\]"),
)
def test_a_benchmark_that_cannot_be_is_refused(given, named):
    refused(named, lambda: parsed(benchmark.BenchmarkArguments, given))


@bad(
    ({"checkpoint_path": None}, "--checkpoint_path needed without --to_original"),
    ({"pipeline": "p"}, "--pipeline has no meaning without --to_original"),
    ({"in_context_start": 9}, "`in_context_start` must name one of the 4 blocks, 0 to 3, got 9"),
    ({"in_context_start": None}, "Give `in_context_start`, from 0 to 3"),
    ({"noise_scale": "nan"}, "`noise_scale` must be positive and finite, got nan"),
    ({"guidance_scale": "inf"}, "`guidance_scale` must be a finite number .* got inf"),
    ({"guidance_interval": ["0.2", "0.1"]}, r"0 ≤ low < high ≤ 1 .* got \(0.2, 0.1\)"),
    ({"guidance_interval": ["0.2"]}, r"`guidance_interval` must be a pair"),
)
def test_a_conversion_that_cannot_be_writes_nothing(tmp_path, given, named):
    values = {"checkpoint_path": PUBLISHED, "output_dir": tmp_path / "out", "in_context_start": 2, **given}
    values = {name: value for name, value in values.items() if value is not None}
    refused(named, lambda: convert_checkpoint.main(parsed(convert_checkpoint.ConvertArguments, values)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text, named",
    [
        ("{", "--id2label: .*names.json is not valid JSON"),
        ("\xff", "--id2label: .*names.json is not valid JSON"),
        ("[" * 100_000, "--id2label: .*names.json is not valid JSON"),
        ("1" * 5000, "--id2label: .*names.json is not valid JSON"),
        ("[]", r"--id2label: .* must hold a JSON object from class ids to names, got \[\]"),
        ('{"a": "b"}', r"--id2label: the keys of .* must be distinct class ids .* not so \['a'\]"),
        ('{"0": NaN}', r"`id2label\['0'\]` must be a name, got nan"),
        ('{"10": "ten"}', "`id2label` has the key '10'; its keys are class ids from 0 to 9"),
    ],
    ids=lambda text: text[:8],
)
def test_class_names_that_are_none_convert_nothing(tmp_path, text, named):
    (tmp_path / "names.json").write_text(text, encoding="latin-1")
    values = {"checkpoint_path": PUBLISHED, "output_dir": tmp_path / "out", "in_context_start": 2}
    values["id2label"] = tmp_path / "names.json"
    refused(named, lambda: convert_checkpoint.main(parsed(convert_checkpoint.ConvertArguments, values)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [-1, 4, 1.5, True, "2"])
def test_a_published_checkpoint_is_not_read_with_an_impossible_start(value):
    named = f"`in_context_start` must .*, got {shown(value)}"
    refused(named, lambda: load_original_checkpoint(PUBLISHED, in_context_start=value))


# ------------------------------------------------------------------------------------------------------- saved folders


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def copied(make_pipeline, tmp_path):
    make_pipeline(id2label={0: "zero"}).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.mark.parametrize(
    "file, change, named",
    [
        ("transformer/config.json", {"num_layers": -3}, "`num_layers` must be a positive integer .* got -3"),
        ("transformer/config.json", {"patch_size": 3}, "16 is not a multiple of 3"),
        ("transformer/config.json", {"t_eps": NAN}, r"`t_eps` must lie in \(0, 1\), got nan"),
        ("transformer/config.json", {"mlp_ratio": INF}, "`mlp_ratio` must be a positive number .* got inf"),
        ("transformer/config.json", {"num_attention_heads": "2"}, "`num_attention_heads` must .* got '2'"),
        ("scheduler/scheduler_config.json", {"solver": "rk4"}, '`solver` must be "heun" or "euler", got \'rk4\''),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 0}, "`num_train_timesteps` must be .* got 0"),
        ("model_index.json", {"guidance_scale": NAN}, "`guidance_scale` must be a finite number .* got nan"),
        ("model_index.json", {"guidance_interval": [1, 0]}, r"0 ≤ low < high ≤ 1 .* got \(1, 0\)"),
        ("model_index.json", {"guidance_interval": "all"}, "`guidance_interval` must be a pair .* got 'all'"),
        ("model_index.json", {"id2label": {"x": "y"}}, "`id2label` has the key 'x'"),
    ],
    ids=str,
)
def test_a_saved_pipeline_with_a_setting_that_cannot_be_is_refused(copied, file, change, named):
    edit(copied / file, **change)
    refused(named, lambda: PixelREPAPipeline.from_pretrained(copied))


@pytest.mark.parametrize(
    "change, named",
    [
        ({"metrics": {}}, "does not say 'metrics'"),
        ({"metrics": {"fid": NAN}}, "The metric 'fid' is nan; it must be a finite number"),
        ({"metrics": {"fid": True}}, "The metric 'fid' is True; it must be a finite number"),
        ({"metrics": [1]}, r'must hold "metrics", from names to numbers, got \[1\]'),
        ({"reference": None}, "does not say 'reference'"),
        ("{", "metrics.json is not valid JSON"),
        ("[]", "metrics.json must hold a JSON object, it holds a list"),
        ("\xff", "metrics.json is not valid JSON"),
    ],
    ids=str,
)
def test_metrics_that_are_none_are_not_published(copied, change, named):
    record = {"metrics": {"fid": 1.0}, "num_samples": 10, "reference": "r", "device": "cpu"}
    text = change if isinstance(change, str) else json.dumps({**record, **change})
    (copied / "metrics.json").write_text(text, encoding="latin-1")
    refused(named, lambda: publish.main([str(copied), "me/tiny", "--dry_run"]))


@pytest.mark.parametrize(
    "file, change, named",
    [
        ("transformer/config.json", "{", "config.json is not valid JSON"),
        ("transformer/config.json", "{}", "The transformer's configuration lacks sample_size"),
        ("training_arguments.json", '{"objective": "gan"}', "The objective 'gan' is none of"),
        ("training_arguments.json", "[1]", "must hold a JSON object, it holds a list"),
        ("model_index.json", "{}", "does not name the pipeline's own code"),
        ("model_index.json", "null", "must hold a JSON object, it holds a NoneType"),
    ],
)
def test_a_folder_that_is_no_pipeline_is_not_published(copied, file, change, named):
    (copied / file).write_text(change)
    refused(named, lambda: publish.main([str(copied), "me/tiny", "--dry_run"]))


def test_a_transformer_without_weights_is_not_published(copied):
    for path in (copied / "transformer").glob("*.safetensors"):
        path.unlink()
    refused("lacks weights", lambda: publish.main([str(copied), "me/tiny", "--dry_run"]), FileNotFoundError)


def test_weights_of_another_architecture_are_not_loaded(copied, make_transformer):
    path = copied / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file(make_transformer(num_classes=7).state_dict(), path)
    with pytest.raises(ValueError, match=r"class_embedding.weight.*shape.*\(?\[?11, 16"):
        JiTTransformer2DModel.from_pretrained(copied, subfolder="transformer")


def test_every_script_knows_its_own_flags_alone(capsys):
    for kind in (
        generate.GenerateArguments, evaluate.EvaluateArguments, prepare_reference.ReferenceArguments,
        probe_alignment.ProbeArguments, benchmark.BenchmarkArguments, convert_checkpoint.ConvertArguments,
        prepare_dataset.PrepareArguments, prepare_teacher.PrepareTeacherArguments, score_digits.ScoreArguments,
    ):  # fmt: skip
        required = [name for name in ("pipeline", "class_labels", "output_dir", "output_file", "pipelines", "data_dir", "teacher")
                    if name in kind.__dataclass_fields__]  # fmt: skip
        words = [word for name in required for word in (f"--{name}", "x")]
        with pytest.raises((SystemExit, ValueError), match=r"^2$|--nonsense"):
            HfArgumentParser(kind).parse_args_into_dataclasses([*words, "--nonsense", "1"])
    capsys.readouterr()
