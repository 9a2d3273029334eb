# Copyright 2026 The pixelrepa_diffusers authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Class labels to images with a JiT, trained with PixelREPA or without: inference is the same.

This file is published beside the weights as remote code: it imports torch, numpy and diffusers only, and never the
model's module, which would load a second copy of the model's class.
"""

import difflib
import inspect
import json
import math
import numbers
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor


logger = logging.get_logger(__name__)

ClassLabels = int | str | list[int] | list[str] | torch.Tensor

# What is read of the model's configuration.
_MODEL_SETTINGS = ("sample_size", "in_channels", "num_classes", "noise_scale")


class PixelREPAPipeline(DiffusionPipeline):
    r"""
    Pipeline for class-conditional image generation in pixel space with a JiT (arXiv 2511.13720), such as those trained
    with PixelREPA (arXiv 2603.14366).

    Parameters:
        transformer ([`JiTTransformer2DModel`]): Predicts the clean image from the noisy one.
        scheduler ([`JiTFlowMatchScheduler`]): The method's solver, or any flow-matching scheduler of diffusers.
        id2label (`dict`, *optional*): Class id to class name. A name may list synonyms separated by commas.
        guidance_scale (`float`, defaults to 1.0): The guidance scale a call uses when it names none.
        guidance_interval (`tuple[float, float]`, defaults to `(0.1, 1.0)`): The times guidance acts in, likewise.

    The last three are saved with the pipeline.
    """

    model_cpu_offload_seq = "transformer"
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        transformer: ModelMixin,
        scheduler: SchedulerMixin,
        id2label: dict | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple | list = (0.1, 1.0),
    ):
        super().__init__()
        missing = [name for name in _MODEL_SETTINGS if name not in getattr(transformer, "config", ())]
        if missing or not hasattr(transformer, "velocity"):
            raise ValueError(
                f"`transformer` must be a JiTTransformer2DModel, got {type(transformer).__name__}"
                + (f", which has no {', '.join(missing)} in its configuration." if missing else ".")
            )
        if not hasattr(scheduler, "set_timesteps"):
            raise ValueError(
                f"`scheduler` must be a JiTFlowMatchScheduler or a flow-matching scheduler of diffusers, got "
                f"{type(scheduler).__name__}."
            )
        _check_guidance(guidance_scale, guidance_interval)
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self._label_ids = _index_names({} if id2label is None else id2label, transformer.config.num_classes)
        # JSON knows string keys only; writing them so makes a saved and a reloaded pipeline equal.
        self.register_to_config(
            id2label=None if id2label is None else {str(key): names for key, names in id2label.items()},
            guidance_scale=float(guidance_scale),
            guidance_interval=[float(bound) for bound in guidance_interval],
        )
        self._guidance_scale = self.config.guidance_scale
        self._current_timestep = None
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @property
    def guidance_scale(self) -> float:
        """The scale of the running or last call; a step-end callback may set `_guidance_scale`."""
        return self._guidance_scale

    @property
    def current_timestep(self) -> torch.Tensor | None:
        """The scheduler's timestep of the running evaluation, `None` outside a call; some caches ask for it."""
        return self._current_timestep

    @property
    def num_timesteps(self) -> int:
        """The number of model evaluations of the running or last call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the running call skips its remaining evaluations; a step-end callback may set `_interrupt`."""
        return self._interrupt

    def get_label_ids(self, class_labels: ClassLabels) -> list[int]:
        """
        Class ids of ids or names, checked.

        Args:
            class_labels (`int`, `str`, a list of them, or an integer `torch.Tensor`):
                Ids in [0, num_classes − 1], or names in `id2label`, whole or one of their comma-separated synonyms.
                What is nested is flattened, as by the other class-conditional pipelines of diffusers.

        Raises:
            `ValueError`: for an empty list, an id out of range, an unknown name (the nearest are listed) or a name that
            several classes share.
        """
        if isinstance(class_labels, torch.Tensor | np.ndarray):
            class_labels = class_labels.tolist()
        if not isinstance(class_labels, list | tuple):
            return [self._label_id(class_labels)]
        if len(class_labels) == 0:
            raise ValueError("`class_labels` is empty; give one class id or name per image.")
        return [class_id for label in class_labels for class_id in self.get_label_ids(label)]

    def _label_id(self, label: int | str) -> int:
        num_classes = self.transformer.config.num_classes
        if isinstance(label, str):
            if not self._label_ids:
                raise ValueError(
                    f"This pipeline has no class names, so {label!r} cannot be looked up; give ids from 0 to "
                    f"{num_classes - 1}, or build the pipeline with `id2label`."
                )
            ids = self._label_ids.get(label, ())
            if len(ids) == 1:
                return ids[0]
            if ids:
                raise ValueError(f"The name {label!r} stands for the classes {list(ids)}; give the id.")
            by_folded_name = {name.casefold(): name for name in self._label_ids}
            nearest = difflib.get_close_matches(label.strip().casefold(), by_folded_name, n=5, cutoff=0.4)
            nearest = [by_folded_name[name] for name in nearest]
            hint = f"The nearest names: {', '.join(map(repr, nearest))}." if nearest else "See `pipe.config.id2label`."
            raise ValueError(f"There is no class called {label!r}. {hint}")
        if isinstance(label, bool) or not isinstance(label, numbers.Integral):
            raise ValueError(
                "`class_labels` must be integers or names, alone or in a list or tensor, got "
                f"{label!r} ({type(label).__name__})."
            )
        if not 0 <= label < num_classes:
            raise ValueError(f"Class id {label} is out of range: this model knows the ids 0 to {num_classes - 1}.")
        return int(label)

    def check_inputs(
        self,
        class_labels: ClassLabels,
        guidance_scale: float,
        guidance_interval: tuple[float, float],
        num_inference_steps: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        output_type: str,
        callback_on_step_end_tensor_inputs: list[str],
    ) -> None:
        """Refuses every argument that cannot work, before the model runs."""
        batch_size = len(self.get_label_ids(class_labels))
        _check_guidance(guidance_scale, guidance_interval)
        if (
            isinstance(num_inference_steps, bool)
            or not isinstance(num_inference_steps, numbers.Integral)
            or num_inference_steps < 1
        ):
            raise ValueError(f"`num_inference_steps` must be an integer of at least 1, got {num_inference_steps!r}.")
        generators = generator if isinstance(generator, list) else [generator]
        if generator is not None and not all(isinstance(one, torch.Generator) for one in generators):
            raise ValueError(f"`generator` must be a `torch.Generator` or a list of them, got {generator!r}.")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"{len(generator)} generators were given for {batch_size} images; give one for each, or a single one."
            )
        if latents is not None:
            config = self.transformer.config
            shape = (batch_size, config.in_channels, config.sample_size, config.sample_size)
            if not isinstance(latents, torch.Tensor) or tuple(latents.shape) != shape:
                given = tuple(latents.shape) if isinstance(latents, torch.Tensor) else type(latents).__name__
                raise ValueError(f"`latents` must be a tensor of the shape {shape}, got {given}.")
            if not latents.is_floating_point():
                raise ValueError(f"`latents` must be floating point unit noise, got {latents.dtype}.")
            if not latents.isfinite().all():
                raise ValueError("`latents` contains values that are not finite; it must be unit noise.")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f'`output_type` must be "pil", "np", "pt" or "latent", got {output_type!r}.')
        names = callback_on_step_end_tensor_inputs
        if not isinstance(names, list | tuple) or any(name not in self._callback_tensor_inputs for name in names):
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be a list and may name {self._callback_tensor_inputs}, got "
                f"{names!r}."
            )
        # Schedulers made for flow matching have `scale_noise`, and diffusers' time if they have `num_train_timesteps`;
        # others integrate flows when told to.
        settings = self.scheduler.config
        made_for_flows = hasattr(self.scheduler, "scale_noise") and "num_train_timesteps" in settings
        told_to = settings.get("prediction_type") == "flow_prediction" and settings.get("use_flow_sigmas")
        if not made_for_flows and not told_to:
            raise ValueError(
                f"{type(self.scheduler).__name__} is not set up for flow matching. Build it with "
                f'`from_config(config, prediction_type="flow_prediction", use_flow_sigmas=True)`, or use '
                f"JiTFlowMatchScheduler or a FlowMatch scheduler."
            )

    def prepare_latents(
        self,
        batch_size: int,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
    ) -> torch.Tensor:
        """Noise of standard deviation `noise_scale`, float32, (batch_size, channels, size, size)."""
        config = self.transformer.config
        if latents is None:
            shape = (batch_size, config.in_channels, config.sample_size, config.sample_size)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        return latents.to(device=device, dtype=torch.float32) * config.noise_scale

    def prepare_timesteps(self, num_inference_steps: int, device: torch.device) -> tuple[torch.Tensor, list[float]]:
        """
        The scheduler's timesteps and, for each, the exact time t = 1 − sigma in [0, 1].

        Some schedulers round their timesteps to integers, so t comes from their sigmas, read once, before the loop: an
        evaluation then never waits for the device. A float32 sigma knows t only to 6e-8; seven decimals put it back on
        the grid, where the bounds of guidance lie.
        """
        if isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):
            # Its own grid ends at 1/1000 instead of one step before the image.
            sigmas = np.linspace(1, 1 / num_inference_steps, num_inference_steps)
            self.scheduler.set_timesteps(sigmas=sigmas, device=device)
        else:
            self.scheduler.set_timesteps(num_inference_steps, device=device)
        self.scheduler.set_begin_index(0)
        timesteps = self.scheduler.timesteps
        sigmas = self.scheduler.sigmas[: len(timesteps)].cpu()
        times = 1 - sigmas.double()
        return timesteps, (times if sigmas.dtype == torch.float64 else times.round(decimals=7)).tolist()

    @torch.no_grad()
    def __call__(
        self,
        class_labels: ClassLabels,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, torch.Tensor, dict[str, Any]], dict[str, Any]]
        | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006
    ) -> ImagePipelineOutput | tuple:
        r"""
        Generates one image per class label.

        Args:
            class_labels (`int`, `str`, a list of them, or an integer tensor): Class ids in [0, num_classes − 1] or names.
            guidance_scale (`float`, *optional*): s in v = v_uncond + s·(v_cond − v_uncond). 1 turns guidance off. The
                saved value when not given.
            guidance_interval (`tuple[float, float]`, *optional*): (low, high): guidance acts where low < t < high, from
                the start when low is 0 (arXiv 2404.07724, in this model's time: 0 is noise). The saved value when not
                given. Outside it the unconditional half of the batch is not computed.
            num_inference_steps (`int`, defaults to 50): Steps; Heun's method evaluates the model twice in all but the last.
            generator (`torch.Generator` or a list of them, *optional*): One generator per image makes an image
                independent of the batch it was made in.
            latents (`torch.Tensor` of shape `(batch_size, channels, size, size)`, *optional*): Unit noise; it is
                multiplied by the model's `noise_scale`.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"` or `"pt"` (in [0, 1]), or `"latent"` (the raw
                float32 image, nominally in [-1, 1]).
            return_dict (`bool`, defaults to `True`): Return an [`ImagePipelineOutput`] instead of a tuple.
            callback_on_step_end (`Callable`, *optional*): Called after every evaluation as
                `callback(pipeline, index, timestep, {"latents": ...})`; what it returns replaces the tensors.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`): The tensors handed to it.

        Returns:
            [`ImagePipelineOutput`] or a tuple whose first element is the images.

        Examples:

        ```py
        >>> import torch
        >>> from diffusers import DiffusionPipeline

        >>> pipe = DiffusionPipeline.from_pretrained("path/or/repo", trust_remote_code=True)
        >>> seeds = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        >>> images = pipe(class_labels=[207, 360], generator=seeds).images
        ```
        """
        guidance_scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        guidance_interval = self.config.guidance_interval if guidance_interval is None else guidance_interval
        self.check_inputs(
            class_labels,
            guidance_scale,
            guidance_interval,
            num_inference_steps,
            generator,
            latents,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise ValueError(f"`callback_on_step_end` must be a function or None, got {callback_on_step_end!r}.")
        self._guidance_scale = guidance_scale
        self._interrupt = False
        num_classes = self.transformer.config.num_classes
        if num_classes == 1 and guidance_scale != 1:
            logger.warning(
                f"`guidance_scale={guidance_scale}` has no effect: the model has a single class, so there is nothing to "
                "guide towards."
            )

        device = self._execution_device
        labels = torch.tensor(self.get_label_ids(class_labels), device=device)
        labels_and_null = torch.cat([labels, torch.full_like(labels, num_classes)])
        latents = self.prepare_latents(len(labels), device, generator, latents)
        timesteps, times = self.prepare_timesteps(num_inference_steps, device)
        time_on_device = torch.tensor(times, dtype=torch.float32, device=device)
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        step_kwargs = {"generator": generator} if takes_generator else {}
        self._num_timesteps = len(timesteps)
        was_guided = None

        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for index, timestep in enumerate(timesteps):
                if self.interrupt:
                    continue
                self._current_timestep = timestep
                guided = num_classes > 1 and self.guidance_scale != 1 and _inside(times[index], guidance_interval)
                sample = torch.cat([latents, latents]) if guided else latents
                if guided != was_guided:
                    # What a cache holds comes from a batch of another size, or from a call that never ended.
                    self.transformer._reset_stateful_cache()
                was_guided = guided
                with self.transformer.cache_context(
                    "guided" if guided else "conditional",
                    step_index=index,
                    num_inference_steps=len(timesteps),
                    timestep=timestep,
                    sigma=1 - times[index],
                ):
                    prediction = self.transformer(
                        sample, time_on_device[index], labels_and_null if guided else labels, return_dict=False
                    )[0]
                velocity = self.transformer.velocity(prediction, sample, time_on_device[index])
                if guided:
                    conditional, unconditional = velocity.chunk(2)
                    velocity = unconditional + self.guidance_scale * (conditional - unconditional)
                # diffusers' flow velocity points from image to noise.
                latents = self.scheduler.step(-velocity, timestep, latents, **step_kwargs, return_dict=False)[0]

                if callback_on_step_end is not None:
                    tensors = {}
                    for name in callback_on_step_end_tensor_inputs:  # a comprehension has locals of its own
                        tensors[name] = locals()[name]
                    changed = callback_on_step_end(self, index, timestep, tensors)
                    if not isinstance(changed, dict):
                        raise ValueError(
                            "`callback_on_step_end` must return the dictionary of tensors it was given, or another one "
                            f"(empty for no change), got {type(changed).__name__}."
                        )
                    latents = changed.pop("latents", latents)
                if index == len(timesteps) - 1 or (index + 1) % self.scheduler.order == 0:
                    progress_bar.update()

        self._current_timestep = None
        self.maybe_free_model_hooks()
        images = latents
        if output_type != "latent":
            # Clipping would turn them into black or white pixels, rounding into anything.
            if not latents.isfinite().all():
                raise ValueError(
                    f"The images contain NaN or infinite values: the weights do, or guidance_scale={guidance_scale} or the "
                    f'type {self.transformer.dtype} is too much for them. output_type="latent" returns them as they are.'
                )
            images = self.image_processor.postprocess(latents, output_type=output_type)

        if not return_dict:
            return (images,)
        return ImagePipelineOutput(images=images)

    # What follows makes a saved folder self-contained: it always names this file and the components' files, which travel
    # with it, and an installed class reads those names as its own package's classes.

    def save_config(self, save_directory, push_to_hub: bool = False, **kwargs):
        """Writes model_index.json and, beside it, this file: the pipeline can then be loaded without the package."""
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        source = Path(inspect.getfile(type(self)))
        shutil.copyfile(source, Path(save_directory) / source.name)

    def to_json_string(self) -> str:
        config = json.loads(super().to_json_string())
        config.pop("_name_or_path", None)  # where it was loaded from is nobody else's business
        config["_class_name"] = [type(self).__module__.rpartition(".")[2], type(self).__name__]
        for name, component in self.components.items():
            component_class = type(getattr(component, "_orig_mod", component))  # unwraps torch.compile
            library = component_class.__module__.partition(".")[0]
            if library not in ("diffusers", "transformers"):
                config[name] = [component_class.__module__.rpartition(".")[2], component_class.__name__]
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    @classmethod
    def _dict_from_json_file(cls, json_file):
        try:
            config = super()._dict_from_json_file(json_file)
        except RecursionError:  # what else is no JSON is diffusers' to tell
            raise ValueError(f"{json_file} is nested too deeply for a configuration.") from None
        if not isinstance(config, dict):
            raise ValueError(f"{json_file} must hold a JSON object, it holds a {type(config).__name__}.")
        package = cls.__module__.partition(".")[0]
        class_name = config.get("_class_name")
        if package == "diffusers_modules" or not isinstance(class_name, list) or len(class_name) != 2:
            return config
        config["_class_name"] = class_name[1]
        for name, value in config.items():
            if value in (["transformer_jit", "JiTTransformer2DModel"], ["scheduling_jit", "JiTFlowMatchScheduler"]):
                config[name] = [package, value[1]]
        return config

    @classmethod
    def _get_signature_types(cls):
        # `from_pipe` compares a component's exact type with these, and the annotation can only name the base class.
        types = super()._get_signature_types()
        models = [model for model in _subclasses(ModelMixin) if model.__name__ == "JiTTransformer2DModel"]
        return {**types, "transformer": (*types["transformer"], *models)}


def _subclasses(base: type) -> list[type]:
    return [found for child in base.__subclasses__() for found in (child, *_subclasses(child))]


def _inside(time: float, interval: tuple[float, float]) -> bool:
    """low < t < high, strict and in float32 as published; low = 0 includes the start."""
    time, low, high = np.float32(time), np.float32(interval[0]), np.float32(interval[1])
    return bool(time < high and (low == 0 or time > low))


def _check_guidance(scale: float, interval: tuple[float, float]) -> None:
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real) or not math.isfinite(scale) or scale < 0:
        raise ValueError(
            f"`guidance_scale` must be a finite number of at least 0 (1 turns guidance off), got {scale!r}."
        )
    if not isinstance(interval, list | tuple) or len(interval) != 2:
        raise ValueError(f"`guidance_interval` must be a pair (low, high), got {interval!r}.")
    low, high = interval
    if not all(isinstance(bound, numbers.Real) and not isinstance(bound, bool) for bound in interval):
        raise ValueError(f"`guidance_interval` must be a pair of numbers, got {interval!r}.")
    if not 0 <= low < high <= 1:
        raise ValueError(
            f"`guidance_interval` must satisfy 0 ≤ low < high ≤ 1 (t = 0 is noise, t = 1 is the image), got ({low}, {high})."
        )


