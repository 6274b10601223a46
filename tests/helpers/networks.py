"""Small networks, data and loops for tests of the state machine."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from ocsfast import Pruner, StepReport
from ocsfast.optim import SGD, AdamW

BATCH = 8


class Net(nn.Module):
    """Two convolutions with batch norm, flattened into two linear layers: three families."""

    def __init__(self, widths: tuple[int, int, int] = (8, 12, 10)) -> None:
        super().__init__()
        a, b, c = widths
        self.conv1 = nn.Conv2d(3, a, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(a)
        self.conv2 = nn.Conv2d(a, b, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(b)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.fc1 = nn.Linear(b * 4, c)
        self.fc2 = nn.Linear(c, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.pool(F.relu(self.bn2(self.conv2(x))))
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


def batch(seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, 3, 8, 8, generator=generator, dtype=dtype)
    return x, torch.randint(0, 5, (BATCH,), generator=generator)


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def sgd(model: nn.Module, lr: float = 0.05) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def train(model: nn.Module, optimizer: Optimizer, steps: int, first: int = 0) -> None:
    """`steps` ordinary training steps on made-up data."""
    dtype = next(p.dtype for p in model.parameters())
    for k in range(first, first + steps):
        x, y = batch(k, dtype)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


EPOCH = 5  # steps


def epochs(
    model: nn.Module, optimizer: Optimizer, pruner: Pruner, count: int, first: int = 0
) -> list[StepReport]:
    """Train for so many epochs, and call the pruner after each: its reports."""
    reports = []
    for e in range(first, first + count):
        train(model, optimizer, EPOCH, first=e * EPOCH)
        reports.append(pruner.step())
    return reports


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "ocsfast SGD": lambda m: SGD(m.parameters(), lr=0.05, momentum=0.9, nesterov=True),
    "ocsfast AdamW": lambda m: AdamW(m.parameters(), lr=1e-3),
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9, nesterov=True),
    "SGD plain": lambda m: torch.optim.SGD(m.parameters(), lr=0.05),
    "Adam": lambda m: torch.optim.Adam(m.parameters(), lr=1e-3, amsgrad=True),
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3),
    "RMSprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=1e-3, momentum=0.9, centered=True),
    "NAdam": lambda m: torch.optim.NAdam(m.parameters(), lr=1e-3),
    "Adagrad": lambda m: torch.optim.Adagrad(m.parameters(), lr=1e-2),
}
