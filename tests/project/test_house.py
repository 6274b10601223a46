"""The house rules that a machine can check: sizes, public docstrings, examples, what a room imports."""

from __future__ import annotations

import ast
import dataclasses
import doctest
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import ocsfast
from ocsfast import optim
from ocsfast.integrations import detection
from ocsfast.ops import extension

ROOT = Path(__file__).resolve().parents[2]
LINES, FUNCTION_LINES, ROOT_ENTRIES = 400, 60, 13
# What one call of a table gives: nothing to take apart.
TABLES = {"tests/helpers/blocks", "bench/zoo", "tests/emulated/torch"}


def sources(*suffixes: str) -> Iterator[Path]:
    """Every source of the project, as the working tree has it."""
    for folder in ("ocsfast", "csrc", "tests", "bench", "examples"):
        for suffix in suffixes:
            yield from sorted((ROOT / folder).rglob(f"*{suffix}"))
    if ".py" in suffixes:
        yield from (ROOT / "setup.py", ROOT / "build_backend.py")


def is_table(path: Path) -> bool:
    return any(str(path.relative_to(ROOT)).startswith(table) for table in TABLES)


def test_no_file_is_longer_than_a_sitting() -> None:
    suffixes = (".py", ".h", ".cpp", ".cu", ".cuh")
    long = {
        str(path.relative_to(ROOT)): count
        for path in sources(*suffixes)
        if (count := len(path.read_text().splitlines())) > LINES and not is_table(path)
    }
    assert not long


def test_no_function_is_longer_than_a_screen() -> None:
    long = {}
    for path in sources(".py"):
        if is_table(path):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                # A docstring is read apart from the code.
                spoken = ast.get_docstring(node, clean=False)
                count = (node.end_lineno or 0) - node.lineno + 1
                count -= len(spoken.splitlines()) if spoken else 0
                if count > FUNCTION_LINES:
                    long[f"{path.relative_to(ROOT)}:{node.name}"] = count
    assert not long


def test_no_c_function_is_longer_than_a_screen() -> None:
    """clang-format puts the brace that ends a function of a namespace into the first column."""
    long = {}
    for path in sources(".h", ".cpp", ".cu", ".cuh"):
        start, inside = 0, False
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if not start and re.match(r"[\w\[].*\(", line):
                start, inside = number, False
            inside = inside or line.endswith("{")
            if start and (line.startswith("}") or (not inside and line.endswith(";"))):
                if number - start + 1 > FUNCTION_LINES:
                    long[f"{path.relative_to(ROOT)}:{start}"] = number - start + 1
                start = 0
    assert not long


def test_the_root_of_the_package_is_short() -> None:
    ours = [
        path.name
        for path in (ROOT / "ocsfast").iterdir()
        if path.name not in ("__pycache__", "__init__.py", "py.typed")
    ]
    assert len(ours) <= ROOT_ENTRIES, sorted(ours)


def test_rooms_import_only_what_is_below_them() -> None:
    pytest.importorskip("importlinter")
    code = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports())"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def public() -> dict[str, object]:
    """Every public object by its name."""
    named = {name: getattr(ocsfast, name) for name in ocsfast.__all__}
    named |= {f"optim.{name}": getattr(optim, name) for name in optim.__all__}
    named["detection.forward"] = detection.forward
    return {
        name: value
        for name, value in named.items()
        if not isinstance(value, str) and not inspect.ismodule(value)
    }


ERRORS = {
    name for name, value in public().items() if inspect.isclass(value) and issubclass(value, Exception)
}


@pytest.mark.parametrize("name", sorted(public()))
def test_a_public_object_says_what_it_is(name: str) -> None:
    value = public()[name]
    text = inspect.getdoc(value) or ""
    assert text, name
    if name in ERRORS:
        return
    assert ">>>" in text, f"{name} has no example"
    assert "as for `" not in text.replace("as for `torch.optim", "").replace("as for `step`, or", ""), (
        name
    )
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            assert re.search(rf"^ +{field.name}: ", text, re.MULTILINE), f"{name}.{field.name}"
    elif inspect.isfunction(value):
        for parameter in inspect.signature(value).parameters:
            assert re.search(rf"^ .*\b{parameter}\b.*:", text, re.MULTILINE), f"{name}({parameter})"


@pytest.mark.parametrize("name", sorted(set(public()) - ERRORS))
def test_its_example_runs(name: str) -> None:
    value = public()[name]
    finder = doctest.DocTestFinder(recurse=False)
    known = {"torch": torch, "ocsfast": ocsfast, value.__name__: value}  # type: ignore[attr-defined]
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    runner = doctest.DocTestRunner(optionflags=flags)
    for example in finder.find(value, name, globs=dict(known)):
        said: list[str] = []
        runner.run(example, out=said.append)
        assert not runner.failures, "".join(said)


def test_info_says_what_was_built() -> None:
    from ocsfast import info

    found = info.facts()
    assert found["ocsfast"] == ocsfast.__version__ == extension.build_info()["version"]
    assert {"torch", "extension", "instruction set"} <= set(found)
