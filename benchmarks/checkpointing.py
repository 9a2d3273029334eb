"""How long saving a checkpoint stops training, and how long writing it takes.

python benchmarks/checkpointing.py --config training/configs/pixelrepa_b16.yaml --output_dir /tmp/checkpoints
"""

from __future__ import annotations

import json
import statistics
import time

import torch
from accelerate import Accelerator

from pixelrepa_diffusers.ema import ConstantDecayEMA
from pixelrepa_diffusers.sampling import device_name
from pixelrepa_diffusers.training.arguments import TrainingArguments, parse_arguments
from pixelrepa_diffusers.training.builders import (
    build_objective,
    build_optimizer,
    build_projector,
    build_transformer,
)
from pixelrepa_diffusers.training.checkpoints import Checkpointer


def main(args: TrainingArguments, num_saves: int = 3) -> None:
    accelerator = Accelerator(mixed_precision="no")
    transformer = build_transformer(args, num_classes=1000)
    projector = build_projector(args, transformer.config, teacher_dim=768)
    objective = build_objective(args, transformer, projector)
    objective, optimizer = accelerator.prepare(objective, build_optimizer(args, objective, args.learning_rate))
    for parameter in objective.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # creates its state
    ema = ConstantDecayEMA(accelerator.unwrap_model(objective).transformer, args.ema_decays)
    args.checkpoints_total_limit = 1
    models = {"transformer": transformer, "adapter": projector}
    checkpointer = Checkpointer(args, accelerator, objective, models, ema, optimizer, pipeline_config={})

    stops, cpu_times, writes = [], [], []
    for step in range(1, num_saves + 1):
        started, cpu_started = time.perf_counter(), time.thread_time()
        checkpointer.save(step, loader_state={})
        stops.append(time.perf_counter() - started)
        cpu_times.append(time.thread_time() - cpu_started)
        folder = checkpointer.wait()
        writes.append(time.perf_counter() - started)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    facts = {
        "device": device_name(accelerator.device),
        "checkpoint_GiB": size / 2**30,
        "first_stop_s": stops[0],
        "stop_s": statistics.median(stops[1:]),
        "stop_cpu_s": statistics.median(cpu_times[1:]),
        "written_after_s": statistics.median(writes),
    }
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main(parse_arguments())
