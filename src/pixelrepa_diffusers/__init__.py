"""PixelREPA (arXiv 2603.14366) and JiT (arXiv 2511.13720) for the Hugging Face ecosystem."""

from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .pipeline_pixelrepa import PixelREPAPipeline
from .presets import PRESETS, Preset, get_preset
from .scheduling_jit import JiTFlowMatchScheduler
from .transformer_jit import JiTTransformer2DModel, JiTTransformer2DModelOutput


# diffusers loads a pipeline's components from the libraries it knows, and looks for these base classes in each.
LOADABLE_CLASSES.setdefault(
    __name__,
    {base.__name__: ["save_pretrained", "from_pretrained"] for base in (ModelMixin, SchedulerMixin)},
)

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "JiTFlowMatchScheduler",
    "JiTTransformer2DModel",
    "JiTTransformer2DModelOutput",
    "PixelREPAPipeline",
    "Preset",
    "get_preset",
]

_LAZY = {
    "MaskedTransformerAdapter": "adapter",
    "MLPProjector": "adapter",
    "ConvProjector": "adapter",
    "SemanticTeacher": "teacher",
    "ConstantDecayEMA": "ema",
    **dict.fromkeys(
        ("PixelREPAObjective", "draw_timesteps", "draw_keep_mask", "drop_labels", "interpolate"), "objective"
    ),
}


def __getattr__(name: str):
    import importlib

    if name not in _LAZY:
        raise AttributeError(name)
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
