"""What cannot be done with sharded models is refused on every rank, before anything changes."""

import pytest
import torch
from helpers.fully_sharded import OPTIMIZERS, attached, options, sharded, structure
from helpers.networks import batch, net
from helpers.ranks import RANKS, smooth, step
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import ocsfast
from ocsfast import CheckpointError, ConfigError, OcsfastError, StateError
from ocsfast.cut.shards import local_of

LINES = r"families = ocsfast\.group\(model, example_inputs\)\n *fully_shard\(model\)"


def refuse(said, model, error=StateError, ratio=0.5, **more):
    """`attach` says so, and no weight of the model has changed."""
    given = {"families": structure(), **options(), **more}
    if "optimizer" not in given:
        given["optimizer"] = OPTIMIZERS["SGD"](model.parameters())
    before = [local_of(p).clone() for p in model.parameters()]
    with pytest.raises(error, match=said):
        ocsfast.attach(model, ratio, **given)
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(local_of(parameter), old)


def ungrouped(rank, folder):
    model, _ = sharded()
    refuse(LINES, model, families=None)
    refuse(LINES, model, families=None, example_inputs=batch(0)[0])
    for call in (ocsfast.inspect, ocsfast.group):
        with pytest.raises(StateError, match=LINES):
            call(model, batch(0)[0])
    with pytest.raises(StateError, match=LINES):
        ocsfast.step(model, 0.5)
    with pytest.raises(CheckpointError, match="the model is sharded: gather"):
        ocsfast.save(model, f"{folder}/never")


def test_a_model_that_was_sharded_before_it_was_grouped_is_told_the_lines(ranks, tmp_path):
    ranks(ungrouped, tmp_path)


def arguments(rank):
    model, _ = sharded()
    refuse("ratio=0.999 cannot be reached", model, error=ConfigError, ratio=0.999)
    refuse("drifted apart: ratio of rank 1", model, ratio=0.4 + rank / 10)
    refuse("drifted apart: config of rank 1", model, tau=0.01 + rank / 100)
    own = ocsfast.optim.SGD(model.parameters(), lr=0.1)
    refuse(r"use torch\.optim\.SGD", model, optimizer=own)
    other = ocsfast.group(net(), batch(0)[0])
    said = r"of another model: bn1\.\w+ should have 8 indices along axis 0, here it is"
    refuse(said, model, families=other)
    for more in (
        {"ratio": 0.5 + rank},
        {"families": (structure(), other)[rank]},
        {"also": [None] * rank},
    ):
        said = "ratio|of another model|also=" if rank == 1 else "^rank 1 refused: "
        refuse(said, model, error=OcsfastError, **more)


def test_wrong_arguments_on_one_rank_or_all_are_refused(ranks):
    ranks(arguments)


def shardings(rank):
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
        refuse(said, shard(smooth()))


def test_other_shardings_than_rows_over_one_mesh_are_refused(ranks):
    ranks(shardings)


def cuts(rank):
    model, optimizer, pruner = attached("SGD")
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


def test_a_cut_without_synchronized_gradients_or_with_nan_is_refused(ranks):
    ranks(cuts)


def unreduced(rank):
    """Gradients that wait in another dtype than the parameters' are seen as well."""
    model, families = smooth(), structure()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = init_device_mesh("cpu", (RANKS,))
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    pruner = ocsfast.attach(model, 0.5, optimizer=optimizer, families=families, **options())
    step(model, optimizer, 0, rank)
    model.set_requires_gradient_sync(False)
    model(batch(0)[0]).float().sum().backward()
    with pytest.raises(StateError, match="gradients wait to be reduced"):
        pruner.cut()


def test_a_cut_while_gradients_wait_to_be_reduced_is_refused(ranks):
    ranks(unreduced)


def other_states(rank):
    """Ranks that load other states than each other say so, instead of waiting for each other."""
    model, optimizer, pruner = attached("SGD")
    states = [pruner.state_dict()]
    step(model, optimizer, 0, rank)
    pruner.cut()
    states.append(pruner.state_dict())
    model, _, pruner = attached("SGD", seed=3)
    with pytest.raises(StateError, match="drifted apart: the state's stage of rank 1"):
        pruner.load_state_dict(states[rank])
    assert pruner.stage == "observe"
    pruner.load_state_dict(states[1])
    assert pruner.stage == "pruned"


def test_ranks_that_load_other_states_are_refused(ranks):
    ranks(other_states)
