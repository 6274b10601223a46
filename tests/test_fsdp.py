"""Models sharded by fully_shard, for real: two gloo processes on the CPU."""

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from networks import batch
from ranks import EPOCH, EPOCHS, RANKS, passed, smooth, spawn, whole_run
from torch.distributed.checkpoint import state_dict as of_parts
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import ocsfast

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-4),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=3e-3),
}


def options():
    return {"total_steps": EPOCHS * EPOCH}


def sharded(seed=0):
    """Two units and what is left: the root keeps its parameters gathered after a forward pass."""
    model = smooth(seed)
    families = ocsfast.group(model, batch(0)[0])
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in (model.conv2, model.fc1):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh), families


def attached(kind, seed=0):
    model, families = sharded(seed)
    optimizer = OPTIMIZERS[kind](model.parameters())
    pruner = ocsfast.attach(model, 0.5, optimizer=optimizer, families=families, **options())
    return model, optimizer, pruner


def values(model, optimizer):
    """Of weights and optimizer state, whole."""

    def whole(state):
        if isinstance(state, dict):
            return {key: whole(value) for key, value in state.items()}
        return state.full_tensor() if isinstance(state, DTensor) else state

    parts = states(model, optimizer)
    return whole({"model": dict(parts["model"]), "state": parts["optimizer"]["state"]})


def states(model, optimizer):
    return {
        "model": of_parts.get_model_state_dict(model),
        "optimizer": of_parts.get_optimizer_state_dict(model, optimizer),
    }


def save(folder, model, optimizer, pruner):
    dcp.save(states(model, optimizer), checkpoint_id=folder)
    if dist.get_rank() == 0:
        torch.save(pruner.state_dict(), f"{folder}/pruner.pt")


def load(folder, model, optimizer, pruner):
    pruner.load_state_dict(torch.load(f"{folder}/pruner.pt", weights_only=True))
    parts = states(model, optimizer)
    dcp.load(parts, checkpoint_id=folder)
    of_parts.set_model_state_dict(model, parts["model"])
    of_parts.set_optimizer_state_dict(model, optimizer, parts["optimizer"])


def evaluate(model):
    """It leaves the root's parameters gathered."""
    with torch.no_grad():
        model(batch(0)[0])


def trained(rank, folder):
    for kind in OPTIMIZERS:
        model, optimizer, pruner = attached(kind)
        parameters = list(model.parameters())
        saved = []

        def drive(kind=kind, model=model, optimizer=optimizer, pruner=pruner, saved=saved):
            evaluate(model)
            ocsfast.step(model, 0.5)
            everywhere = [None] * RANKS
            dist.all_gather_object(everywhere, (pruner.stage, pruner.mask.tolist()))
            assert everywhere[0] == everywhere[1]
            if pruner.stage != (saved[-1] if saved else None):  # a checkpoint at the start of each stage
                saved.append(pruner.stage)
                save(f"{folder}/{kind} {pruner.stage}", model, optimizer, pruner)
            return pruner

        masks = whole_run(model, optimizer, drive, rank)
        assert saved == ["observe", "sparsify", "pruned"]
        model.reshard()
        assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
        end = values(model, optimizer)
        torch.save((masks, end, pruner.t_sl, pruner.t_cut), f"{folder}/{kind}{rank}")

        for stage in saved:
            model, optimizer, pruner = attached(kind, seed=4)
            load(f"{folder}/{kind} {stage}", model, optimizer, pruner)
            assert pruner.stage == stage
            done = pruner.t_cut or len(pruner.history)
            whole_run(model, optimizer, lambda p=pruner: p.step() and None, rank, first=done)
            torch.testing.assert_close(values(model, optimizer), end, rtol=0, atol=0)


def test_two_ranks_equal_one_with_twice_the_batch(tmp_path):
    passed(tmp_path, spawn(trained, tmp_path))
    for kind, made in OPTIMIZERS.items():
        model = smooth()
        optimizer = made(model.parameters())
        pruner = ocsfast.attach(model, 0.5, optimizer=optimizer, example_inputs=batch(0)[0], **options())
        masks = whole_run(model, optimizer, lambda p=pruner: p.step() and p)
        print(kind, pruner.t_sl, pruner.t_cut)
        for rank in range(RANKS):
            theirs, end, *times = torch.load(tmp_path / f"{kind}{rank}")
            assert times == [pruner.t_sl, pruner.t_cut]
            assert all(torch.equal(a, b) for a, b in zip(masks, theirs, strict=True))
            torch.testing.assert_close(end, values(model, optimizer), rtol=1e-4, atol=1e-5)
