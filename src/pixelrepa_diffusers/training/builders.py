"""What a run trains and how: transformer, teacher, projector, objective and optimizer, built from the arguments."""

from __future__ import annotations

import torch
from accelerate.logging import get_logger

from ..adapter import ConvProjector, MaskedTransformerAdapter, MLPProjector
from ..objective import PixelREPAObjective
from ..presets import get_preset
from ..teacher import SemanticTeacher
from ..transformer_jit import JiTBlock, JiTTransformer2DModel
from .arguments import TrainingArguments
from .reporting import pipeline_config


logger = get_logger(__name__)

# Arguments of the transformer that the command line may name.
TRANSFORMER_ARGUMENTS = (
    "patch_size", "num_layers", "num_attention_heads", "attention_head_dim", "bottleneck_dim", "in_context_len",
    "in_context_start", "dropout", "noise_scale", "t_eps",
)  # fmt: skip


def transformer_config(args: TrainingArguments, num_classes: int) -> dict:
    """
    The preset, overridden by whatever the command line names; or the pretrained transformer's, of which the command line
    may change what is no matter of shape.
    """
    given = {name: getattr(args, name) for name in TRANSFORMER_ARGUMENTS if getattr(args, name) is not None}
    if args.resolution is not None:
        given["sample_size"] = args.resolution
    source = args.pretrained_model_name_or_path
    if source is None:
        return {**get_preset(args.preset).transformer_config(), **given, "num_classes": num_classes}
    config = JiTTransformer2DModel.load_config(source, subfolder="transformer", revision=args.revision)
    for name, value in given.items():
        if value != config[name] and name not in ("dropout", "noise_scale", "t_eps"):
            flag = "resolution" if name == "sample_size" else name
            raise ValueError(f"--{flag} is {value}, but {source} was trained with {config[name]}: leave it out.")
    return {**config, **given, "num_classes": num_classes}


def build_transformer(args: TrainingArguments, num_classes: int) -> JiTTransformer2DModel:
    return JiTTransformer2DModel.from_config(transformer_config(args, num_classes))


def build_teacher(args: TrainingArguments, config: dict, device: torch.device) -> SemanticTeacher | None:
    if args.objective == "none":
        return None
    return SemanticTeacher.from_pretrained(
        args.teacher_model_name_or_path,
        grid_size=config["sample_size"] // config["patch_size"],
        image_size=config["sample_size"],
        mode=args.teacher_mode,
        dtype=torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32,
        revision=args.teacher_revision,
    ).to(device)


def build_projector(args: TrainingArguments, config: dict, teacher_dim: int) -> torch.nn.Module | None:
    width = config["num_attention_heads"] * config["attention_head_dim"]
    grid_size = config["sample_size"] // config["patch_size"]
    match args.objective:
        case "none":
            return None
        case "repa":
            return MLPProjector(width, teacher_dim)
        case "irepa":
            return ConvProjector(width, teacher_dim, grid_size=grid_size)
        case "pixelrepa":
            return MaskedTransformerAdapter(
                width,
                config["num_attention_heads"],
                teacher_dim,
                num_layers=args.adapter_layers,
                grid_size=grid_size,
                in_context_len=config["in_context_len"],
                num_classes=config["num_classes"],
                mlp_ratio=config["mlp_ratio"],
            )


def load_pretrained(args: TrainingArguments, part: str, model: torch.nn.Module) -> None:
    """Takes over the weights of `part` of the pretrained pipeline, where other classes are learnt all but theirs."""
    source = args.pretrained_model_name_or_path
    trained = type(model).from_pretrained(source, subfolder=part, revision=args.revision)
    state, num_classes = trained.state_dict(), model.config.get("num_classes")
    if trained.config.get("num_classes") != num_classes:
        logger.warning(
            f"The {part} of {source} knows {trained.config.num_classes} classes, the data have {num_classes}: its class "
            "embedding starts anew."
        )
        name = "conditioning.class_embedding.weight"
        state[name] = model.state_dict()[name]
    model.load_state_dict(state)


def load_pretrained_projector(args: TrainingArguments, projector: torch.nn.Module) -> None:
    """Goes on with the projector beside the pretrained transformer where there is one that fits, and says so."""
    source = args.pretrained_model_name_or_path
    try:
        config = type(projector).load_config(source, subfolder="adapter", revision=args.revision)
    except OSError as error:
        logger.warning(f"{source} has no adapter, a new one is trained ({error}).")
        return
    shape = {name: value for name, value in projector.config.items() if name[0] != "_" and name != "num_classes"}
    needed = {"_class_name": type(projector).__name__, **shape}
    other = [
        f"{name} {config.get(name)}, needed is {needed[name]}" for name in needed if config.get(name) != needed[name]
    ]
    if other:
        logger.warning(f"The adapter of {source} does not fit ({', '.join(other)}): a new one is trained.")
        return
    load_pretrained(args, "adapter", projector)
    logger.info(f"Goes on with the adapter of {source}.")


def compare_classes(args: TrainingArguments, id2label: dict[str, str] | None) -> None:
    """Warns where the pretrained pipeline calls as many classes by other names: each goes on from that of its number."""
    source = args.pretrained_model_name_or_path
    known = pipeline_config(source, args.revision).get("id2label")
    if known and id2label and len(known) == len(id2label) and known != id2label:
        number = next(number for number in id2label if known.get(number) != id2label[number])
        logger.warning(
            f"The classes of {source} have other names than those of the data (class {number}: {known.get(number)!r}, "
            f"here {id2label[number]!r}). Each class goes on from the embedding of its number: check the order."
        )


def build_objective(args: TrainingArguments, transformer: JiTTransformer2DModel, projector) -> PixelREPAObjective:
    return PixelREPAObjective(
        transformer,
        projector,
        alignment_weight=args.alignment_weight,
        spatial_norm=args.spatial_norm if args.objective == "irepa" else None,
        alignment_depth=args.alignment_depth,
    )


def compile_blocks(objective: PixelREPAObjective) -> None:
    """Compiles every block, the projector's too, in place."""
    # It would cut each block's graph where DDP's gradient buckets end; blocks are short enough to overlap as they are.
    torch._dynamo.config.optimize_ddp = False
    for block in objective.modules():
        if isinstance(block, JiTBlock):
            block.compile(fullgraph=True)


def apply_switches(args: TrainingArguments, objective: PixelREPAObjective) -> None:
    """Checkpointing, attention kernel, compilation: how the objective is computed, not what."""
    if args.gradient_checkpointing:
        objective.transformer.enable_gradient_checkpointing()
        if isinstance(objective.projector, MaskedTransformerAdapter):
            objective.projector.enable_gradient_checkpointing()
    if args.attention_backend is not None:
        objective.transformer.set_attention_backend(args.attention_backend)
    if args.compile:
        compile_blocks(objective)


def build_optimizer(args: TrainingArguments, objective: PixelREPAObjective, learning_rate: float):
    """AdamW; biases and norm weights are never decayed."""
    parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": args.adam_weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    settings = {"lr": learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if not args.use_8bit_adam:
        return torch.optim.AdamW(groups, fused=True, **settings)
    import bitsandbytes  # not a dependency; the arguments have been checked for it

    return bitsandbytes.optim.AdamW8bit(groups, **settings)
