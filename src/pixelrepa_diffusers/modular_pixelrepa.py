"""The pipeline as Modular Diffusers blocks, for `ModularPipeline.from_pretrained(repo, trust_remote_code=True)`.

The blocks call the methods of [`PixelREPAPipeline`], so both pipelines make the same images. Here, a `guider` component
combines the predictions. Any guider of diffusers fits; each of its batches is one model call.

The file is published beside pipeline_pixelrepa.py as remote code and imports only torch, diffusers and that file.
"""

import inspect
import math
import re
from typing import Any

import diffusers
import torch
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.models.modeling_utils import ModelMixin
from diffusers.modular_pipelines import (
    BlockState,
    ComponentSpec,
    ConfigSpec,
    InputParam,
    LoopSequentialPipelineBlocks,
    ModularPipeline,
    ModularPipelineBlocks,
    OutputParam,
    PipelineState,
    SequentialPipelineBlocks,
)
from diffusers.modular_pipelines.modular_pipeline import MODULAR_PIPELINE_MAPPING
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.dynamic_modules_utils import get_class_from_dynamic_module

from .pipeline_pixelrepa import _GUIDANCE_KINDS, PixelREPAPipeline, _in_interval


_MODELS = {
    "transformer": "Predicts the clean image from the noisy image.",
    "guidance_head": "Head for self-guidance (optional).",
    "guidance_transformer": "Smaller or less trained transformer for autoguidance (optional).",
}
# Settings saved with the pipeline: id2label, scales and intervals.
_SETTINGS = {
    name: parameter.default
    for name, parameter in inspect.signature(PixelREPAPipeline).parameters.items()
    if name not in (*_MODELS, "scheduler")
}
_GUIDANCE_SETTINGS = [name for name in _SETTINGS if name != "id2label"]

# Inputs of several blocks.
_NUM_STEPS = InputParam("num_inference_steps", type_hint=int, default=50, description="Number of solver steps.")
_GENERATOR = InputParam("generator", description="`torch.Generator`, or a list with one per image.")
_UNIT_NOISE = InputParam("latents", type_hint=torch.Tensor, description="Unit noise of shape (B, C, S, S).")
_IMAGE = InputParam("image", description="Image to start from: one per label, or one for all.")
_STRENGTH = InputParam("strength", type_hint=float, default=0.6, description="Share of the steps taken from an image.")
_OUTPUT_TYPE = InputParam("output_type", type_hint=str, default="pil", description='"pil", "np", "pt" or "latent".')
_LABEL_IDS = InputParam("label_ids", required=True, type_hint=torch.Tensor, description="Class ids (B,).")
_TIMES = InputParam("times", required=True, type_hint=list[float], description="t of every model call.")
_LATENTS = InputParam("latents", required=True, type_hint=torch.Tensor, description="Noisy images (B, C, S, S).")


class PixelREPAGuidance(ClassifierFreeGuidance):
    """
    Classifier-free guidance with the scale of the call, where low < t < high of the call's guidance interval; the
    default guider. Other guiders have a scale of their own, and their `start` and `stop` are fractions of the steps.
    """


class PixelREPABlock(ModularPipelineBlocks):
    """Base class of the blocks: the components and saved settings of a [`PixelREPAPipeline`], and a guider."""

    model_name = "pixelrepa"

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [
            *(ComponentSpec(name, ModelMixin, description) for name, description in _MODELS.items()),
            ComponentSpec(
                "scheduler", SchedulerMixin, "JiTFlowMatchScheduler or a flow-matching scheduler of diffusers."
            ),
            ComponentSpec(
                "guider", PixelREPAGuidance, "Combines the predictions.", default_creation_method="from_config"
            ),
        ]

    @property
    def expected_configs(self) -> list[ConfigSpec]:
        return [ConfigSpec(name, default) for name, default in _SETTINGS.items()]


