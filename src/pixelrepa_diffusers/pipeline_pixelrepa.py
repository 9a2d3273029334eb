"""Class-conditional image generation with a JiT; a model trained with PixelREPA samples like any other.

The file is published beside the weights as remote code and imports only torch, numpy and diffusers. It does not import
the model's file, which would load a second copy of the model's class.
"""

import difflib
import inspect
import json
import math
import operator
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.loaders import SanaLoraLoaderMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor


logger = logging.get_logger(__name__)

# Module, class and base class of the components with a file of their own.
_PUBLISHED_COMPONENTS = (
    ("transformer_jit", "JiTTransformer2DModel", ModelMixin),
    ("scheduling_jit", "JiTFlowMatchScheduler", SchedulerMixin),
    ("guidance_jit", "JiTGuidanceHead", ModelMixin),
)
# `DiffusionPipeline.from_pretrained(..., transformer=model)` compares the type of `model` with the class that
# model_index.json names. diffusers looks for that class in `sys.modules`, where remote code has another name: these modules
# hold the base class in its place, which models of the package and of remote code have in common.
for _module, _class_name, _base in _PUBLISHED_COMPONENTS:
    if _module not in sys.modules:
        sys.modules[_module] = ModuleType(_module)
        vars(sys.modules[_module]).update({_class_name: _base, _base.__name__: _base})

# Every kind of guidance: the scale that disables it, and the component it needs.
_GUIDANCE_KINDS = {
    "guidance": (1, "transformer"),
    "self_guidance": (0, "guidance_head"),
    "autoguidance": (1, "guidance_transformer"),
}

# What `ModularPipeline.from_pretrained` reads beside model_index.json.
_MODULAR_CONFIGS = {
    "modular_config.json": {"auto_map": {"ModularPipelineBlocks": "modular_pixelrepa.PixelREPABlocks"}},
    "modular_model_index.json": {"_class_name": "PixelREPAModularPipeline"},
}

ClassLabels = int | str | list[int] | list[str] | torch.Tensor


