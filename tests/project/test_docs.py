"""The scripts of docs/training, as they stand there, and resumed from the checkpoints they write."""

import ast
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers.processes import interpreter_with, run_script
from helpers.ranks import ABORTED
from safetensors.torch import load_file

DOCS = Path(__file__).parents[2] / "docs" / "training"
PRUNED = re.compile(r"pruned: ([\d,]+) of ([\d,]+) MACs")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "YOLO_OFFLINE": "1"}
NEEDED = {
    "ultralytics": ("ultralytics", "onnx", "onnxruntime"),
    "diffusion": ("diffusers", "accelerate"),
}


def write_script(folder, name):
    """The first Python block of a page, as a script in a folder."""
    block = re.search(r"```python\n(.*?)```", (DOCS / f"{name}.md").read_text(), re.DOTALL)
    (folder / "script.py").write_text(block[1])
    return block[1]


def imports_of(script):
    """Its import statements."""
    found = (node for node in ast.parse(script).body if isinstance(node, (ast.Import, ast.ImportFrom)))
    return "\n".join(map(ast.unparse, found))


def run(folder, *words, by=None):
    """Run the script in a folder; what it printed."""
    for _ in range(3):
        done = run_script(folder, *words, environment=ENVIRONMENT, by=by)
        if ABORTED not in done.stderr:
            break
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def reached(printed):
    """Every script says what it came to: the ratio, met."""
    found = PRUNED.search(printed)
    assert found, printed
    cost, dense = (int(number.replace(",", "")) for number in found.groups())
    assert 2 * cost <= dense
    return cost


def same(a, b):
    one, other = load_file(a), load_file(b)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", sorted(page.stem for page in DOCS.glob("*.md")))
def test_every_page_runs(name, tmp_path):
    if name in RESUMED:
        pytest.skip("it runs in the tests of resuming")
    if name == "cuda-graphs" and not torch.cuda.is_available():
        pytest.skip("it needs a GPU; without one it runs in the tests of the clock")
    missing = [package for package in NEEDED.get(name, ()) if find_spec(package) is None]
    if missing:
        pytest.skip(f"it needs {', '.join(missing)}")
    write_script(tmp_path, name)
    reached(run(tmp_path))


def transformers(folder, epoch):
    for checkpoint in folder.glob("runs/bert/checkpoint-*"):
        if int(checkpoint.name.split("-")[1]) > epoch * 16:  # steps an epoch
            shutil.rmtree(checkpoint)
    return ["--resume"], "runs/bert/pruned.safetensors"


def lightning(folder, epoch):
    return [f"runs/digits/epoch={epoch - 1}.ckpt"], "runs/digits/pruned.safetensors"


def accelerate(folder, epoch):
    for checkpoint in folder.glob("runs/accelerate/checkpoints/checkpoint_*"):
        if int(checkpoint.name.split("_")[1]) >= epoch:
            shutil.rmtree(checkpoint)
    return ["--resume", str(epoch - 1)], "runs/accelerate/pruned.safetensors"


def timm(folder, epoch):
    return ["--resume", str(epoch)], "runs/timm/pruned.safetensors"


RESUMED = {f.__name__: f for f in (transformers, lightning, accelerate, timm)}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_ends_with_the_same_bits(name, tmp_path):
    pytest.importorskip(name)
    script = write_script(tmp_path, name)
    with interpreter_with(imports_of(script)) as once:  # the framework is imported once for three runs
        cost = reached(run(tmp_path, by=once))
        for late in (7, 3):  # after the cut, before it; the later checkpoints go
            words, result = RESUMED[name](tmp_path, late)
            whole = shutil.copy(tmp_path / result, tmp_path / "whole")
            assert reached(run(tmp_path, *words, by=once)) == cost
            assert same(tmp_path / result, whole), f"resumed after epoch {late}"


def test_lightning_on_two_processes(tmp_path):
    pytest.importorskip("lightning")
    write_script(tmp_path, "lightning")
    printed = run(tmp_path, "--ddp")
    assert len(set(PRUNED.findall(printed))) == 1  # both say the same
    reached(printed)