def _index_names(id2label: dict[int | str, str], num_classes: int) -> dict[str, tuple[int, ...]]:
    """Every name, whole and by synonym, to the ids it stands for. Keys are ids, or their decimals as JSON has them."""
    if not isinstance(id2label, dict):
        raise ValueError(f"`id2label` must be a dictionary of class ids to names, got {type(id2label).__name__}.")
    known = {str(class_id) for class_id in range(num_classes)}
    names_by_id: dict[int, str] = {}
    for key, names in id2label.items():
        if str(key) not in known:
            raise ValueError(f"`id2label` has the key {key!r}; its keys are class ids from 0 to {num_classes - 1}.")
        if int(key) in names_by_id:
            raise ValueError(f"`id2label` has two entries for class {key}.")
        if not isinstance(names, str) or not names.strip(" ,"):
            raise ValueError(f"`id2label[{key!r}]` must be a name, got {names!r}.")
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in names):
            raise ValueError(
                f"`id2label[{key!r}]` must be a name of one line, without control characters, got {names!r}."
            )
        names_by_id[int(key)] = names
    ids: dict[str, tuple[int, ...]] = {}
    for class_id, names in names_by_id.items():
        for name in {names.strip(), *(part.strip() for part in names.split(","))} - {""}:
            ids[name] = (*ids.get(name, ()), class_id)
    return ids
