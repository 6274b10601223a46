"""The documentation: what it links and names exists, what it shows runs, and it builds as a site."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ocsfast
from ocsfast.grouping.rules.registry import RULES

ROOT = Path(__file__).resolve().parents[2]
BESIDE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md")
PAGES = [*BESIDE, *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```[ ]*$", re.DOTALL | re.MULTILINE)


@cache
def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def prose_of(page: str) -> str:
    """A page without its blocks of code."""
    return FENCE.sub("", text_of(page))


def python_blocks(page: str) -> list[str]:
    return [code for language, code in FENCE.findall(text_of(page)) if language == "python"]


# Links.


def slugs(page: str) -> set[str]:
    """The anchors of a page, as GitHub and the site make them of its headings."""
    headings = re.findall(r"^#+ (.*)$", prose_of(page), re.MULTILINE)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_anchors_resolve(page: str) -> None:
    broken = []
    for target, anchor in re.findall(r"\]\((?!\w+:)([^)\s#]*)(?:#([^)\s]*))?\)", prose_of(page)):
        there = (ROOT / page).parent / target if target else ROOT / page
        name = os.path.relpath(there, ROOT)
        if not there.is_file() or (anchor and anchor not in slugs(name)):
            broken.append(f"{target}#{anchor}")
    assert not broken


# What is named.

ROOMS = ("ocsfast", "csrc", "tests", "bench", "docs", "examples")


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page: str) -> None:
    named = re.findall(rf"(?<![\w/.-])((?:{'|'.join(ROOMS)})/[\w./-]+\w/?)(?![\w<*:])", text_of(page))
    assert [name for name in named if not (ROOT / name).exists()] == []


def resolve(dotted: str) -> None:
    """Import a module, or find a name in one; skips those of frameworks that are not installed.

    Raises:
        AttributeError, ModuleNotFoundError: there is no such thing.
    """
    module, rest = "ocsfast", dotted.split(".")[1:]
    thing: Any = ocsfast
    while rest:
        if hasattr(thing, rest[0]) and not isinstance(thing, type(ocsfast)):
            thing = getattr(thing, rest.pop(0))
            continue
        if hasattr(thing, rest[0]):
            thing = getattr(thing, rest[0])
        elif importlib.util.find_spec(f"{module}.{rest[0]}") is not None:
            try:
                thing = importlib.import_module(f"{module}.{rest[0]}")
            except ImportError:  # of its framework
                return
        else:
            raise AttributeError(f"{module} has no {rest[0]}")
        module = f"{module}.{rest.pop(0)}"


@pytest.mark.parametrize("page", PAGES)
def test_names_of_the_package_exist(page: str) -> None:
    missing = []
    for dotted in sorted(set(re.findall(r"(?<![\w./-])ocsfast(?:\.\w+)+", text_of(page)))):
        try:
            resolve(dotted)
        except (AttributeError, ModuleNotFoundError):
            missing.append(dotted)
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_targets_of_make_exist(page: str) -> None:
    targets = set(re.findall(r"^([\w-]+):", text_of("Makefile"), re.MULTILINE))
    inline = re.findall(r"`make ([\w-]+)", prose_of(page))
    shown = re.findall(r"^make ([\w-]+)", text_of(page), re.MULTILINE)
    assert {*inline, *shown} <= targets


def test_the_readme_is_short() -> None:
    read = re.sub(r"<!--.*?-->", "", text_of("README.md"))
    assert (
        sum(bool(re.search(r"\w", word)) for word in read.split()) <= 760
    )  # rules of tables are no words


def test_every_option_stands_on_its_page_with_its_default() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(.*?)` \| (.*) \|$", text_of("docs/options.md"), re.MULTILINE)
    told = {name: ast.literal_eval(default) for name, default, _ in rows}
    assert len(told) == len(rows)
    assert told == {field.name: field.default for field in fields(ocsfast.Config)}


def test_the_reference_has_every_public_name() -> None:
    page = text_of("docs/reference/ocsfast.md")
    named = set(re.findall(r"^::: ocsfast\.(\w+)$", page, re.MULTILINE))
    assert named | {"__version__", "detection", "optim"} == set(ocsfast.__all__)


def test_the_method_has_every_criterion() -> None:
    from ocsfast.core.criteria import CRITERIA

    assert set(re.findall(r'^\| `"(\w+)"`', text_of("docs/method.md"), re.MULTILINE)) == set(CRITERIA)


def test_every_room_has_its_floor_and_its_row() -> None:
    page = text_of("docs/architecture.md")
    rooms = {p.parent.name for p in (ROOT / "ocsfast").glob("*/__init__.py")}
    floors = re.search(r"^(info → train, .* → core)$", page, re.MULTILINE)
    assert floors
    assert set(re.findall(r"\w+", floors[1])) == {"info", *rooms}
    assert set(re.findall(r"^\| `ocsfast/(\w+)/` \|", page, re.MULTILINE)) == rooms


def test_the_examples_have_an_index() -> None:
    index = text_of("examples/README.md")
    for program in (ROOT / "examples").glob("*.py"):
        assert f"]({program.name})" in index
    for page in (ROOT / "docs" / "training").glob("*.md"):
        assert f"](../docs/training/{page.name})" in index


PINNED = (
    *("torch", "torchvision", "numpy", "safetensors", "transformers", "lightning", "accelerate", "timm"),
    *("torch-pruning", "pybind11", "setuptools"),
)


@pytest.mark.parametrize("package", PINNED)
def test_versions_are_those_of_the_constraints(package: str) -> None:
    pinned = re.search(rf"^{package}==(\S+)$", text_of("constraints.txt"), re.MULTILINE)
    assert pinned
    assert pinned[1] in text_of("docs/versions.md")


def test_hooks_before_a_commit_are_what_make_lint_runs() -> None:
    yaml = pytest.importorskip("yaml")
    hooks = yaml.safe_load(text_of(".pre-commit-config.yaml"))["repos"][0]["hooks"]
    lint = text_of("Makefile").split("\nlint: setup\n")[1].split("\n\n")[0]
    run = re.findall(r"\$\(BIN\)/([\w-]+)(?: (check|format))?", lint)
    before = sorted(hook["entry"].split("/")[-1].split()[0] for hook in hooks)
    assert before == sorted(tool for tool, _ in run)
    packages = {"lint-imports": "import-linter"}
    for tool in {packages.get(tool, tool) for tool, _ in run}:
        assert re.search(rf"^{tool}==", text_of("constraints.txt"), re.MULTILINE)


@pytest.mark.parametrize("template", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.md")), ids=str)
def test_templates_of_issues_have_a_head(template: Path) -> None:
    yaml = pytest.importorskip("yaml")
    head = yaml.safe_load(template.read_text().split("---\n")[1])
    assert {"name", "about", "labels"} <= head.keys()


# Private names of torch.

# Where texts with an underscore are names of operators, and what else is no name of torch's.
OPERATORS = tuple(
    f"grouping/{name}"
    for name in (
        "rules",
        "macs.py",
        "proof",
        "propagation.py",
        "operators.py",
        "trace/packed.py",
        "graph",
    )
)
OURS = {
    *(
        "_ocsfast_cut",
        "_functions",
        "_head",
        "_predictor",
        "_roi_pool",
        "_row",
        "_col",
        "_steps",
        "_hooks",
    ),
}
PRIVATE = re.compile(r"_[a-zA-Z]\w*")


def is_own(node: ast.Attribute) -> bool:
    """Whether it is an attribute of the object whose method this is."""
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def private_names() -> dict[str, str]:
    """Names with an underscore that the package reads and does not define itself, and a file of each."""
    trees = {p: ast.parse(p.read_text()) for p in (ROOT / "ocsfast").rglob("*.py")}
    own: set[str] = set()
    read: dict[str, str] = {}
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                own.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_own(node):
                own.add(node.attr)
    theirs = {*dir(nn.Module()), *dir(torch.Tensor)}
    for path, tree in trees.items():
        place = str(path.relative_to(ROOT / "ocsfast"))
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.Attribute):
                from_torch = node.attr in theirs and not is_own(node)
                names = [node.attr] if from_torch or node.attr not in own else []
            elif isinstance(node, ast.ImportFrom) and not str(node.module).startswith("ocsfast"):
                names = [*str(node.module).split("."), *(alias.name for alias in node.names)]
            elif isinstance(node, ast.Constant) and not place.startswith(OPERATORS):
                names = [node.value] if isinstance(node.value, str) and node.value not in OURS else []
            read |= {name: place for name in names if PRIVATE.fullmatch(name)}
    return read


def test_the_page_of_private_names_has_all_of_them_and_no_other() -> None:
    page = text_of("docs/private-names.md")
    before, _, behind = page.partition("## Names of operators")
    behind = behind[behind.index("\n## ") :]
    told = set(re.findall(r"(?<!\w)_[a-zA-Z]\w*", before + behind))
    assert told == private_names().keys()


# What is shown.

# Pages whose blocks other tests run: these.
RUN_BY = {
    "docs/detectors.md": "tests/integrations/test_detection.py",
    **{page: "tests/project/test_docs.py" for page in PAGES if page.startswith("docs/training/")},
}
# (page, number of the block): why it is not run anywhere.
SKIPPED: dict[tuple[str, int], str] = {}
SHOWN = [page for page in PAGES if python_blocks(page) and page not in RUN_BY]


@torch.library.custom_op("mylib::scale_channels", mutates_args=())
def scale_channels(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x * scale[:, None, None]


scale_channels.register_fake(lambda x, scale: torch.empty_like(x))


def surroundings(page: str) -> dict[str, Any]:
    """What a page takes for granted: a user's model that trains, and one batch for it."""
    if page != "docs/grouping.md":
        return {}
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(2, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).sum().backward()
    optimizer.step()
    return {"model": model, "x": x, "optimizer": optimizer}


