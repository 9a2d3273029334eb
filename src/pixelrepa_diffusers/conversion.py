"""Published checkpoints (`checkpoint-last.pth` of PixelREPA and of plain JiT) in and out.

Layout of such a file, a PyTorch pickle: `model` holds `net.…` (the JiT, with the adapter's mask token in it),
`masked_transformer_adapter.…`, `repa_model.…` (the frozen teacher) and the constants `scale.…` and `de_scale.…`;
`model_ema1` and `model_ema2` hold the net's keys without prefix; `optimizer`, `epoch` and `args` belong to the training
run. A plain JiT has no adapter, teacher, mask token or constants.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging

from .adapter import MaskedTransformerAdapter
from .presets import PRESETS, Preset, matching_presets
from .transformer_jit import JiTPositionTables, JiTTransformer2DModel


logger = logging.get_logger(__name__)

_ENTRIES = {"ema1": "model_ema1", "ema2": "model_ema2", "model": "model"}
_NET, _ADAPTER = "net.", "masked_transformer_adapter."
# The teacher, loaded from its own weights, and the constants that map images to the teacher's input and back.
_REBUILT = ("repa_model.", "scale.", "de_scale.")
# No published model has another value, and the weights show only the first.
_FIXED = {"mlp_ratio": 4.0, "norm_eps": 1e-6}
# The published code averages the constant position table with the weights, and m ← β·m + (1 − β)·p does not keep m = p in
# float32: at β = 0.9999 it settles up to 1.6e-4 away (measured: 750,000 steps on a CPU), two roundings of 3e-8 a step
# could make it 6e-4. The exact table is used here, as in training.
_TABLE_DRIFT = 1e-3
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Published module → ours, in the published order; `qkv` is one matrix there and three maps here.
_CONDITIONING = {
    "t_embedder.mlp.0": "conditioning.time_embedding.linear_1",
    "t_embedder.mlp.2": "conditioning.time_embedding.linear_2",
    "y_embedder.embedding_table": "conditioning.class_embedding",
}
_PATCH_EMBED = {"x_embedder.proj1": "patch_embed.proj_in", "x_embedder.proj2": "patch_embed.proj_out"}
_BLOCK = {
    "norm1": "norm1",
    "attn.q_norm": "attn.norm_q",
    "attn.k_norm": "attn.norm_k",
    "attn.qkv": "attn.to_q attn.to_k attn.to_v",
    "attn.proj": "attn.to_out.0",
    "norm2": "norm2",
    "mlp.w12": "ff.linear_in",
    "mlp.w3": "ff.linear_out",
    "adaLN_modulation.1": "modulation",
}
_FINAL_LAYER = {
    "final_layer.norm_final": "final_layer.norm",
    "final_layer.linear": "final_layer.linear",
    "final_layer.adaLN_modulation.1": "final_layer.modulation",
}
_PROJECTION = {f"projection_layer.mlp.{index}": f"projection.{index}" for index in (0, 1, 3)}


def _expand(modules: Mapping[str, str], published: str = "", ours: str = "") -> dict[str, tuple[str, ...]]:
    """Module names → tensor names, behind the two prefixes. Tensors a module does not have are never looked up."""
    return {
        published + name + suffix: tuple(ours + part + suffix for part in parts.split())
        for name, parts in modules.items()
        for suffix in (".weight", ".bias")
    }


def _blocks(num_layers: int, name: str, first: int = 0) -> dict[str, tuple[str, ...]]:
    names = {}
    for index in range(num_layers):
        names |= _expand(_BLOCK, f"blocks.{first + index}.", f"{name}.{index}.")
    return names


def _count_blocks(state: Mapping[str, torch.Tensor], name: str) -> int:
    found = (re.match(rf"{name}\.(\d+)\.", key) for key in state)
    return len({match[1] for match in found if match})


def _transformer_names(num_layers: int, in_context_start: int) -> dict[str, tuple[str, ...]]:
    """Published tensor → our tensors, in the published order."""
    return {
        "in_context_posemb": ("in_context_positions",),
        **_expand(_CONDITIONING),
        **_expand(_PATCH_EMBED),
        **_blocks(in_context_start, "encoder_blocks"),
        **_blocks(num_layers - in_context_start, "transformer_blocks", first=in_context_start),
        **_expand(_FINAL_LAYER),
    }


def _adapter_names(num_layers: int) -> dict[str, tuple[str, ...]]:
    return {
        "in_context_posemb": ("in_context_positions",),
        **_expand(_CONDITIONING),
        **_blocks(num_layers, "blocks"),
        **_expand(_PROJECTION),
    }


def _from_original(state: Mapping[str, torch.Tensor], names: Mapping[str, tuple[str, ...]]) -> dict[str, torch.Tensor]:
    if unknown := [key for key in state if key not in names]:
        raise ValueError(f"Not tensors of the published layout: {_listed(unknown)}.")
    converted = {}
    for key, value in state.items():
        converted.update(zip(names[key], value.chunk(len(names[key])), strict=True))
    return converted


def _to_original(state: Mapping[str, torch.Tensor], names: Mapping[str, tuple[str, ...]]) -> dict[str, torch.Tensor]:
    if unknown := state.keys() - {name for ours in names.values() for name in ours}:
        raise ValueError(
            f"These tensors have no place in the published layout: {_listed(sorted(unknown))}. Fold in or remove what "
            "was added to the model (LoRA layers, fused projections) first."
        )
    return {
        published: torch.cat([state[name] for name in ours]) if len(ours) > 1 else state[ours[0]]
        for published, ours in names.items()
        if ours[0] in state
    }


def _listed(names: Iterable[Any]) -> str:
    names = [repr(name) for name in names]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def transformer_state_from_original(
    state: Mapping[str, torch.Tensor], in_context_start: int
) -> dict[str, torch.Tensor]:
    """
    The published net's tensors under [`JiTTransformer2DModel`]'s names.

    It renames and cuts `qkv` in three, no more, so it serves weights, EMAs and gradients, complete or not. The cuts
    are views. `pos_embed` (a constant here) and `mask_token` (the adapter's here) are left out.

    Args:
        state: net keys without prefix → tensor.
        in_context_start: the number of blocks before the class tokens enter.

    Raises:
        ValueError: for a key the published net does not have.
    """
    own = {key: value for key, value in state.items() if key not in ("pos_embed", "mask_token")}
    return _from_original(own, _transformer_names(_count_blocks(own, "blocks"), in_context_start))


def transformer_state_to_original(
    state: Mapping[str, torch.Tensor], grid_size: int, mask_token: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """
    The way back from [`transformer_state_from_original`]: the published net's tensors in the published order.

    Args:
        state: the tensors of a [`JiTTransformer2DModel`].
        grid_size: patches along a side of the image; with the width it defines the `pos_embed` table.
        mask_token: the adapter's mask token, of shape (1, 1, width); None for a plain JiT.

    Raises:
        ValueError: for a key that is not one of the model's own.
    """
    encoder, rest = _count_blocks(state, "encoder_blocks"), _count_blocks(state, "transformer_blocks")
    width = state["in_context_positions"].shape[-1]
    own = _to_original(state, _transformer_names(encoder + rest, encoder))
    # The head's width matters to the rotary tables alone.
    tables = JiTPositionTables(grid_size, head_dim=4, num_in_context=0, dim=width)
    return {
        "pos_embed": tables.positions,
        "in_context_posemb": own.pop("in_context_posemb"),
        **({} if mask_token is None else {"mask_token": mask_token}),
        **own,
    }


def adapter_state_from_original(
    state: Mapping[str, torch.Tensor], mask_token: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """
    The published adapter's tensors under [`MaskedTransformerAdapter`]'s names; renames and cuts, as
    [`transformer_state_from_original`] does.

    Args:
        state: adapter keys without prefix → tensor.
        mask_token: the mask token, which the published code keeps in the net; None leaves it out.

    Raises:
        ValueError: for a key the published adapter does not have.
    """
    converted = _from_original(state, _adapter_names(_count_blocks(state, "blocks")))
    return converted if mask_token is None else {"mask_token": mask_token, **converted}


def adapter_state_to_original(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    The way back from [`adapter_state_from_original`], without `mask_token`: that one goes to
    [`transformer_state_to_original`].

    Raises:
        ValueError: for a key that is not one of the adapter's own.
    """
    own = {key: value for key, value in state.items() if key != "mask_token"}
    return _to_original(own, _adapter_names(_count_blocks(own, "blocks")))


def read_original_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """
    Reads a published `.pth` without running anything in it.

    Tensors, plain containers and `argparse.Namespace` (the training arguments) are all the file may hold. In the zip
    format, PyTorch's own since 1.6, the tensors stay in the file, mapped into memory, until they are used: taking one EMA
    out of a file with the optimizer's state reads that EMA alone. The old format is read whole.

    Args:
        path: the file.

    Returns:
        The top-level dictionary: `model`, `model_ema1`, `model_ema2`, `args`, and whatever else the file holds.

    Raises:
        ValueError: when the pickle asks for another class or function (named in the message; it is not called), is
            damaged or cut short, or is no dictionary.
    """
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    # A damaged pickle makes torch raise nearly anything: KeyError, struct.error, UnicodeDecodeError, AssertionError, …
    except Exception as error:
        # torch's own message recommends to load the file unsafely: it is quoted only where it does not.
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise ValueError(
                f"{path} is refused: its pickle asks for `{refused[1]}`, and a checkpoint needs no class but "
                "`argparse.Namespace`. Nothing of it was run. Do not load this file by other means unless you know who "
                "made it."
            ) from None
        reason = type(error).__name__ if "weights_only" in str(error) else repr(error).partition("\\n")[0][:200]
        raise ValueError(
            f"{path} cannot be read as a PyTorch checkpoint ({reason}). It is damaged, cut short (compare its size with "
            "the original's) or another kind of file."
        ) from None
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, not a published checkpoint's dictionary.")
    return checkpoint


@dataclass(frozen=True)
class _WeightSet:
    """One set of tensors of a file, keyed without the prefix they have there; complaints name them as the file does."""

    entry: str
    prefix: str
    tensors: Mapping[str, torch.Tensor]

    def place(self, key: str) -> str:
        return f"{self.prefix + key!r} in {self.entry!r}"

    def shape(self, key: str, dims: int) -> tuple[int, ...]:
        if key not in self.tensors:
            raise ValueError(f"There is no {self.place(key)}.")
        shape = tuple(self.tensors[key].shape)
        if len(shape) != dims or 0 in shape:
            raise ValueError(f"{self.place(key)} must have {dims} dimensions, none of them 0, got {shape}.")
        return shape

    def check_layout(self, expected: Mapping[str, torch.Tensor]) -> None:
        """Refuses missing, unknown and misshapen tensors, all at once. Reads no values."""
        problems = []
        if missing := [self.prefix + key for key in expected if key not in self.tensors]:
            problems.append(f"missing {_listed(missing)}")
        if unknown := [self.prefix + key for key in self.tensors if key not in expected]:
            problems.append(f"unknown {_listed(unknown)}")
        problems += [
            f"{self.prefix + key!r} has the shape {tuple(value.shape)} instead of {tuple(expected[key].shape)}"
            for key, value in self.tensors.items()
            if key in expected and value.shape != expected[key].shape
        ][:8]
        if problems:
            raise ValueError(f"{self.entry!r} does not fit the architecture: {'; '.join(problems)}.")

    def heads(self) -> tuple[int, int, int]:
        """(width, heads, width of a head)."""
        width = self.shape("in_context_posemb", 3)[2]
        (head_dim,) = self.shape("blocks.0.attn.q_norm.weight", 1)
        if width % head_dim or head_dim % 4:
            raise ValueError(
                f"{self.place('blocks.0.attn.q_norm.weight')} has {head_dim} elements, the width of a head; it must be a "
                f"multiple of 4 and divide the width {width}."
            )
        return width, width // head_dim, head_dim

    def check_values(self) -> None:
        """Refuses what is not a dense tensor of finite floating-point numbers."""
        kinds = (torch.float32, torch.float16, torch.bfloat16)
        for key, value in self.tensors.items():
            # A stride of 0 makes a few bytes of a file a tensor of any size; no published one has 4 GiB.
            inflated = value.layout == torch.strided and 0 in value.stride() and value.nbytes > 2**32
            if value.dtype not in kinds or value.layout != torch.strided or value.is_meta or inflated:
                raise ValueError(
                    f"{self.place(key)} must be a dense tensor of {_listed(kinds)}, got {value.dtype}, "
                    f"{value.layout}, on {value.device}"
                    + (f", {value.nbytes / 2**30:.0f} GiB out of a few bytes." if inflated else ".")
                )
            if not torch.isfinite(value).all():
                raise ValueError(f"{self.place(key)} holds NaN or infinity.")


def _float32(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of their own, on the CPU: out of the mapped file, off the accelerator, qkv's thirds apart."""
    dense = {"dtype": torch.float32, "copy": True, "memory_format": torch.contiguous_format}
    return {key: value.detach().to("cpu", **dense) for key, value in state.items()}


def _tensors(checkpoint: Mapping[str, Any], entry: str) -> dict[str, torch.Tensor]:
    state = checkpoint.get(entry, {})
    if not isinstance(state, dict):
        raise ValueError(f"{entry!r} must be a dictionary of tensors, got a {type(state).__name__}.")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise ValueError(f"{entry!r} must map names to tensors, but holds {key!r}: {type(value).__name__}.")
    return state


def _number(args: argparse.Namespace, name: str) -> int | float | None:
    value = getattr(args, name, None)
    wrong_type = isinstance(value, bool) or not isinstance(value, int | float)
    if value is not None and (wrong_type or not math.isfinite(value)):
        raise ValueError(f"`{name}` in the checkpoint's args must be a finite number, got {value!r}.")
    return value


def _transformer_config(
    net: _WeightSet, args: argparse.Namespace, in_context_start: int | None, noise_scale: float | None
) -> dict[str, int | float]:
    """[`JiTTransformer2DModel`]'s arguments: from the shapes; else as given, as in `args`, as in the preset that fits."""
    _, num_attention_heads, attention_head_dim = net.heads()
    bottleneck_dim, in_channels, _, patch_size = net.shape("x_embedder.proj1.weight", 4)
    shapes = {
        "patch_size": patch_size,
        "in_channels": in_channels,
        "num_layers": _count_blocks(net.tensors, "blocks"),
        "num_attention_heads": num_attention_heads,
        "attention_head_dim": attention_head_dim,
        "bottleneck_dim": bottleneck_dim,
        "in_context_len": net.shape("in_context_posemb", 3)[1],
    }
    sample_size = math.isqrt(net.shape("pos_embed", 3)[1]) * patch_size
    num_classes = net.shape("y_embedder.embedding_table.weight", 2)[0] - 1
    for name, shown, key in (
        ("img_size", sample_size, "pos_embed"),
        ("class_num", num_classes, "y_embedder.embedding_table.weight"),
    ):
        if _number(args, name) not in (None, shown):
            raise ValueError(
                f"The checkpoint contradicts itself: `{name}` is {_number(args, name)} in its args, and {shown} by the "
                f"shape of {net.place(key)}."
            )
    if _number(args, "attn_dropout"):
        logger.warning(
            f"This checkpoint was trained with dropout on the attention weights (attn_dropout={args.attn_dropout}), which "
            "JiTTransformer2DModel does not have. That changes further training, not generation."
        )

    fits = matching_presets(shapes)
    fits_at_size = matching_presets({**shapes, "sample_size": sample_size})
    described = ", ".join(f"{name}={value}" for name, value in shapes.items())
    if in_context_start is None:
        in_context_start = _number(args, "in_context_start")
    if in_context_start is None:
        if not fits:
            raise ValueError(
                "Weights do not show before which block the class tokens enter, and the shapes of these "
                f"({described}) are those of no preset ({', '.join(PRESETS)}). Give `in_context_start`, from 0 to "
                f"{shapes['num_layers'] - 1}."
            )
        in_context_start = next(iter(fits.values())).in_context_start
    if noise_scale is None:
        noise_scale = _number(args, "noise_scale")
    if noise_scale is None:
        if not fits_at_size:
            raise ValueError(
                "The checkpoint's args do not name the noise scale it was trained with, and its shapes "
                f"({described}, sample_size={sample_size}) are those of no preset ({', '.join(PRESETS)}). Give "
                "`noise_scale`; published are 1.0 at 256 pixels and 2.0 at 512."
            )
        noise_scale = next(iter(fits_at_size.values())).noise_scale
    dropout = _number(args, "proj_dropout")
    if dropout is None:
        dropout = next(iter(fits.values())).dropout if fits else 0.0
    t_eps = _number(args, "t_eps")
    return {
        **shapes,
        "sample_size": sample_size,
        "num_classes": num_classes,
        "in_context_start": in_context_start,
        "noise_scale": noise_scale,
        "dropout": dropout,
        "t_eps": 0.05 if t_eps is None else t_eps,
        **_FIXED,
    }


def _adapter_config(adapter: _WeightSet, grid_size: int) -> dict[str, int]:
    """[`MaskedTransformerAdapter`]'s arguments from the shapes; without a projection it keeps the transformer's width."""
    width, num_attention_heads, _ = adapter.heads()
    projects = any(key.startswith("projection_layer.") for key in adapter.tensors)
    return {
        "hidden_size": width,
        "num_attention_heads": num_attention_heads,
        "teacher_dim": adapter.shape("projection_layer.mlp.3.weight", 2)[0] if projects else width,
        "num_layers": _count_blocks(adapter.tensors, "blocks"),
        "grid_size": grid_size,
        "in_context_len": adapter.shape("in_context_posemb", 3)[1],
        "num_classes": adapter.shape("y_embedder.embedding_table.weight", 2)[0] - 1,
        "mlp_ratio": _FIXED["mlp_ratio"],
    }


def _check_match(transformer: JiTTransformer2DModel, adapter: MaskedTransformerAdapter) -> None:
    ours, theirs = transformer.config, adapter.config
    for name, needed, given in (
        ("hidden_size", ours.num_attention_heads * ours.attention_head_dim, theirs.hidden_size),
        ("grid_size", ours.sample_size // ours.patch_size, theirs.grid_size),
        ("num_classes", ours.num_classes, theirs.num_classes),
    ):
        if given != needed:
            raise ValueError(f"The adapter's `{name}` is {given}; with this transformer it must be {needed}.")


def load_original_checkpoint(
    path: str | os.PathLike,
    weights: str = "ema1",
    in_context_start: int | None = None,
    noise_scale: float | None = None,
) -> tuple[JiTTransformer2DModel, MaskedTransformerAdapter | None]:
    """
    Reads a published PixelREPA or JiT checkpoint. Nothing in the file is run, see [`read_original_checkpoint`].

    Widths, depth, heads, patch, image size and classes come from the shapes of the weights. `noise_scale`, `t_eps` and
    the dropout come from the `args` saved in the file. Without them the noise scale comes from the preset of these shapes
    at this image size, the dropout from the preset of these shapes (else 0: it matters to further training alone), and
    `t_eps` is 0.05, its only published value. The teacher, the optimizer and the epoch are left in the file.

    Args:
        path: The `.pth` file.
        weights: Which set becomes the transformer: "ema1" (decay 0.9999, the evaluated one), "ema2" (0.9996) or "model"
            (not averaged). The adapter and its mask token come from `model` in any case: the published code averages no
            adapter, and only the adapter uses the mask token.
        in_context_start: The block (0-based) before which the class tokens enter, also the alignment depth. Weights do
            not show it. When not given it comes from `in_context_start` in the args, which only
            [`save_original_checkpoint`] writes, or from the preset that fits the shapes.
        noise_scale: Standard deviation of the noise in training; overrides what the file or the preset says.

    Returns:
        The transformer, and the adapter or None (plain JiT): on the CPU, in eval mode, in float32. Half-precision files
        are widened, which is exact and what the published code does.

    Raises:
        ValueError: when the file cannot be read safely; lacks the set asked for; has missing, unknown, misshapen or
            non-finite tensors (named); contradicts its own args; or does not tell its architecture.
    """
    if weights not in _ENTRIES:
        raise ValueError(f"`weights` must be one of {_listed(_ENTRIES)}, got {weights!r}.")
    entry = _ENTRIES[weights]
    checkpoint = read_original_checkpoint(path)
    if entry not in checkpoint:
        there = [name for name, each in _ENTRIES.items() if each in checkpoint]
        raise ValueError(
            f"{path} has no {entry!r}, which `weights={weights!r}` asks for. "
            + (f"It has the sets {_listed(there)}." if there else f"It holds {_listed(checkpoint)}.")
        )
    if others := [key for key in checkpoint if key not in (*_ENTRIES.values(), "optimizer", "epoch", "args")]:
        logger.warning(f"{path} also holds {_listed(others)}, which the published layout does not have: ignored.")
    args = checkpoint.get("args", argparse.Namespace())
    if not isinstance(args, argparse.Namespace):
        raise ValueError(f"'args' must be an argparse.Namespace, got a {type(args).__name__}.")

    model = _tensors(checkpoint, "model")
    if strangers := [key for key in model if not key.startswith((_NET, _ADAPTER, *_REBUILT))]:
        raise ValueError(
            f"'model' holds the unknown {_listed(strangers)}; names begin with {_listed((_NET, _ADAPTER, *_REBUILT))}."
        )
    online, adapter_set = (
        _WeightSet("model", prefix, {key.removeprefix(prefix): model[key] for key in model if key.startswith(prefix)})
        for prefix in (_NET, _ADAPTER)
    )
    net = online if weights == "model" else _WeightSet(entry, "", _tensors(checkpoint, entry))
    if ("mask_token" in online.tensors) != bool(adapter_set.tensors):
        there, absent = (_NET + "mask_token", _ADAPTER)[:: 1 if "mask_token" in online.tensors else -1]
        raise ValueError(f"'model' has {there!r} but no {absent!r}: PixelREPA has both, a plain JiT neither.")

    config = _transformer_config(net, args, in_context_start, noise_scale)
    grid_size = config["sample_size"] // config["patch_size"]
    # On the meta device nothing is allocated or drawn: every tensor comes from the file.
    with torch.device("meta"):
        transformer = JiTTransformer2DModel(**config)
        adapter = MaskedTransformerAdapter(**_adapter_config(adapter_set, grid_size)) if adapter_set.tensors else None
        mask_token = torch.empty(1, 1, config["num_attention_heads"] * config["attention_head_dim"])
    has_mask_token = "mask_token" in (online if model else net).tensors
    expected = transformer_state_to_original(
        transformer.state_dict(), grid_size, mask_token if has_mask_token else None
    )
    net.check_layout(expected)
    if model and net is not online:
        online.check_layout(expected)
    if adapter is not None:
        _check_match(transformer, adapter)
        adapter_set.check_layout(adapter_state_to_original(adapter.state_dict()))

    net.check_values()
    table = net.tensors["pos_embed"]
    largest = (table.float() - expected["pos_embed"]).abs().max()
    if largest > _TABLE_DRIFT + torch.finfo(table.dtype).eps / 2:
        raise ValueError(
            f"{net.place('pos_embed')} is up to {largest:.2g} away from the 2-D sin-cos table, the only position "
            "embedding that JiTTransformer2DModel has."
        )
    state = transformer_state_from_original(net.tensors, config["in_context_start"])
    transformer.load_state_dict(_float32(state), assign=True)
    if adapter is None:
        return transformer.eval(), None
    mask_token = online.tensors["mask_token"]
    for part in (adapter_set, _WeightSet("model", _NET, {"mask_token": mask_token})):
        part.check_values()
    adapter.load_state_dict(_float32(adapter_state_from_original(adapter_set.tensors, mask_token)), assign=True)
    return transformer.eval(), adapter.eval()


def save_original_checkpoint(
    path: str | os.PathLike,
    transformer: JiTTransformer2DModel,
    adapter: MaskedTransformerAdapter | None = None,
    ema: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
    args: Mapping[str, Any] | None = None,
) -> None:
    """
    Writes the published layout: the way back from [`load_original_checkpoint`], which reads the very same numbers.

    Written are `model` (the transformer, and with an adapter the adapter, its mask token and the image constants),
    `model_ema1`, `model_ema2` and `args`, all tensors in float32. The published code's strict load takes every key but
    the teacher's: `repa_model.` is not written, as the teacher is loaded from its own weights and never trained. Neither
    are `optimizer` and `epoch`, whose contents depend on the order of the published code's parameters: that code reads
    them only when both are there, so training there begins with epoch 0 and a fresh optimizer, from these weights.

    Args:
        path: The file to write; it must not exist. It appears in one piece: written beside, then renamed.
        transformer: The weights of `model`.
        adapter: Its adapter; None makes a plain JiT's checkpoint. The published code keeps an average of the mask token
            in each EMA and uses it nowhere; the adapter's own is written there.
        ema: "ema1" and "ema2", or one of them, to that average of the transformer (tensors by the transformer's names, such
            as `ConstantDecayEMA.state_dict_for` returns). A set that is not given is written as the transformer's
            weights, so that published code that evaluates an EMA evaluates these.
        args: Further fields of the saved `argparse.Namespace`, numbers and strings, such as `cfg` or `ema_decay1`.

    Raises:
        FileExistsError: when there is something at `path`.
        OSError: when the file cannot be written; the message says how much space is left.
        ValueError: when the transformer or the adapter has no published counterpart, carries more than its own tensors
            (LoRA layers, fused projections), holds NaN or infinity, or when an EMA does not fit.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists; remove it or give another path.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"The folder {path.parent} does not exist.")
    ema = ema or {}
    if unknown := [name for name in ema if name not in ("ema1", "ema2")]:
        raise ValueError(f"`ema` may have the keys 'ema1' and 'ema2', got {_listed(unknown)}.")
    if unsafe := [name for name, value in (args or {}).items() if not isinstance(value, int | float | str | None)]:
        raise ValueError(
            f"`args` may hold numbers, strings and None, which a safe reader takes; not so {_listed(unsafe)}."
        )
    config = transformer.config
    if not config.in_context_len or any(config[name] != value for name, value in _FIXED.items()):
        raise ValueError(
            f"Published models have in-context tokens and {_FIXED}, which their code gives no way to change; this one has "
            f"in_context_len={config.in_context_len}, { ({name: config[name] for name in _FIXED}) }."
        )
    mask_token, adapter_set = None, _WeightSet("adapter", "", {})
    if adapter is not None:
        if not isinstance(adapter, MaskedTransformerAdapter):
            raise ValueError(
                f"The published layout has a place for a MaskedTransformerAdapter, not for a {type(adapter).__name__}. "
                "Leave `adapter` out to save the transformer alone."
            )
        _check_match(transformer, adapter)
        mask_token = adapter.mask_token
        adapter_set = _WeightSet("adapter", "", adapter_state_to_original(adapter.state_dict()))
        adapter_set.check_values()

    own = transformer.state_dict()
    # The order matters: of what was added to the model, converting it says more than comparing an EMA with it.
    grid_size = config.sample_size // config.patch_size
    net = _float32(transformer_state_to_original(own, grid_size, mask_token))
    for name, state in {"transformer": own, **ema}.items():
        weight_set = _WeightSet(name, "", state)
        weight_set.check_layout(own)
        weight_set.check_values()
    # A set that stands in twice is stored once: torch.save writes tensors that share memory as such.
    averages = {
        name: _float32(transformer_state_to_original(ema[name], grid_size, mask_token)) if name in ema else net
        for name in ("ema1", "ema2")
    }
    model = {_NET + key: value for key, value in net.items()}
    if adapter is not None:
        for name, mean, std in (("de_scale", [0.5] * 3, [0.5] * 3), ("scale", _IMAGENET_MEAN, _IMAGENET_STD)):
            model[f"{name}.mean"] = torch.tensor(mean).view(1, 3, 1, 1)
            model[f"{name}.std"] = torch.tensor(std).view(1, 3, 1, 1)
        model |= {_ADAPTER + key: value for key, value in _float32(adapter_set.tensors).items()}

    presets = matching_presets(config)
    namespace = argparse.Namespace(
        **({"model": next(iter(presets))} if presets else {}),
        img_size=config.sample_size,
        class_num=config.num_classes,
        attn_dropout=0.0,
        proj_dropout=config.dropout,
        t_eps=config.t_eps,
        noise_scale=config.noise_scale,
        in_context_start=config.in_context_start,
        **(args or {}),
    )
    checkpoint = {
        "model": model,
        "args": namespace,
        "model_ema1": averages["ema1"],
        "model_ema2": averages["ema2"],
    }
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        torch.save(checkpoint, partial)
        os.replace(partial, path)
    except RuntimeError as error:  # torch.save says nothing of a full disk
        free = shutil.disk_usage(path.parent).free / 2**20
        raise OSError(f"{path} could not be written: {error} ({free:.0f} MiB are free there).") from error
    finally:
        partial.unlink(missing_ok=True)
