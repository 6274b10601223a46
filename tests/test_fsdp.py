"""Models sharded by fully_shard, for real: two gloo processes on the CPU."""

import torch
from networks import batch, sgd
from ranks import EPOCH, EPOCHS, RANKS, passed, smooth, spawn, whole_run
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import ocsfast


def options():
    return {"total_steps": EPOCHS * EPOCH}


def sharded(seed=0):
    model = smooth(seed)
    families = ocsfast.group(model, batch(0)[0])
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in (model.conv2, model.fc1):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh), families


def whole_state(model):
    return {name: value.full_tensor() for name, value in model.state_dict().items()}


def trained(rank, folder):
    model, families = sharded()
    optimizer = sgd(model)
    pruner = ocsfast.attach(
        model, 0.5, optimizer=optimizer, families=families, deadline=99, max_residual=1e-9, **options()
    )

    def drive():
        ocsfast.step(model, 0.5)
        return pruner

    masks = whole_run(model, optimizer, drive, rank)
    torch.save((masks, whole_state(model), pruner.stage), f"{folder}/rank{rank}")


def test_two(tmp_path):
    passed(tmp_path, spawn(trained, tmp_path))
    model = smooth()
    optimizer = sgd(model)
    pruner = ocsfast.attach(
        model,
        0.5,
        optimizer=optimizer,
        example_inputs=batch(0)[0],
        deadline=99,
        max_residual=1e-9,
        **options(),
    )

    def drive():
        pruner.step()
        return pruner

    masks = whole_run(model, optimizer, drive)
    print(pruner.history[-1], pruner.t_sl)
    for rank in range(RANKS):
        theirs, state, stage = torch.load(tmp_path / f"rank{rank}")
        assert stage == "sparsify"
        assert all(torch.equal(a, b) for a, b in zip(masks, theirs, strict=True))
        for key, value in model.state_dict().items():
            torch.testing.assert_close(state[key], value, rtol=1e-4, atol=1e-5)