# Nothing in Sana's loader is Sana's own: it is the one of pipelines that have LoRA weights in their transformer only.
class PixelREPAPipeline(DiffusionPipeline, SanaLoraLoaderMixin):
    r"""
    Pipeline for class-conditional image generation in pixel space with a JiT (arXiv 2511.13720), such as the models
    trained with PixelREPA (arXiv 2603.14366).

    `id2label` and the guidance settings are saved with the pipeline.

    Args:
        transformer ([`JiTTransformer2DModel`]): Predicts the clean image from the noisy image.
        scheduler ([`JiTFlowMatchScheduler`]): The solver of the method, or any flow-matching scheduler of diffusers.
        id2label (`dict`, *optional*): Class id to class name. A name may list synonyms separated by commas.
        guidance_scale (`float`, defaults to 1.0): Default guidance scale of a call.
        guidance_interval (`tuple[float, float]`, defaults to `(0.1, 1.0)`): Default guidance interval of a call.
        guidance_head ([`JiTGuidanceHead`], *optional*): Head for self-guidance (arXiv 2607.29122).
        guidance_transformer ([`JiTTransformer2DModel`], *optional*):
            Smaller or less trained model for autoguidance (arXiv 2406.02507), of the same image size and classes.
        self_guidance_scale, self_guidance_interval, autoguidance_scale, autoguidance_interval:
            Further defaults of a call.

    Examples:

    ```py
    >>> import torch
    >>> from diffusers import DiffusionPipeline

    >>> pipe = DiffusionPipeline.from_pretrained("path/or/repo", trust_remote_code=True)
    >>> seeds = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    >>> images = pipe(class_labels=[207, 360], generator=seeds).images
    ```
    """

    # The guidance models run in every step, like the transformer, so offloading keeps them on the device beside it.
    model_cpu_offload_seq = "transformer"
    _optional_components = ["guidance_head", "guidance_transformer"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        transformer: ModelMixin,
        scheduler: SchedulerMixin,
        id2label: dict | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple | list = (0.1, 1.0),
        guidance_head: ModelMixin | None = None,
        guidance_transformer: ModelMixin | None = None,
        self_guidance_scale: float = 0.0,
        self_guidance_interval: tuple | list = (0.0, 1.0),
        autoguidance_scale: float = 1.0,
        autoguidance_interval: tuple | list = (0.0, 1.0),
    ):
        super().__init__()
        self.register_modules(
            transformer=transformer,
            scheduler=scheduler,
            guidance_head=guidance_head,
            guidance_transformer=guidance_transformer,
        )
        guidance = {
            "guidance_scale": guidance_scale,
            "guidance_interval": guidance_interval,
            "self_guidance_scale": self_guidance_scale,
            "self_guidance_interval": self_guidance_interval,
            "autoguidance_scale": autoguidance_scale,
            "autoguidance_interval": autoguidance_interval,
        }
        self._check_guidance(**guidance)
        self._check_guidance_models()
        self._ids_by_name = _index_names(id2label or {}, transformer.config.num_classes)
        # The types of JSON, so that a reloaded pipeline has the same configuration: string keys, floats and lists.
        for name, value in guidance.items():
            guidance[name] = float(value) if name.endswith("scale") else [float(bound) for bound in value]
        id2label = None if id2label is None else {str(class_id): names for class_id, names in id2label.items()}
        self.register_to_config(id2label=id2label, **guidance)
        self._guidance_scale = self.config.guidance_scale
        self._current_timestep, self._num_timesteps, self._interrupt = None, 0, False
        channels = transformer.config.in_channels
        self.image_processor = VaeImageProcessor(
            vae_scale_factor=1, do_convert_rgb=channels == 3, do_convert_grayscale=channels == 1
        )

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the current or last call; a step-end callback may set `_guidance_scale`."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the guidance scale has an effect (inside the guidance interval)."""
        return self._guidance_scale != 1 and self.transformer.config.num_classes > 1

    @property
    def current_timestep(self) -> torch.Tensor | None:
        """The scheduler's timestep of the current model call, `None` outside a pipeline call; some caches need it."""
        return self._current_timestep

    @property
    def num_timesteps(self) -> int:
        """Number of timesteps (NFE) of the current or last call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the remaining timesteps are skipped; a step-end callback may set `_interrupt`."""
        return self._interrupt

    def get_label_ids(self, class_labels: ClassLabels | None) -> list[int]:
        """
        Return the class id of every label.

        Args:
            class_labels (`int`, `str`, a list of them, an integer `torch.Tensor`, or `None`):
                Ids in [0, num_classes − 1], or names in `id2label`, complete or one of their comma-separated synonyms.
                Nested lists are flattened. `None` is allowed for a model with a single class and means one image.

        Raises:
            `ValueError`: For an empty list, an id out of range, an unknown name (the message lists the nearest names) or
            a name shared by several classes.
        """
        num_classes = self.transformer.config.num_classes
        if isinstance(class_labels, torch.Tensor | np.ndarray):
            class_labels = class_labels.tolist()
        if isinstance(class_labels, list | tuple):
            if len(class_labels) == 0:
                raise ValueError("`class_labels` is empty; pass one class id or name per image.")
            return [class_id for label in class_labels for class_id in self.get_label_ids(label)]
        if isinstance(class_labels, str):
            return [self._find_name(class_labels)]
        if class_labels is None:
            if num_classes > 1:
                raise ValueError(f"`class_labels` is required: this model has {num_classes} classes.")
            return [0]
        class_id = operator.index(class_labels)
        if not 0 <= class_id < num_classes:
            raise ValueError(f"Class id {class_id} is out of range: the class ids are 0 to {num_classes - 1}.")
        return [class_id]

    def _find_name(self, name: str) -> int:
        if not self._ids_by_name:
            raise ValueError(f"This pipeline has no class names to look up {name!r}; pass class ids instead.")
        class_ids = self._ids_by_name.get(name, [])
        if len(class_ids) > 1:
            raise ValueError(f"The name {name!r} is shared by the classes {class_ids}; pass the class id instead.")
        if not class_ids:
            names = {known.casefold(): known for known in self._ids_by_name}
            nearest = difflib.get_close_matches(name.strip().casefold(), names, n=5, cutoff=0.4)
            listed = [names[key] for key in nearest] or [*self._ids_by_name][:10]
            hint = f"{'The nearest' if nearest else 'The first'} names: {', '.join(map(repr, listed))}."
            raise ValueError(f"There is no class called {name!r}. {hint}")
        return class_ids[0]

    def check_inputs(
        self,
        class_labels: ClassLabels | None,
        num_inference_steps: int,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        strength: float = 1.0,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        **guidance,
    ) -> None:
        """Check the arguments of a call; `guidance` are its guidance scales and intervals."""
        batch_size = len(self.get_label_ids(class_labels))
        self._check_guidance(**guidance)
        if num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` must be at least 1, got {num_inference_steps}.")
        if not 0 < strength <= 1:
            raise ValueError(f"`strength` must lie in (0, 1], got {strength}.")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"Got {len(generator)} generators for {batch_size} images; pass one per image, or one.")
        if latents is not None and latents.shape != (shape := self._latent_shape(batch_size)):
            raise ValueError(f"`latents` must have the shape {shape}, got {tuple(latents.shape)}.")
        if not set(callback_on_step_end_tensor_inputs or ()) <= set(self._callback_tensor_inputs):
            raise ValueError(f"`callback_on_step_end_tensor_inputs` may only name {self._callback_tensor_inputs}.")
        # Flow-matching schedulers have `scale_noise` and `num_train_timesteps`; others need flow settings.
        settings = self.scheduler.config
        is_flow_matching = hasattr(self.scheduler, "scale_noise") and "num_train_timesteps" in settings
        has_flow_settings = settings.get("prediction_type") == "flow_prediction" and settings.get("use_flow_sigmas")
        if not is_flow_matching and not has_flow_settings:
            raise ValueError(
                f"{type(self.scheduler).__name__} is not set up for flow matching. Use JiTFlowMatchScheduler, a FlowMatch "
                "scheduler of diffusers, or its DPMSolverMultistep, DPMSolverSinglestep, UniPCMultistep or DEISMultistep "
                'scheduler with `prediction_type="flow_prediction", use_flow_sigmas=True`.'
            )

    def _check_guidance(self, **settings) -> None:
        for kind, (neutral, component) in _GUIDANCE_KINDS.items():
            scale = settings.get(f"{kind}_scale", neutral)
            interval = settings.get(f"{kind}_interval", (0, 1))
            if not 0 <= scale < float("inf"):
                raise ValueError(f"`{kind}_scale` must be at least 0 ({neutral} disables it), got {scale}.")
            if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
                raise ValueError(f"`{kind}_interval` must satisfy 0 ≤ low < high ≤ 1 (0 is noise), got {interval}.")
            if scale != neutral and getattr(self, component) is None:
                raise ValueError(f"`{kind}_scale={scale}` needs a `{component}`, which this pipeline lacks.")
        if settings.get("self_guidance_scale", 0) != 0 and self.transformer.is_cache_enabled:
            raise ValueError(
                "Self-guidance reads the tokens of a middle block, which a cache may skip: call "
                "`pipe.transformer.disable_cache()` or set `self_guidance_scale=0`."
            )

    def _check_guidance_models(self) -> None:
        if self.guidance_head is not None:
            self.guidance_head.check_fits(self.transformer)
        if self.guidance_transformer is not None:
            weak, own = self.guidance_transformer.config, self.transformer.config
            for name in ("sample_size", "in_channels", "num_classes", "noise_scale"):
                if weak[name] != own[name]:
                    raise ValueError(f"The guidance transformer has {name} {weak[name]}, the transformer {own[name]}.")

    def _latent_shape(self, batch_size: int) -> tuple[int, int, int, int]:
        config = self.transformer.config
        return batch_size, config.in_channels, config.sample_size, config.sample_size

    def prepare_latents(
        self,
        batch_size: int,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        image: PipelineImageInput | None = None,
        time: float = 0.0,
    ) -> torch.Tensor:
        """
        Return float32 noise e with the model's `noise_scale`, of shape (batch_size, channels, size, size); with an `image`
        x, return z = t·x + (1 − t)·e at t = `time`.
        """
        shape = self._latent_shape(batch_size)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        latents = latents.to(device=device, dtype=torch.float32) * self.transformer.config.noise_scale
        if image is None:
            return latents
        image = self.image_processor.preprocess(image, *shape[2:]).to(latents)
        if len(image) not in (1, batch_size):
            raise ValueError(f"Got {len(image)} images for {batch_size} labels; pass one per label, or one.")
        return time * image + (1 - time) * latents

    def prepare_timesteps(
        self, num_inference_steps: int, device: torch.device, strength: float = 1.0
    ) -> tuple[torch.Tensor, list[float]]:
        """
        Set the timesteps; return those of the last `strength` of the steps, and the time t = 1 − sigma in [0, 1] of each.

        t comes from the sigmas because some schedulers round their timesteps to integers. A float32 sigma determines t to
        6e-8; rounding to seven decimals restores the grid points, where the bounds of the guidance interval lie.
        """
        if isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):
            # Its default grid ends at sigma 1/1000 instead of one step before the image.
            sigmas = np.linspace(1, 1 / num_inference_steps, num_inference_steps)
            self.scheduler.set_timesteps(sigmas=sigmas, device=device)
        else:
            self.scheduler.set_timesteps(num_inference_steps, device=device)
        skipped_steps = num_inference_steps - max(1, round(strength * num_inference_steps))
        begin = skipped_steps * self.scheduler.order
        self.scheduler.set_begin_index(begin)
        timesteps = self.scheduler.timesteps
        sigmas = self.scheduler.sigmas[: len(timesteps)].cpu()
        times = 1 - sigmas.double()
        times = (times if sigmas.dtype == torch.float64 else times.round(decimals=7)).tolist()
        return timesteps[begin:], times[begin:]

    def prepare_extra_step_kwargs(self, generator: torch.Generator | list[torch.Generator] | None) -> dict[str, Any]:
        """Return the generator as an argument of the scheduler's `step`, if it has one."""
        return {"generator": generator} if "generator" in inspect.signature(self.scheduler.step).parameters else {}

    def predict_velocity(
        self,
        sample: torch.Tensor,
        time: float,
        model_time: torch.Tensor,
        labels: torch.Tensor,
        self_guidance_scale: float = 0.0,
        self_guidance_interval: tuple[float, float] = (0.0, 1.0),
        autoguidance_scale: float = 1.0,
        autoguidance_interval: tuple[float, float] = (0.0, 1.0),
    ) -> torch.Tensor:
        """
        Predict the velocity towards the image of every sample of a batch, with self-guidance and autoguidance.

        `time` is t in double precision, for the intervals; `model_time` is the same t as a float32 tensor, for the models.
        """
        transformer, head, weak = self.transformer, self.guidance_head, self.guidance_transformer
        use_head = self_guidance_scale != 0 and _in_interval(time, self_guidance_interval)
        states = {"return_alignment_states": True, "alignment_depth": head.config.depth} if use_head else {}
        output = transformer(sample, model_time, labels, **states)
        plain = velocity = transformer.velocity(output.sample, sample, model_time)
        if use_head:
            head_velocity = transformer.velocity(head(output.alignment_states, model_time, labels), sample, model_time)
            velocity = velocity + self_guidance_scale * (plain - head_velocity)
        if autoguidance_scale != 1 and _in_interval(time, autoguidance_interval):
            prediction = weak(sample, model_time, labels, return_dict=False)[0]
            weak_velocity = transformer.velocity(prediction, sample, model_time)
            velocity = velocity + (autoguidance_scale - 1) * (plain - weak_velocity)
        return velocity

    def decode(self, latents: torch.Tensor, output_type: str) -> Any:
        """Convert `latents`, nominally in [-1, 1], to images of `output_type`."""
        if output_type == "latent":
            return latents
        if not latents.isfinite().all():  # clipping would turn these values into black or white pixels
            raise ValueError(
                "The images contain NaN or infinite values. Check the weights, the scheduler's settings (Karras sigmas "
                f"do not work with flow matching), guidance_scale={self.guidance_scale} and the dtype "
                f'{self.transformer.dtype}; output_type="latent" returns the values unchecked.'
            )
        return self.image_processor.postprocess(latents, output_type=output_type)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: ClassLabels | None = None,
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
        self_guidance_scale: float | None = None,
        self_guidance_interval: tuple[float, float] | None = None,
        autoguidance_scale: float | None = None,
        autoguidance_interval: tuple[float, float] | None = None,
        image: PipelineImageInput | None = None,
        strength: float = 0.6,
    ) -> ImagePipelineOutput | tuple:
        r"""
        Generate one image per class label.

        Args:
            class_labels (`int`, `str`, a list of them, or an integer `torch.Tensor`, *optional*):
                Class ids in [0, num_classes − 1] or class names. Optional only for a model with a single class.
            guidance_scale (`float`, *optional*, defaults to the saved value):
                s in v = v_uncond + s·(v_cond − v_uncond). 1 disables guidance.
            guidance_interval (`tuple[float, float]`, *optional*, defaults to the saved value):
                Guidance applies where low < t < high, and at t = 0 if low is 0 (arXiv 2404.07724, in this model's time:
                0 is noise). Outside the interval, the unconditional half of the batch is not computed.
            num_inference_steps (`int`, defaults to 50): Number of solver steps; N Heun steps take 2N − 1 NFE.
            generator (`torch.Generator` or a list of them, *optional*):
                With one generator per image, an image does not depend on its batch.
            latents (`torch.Tensor` of shape `(batch_size, channels, size, size)`, *optional*):
                Unit noise, to be multiplied by the model's `noise_scale`.
            output_type (`str`, defaults to `"pil"`):
                `"pil"`, `"np"` or `"pt"` (in [0, 1]), or `"latent"` (raw float32 images, nominally in [-1, 1]).
            return_dict (`bool`, defaults to `True`): Whether to return an [`ImagePipelineOutput`] or a tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called after every timestep as `callback(pipeline, index, timestep, {"latents": ...})`; the returned
                dictionary replaces the tensors.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`): Tensors passed to the callback.
            self_guidance_scale, autoguidance_scale (`float`, *optional*, defaults to the saved value):
                w and s in v ← v + w·(v − v_head) + (s − 1)·(v − v_weak), applied to both halves before `guidance_scale`
                combines them. They need a `guidance_head` and a `guidance_transformer`; 0 and 1 disable them.
            self_guidance_interval, autoguidance_interval (`tuple[float, float]`, *optional*, defaults to the saved value):
                Where they apply, like `guidance_interval`. Outside, the head or the second transformer is not computed.
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of them, *optional*):
                Start from these images, one per label or one for all, instead of from noise. Arrays and tensors are in
                [0, 1]; images of another size are resized to the model's.
            strength (`float`, defaults to 0.6):
                With an `image`, the share of the steps that is taken: the start is z = t·image + (1 − t)·noise at
                t = 1 − strength. 1 ignores the image.

        Returns:
            [`ImagePipelineOutput`] or a tuple whose first element is the images.
        """
        # 1. Check inputs
        given = {
            "guidance_scale": guidance_scale,
            "guidance_interval": guidance_interval,
            "self_guidance_scale": self_guidance_scale,
            "self_guidance_interval": self_guidance_interval,
            "autoguidance_scale": autoguidance_scale,
            "autoguidance_interval": autoguidance_interval,
        }
        guidance = {name: self.config[name] if value is None else value for name, value in given.items()}
        strength = 1.0 if image is None else strength
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self.check_inputs(
            class_labels,
            num_inference_steps,
            generator,
            latents,
            strength,
            callback_on_step_end_tensor_inputs,
            **guidance,
        )
        self._guidance_scale = guidance.pop("guidance_scale")
        guidance_interval = guidance.pop("guidance_interval")
        self._interrupt, self._current_timestep = False, None  # also after a call that raised
        if self._guidance_scale != 1 and not self.do_classifier_free_guidance:
            logger.warning(f"`guidance_scale={self._guidance_scale}` has no effect: the model has a single class.")

        # 2. Prepare labels, timesteps and noise
        device = self._execution_device
        labels = torch.tensor(self.get_label_ids(class_labels), device=device)
        labels_and_null = torch.cat([labels, torch.full_like(labels, self.transformer.config.num_classes)])
        timesteps, times = self.prepare_timesteps(num_inference_steps, device, strength)
        model_times = torch.tensor(times, dtype=torch.float32, device=device)
        latents = self.prepare_latents(len(labels), device, generator, latents, image, times[0])
        extra_step_kwargs = self.prepare_extra_step_kwargs(generator)
        self._num_timesteps = len(timesteps)

        # 3. Denoise in float32
        self.transformer._reset_stateful_cache()  # a call that raised leaves its cache behind
        order, guided, cache_name = self.scheduler.order, None, ""
        with self.progress_bar(total=math.ceil(len(timesteps) / order)) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                self._current_timestep = t

                was_guided = guided
                guided = self.do_classifier_free_guidance and _in_interval(times[i], guidance_interval)
                if guided != was_guided:  # another batch: a new cache context, without outdated states
                    cache_name = f"from-{i}"
                with self.transformer.cache_context(
                    cache_name, step_index=i, num_inference_steps=len(timesteps), timestep=t, sigma=1 - times[i]
                ):
                    velocity = self.predict_velocity(
                        torch.cat([latents, latents]) if guided else latents,
                        times[i],
                        model_times[i],
                        labels_and_null if guided else labels,
                        **guidance,
                    )
                if guided:
                    conditional, unconditional = velocity.chunk(2)
                    velocity = unconditional + self.guidance_scale * (conditional - unconditional)

                # diffusers' flow velocity points from the image to the noise.
                latents = self.scheduler.step(-velocity, t, latents, **extra_step_kwargs, return_dict=False)[0]

                if callback_on_step_end is not None:
                    callback_kwargs = {"latents": latents} if callback_on_step_end_tensor_inputs else {}
                    callback_outputs = callback_on_step_end(self, i, t, callback_kwargs)
                    latents = callback_outputs.pop("latents", latents)

                if i == len(timesteps) - 1 or (i + 1) % order == 0:
                    progress_bar.update()
        self._current_timestep = None
        self.maybe_free_model_hooks()

        # 4. Convert to images
        images = self.decode(latents, output_type)
        if not return_dict:
            return (images,)
        return ImagePipelineOutput(images=images)

    def __repr__(self) -> str:
        lines = []
        for name, component in self.components.items():
            line = f"{name}: {type(component).__name__}"
            if isinstance(component, ModelMixin):
                size = component.num_parameters() / 1e6
                line += f", {size:.3g} M parameters, {component.dtype} on {component.device}"
            if component is not None:
                lines.append(line)
        _, channels, side, _ = self._latent_shape(1)
        lines.append(f"images: {channels}×{side}×{side}, {self.transformer.config.num_classes} classes")
        for kind, (neutral, _) in _GUIDANCE_KINDS.items():
            if self.config[f"{kind}_scale"] != neutral:
                low, high = self.config[f"{kind}_interval"]
                lines.append(f"{kind}: {self.config[f'{kind}_scale']:g} for t in ({low:g}, {high:g})")
        return "\n  ".join([f"{type(self).__name__}(", *lines]) + "\n)"

    # Self-contained folders: model_index.json always names this file and the components' files, which are saved beside it.
    # With the package installed, these names resolve to the package's own classes.

    def save_config(self, save_directory, push_to_hub: bool = False, **kwargs):
        """Save model_index.json and a copy of this file, so that the pipeline loads without this package."""
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        source = Path(inspect.getfile(type(self)))
        shutil.copyfile(source, Path(save_directory) / source.name)
        modular = source.with_name("modular_pixelrepa.py")
        if modular.is_file():  # remote code has it after `ModularPipeline.from_pretrained`
            shutil.copyfile(modular, Path(save_directory) / modular.name)
            for name, content in _MODULAR_CONFIGS.items():
                (Path(save_directory) / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def to_json_string(self) -> str:
        config = json.loads(super().to_json_string())
        config.pop("_name_or_path", None)  # a local path of the machine that loaded the pipeline
        config["_class_name"] = [type(self).__module__.rpartition(".")[2], type(self).__name__]
        # A pipeline without these parts is described as before they existed.
        for kind, (_, component) in _GUIDANCE_KINDS.items():
            if getattr(self, component) is None:
                for name in (component, f"{kind}_scale", f"{kind}_interval"):
                    config.pop(name, None)
        for name, component in self.components.items():
            if component is None:
                continue
            component_class = type(getattr(component, "_orig_mod", component))  # unwraps torch.compile
            library = component_class.__module__.partition(".")[0]
            if library not in ("diffusers", "transformers"):
                config[name] = [component_class.__module__.rpartition(".")[2], component_class.__name__]
        # For `AutoModel.from_pretrained(repo, subfolder="transformer")`, which reads model_index.json first.
        config["auto_map"] = {"AutoModel": ".".join(config["transformer"])}
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        # diffusers would warn about an unexpected argument at every load.
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)

    @classmethod
    def _dict_from_json_file(cls, json_file):
        config = super()._dict_from_json_file(json_file)
        package = cls.__module__.partition(".")[0]
        class_name = config.get("_class_name")
        if package == "diffusers_modules" or not isinstance(class_name, list):
            return config
        config["_class_name"] = class_name[1]
        for name, value in config.items():
            if value in [[module, class_name] for module, class_name, _ in _PUBLISHED_COMPONENTS]:
                config[name] = [package, value[1]]
        return config

    @classmethod
    def _get_signature_types(cls):
        # `from_pipe` compares exact types, and the annotations of the models can only name their base class.
        types = super()._get_signature_types()
        for _, name in _GUIDANCE_KINDS.values():
            types[name] = (*types[name], *ModelMixin.__subclasses__())
        return types


def _in_interval(time: float, interval: tuple[float, float]) -> bool:
    """low < t < high, strict and in float32 as in the published code; low = 0 includes the start."""
    time, low, high = np.float32(time), np.float32(interval[0]), np.float32(interval[1])
    return bool(time < high and (low == 0 or time > low))


def _index_names(id2label: dict[int | str, str], num_classes: int) -> dict[str, list[int]]:
    """Map every complete name and every synonym to its class ids."""
    ids_by_name: dict[str, list[int]] = {}
    for key, names in id2label.items():
        if not 0 <= int(key) < num_classes:
            raise ValueError(
                f"`id2label` has the key {key!r}; its keys must be class ids from 0 to {num_classes - 1}."
            )
        for name in {names.strip(), *(part.strip() for part in names.split(","))} - {""}:
            ids_by_name.setdefault(name, []).append(int(key))
    return ids_by_name
