"""Imports run one way, nothing unpickles or evaluates, and the command line starts light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("cluster", "orchestrator", "workers")
FORBIDDEN = {
    "workers": {"ray", "cluster", "orchestrator"},
    "cluster": {"workers", "orchestrator", "torch", "transformers", "peft", "datasets"},
    "orchestrator": {"ray"},  # through `cluster` alone
}
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
UNPICKLING = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), name_of(path))


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """Full names of the modules a file imports, inside functions too, with their lines."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: relative import"
            yield node.module or "", node.lineno
        elif isinstance(node, ast.Call) and called(node) in ("import_module", "__import__"):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant):
                    yield str(argument.value), node.lineno


def called(node: ast.Call) -> str:
    """`torch.load` for `torch.load(…)`, `?.load` for `get().load(…)`."""
    parts, function = [], node.func
    while isinstance(function, ast.Attribute):
        parts.append(function.attr)
        function = function.value
    parts.append(function.id if isinstance(function, ast.Name) else "?")
    return ".".join(reversed(parts))


def test_there_is_something_to_check():
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(package):
    wrong = [
        f"{name_of(path)}:{line} imports {module}"
        for path in FILES
        if path.is_relative_to(ROOT / package)
        for module, line in imported(path)
        if module.split(".")[0] in FORBIDDEN[package]
    ]
    assert not wrong, "\n".join(wrong)


def test_the_driver_names_its_target_by_path_and_the_target_exists():
    """The one arrow imports do not show: what a lease is asked to call."""
    from importlib import import_module

    from orchestrator.driver.loop import TARGET
    from workers.stages import STAGES

    module, _, function = TARGET.partition(":")
    assert callable(getattr(import_module(module), function))
    assert all(stage.module.startswith("workers.stages.") for stage in STAGES.values())


def test_nothing_is_unpickled_or_evaluated():
    wrong = []
    for path in FILES:
        wrong += [
            f"{name_of(path)}:{line} imports {module}"
            for module, line in imported(path)
            if module.split(".")[0] in UNPICKLING
        ]
        for node in ast.walk(parsed(path)):
            if not isinstance(node, ast.Call):
                continue
            name = called(node)
            place = f"{name_of(path)}:{node.lineno}"
            if name in ("eval", "exec", "torch.load", "yaml.load", "yaml.unsafe_load", "os.system"):
                wrong.append(f"{place} calls {name}")
            if name.rpartition(".")[2] in ("read_pickle", "to_pickle"):
                wrong.append(f"{place} calls {name}")
            for keyword in node.keywords:
                value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                if (keyword.arg, value) in {
                    ("weights_only", False),
                    ("allow_pickle", True),
                    ("shell", True),
                }:
                    wrong.append(f"{place} says {keyword.arg}={value}")
    assert not wrong, "\n".join(wrong)


def test_every_module_says_what_it_is():
    silent = [
        name_of(path) for path in FILES if not (ast.get_docstring(parsed(path)) or "").strip()
    ]
    assert not silent, f"no module docstring: {', '.join(silent)}"


def test_help_answers_without_the_heavy_libraries():
    script = """
import sys
from typer.main import get_command
from orchestrator.cli import app
command = get_command(app)
for arguments in [["--help"]] + [[name, "--help"] for name in command.commands]:
    assert command.main(arguments, prog_name="layersweep", standalone_mode=False) in (0, None)
heavy = {"torch", "transformers", "peft", "ray", "datasets", "pandas", "plotly", "matplotlib"}
heavy &= set(sys.modules)
print("heavy:", ",".join(sorted(heavy)))
"""
    answer = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert "Usage: layersweep" in answer.stdout
    assert answer.stdout.splitlines()[-1] == "heavy: "


def test_stages_can_be_looked_up_without_torch():
    script = "import sys, workers.stages, workers.config; print('torch' in sys.modules)"
    answer = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert answer.stdout.strip() == "False"
