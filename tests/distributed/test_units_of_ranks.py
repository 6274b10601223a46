"""round_to="auto" where ranks see other weights, or other processors: rank 0 says the multiple."""

import torch
from helpers.fully_sharded import OPTIMIZERS, sharded
from helpers.networks import sgd
from helpers.ranks import same_everywhere
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ocsfast

X = torch.randn(2, 16)


def attached_before_the_wrap(rank):
    """By the weights of before, the ranks would have 1 and 2."""
    torch.manual_seed(rank)
    layers = (nn.Linear(16, 40), nn.ReLU(), nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 16))
    model = nn.Sequential(*layers)
    optimizer = sgd(model)
    pruner = ocsfast.attach(
        model, 0.2, optimizer=optimizer, example_inputs=X, total_steps=100, round_to="auto"
    )
    ddp = DistributedDataParallel(model)
    for _ in range(2):
        ddp(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    pruner.step()
    model[0].weight.requires_grad_(False)  # which looks for a finer multiple, on all ranks
    report = pruner.cut()
    same_everywhere((report.kept, report.cost, [p.shape for p in model.parameters()]))


def test_ranks_that_attach_before_the_wrap_cut_the_same(ranks):
    ranks(attached_before_the_wrap)


def on_another_processor(rank):
    torch.backends.cpu.get_cpu_capability = lambda: ("AVX512", "AVX2")[rank]
    model, families = sharded()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    pruner = ocsfast.attach(
        model, 0.5, optimizer=optimizer, families=families, total_steps=40, round_to="auto"
    )
    same_everywhere((pruner.state_dict()["multiple"], pruner.cut().kept))


def test_ranks_of_a_sharded_model_on_other_processors_have_one_multiple(ranks):
    ranks(on_another_processor)
