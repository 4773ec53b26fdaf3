"""The rooms of the package: imports go one way and make no circle; imports in functions count too."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "sdcomp"
LEVELS = (
    {"errors"},
    {"files"},
    {"settings"},
    {"scenes"},
    {"model"},
    {"budgets", "checkpoints", "column_sweep", "moments"},
    {"quantization", "pruning"},
    {"training"},
    {"integer"},
    {"export"},
    {"saving"},
    {"evaluation"},
    {"study"},
)
"""From the bottom up. A room may import from itself and from lower levels."""
LEVEL = {room: height for height, rooms in enumerate(LEVELS) for room in rooms}
LATE_IMPORTS = {
    ("sdcomp.export.onnx", "onnxscript"): "of the extra deploy",
    ("sdcomp.export.openvino", "openvino"): "of the extra deploy",
    ("sdcomp.export.diffusers_pipeline", "diffusers"): "optional, and slow to import",
    ("sdcomp.model.files.hub", "huggingface_hub"): "only models by a hub name need it",
    ("sdcomp.quantization.calibration", "pandas"): "slow to import",
    ("sdcomp.quantization.describe", "pandas"): "slow to import",
}
"""Imports inside functions, with their reasons."""


def name(path: Path) -> str:
    """The dotted name of a module."""
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name(path): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def for_types_only(tree: ast.Module) -> set[ast.AST]:
    """The imports that only a type checker sees."""
    guards = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    return {inner for guard in guards for inner in ast.walk(guard)}


def imported(tree: ast.Module, types: bool) -> set[str]:
    """The modules of this package that a module imports."""
    left_out = set() if types else for_types_only(tree)
    found = set()
    for node in ast.walk(tree):
        if node in left_out:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sdcomp":
            parts = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= parts
            # `from sdcomp.model import UNet` runs the package's own file.
            if len(parts) < len(node.names):
                found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & MODULES.keys()
    return found


def test_every_module_stands_in_a_room():
    rooms = {module.split(".")[1] for module in MODULES if "." in module}
    assert rooms == LEVEL.keys()


def test_there_is_no_circle():
    graph = {module: imported(tree, types=True) - {module} for module, tree in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_arrow_runs_upward():
    upward = []
    for module, tree in MODULES.items():
        if module == "sdcomp":
            continue
        here = module.split(".")[1]
        for other in imported(tree, types=True):
            there = other.split(".")[1] if "." in other else None
            if there is None or (there != here and LEVEL[there] >= LEVEL[here]):
                upward.append(f"{module} -> {other}")
    assert upward == []


def test_imports_inside_functions_have_a_reason():
    late = set()
    for module, tree in MODULES.items():
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef):
                for node in ast.walk(function):
                    if isinstance(node, ast.ImportFrom):
                        late.add((module, node.module))
                    elif isinstance(node, ast.Import):
                        late |= {(module, alias.name) for alias in node.names}
    assert late == LATE_IMPORTS.keys()


def test_files_and_functions_can_be_read_in_one_sitting():
    long = []
    for path in sorted(PACKAGE.rglob("*.py")):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > 300:
            long.append(f"{path.name}: {lines} lines")
    for module, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60:
                long.append(f"{module}.{node.name}: {node.end_lineno - node.lineno + 1} lines")
    assert long == []
