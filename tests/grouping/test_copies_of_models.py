"""The proof's copies of a model: what is copied, what is shared, what need not be a leaf."""

from __future__ import annotations

import copy
import sys
import threading

import pytest
import torch
from helpers.untouched import unchanged
from torch import nn
from torch.nn import functional as F

import ocsfast


def test_a_trainer_behind_a_hook_is_not_copied():
    class Trainer:
        def __init__(self, model):
            self.model, self.rows = model, torch.zeros(2**23)
            self.index = {k: (k,) for k in range(20_000)}
            self.images = [torch.zeros(2**20) for _ in range(40)]
            self.last = None

        def see(self, module, args, output):
            self.last = output

        def __deepcopy__(self, memo):
            copied_to = Trainer.__new__(Trainer)
            for name, value in vars(self).items():
                setattr(copied_to, name, copy.deepcopy(value, memo))
            assert copied_to.rows is self.rows
            assert copied_to.index is self.index
            shared = [a is b for a, b in zip(copied_to.images, self.images, strict=True)]
            assert sum(shared) > 20
            return copied_to

    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    trainer = Trainer(model)
    model[0].register_forward_hook(trainer.see)
    found = ocsfast.inspect(model, torch.randn(2, 8), outputs=("0",))
    assert found.families[0].groups == 16
    assert trainer.last is None


def test_a_tensor_that_is_no_leaf_does_not_stop_the_proof():
    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.o, self.kept = nn.Linear(8, 16), nn.Linear(16, 3), {"deep": [None]}

        def forward(self, x):
            x = F.relu(self.a(x))
            self.kept["deep"][0] = x
            return self.o(x)

    model, x = Keeping(), torch.randn(2, 8)
    model(x).sum().backward()
    with pytest.raises(RuntimeError, match="graph leaves"):
        copy.deepcopy(model)
    assert ocsfast.inspect(model, x, outputs=("0",)).families[0].groups == 16


def test_what_refuses_to_be_copied_is_shared_in_the_proof():
    class Locked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.o = nn.Linear(8, 16), nn.Linear(16, 3)
            self.lock, self.math, self.rows = threading.Lock(), torch, (k for k in range(3))
            self.held = {"file": sys.__stderr__}

        def forward(self, x):
            with self.lock:
                return self.o(self.math.relu(self.a(x)))

    model, x = Locked(), torch.randn(2, 8)
    assert ocsfast.inspect(model, x).families[0].groups == 16
    assert not unchanged(model, lambda: ocsfast.inspect(model, x))
