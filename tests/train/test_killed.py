"""Killed at random moments and resumed, a run ends with the same bits."""

import random
import signal

import pytest
import torch
from helpers.killed import run
from helpers.processes import interpreter


def tell(folder, until):
    torch.set_num_threads(1)
    moments = run(folder, until)
    (folder / "moments").write_text(str(moments))


def in_a_process(folder, until=None):
    """How a run in a process of its own ended."""
    return interpreter().start(tell, folder, until).code()


def bits(folder):
    """Everything that the run ended with: weights, optimizer, scheduler, the pruner's numbers."""
    state = torch.load(folder / "end.pt", weights_only=True)
    for report in state["pruner"]["progress"]["history"]:
        del report["seconds"]
    return state


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.mark.parametrize("points", [6, pytest.param(100, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_at_any_moment_ends_with_the_same_bits(points, tmp_path):
    (tmp_path / "whole").mkdir()
    assert in_a_process(tmp_path / "whole") == 0
    moments = int((tmp_path / "whole" / "moments").read_text())
    expected = bits(tmp_path / "whole")
    assert expected["pruner"]["progress"]["stage"] == "pruned"
    chosen = random.Random(points).sample(range(1, moments + 1), min(points, moments))
    for until in chosen:
        folder = tmp_path / str(until)
        folder.mkdir()
        assert in_a_process(folder, until) == -signal.SIGKILL
        assert in_a_process(folder) == 0
        assert equal(bits(folder), expected), f"killed at moment {until} of {moments}"
