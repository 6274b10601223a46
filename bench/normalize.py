"""What each `Config.normalize` prunes of a small vision transformer trained on the digits.

python bench/normalize.py [--ratio 0.5] [--epochs 15]
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

import ocsfast
from ocsfast.train.models import build_model

KINDS = ("head", "neuron", "width")


def trained(epochs: int) -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    y = torch.tensor(digits.target)
    model = build_model("vit_tiny", 10, 1, x.shape[-1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(128):
            cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model, x[:2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--epochs", type=int, default=15)
    chosen = parser.parse_args()
    model, x = trained(chosen.epochs)
    print(f"share kept at ratio {chosen.ratio:g}, by kind; of neurons layer by layer")
    print(f"normalize | {' | '.join(KINDS)} | layers | M parameters")
    for normalize in ("none", "kind", "isomorphic"):
        found = ocsfast.inspect(model, x, chosen.ratio, normalize=normalize)
        shares = []
        for kind in KINDS:
            own = [f for f in found.families if f.kind == kind]
            shares.append(f"{sum(f.kept or 0 for f in own) / sum(f.groups for f in own):.2f}")
        layers = " ".join(
            f"{(f.kept or 0) / f.groups:.2f}" for f in found.families if f.kind == "neuron"
        )
        print(
            f"{normalize} | {' | '.join(shares)} | {layers} | {(found.parameters_left or 0) / 1e6:.3f}"
        )


if __name__ == "__main__":
    main()
