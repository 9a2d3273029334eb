"""Import rules: layers, self-contained remote code, nothing heavy at import."""

import ast
import graphlib
import sys
from pathlib import Path

import pytest
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

import pixelrepa_diffusers


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "pixelrepa_diffusers"
FILES = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
SCRIPTS = [path for folder in ("training", "pipelines") for path in sorted((ROOT / folder).glob("*.py"))]

# From the bottom up; every other module belongs to the bottom layer. Imports within a layer must be free of cycles.
LAYERS = ["adapter", "objective", "conversion hub", "sampling", "evaluation", "training", "commands"]


def layer(module: str) -> int:
    room = module.partition("/")[0]
    return next((number for number, rooms in enumerate(LAYERS, 1) if room in rooms.split()), 0)


def imports(path: Path, only_on_import: bool = False) -> set[str]:
    """
    Dotted names of all imports in a file, or of those that run when it is imported; relative imports become
    `pixelrepa_diffusers.…`.
    """
    names, nodes = set(), [ast.parse(path.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = path.relative_to(PACKAGE.parent).parts[: -node.level] if node.level else ()
            names |= {".".join(filter(None, (*parents, node.module, alias.name))) for alias in node.names}
        for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if not (only_on_import and (for_types or isinstance(node, ast.FunctionDef))):
            nodes.extend(ast.iter_child_nodes(node))
    return names


def own_imports(module: str) -> set[str]:
    """The modules of the package that a module imports."""
    found = set()
    for name in imports(FILES[module]):
        root, _, name = name.partition(".")
        if root != PACKAGE.name:
            continue
        name = pixelrepa_diffusers._MODULES.get(name, name).replace(".", "/")
        candidates = [name, name.rpartition("/")[0], f"{name}/__init__", f"{name.rpartition('/')[0]}/__init__"]
        found |= {next((module for module in candidates if module in FILES), "__init__")}
    return found - {"__init__", module}


def test_modules_import_only_from_lower_layers_and_without_cycles():
    graph = {module: own_imports(module) for module in FILES if module != "__init__"}
    assert [(one, other) for one in graph for other in graph[one] if layer(other) > layer(one)] == []
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises on a cycle


@pytest.mark.parametrize(
    ("module", "beside"),
    [
        *((module, set()) for module in ("transformer_jit", "scheduling_jit", "guidance_jit", "pipeline_pixelrepa")),
        ("modular_pixelrepa", {"pipeline_pixelrepa"}),
    ],
)
def test_remote_code_is_self_contained(module, beside):
    roots = {name.partition(".")[0] for name in imports(FILES[module])} - {PACKAGE.name}
    assert roots - set(sys.stdlib_module_names) <= {"torch", "numpy", "PIL", "diffusers"}
    assert own_imports(module) == beside


def test_no_file_imports_a_script_or_an_undeclared_dependency():
    scripts = {path.stem for path in SCRIPTS} - {"evaluate"}  # also a library
    for path in (*FILES.values(), *SCRIPTS):
        roots = {name.partition(".")[0] for name in imports(path)}
        assert not roots & {*scripts, "training", "pipelines", "einops", "timm", "torchvision"}, path


def test_importing_the_package_is_light_and_registers_its_classes():
    heavy = {"evaluate", "matplotlib", "torchvision", "timm", "sklearn", "tensorboard", "wandb", "gradio", "peft"}
    for module in FILES.keys() - {"evaluation/scores"}:
        roots = {name.partition(".")[0] for name in imports(FILES[module], only_on_import=True)}
        assert not roots & (heavy if layer(module) >= layer("training") else {*heavy, "datasets"}), module
    assert not [name for name in imports(FILES["__init__"], only_on_import=True) if name.startswith(PACKAGE.name)]
    assert set(LOADABLE_CLASSES[PACKAGE.name]) == {"ModelMixin", "SchedulerMixin"}
    assert all(hasattr(pixelrepa_diffusers, name) for name in pixelrepa_diffusers.__all__)
    assert set(pixelrepa_diffusers.__all__) <= set(dir(pixelrepa_diffusers))


def test_type_checkers_see_the_public_names():
    (block,) = [node for node in ast.parse(FILES["__init__"].read_text()).body if isinstance(node, ast.If)][:1]
    declared = {alias.asname: node.module for node in block.body for alias in node.names}
    assert declared == pixelrepa_diffusers._MODULES


def test_unknown_names_and_presets_are_refused():
    with pytest.raises(AttributeError, match="no attribute 'NoSuchName'"):
        _ = pixelrepa_diffusers.NoSuchName
    with pytest.raises(ValueError, match="Known presets: JiT-B/16"):
        pixelrepa_diffusers.get_preset("JiT-B")
