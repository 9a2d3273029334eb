"""PixelREPA (arXiv 2603.14366) and JiT (arXiv 2511.13720) for the Hugging Face ecosystem.

Public names are imported from their modules on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from diffusers.schedulers.scheduling_utils import SchedulerMixin


if TYPE_CHECKING:
    from .adapter import ConvProjector as ConvProjector
    from .adapter import MaskedTransformerAdapter as MaskedTransformerAdapter
    from .adapter import MLPProjector as MLPProjector
    from .conversion import load_original_checkpoint as load_original_checkpoint
    from .conversion import save_original_checkpoint as save_original_checkpoint
    from .ema import ConstantDecayEMA as ConstantDecayEMA
    from .guidance_jit import JiTGuidanceHead as JiTGuidanceHead
    from .hub import publish_folder as publish_folder
    from .modular_pixelrepa import PixelREPABlocks as PixelREPABlocks
    from .modular_pixelrepa import PixelREPAModularPipeline as PixelREPAModularPipeline
    from .objective import PixelREPAObjective as PixelREPAObjective
    from .objective import PixelREPAObjectiveOutput as PixelREPAObjectiveOutput
    from .objective import draw_keep_mask as draw_keep_mask
    from .objective import draw_timesteps as draw_timesteps
    from .objective import drop_labels as drop_labels
    from .objective import interpolate as interpolate
    from .pipeline_pixelrepa import PixelREPAPipeline as PixelREPAPipeline
    from .presets import PRESETS as PRESETS
    from .presets import Preset as Preset
    from .presets import get_preset as get_preset
    from .presets import matching_presets as matching_presets
    from .scheduling_jit import JiTFlowMatchScheduler as JiTFlowMatchScheduler
    from .teacher import SemanticTeacher as SemanticTeacher
    from .transformer_jit import JiTTransformer2DModel as JiTTransformer2DModel
    from .transformer_jit import JiTTransformer2DModelOutput as JiTTransformer2DModelOutput


__version__ = "0.1.0"

_MODULES = {
    "ConstantDecayEMA": "ema",
    "ConvProjector": "adapter",
    "JiTFlowMatchScheduler": "scheduling_jit",
    "JiTGuidanceHead": "guidance_jit",
    "JiTTransformer2DModel": "transformer_jit",
    "JiTTransformer2DModelOutput": "transformer_jit",
    "MLPProjector": "adapter",
    "MaskedTransformerAdapter": "adapter",
    "PRESETS": "presets",
    "PixelREPABlocks": "modular_pixelrepa",
    "PixelREPAModularPipeline": "modular_pixelrepa",
    "PixelREPAObjective": "objective",
    "PixelREPAObjectiveOutput": "objective",
    "PixelREPAPipeline": "pipeline_pixelrepa",
    "Preset": "presets",
    "SemanticTeacher": "teacher",
    "draw_keep_mask": "objective",
    "draw_timesteps": "objective",
    "drop_labels": "objective",
    "get_preset": "presets",
    "interpolate": "objective",
    "load_original_checkpoint": "conversion",
    "matching_presets": "presets",
    "publish_folder": "hub",
    "save_original_checkpoint": "conversion",
}

__all__ = list(_MODULES)

# diffusers loads pipeline components only from known libraries, and looks up these base classes in the library.
LOADABLE_CLASSES[__name__] = {
    base.__name__: ["save_pretrained", "from_pretrained"] for base in (ModelMixin, SchedulerMixin)
}


if not TYPE_CHECKING:  # type checkers would accept any attribute of a module with `__getattr__`

    def __getattr__(name):
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
        globals()[name] = value
        return value

    def __dir__():
        return sorted({*globals(), *__all__})
