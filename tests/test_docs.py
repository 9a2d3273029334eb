"""What the READMEs say a program says, it says."""

import ast
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
SAID_BY_OTHERS = {"contains custom code", "Pass trust_remote_code=True", "CUDA out of memory"}  # diffusers, torch


def messages() -> list[str]:
    """Every string of the sources, with … for what is filled in."""
    found = []
    for folder in ("src", "training", "pipelines"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                    found.append("".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def promised() -> list[str]:
    """The first column of every table of messages, cut where something is filled in: at … and at numbers."""
    rows = []
    for path in ("README.md", "pipelines/README.md"):
        lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
        for start in (number for number, line in enumerate(lines) if line.startswith("| message |")):
            for line in lines[start + 2 :]:
                if not line.startswith("|"):
                    break
                rows.append(re.match(r"\| `([^`]+)` \|", line)[1])
    return rows


@pytest.mark.parametrize("message", promised())
def test_every_message_with_advice_is_one_a_program_says(message):
    parts = [part.strip() for part in re.split(r"…|checkpoint-N|\b\d+\b|\bN\b", message)]
    parts = [part for part in parts if part and part not in SAID_BY_OTHERS]
    sources = messages()
    for part in parts:
        assert any(part in said for said in sources), part


def test_there_is_advice():
    assert len(promised()) >= 20
