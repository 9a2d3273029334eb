"""The documentation names only commands, flags, files, messages and public names that exist."""

import ast
import dataclasses
import importlib
import inspect
import re
import sys
from pathlib import Path

import pytest
import torch
from training_runs import ROOT, TEACHER, load_script

import pixelrepa_diffusers


PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    *(path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("docs/*.md"))),
)
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
SOURCES = [path for folder in ("src", "training", "benchmarks", "examples") for path in ROOT.glob(f"{folder}/**/*.py")]
INSTALLED = dict(re.findall(r'"(pixelrepa-[\w-]+)=([\w.]+):cli"', (ROOT / "setup.py").read_text(encoding="utf-8")))
SAID_BY_OTHERS = {
    "attribute name must be string",
    "contains custom code",
    "Pass trust_remote_code=True",
    "CUDA out of memory",
}  # diffusers, torch


def blocks(language: str) -> list[str]:
    return [block for text in TEXTS.values() for block in re.findall(rf"```{language}\n(.*?)```", text, flags=re.S)]


def commands() -> list[str]:
    """Every command of ours in the code blocks of the pages and in the docstrings of the sources."""
    texts = [
        *blocks("bash"),
        *(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "" for path in SOURCES),
    ]
    lines = [line.partition(" #")[0].strip() for text in texts for line in re.sub(r"\\+\n\s*", "", text).splitlines()]
    ours = r"(\w+=\w+ )*(python [a-z]+/|accelerate launch |pixelrepa-)"
    return sorted({line for line in lines if re.match(ours, line)})


def flags(module) -> set[str]:
    """The fields of a command's argument dataclasses, and what is added to a parser by hand."""
    found = set()
    for group in (value for name, value in vars(module).items() if name.endswith("Arguments")):
        found |= {f"--{field.name}" for field in dataclasses.fields(group)}
        found |= set(re.findall(r'add_argument\("(--\w+)"', inspect.getsource(sys.modules[group.__module__])))
    return found


def load(program: str):
    """The module of an installed command, of a script that wraps one, or of a script."""
    command = f"pixelrepa_diffusers.commands.{Path(program).stem}"
    if program in INSTALLED or command in INSTALLED.values():
        return importlib.import_module(INSTALLED.get(program, command))
    return load_script(program)


@pytest.mark.parametrize("command", commands())
def test_commands_name_programs_flags_and_files_that_exist(command):
    words = command.split()
    place = next(place for place, word in enumerate(words) if word in INSTALLED or word.endswith(".py"))
    assert {word for word in words[place:] if word.startswith("--")} <= flags(load(words[place]))
    ours = [word for word in words if word.startswith(("training/", "pipelines/", "examples/", "benchmarks/"))]
    assert all((ROOT / word).exists() for word in ours)


def test_flags_in_the_text_exist():
    programs = {
        *INSTALLED,
        "training/train_pixelrepa.py",
        "training/train_guidance_head.py",
        "benchmarks/training.py",
        "benchmarks/sampling.py",
    }
    known = set().union(*(flags(load(program)) for program in programs))
    mentioned = {flag for text in TEXTS.values() for flag in re.findall(r"`(--[a-z]\w+)", text)}
    assert mentioned - known <= {"--cpu"}  # accelerate's


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page):
    for target in re.findall(r"\]\(([^)#]+)\)", TEXTS[page]):
        assert target.startswith("https://") or ((ROOT / page).parent / target).exists(), target


def test_python_examples_import_public_names():
    for block in blocks("python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "pixelrepa_diffusers":
                assert all(hasattr(pixelrepa_diffusers, alias.name) for alias in node.names)


def test_the_training_loop_of_the_readme_runs():
    (block,) = (block for block in blocks("python") if "PixelREPAObjective" in block)
    small = {
        "JiT-B/16": "JiT-Digits/4",
        "facebook/dinov2-base": str(TEACHER),
        "grid_size=16, num_classes=1000)": "grid_size=4, num_classes=10)",
        "grid_size=16, image_size=256": "grid_size=4, image_size=16",
        "768, 12": "128, 4",
        "len(images), 256": "len(images), 16",
    }
    for old, new in small.items():
        assert old in block
        block = block.replace(old, new)
    results = {"loader": [(torch.rand(4, 3, 16, 16) * 2 - 1, torch.arange(4))] * 2}
    exec(block, results)
    assert torch.isfinite(results["output"].loss) and results["output"].alignment_loss > 0


def test_every_message_with_advice_is_in_the_sources():
    said = []
    for node in (node for path in SOURCES for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))):
        if isinstance(node, ast.JoinedStr):
            said.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            said.append(node.value)
    rows = re.findall(r"^\| `([^`]+)` \|", TEXTS["docs/troubleshooting.md"], flags=re.M)
    parts = {part.strip() for row in rows for part in re.split(r"…|checkpoint-N|\b\d+\b|\bN\b", row)}
    missing = [part for part in parts - SAID_BY_OTHERS if not any(part in message for message in said)]
    assert rows and not missing
