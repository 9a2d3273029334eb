"""docs/quickstart.md runs from top to bottom, with fewer steps and images."""

import importlib
import json
import re
import runpy
import shlex
import sys

from conftest import reset_accelerate_state
from PIL import Image
from test_docs import INSTALLED
from training_runs import ROOT


PAGE = (ROOT / "docs/quickstart.md").read_text(encoding="utf-8")
SMALL = {  # a later flag replaces an earlier one
    "examples/digits/prepare_teacher.py": "--steps 2",
    "training/train_pixelrepa.py": "--max_train_steps 2 --lr_warmup_steps 1 --train_batch_size 8 --validation_steps 0 "
    "--report_to none",
    "pixelrepa-generate": "--num_inference_steps 1",
    "pixelrepa-prepare-reference": "--dataloader_num_workers 0",
    "pixelrepa-evaluate": "--num_samples 70 --num_inference_steps 1",
}


def run(command: str) -> None:
    """Run a command of the page in this process."""
    words = shlex.split(command.removeprefix("python "))
    sys.argv = [*words, *SMALL.get(words[0], "").split()]
    if words[0] in INSTALLED:
        importlib.import_module(INSTALLED[words[0]]).cli()
    else:
        runpy.run_path(words[0], run_name="__main__")
    reset_accelerate_state()


def test_quickstart_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    for folder in ("examples", "training"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    for language, code in re.findall(r"```(bash|python)\n(.*?)```", PAGE, flags=re.S):
        if language == "python":
            exec(code.replace("num_inference_steps=20", "num_inference_steps=1"), {})
            continue
        for command in code.replace("\\\n", "").splitlines():
            if not command.startswith("pip "):
                run(command)
    results = tmp_path / "outputs/quickstart"
    assert len(list(results.glob("images/0*.png"))) == 40 and (results / "images/grid.png").is_file()
    assert Image.open(results / "three.png").size == (256, 256)
    (distance,) = json.loads((results / "evaluation/metrics.json").read_text())["metrics"].values()
    card = capsys.readouterr().out
    assert "license: mit" in card and distance > 0 and str(float(f"{distance:.3g}")) in card
