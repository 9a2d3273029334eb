"""Train a JiT with PixelREPA (arXiv 2603.14366), or as plain JiT, with REPA or with iREPA.

The published B/16 recipe on ImageNet at 256 pixels, 8 GPUs:

    accelerate launch --config_file training/accelerate/8gpu.yaml training/train_pixelrepa.py \
        --config training/configs/pixelrepa_b16.yaml --train_data_dir /path/to/imagenet/train

A tiny run on any CPU, with one sub-folder of images per class and any small DINOv2 as the teacher:

    accelerate launch --config_file training/accelerate/cpu.yaml training/train_pixelrepa.py --preset JiT-Digits/4 \
        --train_data_dir photos --teacher_model_name_or_path teacher --train_batch_size 16 --max_train_steps 20 \
        --lr_warmup_steps 5 --checkpointing_steps 10 --validation_steps 10 --validation_inference_steps 10

Outputs in --output_dir: checkpoint-N/ (transformer, EMAs and adapter as diffusers folders, optimizer, position in the data),
samples/step-N.png, metrics.jsonl, curves.png, and at the end pipeline/, which `DiffusionPipeline.from_pretrained` loads.

Every random draw is a function of (seed, step, image): neither the number of processes and workers nor a restart changes
the run. (Dropout, used by JiT-H only, is keyed by (seed, step, process, micro-step).)

The loop is `TrainingLoop.train` (src/pixelrepa_diffusers/training/loop.py), a step `take_step` (step.py beside it), the loss
`PixelREPAObjective` (objective.py).
"""

from __future__ import annotations

import contextlib
import json
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger

from pixelrepa_diffusers.cli import run
from pixelrepa_diffusers.files import only_writer, remove_incomplete
from pixelrepa_diffusers.hub import BackgroundPusher
from pixelrepa_diffusers.pipeline_pixelrepa import PixelREPAPipeline
from pixelrepa_diffusers.sampling import check_cuda_graphs
from pixelrepa_diffusers.training.arguments import TrainingArguments, parse_arguments
from pixelrepa_diffusers.training.builders import (
    add_lora,
    apply_switches,
    build_loader,
    build_objective,
    build_projector,
    build_teacher,
    build_transformer,
    load_pretrained,
    transformer_config,
)
from pixelrepa_diffusers.training.data import ImageSource, StreamSource, open_source, random_words
from pixelrepa_diffusers.training.draws import BatchDraws
from pixelrepa_diffusers.training.dry_run import dry_run
from pixelrepa_diffusers.training.export import Exporter, build_pipeline, open_evaluation
from pixelrepa_diffusers.training.flops import flops_per_image
from pixelrepa_diffusers.training.loop import TrainingLoop, create_accelerator
from pixelrepa_diffusers.training.step import WEIGHT_DRAWS, PreparedBatches
from pixelrepa_diffusers.training.teacher_cache import CachedTeacher


logger = get_logger(__name__)


def main(args: TrainingArguments) -> Path | None:
    """Train and return the folder of the final pipeline (`None` after a dry run)."""
    accelerator = create_accelerator(args)
    if args.dry_run:
        source = open_source(args) if args.train_data_dir is not None or args.dataset_name is not None else None
        accelerator.print(json.dumps(dry_run(args, accelerator.num_processes, source), indent=1, ensure_ascii=False))
        return None

    check_cuda_graphs(args.cuda_graphs, accelerator.device)
    source, output_dir, pusher = open_source(args), Path(args.output_dir), None
    with contextlib.ExitStack() as stack:
        if accelerator.is_main_process:
            stack.enter_context(only_writer(output_dir))
            remove_incomplete(output_dir / "samples")
            remove_incomplete(output_dir / "hub")
            if args.push_to_hub:
                # Creates the repository now, so that a missing login ends the run before it starts.
                pusher = BackgroundPusher(
                    args.hub_model_id or output_dir.name,
                    private=args.hub_private_repo,
                    token=args.hub_token,
                    license=args.hub_license,
                )
                stack.enter_context(pusher)
        accelerator.wait_for_everyone()
        folder = Trainer(args, accelerator, source, pusher).run()
        if pusher is not None:
            pusher.push(folder)
    return folder


class Trainer(TrainingLoop):
    """Everything that is built before the first step; the loop itself is [`TrainingLoop.train`]."""

    def __init__(
        self,
        args: TrainingArguments,
        accelerator: Accelerator,
        source: ImageSource | StreamSource,
        pusher: BackgroundPusher | None,
    ):
        super().__init__(args, accelerator)
        device, num_classes = accelerator.device, source.num_classes
        loader = build_loader(args, accelerator, source, transformer_config(args, num_classes)["sample_size"])

        # Student, teacher and projector
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
        torch.manual_seed(int(random_words(args.seed, 0, 0, purpose=WEIGHT_DRAWS)[0]))
        transformer = build_transformer(args, num_classes)
        config = transformer.config
        teacher = build_teacher(args, config, device)
        pipeline = build_pipeline(args, transformer, source.id2label)
        spaces = open_evaluation(args, pipeline, device) if args.eval_steps else []
        projector = build_projector(args, config, teacher.feature_dim) if teacher is not None else None
        if args.pretrained_model_name_or_path is not None and (self.checkpoint is None or args.lora_rank):
            load_pretrained(args, transformer, projector, source.id2label)
        if args.lora_rank:
            add_lora(args, transformer)
        objective = build_objective(args, transformer, projector)
        flops = flops_per_image(objective, None if args.teacher_cache_dir is not None else teacher)
        apply_switches(args, objective)
        models = {"transformer": transformer}
        if projector is not None:
            models["adapter"] = projector
        settings = {name: pipeline.config[name] for name in ("id2label", "guidance_scale", "guidance_interval")}
        self.prepare(objective, models, loader, settings, flops)

        # Inputs
        draw, teach = BatchDraws.from_arguments(args, config), None
        if args.compile:
            if teacher is not None:
                teacher.compile()
            if device.type == "cuda":
                draw.compile()
        if teacher is not None and args.teacher_cache_dir is not None:
            teach = CachedTeacher(teacher, args.teacher_cache_dir, len(source))
            loader.batch_transform = teach.file.read_into
        elif teacher is not None:
            teach = lambda pixel_values, batch: teacher(pixel_values)  # noqa: E731
        self.batches = PreparedBatches(args, loader, draw, teach, self.step, device)

        # Outputs
        make_pipeline = partial(PixelREPAPipeline, scheduler=pipeline.scheduler, **settings)
        self.exporter = Exporter(
            args, accelerator, transformer, self.ema, make_pipeline, self.metrics, self.step, spaces, pusher
        )


if __name__ == "__main__":
    run(lambda: main(parse_arguments()))
