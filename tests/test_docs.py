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
    for path in ("README.md", "docs/pipelines.md"):
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


# ------------------------------------------------------------------------------------------------------------ commands


def commands() -> list[str]:
    """Every call of a script of ours in the READMEs and in the scripts' own descriptions."""
    texts = [(ROOT / path).read_text(encoding="utf-8") for path in ("README.md", "docs/pipelines.md")]
    for path in sorted((*ROOT.glob("training/*.py"), *ROOT.glob("pipelines/*.py"))):
        texts.append(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "")
    found = []
    for text in texts:
        text = re.sub(r"\\\n\s*", " ", text)
        fenced = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.M | re.S)
        rest = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.M | re.S)
        lines = [line for block in fenced for line in block.splitlines()]
        lines += [line for line in rest.splitlines() if line.startswith("    ")]
        lines += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", rest)]
        for line in lines:
            line = line.partition(" #")[0].strip()
            if re.search(r"^(\w+=\w+ )*(python|accelerate launch) .*\b(training|pipelines)/\w+\.py", line):
                found.append(line)
    return sorted(set(found))


def options(script: Path) -> set[str]:
    """The flags a script takes: the fields of its dataclasses and what it adds to its parser."""
    files = [script]
    if script.stem == "train_pixelrepa":
        files += [script.with_name("arguments.py"), script.with_name("data.py")]
    elif script.stem == "prepare_dataset":
        files.append(script.with_name("data.py"))
    flags = set()
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))):
        if isinstance(node, ast.ClassDef) and node.name.endswith("Arguments"):
            flags |= {f"--{field.target.id}" for field in node.body if isinstance(field, ast.AnnAssign)}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "add_argument":
            flags.add(node.args[0].value)
    return flags


@pytest.mark.parametrize("command", commands())
def test_a_command_names_scripts_flags_and_settings_that_exist(command):
    words = command.split()
    place = next(place for place, word in enumerate(words) if re.fullmatch(r"(training|pipelines)/\w+\.py", word))
    script = ROOT / words[place]
    assert script.is_file()
    given = {word for word in words[place:] if word.startswith("--")}
    assert given <= options(script)
    for word in words:
        if word.startswith(("training/", "pipelines/")):
            assert (ROOT / word).exists(), word


def test_there_are_commands_and_options():
    assert len(commands()) >= 25
    assert {"--preset", "--config", "--streaming"} <= options(ROOT / "training/train_pixelrepa.py")
