"""Conversion of published checkpoints (`checkpoint-last.pth` of PixelREPA and of plain JiT), in both directions.

Their `model` holds `net.…` (the JiT and the adapter's mask token), `masked_transformer_adapter.…`, `repa_model.…` (the
frozen teacher) and the constants `scale.…` and `de_scale.…`; `model_ema1` and `model_ema2` hold EMA weights of the net,
without prefix; `args` its settings. A plain JiT has no adapter, teacher, mask token or constants.
"""

import argparse
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .adapter import MaskedTransformerAdapter, check_projector_fits
from .files import write_atomically
from .presets import PRESETS, matching_presets
from .transformer_jit import JiTPositionTables, JiTTransformer2DModel


StateDict = Mapping[str, torch.Tensor]

_ENTRIES = {"ema1": "model_ema1", "ema2": "model_ema2", "model": "model"}
_NET, _ADAPTER = "net.", "masked_transformer_adapter."
# The teacher, which is loaded from its own weights, and the constants that map images to its input and back.
_REBUILT = ("repa_model.", "scale.", "de_scale.")
# The published EMA includes the constant position table, which float32 rounding moves by up to 1.6e-4 (measured over
# 750,000 steps with decay 0.9999); rounding it to bfloat16 moves it by 2e-3. The exact table is used here.
_POSITION_TOLERANCE = 5e-3
_IMAGE_CONSTANTS = {
    "de_scale.mean": (0.5, 0.5, 0.5),
    "de_scale.std": (0.5, 0.5, 0.5),
    "scale.mean": (0.485, 0.456, 0.406),
    "scale.std": (0.229, 0.224, 0.225),
}

# ------------------------------------------------------------------------------------------------------- tensor names

# Published module → our modules, in the published order; `qkv` is one matrix there and three here.
_CONDITIONING = {
    "t_embedder.mlp.0": ("conditioning.time_embedding.linear_1",),
    "t_embedder.mlp.2": ("conditioning.time_embedding.linear_2",),
    "y_embedder.embedding_table": ("conditioning.class_embedding",),
}
_PATCH_EMBED = {"x_embedder.proj1": ("patch_embed.proj_in",), "x_embedder.proj2": ("patch_embed.proj_out",)}
_BLOCK = {
    "norm1": ("norm1",),
    "attn.q_norm": ("attn.norm_q",),
    "attn.k_norm": ("attn.norm_k",),
    "attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.proj": ("attn.to_out.0",),
    "norm2": ("norm2",),
    "mlp.w12": ("ff.linear_in",),
    "mlp.w3": ("ff.linear_out",),
    "adaLN_modulation.1": ("modulation",),
}
_FINAL_LAYER = {
    "final_layer.norm_final": ("final_layer.norm",),
    "final_layer.linear": ("final_layer.linear",),
    "final_layer.adaLN_modulation.1": ("final_layer.modulation",),
}
_PROJECTION = {f"projection_layer.mlp.{index}": (f"projection.{index}",) for index in (0, 1, 3)}


def _blocks(num_layers: int, name: str, first: int = 0) -> dict[str, tuple[str, ...]]:
    """Names of the modules of `num_layers` blocks: ours in the list `name`, the published ones counted from `first`."""
    return {
        f"blocks.{first + index}.{published}": tuple(f"{name}.{index}.{module}" for module in modules)
        for index in range(num_layers)
        for published, modules in _BLOCK.items()
    }


