"""The cut of sharded models: as whole tensors would be cut, and whole or not at all."""

import copy

import pytest
import torch
import torch.distributed as dist
from helpers.fully_sharded import OPTIMIZERS, attached, options, sharded, structure, values
from helpers.planted import Planted, PlantedError, require_same
from helpers.ranks import RANKS, smooth, step
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.tensor import Shard, distribute_tensor

import ocsfast
from ocsfast import StateError
from ocsfast.cut import layout as slicing
from ocsfast.cut import removal as cut
from ocsfast.cut import shards as resharding
from ocsfast.cut.fsdp_records import records_of
from ocsfast.cut.layout import crop
from ocsfast.cut.shards import crop_shards, local_of


def cropped_as_whole_tensors(rank):
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


def test_shards_are_cropped_as_whole_tensors(ranks):
    ranks(cropped_as_whole_tensors)


def everything(model, optimizer, pruner):
    """All that a cut changes: copies of values, and the objects that hold them."""
    resharding.settle(model)
    records = records_of(model)
    values, objects = [], []
    for p in model.parameters():
        state, record = optimizer.state[p], vars(records[id(p)])
        held = (local_of(x).clone() for x in (p, p.grad, *state.values()))
        values += [*held, p.shape, p.stride(), sorted(record)]
        objects += [p, p.grad, p._local_tensor, p._spec, *state.values(), *record.values()]
    values += [cut.size_attributes(module) for module in model.modules()]
    values += [pruner.stage, pruner.steps, len(pruner.history), pruner.t_cut, pruner.mask]
    return values, objects


def failing(rank):
    """A failure planted at each step of the cut, on both ranks and on one; then none."""
    model, optimizer, pruner = attached("AdamW")
    for k in range(3):
        step(model, optimizer, k, rank)
    untouched, other, theirs = attached("AdamW")
    for k in range(3):
        step(untouched, other, k, rank)
    with pytest.MonkeyPatch.context() as patch:
        planted = Planted(
            patch,
            (resharding, "crop_shards"),
            (resharding, "alloc_storage"),
            (dist, "all_to_all_single"),
            (FSDPParam, "_init_sharded_param"),
            (FSDPParam, "reset_sharded_param"),
            (slicing, "replace_data"),
            (resharding, "_hold"),
            (cut, "set_size"),
            (cut, "announce"),
            (cut, "describes_itself"),
            (cut, "require_between_steps"),
        )
        theirs.cut()
        steps = list(planted.names)
        assert len(set(steps)) == 11
        before = everything(model, optimizer, pruner)
        for at, name in enumerate(steps):
            for failing in ((0, 1), (1,)):
                if failing == (1,) and name == "all_to_all_single":
                    continue  # the other rank is in it already
                planted.plant(at if rank in failing else None)
                said = "^planted in" if rank in failing else "^rank 1 refused: planted in"
                with pytest.raises((PlantedError, StateError), match=said):
                    pruner.cut()
                planted.plant(None)
                require_same(before, everything(model, optimizer, pruner))
    pruner.cut()
    for k in range(3, 6):
        step(model, optimizer, k, rank)
        step(untouched, other, k, rank)
    assert model.conv2.weight.shape[0] < 12
    torch.testing.assert_close(values(model, optimizer), values(untouched, other), rtol=0, atol=0)


def test_a_cut_that_fails_on_any_rank_is_undone_on_all(ranks):
    ranks(failing)


def unfit_torchs(rank):
    """What a torch lacks, or keeps besides, by name: at attach, before anything changes."""

    def attach(said, change):
        model, families = sharded()
        optimizer = OPTIMIZERS["SGD"](model.parameters())
        before = [local_of(p).clone() for p in model.parameters()]
        with pytest.MonkeyPatch.context() as patch:
            change(patch, model)
            with pytest.raises(StateError, match=said):
                ocsfast.attach(model, 0.5, optimizer=optimizer, families=families, **options())
        for p, old in zip(model.parameters(), before, strict=True):
            assert torch.equal(local_of(p), old)

    def record_of(model):
        return records_of(model)[id(model.conv2.weight)]

    methods = ("_init_sharded_param", "_init_sharded_post_forward_param_metadata", "reset_sharded_param")
    for name in (*methods, "_setattr_on_modules"):
        said = rf"fully_shard of torch {torch.__version__.split('+')[0]}.*FSDPParam\.{name} is not there"
        attach(said, lambda patch, model, name=name: patch.delattr(FSDPParam, name))
    for name in ("device", "mesh_info", "all_gather_outputs", "_module_info", "offload_to_cpu"):
        attach(
            rf"FSDPParam\.{name} is not there",
            lambda patch, model, name=name: patch.delattr(record_of(model), name),
        )
    state = smooth_state()
    groups = "_fsdp_param_groups" if "_fsdp_param_groups" in vars(state) else "_fsdp_param_group"
    attach(
        rf"FSDPState\.{groups} is not there",
        lambda patch, model: patch.delattr(model._get_fsdp_state(), groups),
    )
    attach(
        r"FSDPParam\.sharded_size is not what its parameter alone says",
        lambda patch, model: patch.setattr(record_of(model), "sharded_size", torch.Size([1])),
    )
    attach(
        "wants_more",
        lambda patch, model: patch.setattr(FSDPParam, "_init_sharded_param", lambda self, wants_more: 0),
    )


def smooth_state():
    model, _ = sharded()
    return model._get_fsdp_state()


def test_what_torch_lacks_or_keeps_besides_is_named_at_attach(ranks):
    ranks(unfit_torchs)


def odd_copies(rank):
    """Copies that the cut could not follow are refused at attach too."""
    model, families = sharded()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    columns = smooth()
    mesh = init_device_mesh("cpu", (RANKS,))
    fully_shard(
        columns, mesh=mesh, shard_placement_fn=lambda p: Shard(1) if p.shape[1:] == (48,) else None
    )
    with pytest.raises(StateError, match=r"fc1\.weight has the placements \(Shard\(dim=1\),\)"):
        ocsfast.attach(model, 0.5, optimizer=optimizer, families=families, also=[columns], **options())
    with pytest.raises(StateError, match="only rows over one dimension can be cut"):
        crop_shards(columns.fc1.weight, {0: torch.arange(4)})


def test_copies_that_the_cut_could_not_follow_are_refused(ranks):
    ranks(odd_copies)


def dtypes_of_gradients(rank):
    """What a user has said of them is kept by the parameter and by its record."""
    model, families = smooth(), structure()
    if not hasattr(model.conv2.weight, "_has_grad_dtype_override"):
        return  # torch 2.14 and older have none to keep
    model.conv2.weight.grad_dtype = torch.float64
    fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    pruner = ocsfast.attach(model, 0.5, optimizer=optimizer, families=families, **options())
    kept = ("_orig_param_uid", "_has_sharded_grad_dtype_override", "sharded_grad_dtype")
    record = records_of(model)[id(model.conv2.weight)]
    before = [copy.copy(getattr(record, name)) for name in kept]
    pruner.cut()
    assert [getattr(record, name) for name in kept] == before
    assert before[1:] == [True, torch.float64]
    assert model.conv2.weight.grad_dtype == torch.float64


def test_dtypes_that_a_user_gave_gradients_are_kept(ranks):
    ranks(dtypes_of_gradients)
