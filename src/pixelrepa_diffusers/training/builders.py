"""Build transformer, teacher, projector, objective and optimizer from the arguments."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger

from ..adapter import ConvProjector, MaskedTransformerAdapter, MLPProjector
from ..objective import PixelREPAObjective
from ..presets import get_preset
from ..sampling import read_settings
from ..teacher import SemanticTeacher
from ..transformer_jit import JiTAttention, JiTBlock, JiTTransformer2DModel
from .arguments import TrainingArguments
from .data import ImageLoader, ImageSource, StreamSource


logger = get_logger(__name__)

LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]

# Transformer settings that the command line may override.
TRANSFORMER_ARGUMENTS = (
    "patch_size", "num_layers", "num_attention_heads", "attention_head_dim", "bottleneck_dim", "in_context_len",
    "in_context_start", "dropout", "noise_scale", "t_eps",
)  # fmt: skip


def transformer_config(args: TrainingArguments, num_classes: int) -> dict:
    """Return the configuration of the preset, or of the pretrained transformer, with the overrides of the command line."""
    overrides = {name: getattr(args, name) for name in TRANSFORMER_ARGUMENTS if getattr(args, name) is not None}
    if args.resolution is not None:
        overrides["sample_size"] = args.resolution
    source = args.pretrained_model_name_or_path
    if source is None:
        return {**get_preset(args.preset).transformer_config(), **overrides, "num_classes": num_classes}
    if Path(source).exists() and not (Path(source) / "transformer" / "config.json").is_file():
        raise ValueError(
            f"--pretrained_model_name_or_path {source} is neither a pipeline nor a checkpoint: give RUN/pipeline or "
            "RUN/checkpoint-N of a run; convert a published .pth file with pixelrepa-convert first."
        )
    config = JiTTransformer2DModel.load_config(source, subfolder="transformer", revision=args.revision)
    for name, value in overrides.items():
        if value != config[name] and name not in ("dropout", "noise_scale", "t_eps"):
            flag = "resolution" if name == "sample_size" else name
            raise ValueError(f"--{flag} is {value}, but {source} was trained with {config[name]}: leave it out.")
    return {**config, **overrides, "num_classes": num_classes}


def build_loader(
    args: TrainingArguments, accelerator: Accelerator, source: ImageSource | StreamSource, size: int
) -> ImageLoader:
    """The process's share of the images, `size` pixels square."""
    return ImageLoader(
        source,
        size,
        args.train_batch_size,
        args.seed,
        center_crop=args.center_crop,
        random_flip=args.random_flip,
        on_bad_image=args.on_bad_image,
        accumulation_steps=args.gradient_accumulation_steps,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        num_workers=args.dataloader_num_workers,
    )


def build_transformer(args: TrainingArguments, num_classes: int) -> JiTTransformer2DModel:
    return JiTTransformer2DModel.from_config(transformer_config(args, num_classes))


def add_lora(args: TrainingArguments, transformer: JiTTransformer2DModel) -> None:
    """Freeze the pretrained transformer and add LoRA layers of scale 1."""
    from peft import LoraConfig  # optional dependency

    config = transformer.load_config(
        args.pretrained_model_name_or_path, subfolder="transformer", revision=args.revision
    )
    if config["num_classes"] != transformer.config.num_classes:
        raise ValueError(
            f"--lora_rank keeps the {config['num_classes']} classes of {args.pretrained_model_name_or_path}, the data have "
            f"{transformer.config.num_classes}: leave it out to train new classes."
        )
    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=args.lora_rank, lora_alpha=args.lora_rank, target_modules=LORA_TARGETS))


def build_teacher(args: TrainingArguments, config: dict, device: torch.device) -> SemanticTeacher | None:
    if args.objective == "none":
        return None
    try:
        teacher = SemanticTeacher.from_pretrained(
            args.teacher_model_name_or_path,
            grid_size=config["sample_size"] // config["patch_size"],
            image_size=config["sample_size"],
            mode=args.teacher_mode,
            dtype=torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32,
            revision=args.teacher_revision,
        )
    except OSError as error:
        raise OSError(
            f"The teacher could not be loaded: {error}\nSet --teacher_model_name_or_path to a folder or Hub id, or train "
            "plain JiT without a teacher: --objective none."
        ) from error
    return teacher.to(device)


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


def build_objective(
    args: TrainingArguments, transformer: JiTTransformer2DModel, projector: torch.nn.Module | None
) -> PixelREPAObjective:
    return PixelREPAObjective(
        transformer,
        projector,
        alignment_weight=args.alignment_weight,
        spatial_norm=args.spatial_norm if args.objective == "irepa" else None,
        alignment_depth=args.alignment_depth,
    )


def apply_switches(args: TrainingArguments, objective: PixelREPAObjective) -> None:
    """Enable gradient checkpointing, an attention backend and compilation."""
    if args.gradient_checkpointing:
        objective.transformer.enable_gradient_checkpointing()
        if isinstance(objective.projector, MaskedTransformerAdapter):
            objective.projector.enable_gradient_checkpointing()
    if args.attention_backend is not None:
        objective.transformer.set_attention_backend(args.attention_backend)
    if torch.cuda.is_available():
        join_projections(objective)
    if args.compile and args.cuda_graphs:
        compile_whole(objective)
    elif args.compile:
        compile_blocks(objective)