class PixelREPAInputStep(PixelREPABlock):
    description = "Checks the inputs, looks up class names and fills in the saved guidance settings."
    inputs = [
        InputParam("class_labels", description="Class ids, class names, or a list of them; one image each."),
        _NUM_STEPS,
        _GENERATOR,
        _UNIT_NOISE,
        _IMAGE,
        _STRENGTH,
        _OUTPUT_TYPE,
        *(InputParam(name, description="Default: the value saved with the pipeline.") for name in _GUIDANCE_SETTINGS),
    ]
    intermediate_outputs = [
        OutputParam("label_ids", type_hint=torch.Tensor, description="Class ids (B,)."),
        OutputParam("null_ids", type_hint=torch.Tensor, description="Label of the unconditional model (B,)."),
        OutputParam("guidance", type_hint=dict, description="Guidance scales and intervals of this call."),
    ]

    def __call__(self, components: ModularPipeline, state: PipelineState) -> tuple[ModularPipeline, PipelineState]:
        block_state = self.get_block_state(state)
        given = {name: block_state[name] for name in _GUIDANCE_SETTINGS if block_state[name] is not None}
        is_default = isinstance(components.guider, PixelREPAGuidance)
        if not is_default and {"guidance_scale", "guidance_interval"} & given.keys():
            raise ValueError(
                "`guidance_scale` and `guidance_interval` are arguments of the default guider. Set the scale of "
                f"{type(components.guider).__name__} with `pipe.update_components(guider=pipe.guider.new(...))`."
            )
        block_state.guidance = {name: given.get(name, components.config[name]) for name in _GUIDANCE_SETTINGS}
        pipeline = components.standard_pipeline
        pipeline.check_inputs(
            class_labels=block_state.class_labels,
            num_inference_steps=block_state.num_inference_steps,
            generator=block_state.generator,
            latents=block_state.latents,
            strength=1.0 if block_state.image is None else block_state.strength,
            **block_state.guidance,
        )
        label_ids = pipeline.get_label_ids(block_state.class_labels)
        block_state.label_ids = torch.tensor(label_ids, device=components._execution_device)
        block_state.null_ids = torch.full_like(block_state.label_ids, components.transformer.config.num_classes)
        self.set_block_state(state, block_state)
        return components, state


class PixelREPASetTimestepsStep(PixelREPABlock):
    description = "Sets the scheduler's timesteps."
    inputs = [_NUM_STEPS, _IMAGE, _STRENGTH]
    intermediate_outputs = [
        OutputParam("timesteps", type_hint=torch.Tensor, description="The scheduler's timestep of every model call."),
        OutputParam("times", type_hint=list[float], description="t of every model call; 0 is noise, 1 the image."),
    ]

    def __call__(self, components: ModularPipeline, state: PipelineState) -> tuple[ModularPipeline, PipelineState]:
        block_state = self.get_block_state(state)
        strength = 1.0 if block_state.image is None else block_state.strength
        block_state.timesteps, block_state.times = components.standard_pipeline.prepare_timesteps(
            block_state.num_inference_steps, components._execution_device, strength
        )
        self.set_block_state(state, block_state)
        return components, state


class PixelREPAPrepareLatentsStep(PixelREPABlock):
    description = "Draws the noise, with the model's `noise_scale`, and adds it to an image."
    inputs = [_LABEL_IDS, _GENERATOR, _UNIT_NOISE, _IMAGE, _TIMES]
    intermediate_outputs = [
        OutputParam("latents", type_hint=torch.Tensor, description="Noisy images (B, C, S, S), float32.")
    ]

    def __call__(self, components: ModularPipeline, state: PipelineState) -> tuple[ModularPipeline, PipelineState]:
        block_state = self.get_block_state(state)
        block_state.latents = components.standard_pipeline.prepare_latents(
            len(block_state.label_ids),
            components._execution_device,
            block_state.generator,
            block_state.latents,
            block_state.image,
            block_state.times[0],
        )
        self.set_block_state(state, block_state)
        return components, state


