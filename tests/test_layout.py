"""Imports point downward: no two files import each other, and no two folders do."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("research", "launch", "experiments")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in (ROOT / package).rglob("*.py")
}


def _imports(path):
    """The modules of this project that a file imports anywhere: within functions, and for type checkers only, too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            # What is imported from a package may be a module of it or a name that it defines.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else str(node.module) for name in names]
        else:
            continue
        yield from (name for name in names if name in MODULES)


def _unit(module):
    """A folder counts as one: `research.training.loop` is part of `research.training`."""
    parts = module.split(".")
    return ".".join(parts[:2]) if len(parts) > 2 else module


def _graph(unit):
    graph = {}
    for module, path in MODULES.items():
        graph.setdefault(unit(module), set()).update({unit(name) for name in _imports(path)} - {unit(module)})
    return graph


@pytest.mark.parametrize("unit", [lambda module: module, _unit], ids=["files", "folders"])
def test_no_import_points_upward(unit):
    graph = _graph(unit)
    assert sum(map(len, graph.values())) > 100
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("research", {"research"}),
        ("launch", {"launch", "research"}),
        # An artifact runs without `research` but for the decoder, which imports nothing else of this project.
        ("launch.artifacts", {"research.data.decoding"}),
    ],
)
def test_a_package_imports_only_those_below_it(package, allowed):
    for module, path in MODULES.items():
        if module.startswith(f"{package}."):
            for name in _imports(path):
                known = {name, name.split(".")[0]} & allowed
                assert known or name.startswith(f"{package}."), f"{module} imports {name}"


def test_the_decoder_of_images_imports_nothing_of_this_project():
    assert not list(_imports(MODULES["research.data.decoding"]))