def join_projections(objective: PixelREPAObjective) -> None:
    """
    Compute queries, keys and values as one product: three of width 768 do not fill a GPU, one of 2304 does.

    On a CPU the copy of the weights costs more than it saves. Layers that are not plain, such as LoRA's, are left alone.
    """
    for attention in objective.modules():
        if isinstance(attention, JiTAttention) and type(attention.to_q) is torch.nn.Linear:
            attention.processor.joint_projections = True


def compile_blocks(objective: PixelREPAObjective) -> None:
    """Compile every block of transformer and projector in place."""
    # DDP's optimizer would split each block's graph at the gradient buckets; blocks are short enough to overlap whole.
    torch._dynamo.config.optimize_ddp = False
    for block in objective.modules():
        if isinstance(block, JiTBlock):
            block.compile(fullgraph=True, dynamic=False)  # a run has two lengths: with and without class tokens


def compile_whole(objective: PixelREPAObjective) -> None:
    """Compile the objective as one graph that a GPU replays as CUDA graphs: a few launches instead of a thousand."""
    # DDP's optimizer splits the graph at the gradient buckets, whose reduction overlaps with the backward pass.
    objective.compile(fullgraph=True, dynamic=False, mode="reduce-overhead")


def build_optimizer(
    args: TrainingArguments, objective: PixelREPAObjective, learning_rate: float
) -> torch.optim.Optimizer:
    """AdamW without weight decay for biases and norm weights."""
    parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": args.adam_weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    settings = {"lr": learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if args.use_8bit_adam:
        import bitsandbytes  # optional dependency

        return bitsandbytes.optim.AdamW8bit(groups, **settings)
    return torch.optim.AdamW(groups, fused=True, **settings)


@functools.cache
def pretrained_settings(name_or_path: str, revision: str | None) -> dict:
    """Class names and guidance saved with a pipeline or a checkpoint, if any."""
    try:
        return read_settings(name_or_path, revision)
    except OSError as error:
        logger.warning(f"{name_or_path} has no class names and no guidance, the preset's guidance is used ({error}).")
        return {}


def load_pretrained(
    args: TrainingArguments,
    transformer: JiTTransformer2DModel,
    projector: torch.nn.Module | None,
    id2label: dict[str, str] | None,
) -> None:
    """Load the pretrained transformer, and the pretrained projector if there is one of the same architecture."""
    source = args.pretrained_model_name_or_path
    _load_weights(args, "transformer", transformer, id2label)
    if projector is None:
        return
    try:
        config = projector.load_config(source, subfolder="adapter", revision=args.revision)
    except OSError as error:
        logger.warning(f"{source} has no adapter: a new one is trained ({error}).")
        return
    needed = {name: value for name, value in projector.config.items() if not name.startswith("_")}
    needed |= {"_class_name": type(projector).__name__, "num_classes": config.get("num_classes")}
    differences = [f"{name}: {config.get(name)}, not {own}" for name, own in needed.items() if config.get(name) != own]
    if differences:
        logger.warning(f"The adapter of {source} does not fit ({', '.join(differences)}): a new one is trained.")
        return
    _load_weights(args, "adapter", projector, id2label)
    logger.info(f"Loaded the adapter of {source}.")


def _load_weights(
    args: TrainingArguments, subfolder: str, model: torch.nn.Module, id2label: dict[str, str] | None
) -> None:
    source = args.pretrained_model_name_or_path
    state = type(model).from_pretrained(source, subfolder=subfolder, revision=args.revision).state_dict()
    name = "conditioning.class_embedding.weight"
    if name in state:
        known = pretrained_settings(source, args.revision).get("id2label") or {}
        state[name] = _match_classes(state[name], model.state_dict()[name], known, id2label or {}, source)
    model.load_state_dict(state)


def _match_classes(
    pretrained: torch.Tensor, initial: torch.Tensor, known: dict[str, str], id2label: dict[str, str], source: str
) -> torch.Tensor:
    """
    Return the class embedding for the classes of the data.

    A class takes the pretrained row of its name. Without one it takes the row of its number if the numbers of classes
    agree, and keeps its initialization otherwise. The last row is the null class.
    """
    num_classes, same_number = len(initial) - 1, len(initial) == len(pretrained)
    shared = {name for name, count in Counter(known.values()).items() if count > 1}
    rows = {name: int(number) for number, name in known.items() if name not in shared}
    unmatched = [number for number in range(num_classes) if id2label.get(str(number)) not in rows]
    embedding = pretrained.clone() if same_number else initial.clone()
    embedding[-1] = pretrained[-1]
    for number in set(range(num_classes)) - {*unmatched}:
        embedding[number] = pretrained[rows[id2label[str(number)]]]
    if unmatched and not same_number:
        logger.warning(
            f"{source} has {len(pretrained) - 1} classes, the data have {num_classes}: {len(unmatched)} class embeddings "
            "without a match by name start from their initialization."
        )
    elif unmatched and known and id2label:
        number = str(unmatched[0])
        logger.warning(
            f"The classes of {source} have other names than those of the data (class {number}: {known.get(number)!r}, here "
            f"{id2label.get(number)!r}). Such a class takes the embedding of its number: check the order."
        )
    return embedding
