"""Models sharded by fully_shard, for real: two gloo processes on the CPU."""

import functools
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers.networks import batch, net
from helpers.ranks import EPOCH, EPOCHS, RANKS, passed, smooth, spawn, step, whole_run
from torch import nn
from torch.distributed.checkpoint import state_dict as of_parts
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import ocsfast
from ocsfast import CheckpointError, ConfigError, OcsfastError, StateError
from ocsfast.cut.layout import crop
from ocsfast.cut.shards import crop_shards, local_of

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-4),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=3e-3),
}


def options():
    return {"total_steps": EPOCHS * EPOCH}


@functools.cache
def structure():
    return ocsfast.group(smooth(), batch(0)[0])


def sharded(seed=0):
    """Two units and what is left: the root keeps its parameters gathered after a forward pass."""
    model, families = smooth(seed), structure()
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

        for stage in saved if kind == "SGD" else saved[1:2]:
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
        for rank in range(RANKS):
            theirs, end, *times = torch.load(tmp_path / f"{kind}{rank}")
            assert times == [pruner.t_sl, pruner.t_cut]
            assert all(torch.equal(a, b) for a, b in zip(masks, theirs, strict=True))
            torch.testing.assert_close(end, values(model, optimizer), rtol=1e-4, atol=1e-5)


def refused(rank, folder):
    """On every rank, and before anything changes."""
    model, families = sharded()
    optimizer = OPTIMIZERS["SGD"](model.parameters())

    def attach(said, model=model, error=StateError, ratio=0.5, **more):
        given = {"optimizer": optimizer, "families": families, **options(), **more}
        before = [local_of(p).clone() for p in model.parameters()]
        with pytest.raises(error, match=said):
            ocsfast.attach(model, ratio, **given)
        for parameter, old in zip(model.parameters(), before, strict=True):
            assert torch.equal(local_of(parameter), old)

    lines = r"families = ocsfast\.group\(model, example_inputs\)\n *fully_shard\(model\)"
    attach(lines, families=None)
    attach(lines, families=None, example_inputs=batch(0)[0])
    for call in (ocsfast.inspect, ocsfast.group):
        with pytest.raises(StateError, match=lines):
            call(model, batch(0)[0])
    with pytest.raises(StateError, match=lines):
        ocsfast.step(model, 0.5)
    with pytest.raises(CheckpointError, match="the model is sharded: gather"):
        ocsfast.save(model, f"{folder}/never")
    attach("ratio=0.999 cannot be reached", error=ConfigError, ratio=0.999)
    attach("drifted apart: ratio of rank 1", ratio=0.4 + rank / 10)
    attach("drifted apart: config of rank 1", tau=0.01 + rank / 100)
    own = ocsfast.optim.SGD(model.parameters(), lr=0.1)
    attach(r"use torch\.optim\.SGD", optimizer=own)
    other = ocsfast.group(net(), batch(0)[0])
    attach(r"of another model: bn1\.\w+ should have 8 indices along axis 0, here it is", families=other)

    for more in (
        {"ratio": 0.5 + rank},
        {"families": (structure(), other)[rank]},
        {"also": [None] * rank},
    ):
        attach(
            "ratio|of another model|also=" if rank == 1 else "^rank 1 refused: ",
            error=OcsfastError,
            **more,
        )

    line = init_device_mesh("cpu", (RANKS,))
    plane = init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("copies", "rows"))
    columns = {"shard_placement_fn": lambda p: Shard(1) if p.dim() == 2 else None}
    offload = {"offload_policy": CPUOffloadPolicy(pin_memory=False)}
    for said, shard in (
        ("a mesh of 2 dimensions", lambda m: fully_shard(m, mesh=plane)),
        (r"Shard\(dim=1\)", lambda m: fully_shard(m, mesh=line, **columns)),
        ("not sharded, while others are", lambda m: fully_shard(m.fc2, mesh=line) and m),
        ("without CPUOffloadPolicy", lambda m: fully_shard(m, mesh=line, **offload)),
        ("as of tensor parallel", lambda m: parallelize_module(m, line, {"fc1": ColwiseParallel()})),
    ):
        odd = shard(smooth())
        attach(said, odd, optimizer=OPTIMIZERS["SGD"](odd.parameters()))

    pruner = ocsfast.attach(model, 0.5, optimizer=optimizer, families=families, **options())
    model.set_requires_gradient_sync(False)
    step(model, optimizer, 0, rank)
    with pytest.raises(StateError, match=r"set_requires_gradient_sync\(False\)"):
        pruner.cut()
    model.set_requires_gradient_sync(True)
    step(model, optimizer, 0, rank)
    if rank == 1:
        local_of(model.fc1.weight)[0, 0] = torch.nan
    with pytest.raises(StateError, match=r"fc1\.weight holds NaN"):
        pruner.cut()
    assert pruner.stage == "observe"
    assert model.conv2.weight.shape[0] == 12


