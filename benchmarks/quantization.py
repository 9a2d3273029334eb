"""Measure quantized transformers: size on disk, sampling time, and the distance of their images to float32's.

    python benchmarks/quantization.py --pipeline FOLDER_OR_HUB_ID

Rows need torchao or optimum-quanto (`pip install -e ".[quantization]"`); bitsandbytes is measured on a GPU only. The rows take
turns, and the time is the median ratio to float32 over the turns. The RMSE is in levels of 255.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from diffusers import BitsAndBytesConfig, QuantoConfig, TorchAoConfig

from pixelrepa_diffusers import JiTTransformer2DModel, PixelREPAPipeline
from pixelrepa_diffusers.cli import flag, parse, run
from pixelrepa_diffusers.sampling import device_name, fetch_pipeline, seeded


@dataclass
class QuantizationArguments:
    pipeline: str = flag(help="A saved pipeline's folder or Hub id.")
    num_images: int = flag(100, "Images, spread over the classes.", ge=1)
    num_inference_steps: int = flag(50, "Sampling steps.", ge=1)
    num_rounds: int = flag(3, "Turns.", ge=1)


def configs(device: torch.device) -> dict[str, dict]:
    """Arguments of `from_pretrained` by row, for the libraries that are installed."""
    rows = {"float32": {"dtype": torch.float32}, "bfloat16": {"dtype": torch.bfloat16}}
    if find_spec("torchao"):
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

        rows["torchao int8 weights"] = {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}
        rows["torchao float8 weights"] = {"quantization_config": TorchAoConfig(Float8WeightOnlyConfig())}
    if find_spec("optimum"):
        rows["Quanto int8 weights"] = {"quantization_config": QuantoConfig(weights_dtype="int8")}
    if find_spec("bitsandbytes") and device.type == "cuda":
        rows["bitsandbytes 8 bit"] = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
        rows["bitsandbytes nf4"] = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}
    return {name: {"dtype": torch.bfloat16, **arguments} for name, arguments in rows.items()}


def load(folder: Path, name: str, arguments: dict, device: torch.device) -> PixelREPAPipeline:
    transformer = JiTTransformer2DModel.from_pretrained(folder / "transformer", **arguments)
    if name.startswith("layerwise"):
        transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
    pipeline = PixelREPAPipeline.from_pretrained(folder, transformer=transformer).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def main(args: QuantizationArguments) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # A CPU's own time does not depend on what else the machine does.
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    folder, _ = fetch_pipeline(args.pipeline)
    rows = {**configs(device), "layerwise casting to float8": {"dtype": torch.bfloat16}}
    pipelines = {name: load(folder, name, arguments, device) for name, arguments in rows.items()}
    classes = pipelines["float32"].transformer.config.num_classes
    labels, images, seconds = [index % classes for index in range(args.num_images)], {}, {name: [] for name in rows}
    for _ in range(args.num_rounds + 1):  # the first turn warms up
        for name, pipeline in pipelines.items():
            start, seeds = clock(), seeded(range(args.num_images))
            images[name] = pipeline(
                labels, generator=seeds, num_inference_steps=args.num_inference_steps, output_type="pt"
            ).images.cpu()
            seconds[name].append(clock() - start)
    print(f"{device_name(device)}, {torch.get_num_threads()} threads, {args.num_images} images")
    print("| weights | transformer, MB | time | RMSE |\n|---|---|---|---|")
    for name, pipeline in pipelines.items():
        with tempfile.TemporaryDirectory() as saved:
            pipeline.transformer.save_pretrained(saved)
            size = sum(path.stat().st_size for path in Path(saved).glob("*.safetensors")) / 1e6
        ratio = statistics.median(
            own / base for own, base in zip(seconds[name][1:], seconds["float32"][1:], strict=True)
        )
        rmse = 255 * (images[name] - images["float32"]).square().mean().sqrt().item()
        print(f"| {name} | {size:.1f} | {ratio:.2f} | {rmse:.2f} |")


if __name__ == "__main__":
    run(lambda: main(parse(QuantizationArguments, __doc__.partition("\n")[0])))
