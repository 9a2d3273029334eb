"""Train a guidance head for a PixelREPA or JiT pipeline (self-guidance of a frozen model, arXiv 2607.29122).

On the model's own guided samples, which the script makes and keeps in --output_dir:

    accelerate launch --config_file training/accelerate/8gpu.yaml training/train_guidance_head.py \
        --pipeline FOLDER_OR_HUB_ID --num_generated_images 50000 --train_batch_size 32 --output_dir outputs/guidance_head

The pipeline of the demo, on any CPU:

    accelerate launch --config_file training/accelerate/cpu.yaml training/train_guidance_head.py \
        --pipeline outputs/demo/run/pipeline --num_generated_images 1500 --num_inference_steps 10 --max_train_steps 300 \
        --train_batch_size 64 --learning_rate 1e-3 --lr_warmup_steps 20 --ema_decays 0.98 --output_dir outputs/demo/head

Outputs in --output_dir: generated/, checkpoint-N/, samples/step-N.png, metrics.jsonl, curves.png, and at the end pipeline/,
the pipeline with its head, which `DiffusionPipeline.from_pretrained` loads. The transformer does not change.
"""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DistributedType

from pixelrepa_diffusers.cli import parse, run
from pixelrepa_diffusers.files import only_writer, remove_incomplete
from pixelrepa_diffusers.guidance_jit import JiTGuidanceHead
from pixelrepa_diffusers.objective import PixelREPAObjective
from pixelrepa_diffusers.sampling import fetch_pipeline, load_pipeline
from pixelrepa_diffusers.training.builders import build_loader
from pixelrepa_diffusers.training.data import DataArguments, open_source
from pixelrepa_diffusers.training.draws import BatchDraws
from pixelrepa_diffusers.training.guidance_head import (
    GuidanceHeadArguments,
    GuidedExporter,
    HeadOnFrozenTransformer,
    generate_images,
    guided_pipeline,
)
from pixelrepa_diffusers.training.loop import TrainingLoop, create_accelerator
from pixelrepa_diffusers.training.step import PreparedBatches


def main(args: GuidanceHeadArguments) -> Path:
    """Train and return the folder of the pipeline with its head."""
    accelerator = create_accelerator(args)
    if accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError("A guidance head is too small to shard: use DDP, as in training/accelerate/8gpu.yaml.")
    output_dir = Path(args.output_dir)
    with contextlib.ExitStack() as stack:
        if accelerator.is_main_process:
            stack.enter_context(only_writer(output_dir))
            for folder in (output_dir / "samples", *output_dir.glob("generated/*")):
                remove_incomplete(folder)
        accelerator.wait_for_everyone()
        return HeadTrainer(args, accelerator).run()


class HeadTrainer(TrainingLoop):
    """Everything that is built before the first step; the loop itself is [`TrainingLoop.train`]."""

    def __init__(self, args: GuidanceHeadArguments, accelerator: Accelerator):
        super().__init__(args, accelerator)

        # Models and images
        with accelerator.local_main_process_first():  # which downloads
            source, _ = fetch_pipeline(args.pipeline, args.revision)
            pipe = load_pipeline(source, "float32")
        pipe.set_progress_bar_config(disable=True)
        config = pipe.transformer.config
        head = JiTGuidanceHead.from_transformer(pipe.transformer, args.depth)
        folder = str(args.train_data_dir or generate_images(args, accelerator, pipe))
        images = open_source(DataArguments(train_data_dir=folder, unconditional=config.num_classes == 1))
        if images.num_classes != config.num_classes:
            raise ValueError(
                f"{folder} has {images.num_classes} classes, the transformer {config.num_classes}. Give the data it was "
                "trained on, or leave --train_data_dir out to train on the model's own images."
            )
        loader = build_loader(args, accelerator, images, config.sample_size)
        objective = PixelREPAObjective(HeadOnFrozenTransformer(pipe.transformer, head))
        # The head's parameters are the only ones of `objective.transformer`, from which a step updates the EMAs.
        self.prepare(objective, {"guidance_head": head}, loader, settings={})

        # Inputs and outputs
        draw = BatchDraws.from_arguments(args, config)
        self.batches = PreparedBatches(args, loader, draw, None, self.step, accelerator.device)
        make_pipeline = partial(guided_pipeline, args, pipe)
        self.exporter = GuidedExporter(
            source, args, accelerator, head, self.ema, make_pipeline, self.metrics, self.step
        )


if __name__ == "__main__":
    run(lambda: main(parse(GuidanceHeadArguments, __doc__.partition("\n")[0])))
