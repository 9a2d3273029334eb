"""Try an installed wheel, outside the repository: every command's --help, and a few images. `make test-wheel` runs it.

python tests/try_wheel.py
"""

import subprocess
import sys
import tempfile
from importlib.metadata import distribution
from pathlib import Path

import pixelrepa_diffusers
from pixelrepa_diffusers import JiTFlowMatchScheduler, JiTTransformer2DModel, PixelREPAPipeline


def call(name: str, *words: str) -> str:
    run = subprocess.run([Path(sys.prefix, "bin", name), *words], capture_output=True, text=True)
    assert run.returncode == 0, f"{name}: {run.stderr}"
    return run.stdout


assert Path(pixelrepa_diffusers.__file__).is_relative_to(sys.prefix), "not the installed package"
commands = [entry.name for entry in distribution("pixelrepa-diffusers").entry_points]
for command in commands:
    assert f"usage: {command}" in call(command, "--help"), command

with tempfile.TemporaryDirectory() as folder:
    sizes = {"sample_size": 16, "patch_size": 4, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}
    sizes |= {"bottleneck_dim": 6, "in_context_len": 2, "in_context_start": 1, "num_classes": 3}
    pipeline = PixelREPAPipeline(
        JiTTransformer2DModel(**sizes), JiTFlowMatchScheduler(), id2label={0: "a", 1: "b", 2: "c"}
    )
    pipeline.save_pretrained(Path(folder, "pipeline"))
    words = f"--pipeline {folder}/pipeline --class_labels a 2 --seeds 0-1 --num_inference_steps 2"
    call("pixelrepa-generate", *words.split(), "--output_dir", f"{folder}/images")
    images = sorted(path.name for path in Path(folder, "images").glob("0*.png"))
    assert len(images) == 4, images
print(f"{len(commands)} commands show their help; pixelrepa-generate wrote {', '.join(images)}.")
