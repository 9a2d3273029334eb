"""Size, schedule and memory of a run, without running it."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModel, Dinov2Config, PretrainedConfig

from ..presets import get_preset
from .arguments import TrainingArguments
from .builders import add_lora, build_projector, build_transformer
from .data import ImageSource, StreamSource, check_global_batch


def dry_run(args: TrainingArguments, num_processes: int, source: ImageSource | StreamSource | None) -> dict:
    """Describe a run. Without data, or with a stream, ImageNet's number of images is assumed."""
    num_classes = source.num_classes if source else args.num_classes or get_preset(args.preset).num_classes
    num_images = len(source) if isinstance(source, ImageSource) else 1_281_167
    num_processes = args.dry_run_processes or num_processes
    check_global_batch(num_images, args.train_batch_size, args.gradient_accumulation_steps, num_processes)
    batch = args.global_batch_size(num_processes)
    steps, warmup = args.resolved_steps(num_images // batch)
    parameters, teacher_dim = {"transformer": 0, "projector": 0, "teacher (frozen)": 0}, 0
    with torch.device("meta"):
        transformer = build_transformer(args, num_classes)
        if args.lora_rank:
            add_lora(args, transformer)
        models = {"transformer": transformer}
        if args.objective != "none":
            config = teacher_config(args)
            teacher_dim = config.hidden_size
            models["projector"] = build_projector(args, transformer.config, teacher_dim)
            models["teacher (frozen)"] = AutoModel.from_config(config)
        parameters |= {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    trained = sum(p.numel() for p in transformer.parameters() if p.requires_grad)
    memory = estimate_memory(args, transformer.config, *parameters.values(), teacher_dim, trained)
    return {
        "arguments": args.saved(),
        "transformer": {k: v for k, v in transformer.config.items() if not k.startswith("_")},
        "parameters": parameters,
        "images": num_images,
        "processes": num_processes,
        "launch_file": f"training/accelerate/{launch_file(args, num_processes, parameters['transformer'])}.yaml",
        "global_batch_size": batch,
        "learning_rate": args.resolved_learning_rate(num_processes),
        "steps": steps,
        "warmup_steps": warmup,
        "epochs": round(steps * batch / num_images, 2),
        "warnings": args.warnings(steps, warmup),
        "memory_GiB": {name: round(value, 2) for name, value in {**memory, "sum": sum(memory.values())}.items()},
    }


def launch_file(args: TrainingArguments, num_processes: int, parameters: int) -> str:
    """Name the launch file for GPUs, eight per machine. Sharding pays from JiT-H on, if the settings allow it."""
    if num_processes == 1:
        return "1gpu"
    if parameters > 9e8 and not (args.ema_offload or args.use_8bit_adam or args.lora_rank):
        return "fsdp2" if num_processes <= 8 else "hsdp"
    return "8gpu" if num_processes <= 8 else "2nodes"


def teacher_config(args: TrainingArguments) -> PretrainedConfig:
    if args.teacher_model_name_or_path == "facebook/dinov2-base":
        return Dinov2Config()  # the defaults are that model, so published recipes are checked without a network
    config = AutoConfig.from_pretrained(
        args.teacher_model_name_or_path, revision=args.teacher_revision, trust_remote_code=False
    )
    return getattr(config, "vision_config", config)


# Bytes that the backward pass of a block needs per token, as (a, b, c): a·width + b·feed-forward width + c·heads. Measured by
# torch's saved_tensors_hooks, by the bytes of a matrix product's operand and by whether blocks are compiled.
SAVED_BYTES = {(4, False): (72, 16, 14), (4, True): (44, 12, 14), (2, False): (60, 8, 14), (2, True): (24, 6, 14)}


def estimate_memory(
    args: TrainingArguments,
    config: dict,
    transformer: int,
    projector: int,
    teacher: int,
    teacher_dim: int,
    trained: int,
) -> dict[str, float]:
    """
    Estimate the peak memory of an unsharded step in GiB per process, from the configuration and numbers of parameters, of
    which `trained` are those of the transformer that are not frozen.

    Weights, gradients, optimizer and EMAs are exact. Saved activations (fused attention assumed) are within 15 % of what the
    backward pass keeps, less with LoRA; the memory that torch's allocator loses to fragmentation is not counted.
    """
    heads, width = config["num_attention_heads"], config["num_attention_heads"] * config["attention_head_dim"]
    tokens, pixels = (config["sample_size"] // config["patch_size"]) ** 2, config["sample_size"] ** 2 * 3
    size = 2 if args.mixed_precision in ("fp16", "bf16") else 4
    per_width, per_hidden, per_head = SAVED_BYTES[size, args.compile]
    per_token = per_width * width + per_hidden * int(width * config["mlp_ratio"] * 2 / 3) + per_head * heads
    longest = tokens + config["in_context_len"]
    extended = config["num_layers"] - config["in_context_start"]
    extended += args.adapter_layers if args.objective == "pixelrepa" else 0
    passed = tokens * config["in_context_start"] + longest * extended
    # Beside the blocks: images and velocities, final layer, projector's output and loss.
    activations = 8 * pixels + (6 if projector else 4) * tokens * width * size
    activations += passed * (4 * width if args.gradient_checkpointing else per_token)
    features = tokens * teacher_dim * size
    emas = len(args.ema_decays) if args.use_ema and not args.ema_offload else 0
    batch = args.train_batch_size
    parts = {
        "weights and gradients": 4 * (transformer + projector) + 4 * (trained + projector),
        "weights in the compute dtype": size * (transformer + projector) if size == 2 else 0,
        "optimizer": (2 if args.use_8bit_adam else 8) * (trained + projector),
        "EMAs": 4 * emas * trained,
        "teacher": size * teacher + 8 * features * batch,  # eight widths per token at once
        "prepared batches": 2 * batch * (9 * pixels + features),  # uint8, float32, noise; one batch ahead
        f"saved activations (batch {batch})": activations * batch,
        "recomputed block": longest * per_token * batch if args.gradient_checkpointing else 0,
    }
    return {name: value / 2**30 for name, value in parts.items()}
