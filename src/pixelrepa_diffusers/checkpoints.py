"""Published checkpoints (`checkpoint-last.pth` of PixelREPA and of plain JiT) in and out.

Layout of such a file, a PyTorch pickle: `model` holds `net.…` (the JiT, with the adapter's mask token in it),
`masked_transformer_adapter.…`, `repa_model.…` (the frozen teacher) and the constants `scale.…` and `de_scale.…`;
`model_ema1` and `model_ema2` hold the net's keys without prefix; `optimizer`, `epoch` and `args` belong to the training
run. A plain JiT has no adapter, teacher, mask token or constants.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from .transformer_jit import JiTPositionTables


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


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names[:8])) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


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