@pytest.fixture
def rules_as_before() -> Iterator[None]:
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


@pytest.mark.parametrize("page", SHOWN)
def test_blocks_run(
    page: str, rules_as_before: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks(page)
    if "torchvision" in "".join(blocks):
        pytest.importorskip("torchvision")
    names = surroundings(page)
    for number, block in enumerate(blocks):
        if (page, number) not in SKIPPED:
            exec(compile(block, f"{page}, block {number}", "exec"), names)


def test_the_rule_of_the_page_on_grouping_is_right(rules_as_before: None) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 2, 3)
            self.scale = nn.Parameter(torch.rand(6))

        def forward(self, x: torch.Tensor) -> Any:
            return self.last(torch.ops.mylib.scale_channels(self.first(x), self.scale))

    x = torch.randn(2, 1, 8, 8)
    assert ocsfast.group(Net(), x).families == ()
    exec(python_blocks("docs/grouping.md")[0], {})
    (family,) = ocsfast.group(Net(), x).families
    assert family.size == 6


def test_pages_that_others_run_are_run_there() -> None:
    for page, test in RUN_BY.items():
        told = text_of(test)
        name = Path(page).name
        assert name in told or ('"docs" / "training"' in told and len(python_blocks(page)) == 1), page


# The site.


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    for package in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(package)
    site = tmp_path / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    for page in PAGES:
        name = "index.md" if page == "README.md" else page.removeprefix("docs/")
        parent = Path(name).parent / "index.html" if name.endswith("/README.md") else None
        assert (site / (parent or Path(name).with_suffix(".html"))).is_file(), page
    reference = (site / "reference" / "ocsfast.html").read_text()
    assert all(f'id="ocsfast.{name}"' in reference for name in ("step", "Config", "Pruner.cut"))
    # It is read without a network too: nothing is loaded from elsewhere.
    loaded = re.compile(r"<(?:script|link|img)[^>]+(?:src|href)=\"https?://")
    assert [page.name for page in site.rglob("*.html") if loaded.search(page.read_text())] == []