def _tensor_names(modules: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Module names → tensor names; a name of a tensor that a module does not have is never looked up."""
    names = {"in_context_posemb": ("in_context_positions",)}
    for published, ours in modules.items():
        for suffix in (".weight", ".bias"):
            names[published + suffix] = tuple(module + suffix for module in ours)
    return names


def _transformer_names(num_layers: int, in_context_start: int) -> dict[str, tuple[str, ...]]:
    encoder_blocks = _blocks(in_context_start, "encoder_blocks")
    transformer_blocks = _blocks(num_layers - in_context_start, "transformer_blocks", first=in_context_start)
    return _tensor_names(_CONDITIONING | _PATCH_EMBED | encoder_blocks | transformer_blocks | _FINAL_LAYER)


def _adapter_names(num_layers: int) -> dict[str, tuple[str, ...]]:
    return _tensor_names(_CONDITIONING | _blocks(num_layers, "blocks") | _PROJECTION)


def _count_blocks(state: StateDict, name: str) -> int:
    return len({key.split(".")[1] for key in state if key.startswith(name + ".")})


def _from_original(state: StateDict, names: Mapping[str, tuple[str, ...]]) -> dict[str, torch.Tensor]:
    converted = {}
    for key, value in state.items():
        converted.update(zip(names[key], value.chunk(len(names[key])), strict=True))
    return converted


def _to_original(state: StateDict, names: Mapping[str, tuple[str, ...]]) -> dict[str, torch.Tensor]:
    if unexpected := sorted(state.keys() - {name for ours in names.values() for name in ours}):
        raise ValueError(
            f"The published layout has no place for {', '.join(unexpected[:4])}. Merge or remove what was added to the "
            "model (LoRA layers, fused projections) first."
        )
    return {
        published: torch.cat([state[name] for name in ours]) if len(ours) > 1 else state[ours[0]]
        for published, ours in names.items()
        if ours[0] in state
    }


def transformer_state_from_original(state: StateDict, in_context_start: int) -> dict[str, torch.Tensor]:
    """
    Rename the published net's tensors, or their gradients, to [`JiTTransformer2DModel`]'s.

    Leaves out `pos_embed` (constant here) and `mask_token` (part of the adapter here).
    """
    own = {key: value for key, value in state.items() if key not in ("pos_embed", "mask_token")}
    return _from_original(own, _transformer_names(_count_blocks(own, "blocks"), in_context_start))


def transformer_state_to_original(
    state: StateDict, grid_size: int, mask_token: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Inverse of [`transformer_state_from_original`], in the published order; `mask_token` is the adapter's, if any."""
    encoder, rest = _count_blocks(state, "encoder_blocks"), _count_blocks(state, "transformer_blocks")
    own = _to_original(state, _transformer_names(encoder + rest, encoder))
    in_context = own.pop("in_context_posemb")
    # `head_dim` matters only to the rotary tables, which are not used here.
    tables = JiTPositionTables(grid_size, head_dim=4, num_in_context=0, dim=in_context.shape[-1])
    return {
        "pos_embed": tables.positions,
        "in_context_posemb": in_context,
        **({} if mask_token is None else {"mask_token": mask_token}),
        **own,
    }


def adapter_state_from_original(state: StateDict, mask_token: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Rename the published adapter's tensors to [`MaskedTransformerAdapter`]'s; the published net holds `mask_token`."""
    converted = _from_original(state, _adapter_names(_count_blocks(state, "blocks")))
    return converted if mask_token is None else {"mask_token": mask_token, **converted}


def adapter_state_to_original(state: StateDict) -> dict[str, torch.Tensor]:
    """Inverse of [`adapter_state_from_original`], without the mask token (see [`transformer_state_to_original`])."""
    own = {key: value for key, value in state.items() if key != "mask_token"}
    return _to_original(own, _adapter_names(_count_blocks(own, "blocks")))


# ------------------------------------------------------------------------------------------------------------ reading


def read_original_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """
    Read a published `.pth` file without running code in it: tensors, plain containers and `argparse.Namespace`.

    Tensors are memory-mapped, so taking one EMA out of a file with optimizer state reads that EMA only.

    Raises:
        `ValueError`: If the pickle needs any other class or function, or the file is damaged.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # damaged pickles raise nearly anything: KeyError, struct.error, UnicodeDecodeError, …
        # torch's own message is not repeated: it recommends loading the file unsafely.
        needed = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"its pickle needs `{needed[1]}`, which was not run" if needed else "damaged or another kind of file"
        raise ValueError(f"{path} cannot be read as a PyTorch checkpoint: {reason}.") from None


def load_original_checkpoint(
    path: str | os.PathLike,
    weights: str = "ema1",
    in_context_start: int | None = None,
    noise_scale: float | None = None,
) -> tuple[JiTTransformer2DModel, MaskedTransformerAdapter | None]:
    """
    Load a published PixelREPA or JiT checkpoint, safely (see [`read_original_checkpoint`]).

    Sizes come from the shapes of the weights; `in_context_start`, `noise_scale`, `t_eps` and the dropout, which the shapes do
    not show, from the `args` in the file, else from the preset of these shapes. Teacher, optimizer and epoch are not read.

    Args:
        path (`str` or `os.PathLike`): The `.pth` file.
        weights (`str`, *optional*, defaults to `"ema1"`): The weights of the net, mask token included: `"ema1"` (decay
            0.9999, used for evaluation), `"ema2"` (0.9996) or `"model"` (no EMA). The rest of the adapter always
            comes from `model`, as the published code keeps no EMA of it.
        in_context_start (`int`, *optional*): Block (0-based) before which the class tokens are prepended.
        noise_scale (`float`, *optional*): Standard deviation of the training noise.

    Returns:
        `tuple`: The transformer, and the adapter or None for a plain JiT; both in float32 and eval mode on the CPU.

    Raises:
        `ValueError`: If the file cannot be read safely, does not determine the architecture, or has wrong tensors.
    """
    checkpoint = read_original_checkpoint(path)
    if _ENTRIES.get(weights) not in checkpoint:
        available = [name for name, entry in _ENTRIES.items() if entry in checkpoint]
        raise ValueError(f"{path} has no weights {weights!r}; it has {available}.")
    try:
        return _build_models(checkpoint, weights, {"in_context_start": in_context_start, "noise_scale": noise_scale})
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = f"missing or unexpected tensor {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path}: {_ENTRIES[weights]!r} cannot be converted: {reason}") from error


def _build_models(
    checkpoint: Mapping[str, Any], weights: str, given: Mapping[str, Any]
) -> tuple[JiTTransformer2DModel, MaskedTransformerAdapter | None]:
    model = checkpoint.get("model", {})
    if unexpected := [key for key in model if not key.startswith((_NET, _ADAPTER, *_REBUILT))]:
        raise ValueError(f"unexpected tensors in 'model': {', '.join(unexpected[:4])}")
    net = _without_prefix(model, _NET) if weights == "model" else checkpoint[_ENTRIES[weights]]
    adapter_state = _without_prefix(model, _ADAPTER)
    sizes = _transformer_sizes(net)
    settings = _training_settings(sizes, vars(checkpoint.get("args", argparse.Namespace())), given)

    # On the meta device nothing is allocated or initialized: every tensor comes from the file.
    with torch.device("meta"):
        transformer = JiTTransformer2DModel(**sizes, **settings).eval()
        adapter = MaskedTransformerAdapter(**_adapter_sizes(adapter_state, sizes)).eval() if adapter_state else None
    if (net["pos_embed"].float() - transformer.tables.positions).abs().max() > _POSITION_TOLERANCE:
        raise ValueError("'pos_embed' is not the sin-cos table, the only one JiTTransformer2DModel has")
    state = transformer_state_from_original(net, settings["in_context_start"])
    transformer.load_state_dict(_to_float32(state), assign=True)
    if adapter is not None:
        state = adapter_state_from_original(adapter_state, net["mask_token"])
        adapter.load_state_dict(_to_float32(state), assign=True)
    return transformer, adapter


def _without_prefix(state: StateDict, prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _transformer_sizes(net: StateDict) -> dict[str, int]:
    """The arguments of [`JiTTransformer2DModel`] that the shapes of the published net show."""
    bottleneck_dim, in_channels, _, patch_size = net["x_embedder.proj1.weight"].shape
    _, in_context_len, width = net["in_context_posemb"].shape
    (attention_head_dim,) = net["blocks.0.attn.q_norm.weight"].shape
    return {
        "sample_size": math.isqrt(net["pos_embed"].shape[1]) * patch_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "num_layers": _count_blocks(net, "blocks"),
        "num_attention_heads": width // attention_head_dim,
        "attention_head_dim": attention_head_dim,
        "bottleneck_dim": bottleneck_dim,
        "in_context_len": in_context_len,
        "num_classes": net["y_embedder.embedding_table.weight"].shape[0] - 1,
    }


def _adapter_sizes(adapter: StateDict, transformer_sizes: Mapping[str, int]) -> dict[str, int]:
    """The arguments of [`MaskedTransformerAdapter`]; without a projection the teacher has the transformer's width."""
    _, in_context_len, width = adapter["in_context_posemb"].shape
    (head_dim,) = adapter["blocks.0.attn.q_norm.weight"].shape
    return {
        "hidden_size": width,
        "num_attention_heads": width // head_dim,
        "teacher_dim": len(adapter.get("projection_layer.mlp.3.weight", range(width))),
        "num_layers": _count_blocks(adapter, "blocks"),
        "grid_size": transformer_sizes["sample_size"] // transformer_sizes["patch_size"],
        "in_context_len": in_context_len,
        "num_classes": adapter["y_embedder.embedding_table.weight"].shape[0] - 1,
    }


def _training_settings(
    sizes: Mapping[str, int], recorded: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, int | float]:
    """Settings that shapes do not determine: `given`, else `recorded` in the file's args, else those of the matching preset."""
    settings = {"t_eps": 0.05, "dropout": 0.0}
    shapes = {name: value for name, value in sizes.items() if name not in ("sample_size", "num_classes")}
    for preset in matching_presets(shapes).values():
        settings |= {"in_context_start": preset.in_context_start, "dropout": preset.dropout}
        if preset.sample_size == sizes["sample_size"]:
            settings["noise_scale"] = preset.noise_scale
    names = ("in_context_start", "noise_scale", "t_eps", "dropout")
    for source in ({**recorded, "dropout": recorded.get("proj_dropout")}, given):
        settings |= {name: source[name] for name in names if source.get(name) is not None}
    if missing := given.keys() - settings.keys():
        raise ValueError(
            f"Pass {' and '.join(f'`{name}`' for name in sorted(missing))}: the file does not record it, and no preset "
            f"({', '.join(PRESETS)}) has these sizes: {sizes}."
        )
    return settings


def _to_float32(state: StateDict) -> dict[str, torch.Tensor]:
    """Contiguous float32 copies on the CPU, which share no memory with the mapped file or each other."""
    if bad := [key for key, value in state.items() if not value.isfinite().all()]:
        raise ValueError(f"NaN or infinity in {', '.join(bad[:4])}")
    options = {"dtype": torch.float32, "copy": True, "memory_format": torch.contiguous_format}
    return {key: value.detach().to("cpu", **options) for key, value in state.items()}


# ------------------------------------------------------------------------------------------------------------ writing


def save_original_checkpoint(
    path: str | os.PathLike,
    transformer: JiTTransformer2DModel,
    adapter: MaskedTransformerAdapter | None = None,
    ema: Mapping[str, StateDict] | None = None,
    args: Mapping[str, Any] | None = None,
) -> None:
    """
    Save a checkpoint in the published layout, the inverse of [`load_original_checkpoint`].

    Writes `model`, `model_ema1`, `model_ema2` and `args`, with all tensors in float32. The published code loads it
    strictly, except for the teacher, which is loaded from its own weights. Optimizer and epoch are not written, so training
    with the published code starts at epoch 0 from these weights.

    Args:
        path (`str` or `os.PathLike`): The file to write, atomically; it must not exist.
        transformer (`JiTTransformer2DModel`): The weights of `model`.
        adapter (`MaskedTransformerAdapter`, *optional*): Its adapter; None writes a plain JiT.
        ema (`dict`, *optional*): EMA weights of the transformer for `"ema1"`, `"ema2"` or both, by parameter name as from
            [`ConstantDecayEMA.state_dict_for`]; with the key `"mask_token"` also that of the adapter's mask token. Defaults
            to the transformer's weights and the adapter's mask token.
        args (`dict`, *optional*): Further fields of the saved `argparse.Namespace` (numbers and strings), such as `cfg`.

    Raises:
        `ValueError`: If the model has no counterpart in the published layout (other settings, LoRA layers, fused
            projections), an EMA does not fit, or a tensor is not finite.
    """
    path, config = Path(path), transformer.config
    if path.exists():
        raise FileExistsError(f"{path} exists; remove it or choose another path.")
    if not config.in_context_len or (config.mlp_ratio, config.norm_eps) != (4.0, 1e-6):
        raise ValueError(
            "The published layout needs in-context tokens, `mlp_ratio` 4.0 and `norm_eps` 1e-6; this transformer has "
            f"{config.in_context_len}, {config.mlp_ratio} and {config.norm_eps}."
        )
    if adapter is not None:
        check_projector_fits(adapter, transformer)

    def to_original(state: StateDict) -> dict[str, torch.Tensor]:
        state = {"mask_token": adapter and adapter.mask_token, **state}
        mask_token = state.pop("mask_token")
        return _to_float32(transformer_state_to_original(state, config.sample_size // config.patch_size, mask_token))

    net = to_original(transformer.state_dict())
    # EMA weights that are not given are the net's tensors, which torch.save stores once.
    ema_weights = {"model_ema1": net, "model_ema2": net}
    shapes = {key: value.shape for key, value in net.items()}
    for name, state in (ema or {}).items():
        weights = ema_weights[_ENTRIES[name]] = to_original(state)
        if {key: value.shape for key, value in weights.items()} != shapes:
            raise ValueError(f"`ema[{name!r}]` does not have the transformer's tensors and shapes.")
    model = {_NET + key: value for key, value in net.items()}
    if adapter is not None:
        model |= {key: torch.tensor(value).view(1, 3, 1, 1) for key, value in _IMAGE_CONSTANTS.items()}
        adapter_state = _to_float32(adapter_state_to_original(adapter.state_dict()))
        model |= {_ADAPTER + key: value for key, value in adapter_state.items()}

    presets = list(matching_presets(config))
    recorded = {"model": presets[0]} if presets else {}
    recorded |= {"img_size": config.sample_size, "class_num": config.num_classes}
    recorded |= {"attn_dropout": 0.0, "proj_dropout": config.dropout}
    recorded |= {name: config[name] for name in ("t_eps", "noise_scale", "in_context_start")} | dict(args or {})
    checkpoint = {"model": model, "args": argparse.Namespace(**recorded), **ema_weights}
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_atomically(path, lambda temporary: torch.save(checkpoint, temporary))
    except RuntimeError as error:  # how torch.save reports a full disk
        raise OSError(f"{path} could not be written: {error}") from error
