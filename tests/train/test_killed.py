"""Killed at random moments and resumed, a run ends with the same bits."""

import multiprocessing
import random
import signal

import pytest
import torch
from helpers.killed import run

# Forked from a process that has done nothing but import: autograd's threads, which other tests leave
# behind, do not survive a fork.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["torch", "killed"])


def tell(folder, until, pipe):
    torch.set_num_threads(1)
    pipe.send(run(folder, until))


def in_a_process(folder, until=None):
    """How a run in a process of its own ended, and the number of moments if it did."""
    read, write = processes.Pipe(duplex=False)
    child = processes.Process(target=tell, args=(folder, until, write))
    child.start()
    write.close()
    try:
        moments = read.recv()
    except EOFError:
        moments = None
    child.join()
    return child.exitcode, moments


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
    code, moments = in_a_process(tmp_path / "whole")
    assert code == 0
    expected = bits(tmp_path / "whole")
    assert expected["pruner"]["progress"]["stage"] == "pruned"
    chosen = random.Random(points).sample(range(1, moments + 1), min(points, moments))
    for until in chosen:
        folder = tmp_path / str(until)
        folder.mkdir()
        code, _ = in_a_process(folder, until)
        assert code == -signal.SIGKILL
        code, _ = in_a_process(folder)
        assert code == 0
        assert equal(bits(folder), expected), f"killed at moment {until} of {moments}"
