"""Size, schedule and memory of a run, without running it."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModel, Dinov2Config, PretrainedConfig

from ..presets import get_preset
from .arguments import TrainingArguments
from .builders import build_projector, build_transformer
from .data import ImageSource, StreamSource, check_global_batch


def dry_run(args: TrainingArguments, num_processes: int, source: ImageSource | StreamSource | None) -> dict:
    """Describe a run. Without data, or with a stream, ImageNet's number of images is assumed."""
    num_classes = source.num_classes if source else args.num_classes or get_preset(args.preset).num_classes
    num_images = len(source) if isinstance(source, ImageSource) else 1_281_167
    num_processes = args.dry_run_processes or num_processes
    check_global_batch(num_images, args.train_batch_size, args.gradient_accumulation_steps, num_processes)
    batch = args.global_batch_size(num_processes)
    steps, warmup = args.resolved_steps(num_images // batch)
    parameters = {"transformer": 0, "projector": 0, "teacher (frozen)": 0}
    with torch.device("meta"):
        transformer = build_transformer(args, num_classes)
        models = {"transformer": transformer}
        if args.objective != "none":
            config = teacher_config(args)
            models["projector"] = build_projector(args, transformer.config, config.hidden_size)
            models["teacher (frozen)"] = AutoModel.from_config(config)
        parameters |= {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    memory = estimate_memory(args, transformer.config, *parameters.values())
    return {
        "arguments": args.saved(),
        "transformer": {k: v for k, v in transformer.config.items() if not k.startswith("_")},
        "parameters": parameters,
        "images": num_images,
        "processes": num_processes,
        "global_batch_size": batch,
        "learning_rate": args.resolved_learning_rate(num_processes),
        "steps": steps,
        "warmup_steps": warmup,
        "epochs": round(steps * batch / num_images, 2),
        "warnings": args.warnings(steps, warmup),
        "memory_GiB": {name: round(value, 2) for name, value in {**memory, "sum": sum(memory.values())}.items()},
    }


def teacher_config(args: TrainingArguments) -> PretrainedConfig:
    if args.teacher_model_name_or_path == "facebook/dinov2-base":
        return Dinov2Config()  # the defaults are that model, so published recipes are checked without a network
    config = AutoConfig.from_pretrained(
        args.teacher_model_name_or_path, revision=args.teacher_revision, trust_remote_code=False
    )
    return getattr(config, "vision_config", config)


def estimate_memory(
    args: TrainingArguments, config: dict, transformer: int, projector: int, teacher: int
) -> dict[str, float]:
    """
    Estimate the peak memory of an unsharded step in GiB per process, from the configuration and numbers of parameters.

    Weights, gradients and optimizer are exact. Activations assume eager fused attention: per token and block two float32
    residuals and, in the compute dtype, 18 widths (norms, queries, keys, values, attention, gates) and 3 feed-forward
    widths. Gradient checkpointing keeps one residual.
    """
    width = config["num_attention_heads"] * config["attention_head_dim"]
    hidden = int(width * config["mlp_ratio"] * 2 / 3)
    tokens = (config["sample_size"] // config["patch_size"]) ** 2
    size = 2 if args.mixed_precision in ("fp16", "bf16") else 4
    per_token = 8 * width + size * (18 * width + 3 * hidden)
    plain = tokens * config["in_context_start"]
    extended = (tokens + config["in_context_len"]) * (config["num_layers"] - config["in_context_start"])
    if args.objective == "pixelrepa":
        extended += (tokens + config["in_context_len"]) * args.adapter_layers
    passed = plain + extended
    activations = passed * 4 * width + tokens * per_token if args.gradient_checkpointing else passed * per_token
    emas = len(args.ema_decays) if args.use_ema and not args.ema_offload else 0
    parts = {
        "weights and gradients": 8 * (transformer + projector),
        "optimizer": (2 if args.use_8bit_adam else 8) * (transformer + projector),
        "EMAs": 4 * emas * transformer,
        "teacher": size * teacher,
        f"activations (estimate, batch {args.train_batch_size})": activations * args.train_batch_size,
    }
    return {name: value / 2**30 for name, value in parts.items()}