def cropped_as_whole_tensors(rank, folder):
    mesh = init_device_mesh("cpu", (RANKS,))

    def spread(tensor):
        return distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None)

    torch.manual_seed(0)
    for shape in ((7, 5), (1, 4, 3), (2,), (9,), (6, 4, 3, 3)):
        for dtype in (torch.float32, torch.bfloat16, torch.int64):
            whole = (torch.rand(shape) * 100).to(dtype)
            for share in (0.1, 0.5, 0.9):
                kept = {}
                for axis in range(min(2, len(shape))):
                    stays = torch.rand(shape[axis]) < share
                    stays[-1] = True
                    kept[axis] = stays.nonzero().flatten()
                dist.broadcast_object_list(box := [kept])
                split, move = crop_shards(
                    distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None), box[0]
                )
                move.run()
                again = distribute_tensor(crop(whole, box[0]), mesh, [Shard(0)], src_data_rank=None)
                assert split.shape == again.shape
                assert split.stride() == again.stride()
                assert torch.equal(local_of(split), local_of(again))


def as_one_process(rank, folder):
    """Criteria of each kind, and what is kept through a cut: gradients, hooks, references, copies."""

    def worth(weight, grad, state):
        return weight.abs() * grad.abs()

    for criterion in ("linf", "obd_state", worth):
        made = {"criterion": criterion, **options()}
        kind = "AdamW" if criterion == "obd_state" else "SGD"
        alone = smooth()
        mine = OPTIMIZERS[kind](alone.parameters())
        ours = ocsfast.attach(alone, 0.5, optimizer=mine, families=structure(), **made)
        model, families = sharded()
        optimizer = OPTIMIZERS[kind](model.parameters())
        copy, _ = sharded(seed=1)
        theirs = ocsfast.attach(model, 0.5, optimizer=optimizer, families=families, also=[copy], **made)
        for k in range(3):
            step(alone, mine, k)
            step(model, optimizer, k, rank)
        watched = weakref.ref(model.fc1.weight)
        alive = local_of(model.fc1.weight).sum() + model.fc2.weight.square().sum()
        ours.cut()
        theirs.cut()
        torch.testing.assert_close(theirs.scores, ours.scores, rtol=1e-4, atol=1e-6)
        assert torch.equal(theirs.mask, ours.mask)
        assert watched() is model.fc1.weight
        for sharded_one, one in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(sharded_one.grad.full_tensor(), one.grad, rtol=1e-4, atol=1e-6)
        step(copy, torch.optim.SGD(copy.parameters(), lr=0.1), 0, rank)
        shapes = [parameter.shape for parameter in model.parameters()]
        assert [parameter.shape for parameter in copy.parameters()] == shapes
        for k in range(3, 6):
            step(alone, mine, k)
            step(model, optimizer, k, rank)
        torch.testing.assert_close(values(model, optimizer), values(alone, mine), rtol=1e-4, atol=1e-5)
        del alive


def in_low_precision(rank, folder):
    """Computed in bfloat16, kept in float32, gathered from the forward pass to the backward pass."""
    model, families = smooth(), structure()
    mesh = init_device_mesh("cpu", (RANKS,))
    for part, output in ((model.conv2, None), (model, torch.float32)):
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=output)
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    ocsfast.attach(model, 0.5, optimizer=optimizer, families=families, **options())
    whole_run(model, optimizer, lambda: ocsfast.step(model, 0.5) and None, rank)
    assert model.conv2.out_channels < 12
    assert model.fc1.weight.dtype == torch.float32
    assert all(bool(p.full_tensor().isfinite().all()) for p in model.parameters())


class Wide(nn.Module):
    """Weights large enough for what is said to be small beside them."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(512, 512) for _ in range(6))
        self.head = nn.Linear(512, 8)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).relu()
        return self.head(x)


def traffic(work):
    """Bytes that collectives are given while `work` runs: of each."""
    sizes = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", "all_to_all_single", "broadcast", "all_gather"):
            real = getattr(dist.distributed_c10d, name)

            def counted(*args, real=real, **kwargs):
                given = [entry for a in args for entry in (a if isinstance(a, list) else [a])]
                tensors = [entry for entry in given if isinstance(entry, torch.Tensor)]
                sizes.append(sum(t.numel() * t.element_size() for t in tensors))
                return real(*args, **kwargs)

            for module in (dist, dist.distributed_c10d):
                patch.setattr(module, name, counted)
        work()
    return sizes


def small(rank, folder):
    """A check sends little, and a cut never holds more than a rank's own rows."""
    torch.manual_seed(0)
    model = Wide()
    x = torch.randn(8, 512)
    families = ocsfast.group(model, x)
    model = fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
    optimizer = torch.optim.AdamW(model.parameters())
    pruner = ocsfast.attach(model, 0.5, optimizer=optimizer, families=families, total_steps=1000)
    for _ in range(2):
        model(x).sum().backward()
        optimizer.step()

    def held():
        return sum(local_of(p).numel() * 4 for p in model.parameters())

    whole = sum(p.numel() * 4 for p in model.parameters())
    largest = max(p.numel() * 4 for p in model.parameters())
    check = traffic(pruner.step)
    assert len(check) > 2
    assert sum(check) < whole / 100
    before, cut = held(), traffic(pruner.cut)
    assert held() < 0.6 * before
    assert max(cut) <= largest  # what a rank sends and gets of one tensor


def the_rest(rank, folder):
    refused(rank, folder)
    cropped_as_whole_tensors(rank, folder)
    as_one_process(rank, folder)
    in_low_precision(rank, folder)
    small(rank, folder)


def test_what_is_refused_and_what_is_kept(tmp_path):
    passed(tmp_path, spawn(the_rest, tmp_path))
