"""Who may import whom: the rooms of model/ keep their doors. Read from the source, so late imports count too."""

import ast

import pytest

from conftest import ROOT

# Room -> rooms it must not import from. "core": the files that lie directly in model/.
FORBIDDEN = {
    "core": {"data", "training", "inference", "evaluation", "export", "demo"},
    "data": {"training"},
    "inference": {"training"},
    "evaluation": {"training", "demo"},
    "export": {"data", "training", "inference", "evaluation", "demo"},
}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted(ROOT.glob("model/**/*.py"))
    if path.name != "__init__.py"
}


def imported_modules(path):
    """Names of all that a source file imports, anywhere in it, those of this project with their full path."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = f"model.{node.module}" if node.level else node.module
            names |= {f"{module}.{alias.name}" for alias in node.names} | {module}
    return names


IMPORTS = {name: imported_modules(path) for name, path in MODULES.items()}


def room(module):
    parts = module.split(".")
    return parts[1] if len(parts) == 3 else "core"


@pytest.mark.parametrize("module", MODULES)
def test_doors_between_rooms(module):
    rooms = {room(other) for other in IMPORTS[module] & MODULES.keys()}
    assert not rooms & FORBIDDEN.get(room(module), set())


@pytest.mark.parametrize("module", MODULES)
def test_only_the_scripts_and_cli_know_argparse(module):
    assert not {"argparse", "model.cli"} & IMPORTS[module] or module == "model.cli"


@pytest.mark.parametrize("module", MODULES)
def test_no_circle(module):
    waiting, reached = [module], set()
    while waiting:
        for other in IMPORTS[waiting.pop()] & MODULES.keys() - reached:
            reached.add(other)
            waiting.append(other)
    assert module not in reached


def test_two_levels_and_empty_init_files():
    assert all(name.count(".") <= 2 for name in MODULES)
    assert all(not path.read_bytes() for path in ROOT.glob("model/**/__init__.py"))


def test_model_and_configuration_stand_alone():
    """A Hugging Face folder carries just these two files."""
    assert IMPORTS["model.model"] & MODULES.keys() == {"model.LMConfig"}
    assert not IMPORTS["model.LMConfig"] & MODULES.keys()


def test_tests_mirror_the_rooms():
    rooms = {path.parent.name for path in ROOT.glob("model/*/*.py")}
    assert {path.name for path in ROOT.glob("tests/*/") if any(path.glob("test_*.py"))} <= rooms