class PixelREPALoopDenoiser(PixelREPABlock):
    description = "Predicts a velocity for every batch of the guider, which combines them."
    inputs = [
        _LATENTS,
        _LABEL_IDS,
        InputParam("null_ids", required=True, type_hint=torch.Tensor, description="Null labels (B,)."),
        _TIMES,
        InputParam("guidance", required=True, type_hint=dict, description="Guidance scales and intervals."),
    ]

    def __call__(
        self, components: ModularPipeline, block_state: BlockState, i: int, t: torch.Tensor
    ) -> tuple[ModularPipeline, BlockState]:
        transformer, guider, time = components.transformer, components.guider, block_state.times[i]
        model_time = torch.tensor(time, dtype=torch.float32, device=block_state.latents.device)
        settings = dict(block_state.guidance)
        scale, interval = settings.pop("guidance_scale"), settings.pop("guidance_interval")
        if isinstance(guider, PixelREPAGuidance):
            guided = transformer.config.num_classes > 1 and _in_interval(time, interval)
            guider.guidance_scale = scale if guided else 1.0  # 1 asks for no unconditional batch

        # A guider counts solver steps: both model calls of a Heun step have the same number.
        order = components.scheduler.order
        guider.set_state(i // order, num_inference_steps=math.ceil(len(block_state.times) / order), timestep=t)
        batches = guider.prepare_inputs_from_block_state(block_state, {"labels": ("label_ids", "null_ids")})
        for batch in batches:
            guider.prepare_models(transformer)
            with transformer.cache_context(
                getattr(batch, guider._identifier_key),
                step_index=i,
                num_inference_steps=len(block_state.times),
                timestep=t,
                sigma=1 - time,
            ):
                velocity = block_state.pipeline.predict_velocity(
                    block_state.latents, time, model_time, batch.labels, **settings
                )
            # diffusers' flow velocity points from the image to the noise.
            batch.noise_pred = -velocity
            guider.cleanup_models(transformer)
        block_state.noise_pred = guider(batches)[0]
        return components, block_state


class PixelREPALoopSchedulerStep(PixelREPABlock):
    description = "Moves the noisy images to the next timestep."
    inputs = [_GENERATOR]
    intermediate_outputs = [
        OutputParam("latents", type_hint=torch.Tensor, description="Images (B, C, S, S), nominally in [-1, 1].")
    ]

    def __call__(
        self, components: ModularPipeline, block_state: BlockState, i: int, t: torch.Tensor
    ) -> tuple[ModularPipeline, BlockState]:
        kwargs = block_state.pipeline.prepare_extra_step_kwargs(block_state.generator)
        block_state.latents = components.scheduler.step(
            block_state.noise_pred, t, block_state.latents, **kwargs, return_dict=False
        )[0]
        return components, block_state


class PixelREPADenoiseStep(LoopSequentialPipelineBlocks):
    model_name = "pixelrepa"
    description = "Solves from noise to images. The blocks of the loop run once per timestep."
    block_classes = [PixelREPALoopDenoiser, PixelREPALoopSchedulerStep]
    block_names = ["denoiser", "scheduler_step"]
    loop_inputs = [
        InputParam("timesteps", required=True, type_hint=torch.Tensor, description="Timestep of every model call.")
    ]

    def __call__(self, components: ModularPipeline, state: PipelineState) -> tuple[ModularPipeline, PipelineState]:
        block_state = self.get_block_state(state)
        block_state.pipeline = components.standard_pipeline
        components.transformer._reset_stateful_cache()  # a call that raised leaves its cache behind
        timesteps, order = block_state.timesteps, components.scheduler.order
        with self.progress_bar(total=math.ceil(len(timesteps) / order)) as progress_bar:
            for i, t in enumerate(timesteps):
                components, block_state = self.loop_step(components, block_state, i=i, t=t)
                if i == len(timesteps) - 1 or (i + 1) % order == 0:
                    progress_bar.update()
        self.set_block_state(state, block_state)
        return components, state


class PixelREPADecodeStep(PixelREPABlock):
    description = "Converts the values in [-1, 1] to images."
    inputs = [
        _LATENTS,
        InputParam("guidance", type_hint=dict, description="Guidance scales and intervals."),
        _OUTPUT_TYPE,
    ]
    intermediate_outputs = [OutputParam("images", description="PIL images, or an array or tensor in [0, 1].")]

    def __call__(self, components: ModularPipeline, state: PipelineState) -> tuple[ModularPipeline, PipelineState]:
        block_state = self.get_block_state(state)
        pipeline = components.standard_pipeline
        if block_state.guidance is not None:  # named in the message about infinite values
            pipeline._guidance_scale = block_state.guidance["guidance_scale"]
        block_state.images = pipeline.decode(block_state.latents, block_state.output_type)
        self.set_block_state(state, block_state)
        return components, state


class PixelREPABlocks(SequentialPipelineBlocks):
    """Class-conditional generation: `PixelREPABlocks().init_pipeline("path/or/repo")`."""

    model_name = "pixelrepa"
    description = "Class-conditional image generation in pixel space with a JiT (arXiv 2511.13720)."
    block_classes = [
        PixelREPAInputStep,
        PixelREPASetTimestepsStep,
        PixelREPAPrepareLatentsStep,
        PixelREPADenoiseStep,
        PixelREPADecodeStep,
    ]
    block_names = ["input", "set_timesteps", "prepare_latents", "denoise", "decode"]

    @property
    def outputs(self) -> list[OutputParam]:
        return self.sub_blocks["decode"].intermediate_outputs


class PixelREPAModularPipeline(ModularPipeline):
    r"""
    Modular pipeline for class-conditional image generation in pixel space with a JiT.

    Its folder is that of a [`PixelREPAPipeline`]: components and settings are listed in model_index.json. The guider is not
    saved.

    Examples:

    ```py
    >>> from diffusers import AdaptiveProjectedGuidance, ModularPipeline

    >>> pipe = ModularPipeline.from_pretrained("path/or/repo", trust_remote_code=True)
    >>> pipe.load_components()
    >>> images = pipe(class_labels=[207, 360], output="images")
    >>> pipe.update_components(guider=AdaptiveProjectedGuidance(guidance_scale=3.0))
    >>> images = pipe(class_labels=[207, 360], output="images")
    ```
    """

    def __init__(
        self,
        blocks: ModularPipelineBlocks | None = None,
        pretrained_model_name_or_path: str | None = None,
        modular_config_dict: dict[str, Any] | None = None,
        config_dict: dict[str, Any] | None = None,
        revision: str | None = None,
        **kwargs,
    ):
        index = {}
        if pretrained_model_name_or_path is not None:
            # Remote code of the Hub lies in a folder named after its commit; the weights are loaded from the same commit.
            folder = __name__.split(".")[-2]
            revision = folder if re.fullmatch("[0-9a-f]{40}", folder) else revision
            source = {"pretrained_model_name_or_path": str(pretrained_model_name_or_path), "revision": revision}
            index = PixelREPAPipeline.load_config(pretrained_model_name_or_path, revision=revision)
            for name in (*_MODELS, "scheduler"):
                if name in index:
                    index[name] = (*index[name], {"type_hint": index[name], "subfolder": name, **source})
        super().__init__(
            blocks or PixelREPABlocks(), pretrained_model_name_or_path, modular_config_dict=index, **kwargs
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, **kwargs) -> "PixelREPAModularPipeline":
        """
        Load a pipeline with the blocks of this file instead of those in the repository.

        Args:
            pretrained_model_name_or_path (`str`): Folder or Hub id, also of a pipeline saved without modular files.
            kwargs: `blocks`, `revision`, `components_manager` and `collection`.
        """
        return cls(pretrained_model_name_or_path=pretrained_model_name_or_path, **kwargs)

    @staticmethod
    def _dict_to_component_spec(name: str, spec_dict: dict[str, Any]) -> ComponentSpec:
        library, class_name = spec_dict.pop("type_hint")
        if not library.endswith("_jit"):
            return ModularPipeline._dict_to_component_spec(name, {"type_hint": (library, class_name), **spec_dict})
        component_class = get_class_from_dynamic_module(
            spec_dict["pretrained_model_name_or_path"],
            f"{library}.py",
            subfolder=name,
            class_name=class_name,
            revision=spec_dict["revision"],
            trust_remote_code=True,  # as this file
        )
        return ComponentSpec(name, component_class, **spec_dict)

    @property
    def standard_pipeline(self) -> PixelREPAPipeline:
        """Standard pipeline of the same components, without guidance settings. The blocks call its methods."""
        if self.transformer is None or self.scheduler is None:
            raise ValueError("The components are not loaded yet: call `pipe.load_components()` first.")
        components = {name: getattr(self, name) for name in (*_MODELS, "scheduler")}
        return PixelREPAPipeline(**components, id2label=self.config.id2label)

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """Save the folder of the [`PixelREPAPipeline`], from which both pipelines load; same arguments."""
        components = self.standard_pipeline.components
        missing = [f"{kind}_scale" for kind, (_, model) in _GUIDANCE_KINDS.items() if components[model] is None]
        settings = {name: self.config[name] for name in _SETTINGS if name not in missing}
        PixelREPAPipeline(**components, **settings).save_pretrained(save_directory, **kwargs)


# diffusers looks up the class of a modular pipeline by the blocks' `model_name`, and then by name in its own namespace.
MODULAR_PIPELINE_MAPPING[PixelREPABlocks.model_name] = lambda config=None: PixelREPAModularPipeline.__name__
diffusers.PixelREPAModularPipeline = PixelREPAModularPipeline
