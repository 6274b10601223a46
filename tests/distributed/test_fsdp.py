"""Models sharded by fully_shard, for real: two gloo processes train and cut as one would."""

import weakref

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers.fully_sharded import OPTIMIZERS, attached, options, sharded, states, structure, values
from helpers.networks import EPOCH, batch
from helpers.ranks import RANKS, same_everywhere, smooth, step, whole_run
from torch import nn
from torch.distributed.checkpoint import state_dict as of_parts
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import ocsfast
from ocsfast.cut.shards import local_of


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


def trained(rank, folder, kind):
    """A whole run, and runs that go on from its checkpoints; with AdamW from one, as SGD tries each."""
    model, optimizer, pruner = attached(kind)
    parameters = list(model.parameters())
    saved = []

    def drive():
        evaluate(model)
        ocsfast.step(model, 0.5)
        same_everywhere((pruner.stage, pruner.mask.tolist()))
        if pruner.stage != (saved[-1] if saved else None):  # a checkpoint at the start of each stage
            saved.append(pruner.stage)
            save(f"{folder}/{pruner.stage}", model, optimizer, pruner)
        return pruner

    masks = whole_run(model, optimizer, drive, rank)
    assert saved == ["observe", "sparsify", "pruned"]
    model.reshard()
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    end = values(model, optimizer)
    torch.save((masks, end, pruner.t_sl, pruner.t_cut), f"{folder}/rank{rank}")

    for stage in saved if kind == "SGD" else saved[1:2]:
        model, optimizer, pruner = attached(kind, seed=4)
        load(f"{folder}/{stage}", model, optimizer, pruner)
        assert pruner.stage == stage
        done = pruner.steps // EPOCH
        whole_run(model, optimizer, lambda p=pruner: p.step() and None, rank, first=done)
        torch.testing.assert_close(values(model, optimizer), end, rtol=0, atol=0)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_two_ranks_equal_one_with_twice_the_batch(kind, ranks, tmp_path):
    ranks(trained, tmp_path, kind)
    model = smooth()
    optimizer = OPTIMIZERS[kind](model.parameters())
    pruner = ocsfast.attach(model, 0.5, optimizer=optimizer, families=structure(), **options())
    masks = whole_run(model, optimizer, lambda: pruner.step() and pruner)
    for rank in range(RANKS):
        theirs, end, *times = torch.load(tmp_path / f"rank{rank}")
        assert times == [pruner.t_sl, pruner.t_cut]
        assert all(torch.equal(a, b) for a, b in zip(masks, theirs, strict=True))
        torch.testing.assert_close(end, values(model, optimizer), rtol=1e-4, atol=1e-5)


def worth(weight, grad, state):
    return weight.abs() * grad.abs()


def as_one_process(rank):
    """Criteria of each kind, and what is kept through a cut: gradients, hooks, references, copies."""
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


def test_a_sharded_cut_is_that_of_one_process(ranks):
    ranks(as_one_process)


def in_low_precision(rank):
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


def test_a_run_in_mixed_precision_is_cut(ranks):
    ranks(in_low_precision)


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


def sent_and_held(rank):
    """A check sends little, and a cut never holds more than a rank's own rows."""
    torch.manual_seed(0)
    model = Wide()
    x = torch.randn(8, 512)
    families = ocsfast.group(model, x)
    model = fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
    optimizer = torch.optim.AdamW(model.parameters())
    pruner = ocsfast.attach(
        model, 0.5, optimizer=optimizer, families=families, total_steps=1000, check_every="call"
    )
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


def test_a_check_sends_little_and_a_cut_holds_no_whole_parameter(ranks):
    ranks(sent_and_held)
