"""What a cut of a sharded model holds and moves: python bench/fsdp_memory.py

Two gloo processes on the CPU, six layers of 512, AdamW, half of the MACs; the first one tells, in MB.
"Live" are all tensors' memory, looked at before and after each step of the cut.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import ocsfast
from ocsfast.cut import shards as resharding


def live() -> int:
    """Bytes of all tensors in this process, each storage once."""
    tensors = (x for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter))
    storages = {s.data_ptr(): s.size() for s in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storages.values())


def held(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of this process's rows of weights, gradients and optimizer state."""
    states = (value for p in model.parameters() for value in optimizer.state[p].values())
    tensors = [*model.parameters(), *(p.grad for p in model.parameters()), *states]
    return sum(resharding.local_of(x).nbytes for x in tensors if isinstance(x, Tensor))


def watched(real: Callable[..., Any], seen: list[int]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        seen.append(live())
        result = real(*args, **kwargs)
        seen.append(live())
        return result

    return call


def measure(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    torch.manual_seed(0)
    layers = [layer for _ in range(6) for layer in (nn.Linear(512, 512), nn.ReLU())]
    model, x = nn.Sequential(*layers, nn.Linear(512, 8)), torch.randn(8, 512)
    families = ocsfast.group(model, x)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(model.parameters())
    pruner = ocsfast.attach(model, 0.5, optimizer=optimizer, families=families, total_steps=1000)
    for _ in range(2):
        model(x).sum().backward()
        optimizer.step()
    resharding.settle(model)
    gc.collect()
    before, seen, moved = (held(model, optimizer), live()), [], []
    exchange = dist.all_to_all_single

    def counted(received: Tensor, sent: Tensor, *args: Any, **kwargs: Any) -> Any:
        moved.append(received.nbytes + sent.nbytes)
        return exchange(received, sent, *args, **kwargs)

    dist.all_to_all_single = watched(counted, seen)
    for owner, name in ((resharding, "crop_shards"), (resharding.ShardedLayout, "place")):
        setattr(owner, name, watched(getattr(owner, name), seen))
    pruner.cut()
    gc.collect()
    if rank == 0:
        after = (held(model, optimizer), live())
        print(f"torch {torch.__version__}")
        for name, (of_model, of_all) in (("before", before), ("after", after)):
            print(
                f"{name}: {of_model / 1e6:.1f} of the model and its optimizer, {of_all / 1e6:.1f} live"
            )
        print(
            f"at most {max(seen) / 1e6:.1f} live; largest move {max(moved) / 1e6:.2f}, sent and received"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure, (folder,), nprocs=2)
