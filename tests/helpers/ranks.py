"""Two gloo processes on the CPU, and a run whose batches they share."""

import os
import socket
import sys
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers.networks import BATCH, EPOCH, Net, batch
from torch import nn
from torch.nn import functional as F

# Where DistributedDataParallel has been used, torch 2.14 and 2.15 leave gloo's threads running after
# destroy_process_group, and now and then a process dies of that as its interpreter ends.
ABORTED = "terminate called without an active exception"
EPOCHS = 14
RANKS = 2


class Smooth(Net):
    """Without batch norm, so that two halves of a batch make the whole."""

    def __init__(self):
        super().__init__()
        self.bn1 = self.bn2 = nn.Identity()


def smooth(seed=0):
    torch.manual_seed(seed)
    return Smooth()


def spawn(worker, folder, *args):
    """Run worker(rank, folder, *args) in two processes; what they put into files is their result."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    processes = [
        context.Process(target=_enter, args=(worker, rank, str(port), str(folder), *args))
        for rank in range(RANKS)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(180)
        if process.is_alive():
            process.kill()
            pytest.fail("a rank hangs")
    return [process.exitcode for process in processes]


def _enter(worker, rank, port, folder, *args):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    try:
        worker(rank, folder, *args)
    except Exception:
        with open(f"{folder}/error{rank}", "w") as file:
            file.write(traceback.format_exc())
        raise
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # without the interpreter's end: see ABORTED


def passed(folder, codes):
    errors = [file.read_text() for file in sorted(folder.glob("error*"))]
    assert codes == [0] * RANKS, "\n".join(errors)


def step(model, optimizer, k, rank=None):
    """One training step; a rank takes its half of the batch."""
    x, y = batch(k)
    if rank is not None:
        half = slice(rank * BATCH // RANKS, (rank + 1) * BATCH // RANKS)
        x, y = x[half], y[half]
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def whole_run(model, optimizer, drive, rank=None, first=0, last=EPOCHS):
    masks = []
    for e in range(first, last):
        for k in range(EPOCH):
            step(model, optimizer, e * EPOCH + k, rank)
        pruner = drive()
        masks.append(None if pruner is None or pruner.mask is None else pruner.mask.clone())
    return masks
