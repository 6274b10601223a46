"""Killed at random moments and resumed, a run ends with the same bits."""

import os
import random
import signal

import pytest
import torch
from killed import run


def in_a_process(folder, until=None):
    """Run in a fork, which starts at once: how it ended, and the number of moments if it did."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            os.write(write, str(run(folder, until)).encode())
            os._exit(0)
        except BaseException as error:
            os.write(write, repr(error).encode())
            os._exit(1)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


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
def test_any_moment(points, tmp_path):
    (tmp_path / "whole").mkdir()
    code, said = in_a_process(tmp_path / "whole")
    assert code == 0, said
    moments = int(said)
    expected = bits(tmp_path / "whole")
    assert expected["pruner"]["progress"]["stage"] == "pruned"
    chosen = random.Random(points).sample(range(1, moments + 1), min(points, moments))
    for until in chosen:
        folder = tmp_path / str(until)
        folder.mkdir()
        code, said = in_a_process(folder, until)
        assert code == -signal.SIGKILL, said
        code, said = in_a_process(folder)
        assert code == 0, said
        assert equal(bits(folder), expected), f"killed at moment {until} of {moments}"
