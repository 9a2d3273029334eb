"""Who may import whom: the arrows of the package's layers, and nothing heavy at import."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "pixelrepa_diffusers"
MODULES = sorted(
    path.relative_to(PACKAGE).with_suffix("").as_posix()
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py"
)
SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix() for folder in ("training", "pipelines") for path in (ROOT / folder).glob("*.py")
)

# The lower layers, and what each may import of the package. What is not listed stands above them all.
LOWER = {
    "presets": set(),
    "transformer_jit": set(),
    "scheduling_jit": set(),
    "pipeline_pixelrepa": set(),
    "teacher": set(),
    "ema": set(),
    "images": set(),
    "stored_images": set(),
    "adapter": {"transformer_jit"},
    "objective": {"adapter", "transformer_jit"},
    "checkpoints": {"presets", "transformer_jit", "adapter"},
    "hub": {"presets", "transformer_jit", "scheduling_jit", "pipeline_pixelrepa"},
}
# They travel with the weights.
PUBLISHED = ["transformer_jit", "scheduling_jit", "pipeline_pixelrepa"]


def imports(path: Path) -> set[str]:
    """Dotted names of everything a file imports anywhere in it, relative ones with their leading dot."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names |= {f"{module}{'' if module.endswith('.') else '.'}{alias.name}" for alias in node.names}
    return names


def own_modules(path: Path) -> set[str]:
    """The modules of the package a file imports; a name of a package's own `__init__` counts as that package's."""
    found = set()
    for name in imports(path):
        if name.startswith("."):
            level = len(name) - len(name.lstrip("."))
            parents = path.relative_to(PACKAGE).parts[:-level]
            name = ".".join((*parents, name.lstrip(".")))
        elif name.partition(".")[0] == PACKAGE.name:
            name = name.partition(".")[2]
        else:
            continue
        fits = [module for module in MODULES if f"{name}.".startswith(f"{module.replace('/', '.')}.")]
        rooms = {module.partition("/")[0] for module in MODULES if "/" in module}
        found |= set(fits) or {name.partition(".")[0] for room in rooms if name.partition(".")[0] == room}
    return found


@pytest.mark.parametrize("module", LOWER)
def test_a_lower_layer_imports_only_what_lies_below_it(module):
    assert own_modules(PACKAGE / f"{module}.py") <= LOWER[module]


def test_no_modules_of_the_package_import_each_other():
    graph = {module: own_modules(PACKAGE / f"{module}.py") for module in MODULES}
    for room in {module.partition("/")[0] for module in MODULES if "/" in module}:
        graph[room] = own_modules(PACKAGE / room / "__init__.py")
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises on a cycle


@pytest.mark.parametrize("module", PUBLISHED)
def test_a_published_file_stands_alone(module):
    names = imports(PACKAGE / f"{module}.py")
    assert not [name for name in names if name.startswith(".")]
    roots = {name.partition(".")[0] for name in names}
    assert roots - set(sys.stdlib_module_names) <= {"torch", "numpy", "PIL", "diffusers"}


@pytest.mark.parametrize("module", MODULES)
def test_the_package_does_not_import_the_scripts(module):
    assert not {name.partition(".")[0] for name in imports(PACKAGE / f"{module}.py")} & {"training", "pipelines"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_training_and_pipelines_import_the_package_and_never_each_other(script):
    room = Path(script).parts[0]
    roots = {name.lstrip(".").partition(".")[0] for name in imports(ROOT / script)}
    other = {"training": "pipelines", "pipelines": "training"}[room]
    stems = {Path(path).stem for path in SCRIPTS if path.startswith(f"{other}/")}
    # Names that are also a script of this room, or a library's, say nothing.
    stems -= {Path(path).stem for path in SCRIPTS if path.startswith(f"{room}/")} | {"evaluate"}
    assert not roots & {other, *stems}


@pytest.mark.parametrize("path", [*(f"src/pixelrepa_diffusers/{module}.py" for module in MODULES), *SCRIPTS])
def test_no_file_needs_einops_timm_or_torchvision(path):
    roots = {name.partition(".")[0] for name in imports(ROOT / path)}
    assert not roots & {"einops", "timm", "torchvision"}


def test_importing_the_package_imports_nothing_heavy():
    heavy = ["evaluate", "datasets", "matplotlib", "torchvision", "timm", "sklearn", "tensorboard", "wandb"]
    code = (
        "import sys\n"
        "from diffusers import DiffusionPipeline\n"
        "theirs = set(sys.modules)\n"
        "import pixelrepa_diffusers as package\n"
        "assert all(hasattr(package, name) for name in package.__all__)\n"
        "import pixelrepa_diffusers.metrics\n"
        f"print([name for name in {heavy} if name in set(sys.modules) - theirs])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
