"""Vision transformers: sizes, what removing parts does, their recipe, and a one-cycle run of one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import ocsfast
from ocsfast.core.errors import ConfigError
from ocsfast.train.cli import choose_recipe, main, make_parser
from ocsfast.train.data.catalogue import load
from ocsfast.train.data.source import Request
from ocsfast.train.loop import count_parameters, evaluate, macs_per_sample
from ocsfast.train.models import TRANSFORMERS, build_model
from ocsfast.train.recipes import Recipe, learning_rate_factor, make_optimizer, make_scheduler, recipe
from ocsfast.train.vit import Attention, Mlp, VisionTransformer, patch_size

# The networks


@pytest.mark.parametrize(
    ("arch", "macs", "params"), [("deit_tiny", "1.3", "5.72"), ("deit_small", "4.6", "22.05")]
)
def test_published_sizes(arch: str, macs: str, params: str) -> None:
    model = build_model(arch, 1000, 3, 224)
    assert f"{macs_per_sample(model, (3, 224, 224)) / 1e9:.1f}" == macs
    assert f"{count_parameters(model) / 1e6:.2f}" == params


def test_names_and_shapes_are_timms() -> None:
    state = build_model("deit_tiny", 1000, 3, 224).state_dict()
    inside = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    modules = [f"blocks.{number}.{name}" for number in range(12) for name in inside]
    modules += ["patch_embed.proj", "norm", "head"]
    expected = {f"{name}.{kind}" for name in modules for kind in ("weight", "bias")}
    assert set(state) == {"cls_token", "pos_embed"} | expected
    assert state["pos_embed"].shape == (1, 197, 192)
    assert state["cls_token"].shape == (1, 1, 192)
    assert state["blocks.0.attn.qkv.weight"].shape == (576, 192)


@pytest.mark.parametrize("arch", TRANSFORMERS)
@pytest.mark.parametrize(("size", "channels", "tokens"), [(8, 1, 17), (28, 1, 50), (32, 3, 65)])
def test_forward_and_backward(arch: str, size: int, channels: int, tokens: int) -> None:
    model = build_model(arch, 7, channels, size)
    assert model.get_parameter("pos_embed").shape[1] == tokens
    logits = model(torch.randn(2, channels, size, size))
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_an_image_needs_whole_patches() -> None:
    assert [patch_size(size) for size in (8, 28, 32, 64, 224)] == [2, 4, 4, 4, 16]
    with pytest.raises(ConfigError, match=r"30 pixels.*patches of 4"):
        build_model("vit_tiny", 10, 3, 30)


def keep(module: nn.Module, name: str, axis: int, indices: torch.Tensor) -> None:
    """Cut one parameter of a module down to `indices` along one axis."""
    parameter = module.get_parameter(name)
    parameter.data = parameter.data.index_select(axis, indices)


@torch.no_grad()
def test_removed_heads_are_zeroed_heads() -> None:
    full, cut = Attention(32, 4).double(), Attention(32, 4).double()
    cut.load_state_dict(full.state_dict())
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    gone = torch.arange(8, 16)  # the second head
    full.proj.weight[:, gone] = 0

    kept = torch.tensor([index for index in range(32) if index not in gone])
    rows = torch.cat([kept + 32 * part for part in range(3)])
    for name, axis, indices in (
        ("qkv.weight", 0, rows),
        ("qkv.bias", 0, rows),
        ("proj.weight", 1, kept),
    ):
        keep(cut, name, axis, indices)
    cut.num_heads, cut.attn_dim = 3, 24
    torch.testing.assert_close(cut(x), full(x))


@torch.no_grad()
def test_removed_neurons_are_zeroed_neurons() -> None:
    full, cut = Mlp(8, 32).double(), Mlp(8, 32).double()
    cut.load_state_dict(full.state_dict())
    kept = torch.arange(0, 32, 3)
    gone = torch.ones(32, dtype=torch.bool).index_fill(0, kept, False)
    full.fc2.weight[:, gone] = 0
    for name, axis in (("fc1.weight", 0), ("fc1.bias", 0), ("fc2.weight", 1)):
        keep(cut, name, axis, kept)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(cut(x), full(x))


def test_a_narrower_residual_runs() -> None:
    model = VisionTransformer(width=32, heads=4, depth=2, classes=7, channels=1, size=8)
    kept = torch.arange(0, 32, 2)
    for name, parameter in list(model.named_parameters()):
        for axis in range(parameter.dim()):
            # Attention keeps its 32, in the rows of qkv and the columns of proj.
            inner = name.endswith("attn.proj.weight") and axis == 1
            if parameter.shape[axis] == 32 and not inner:
                keep(model, name, axis, kept)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.normalized_shape = (16,)
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 7)


# The recipe


def choose(arguments: list[str], arch: str = "vit_tiny") -> Recipe:
    return choose_recipe(make_parser().parse_args(arguments), arch)


def test_transformers_train_with_adamw() -> None:
    for arch in TRANSFORMERS:
        chosen = recipe("default", "digits", arch)
        assert (chosen.optimizer, chosen.lr, chosen.weight_decay) == ("adamw", 1e-3, 0.05)
    assert recipe("default", "digits", "resnet20").optimizer == "sgd"
    assert isinstance(make_optimizer(chosen, nn.Linear(1, 1)), torch.optim.AdamW)


def test_arguments_for_the_optimizer() -> None:
    given = choose(["--optimizer", "sgd", "--warmup", "0.2"])
    assert (given.optimizer, given.lr, given.warmup) == ("sgd", 0.1, 0.2)
    other = choose(["--optimizer", "adamw"], "resnet20")
    assert (other.optimizer, other.lr, other.warmup) == ("adamw", 1e-3, 0.1)
    assert choose(["--optimizer", "sgd", "--recipe", "paper-cifar"]).optimizer == "sgd"
    with pytest.raises(ConfigError, match="paper-cifar is SGD's"):
        choose(["--optimizer", "adamw", "--recipe", "paper-cifar"])
    for share in ("1", "-0.1", "nan"):
        with pytest.raises(ConfigError, match="warmup is"):
            choose(["--warmup", share])


def test_only_matrices_and_kernels_decay() -> None:
    model = build_model("vit_tiny", 10, 1, 8)
    decayed, others = make_optimizer(recipe("default", "digits", "vit_tiny"), model).param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.05, 0.0)
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    decaying, rest = (
        {name_of[id(parameter)] for parameter in group["params"]} for group in (decayed, others)
    )
    assert {name.split(".")[-2] for name in decaying} == {"qkv", "proj", "fc1", "fc2", "head"}
    assert {"cls_token", "pos_embed", "norm.weight", "head.bias"} <= rest
    assert decaying | rest == set(name_of.values())


def test_warm_up_then_cosine() -> None:
    chosen = choose(["--warmup", "0.2"])
    shares = {0.0: 0.0, 0.1: 0.5, 0.2: 1.0, 0.4: 0.5 + 0.5**1.5, 0.6: 0.5, 1.0: 0.0, 1.1: 0.0}
    for done, factor in shares.items():
        assert learning_rate_factor(chosen, done) == pytest.approx(factor)

    optimizer = make_optimizer(chosen, nn.Linear(1, 1))
    scheduler = make_scheduler(chosen, optimizer, 10)
    seen = []
    for _ in range(10):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    assert seen[0] == [0, 0]
    assert seen[1] == pytest.approx([5e-4, 5e-4])
    assert seen[2] == pytest.approx([1e-3, 1e-3])
    assert seen[6] == pytest.approx([5e-4, 5e-4])


# The whole program


def test_one_cycle(tmp_path: Path) -> None:
    arguments = ["--arch", "vit_tiny", "--subset", "128", "--batch-size", "64", "--epochs", "6"]
    assert main([*arguments, "--prune-only", "--ratio", "0.5", "--out", str(tmp_path)]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["recipe"]["optimizer"] == "adamw"
    assert summary["macs_removed"] >= 0.5
    assert 0 < summary["t_sl"] < summary["t_cut"] < 6
    assert summary["widths"]["blocks.0.attn.qkv"][0] == 4  # heads
    pruned = summary["one_cycle"]
    assert pruned["params"] < 0.6 * summary["params_before"]

    model = build_model("vit_tiny", 10, 1, 8)
    ocsfast.load(model, tmp_path / "model.safetensors")
    assert macs_per_sample(model, (1, 8, 8)) == summary["macs_after"]
    data = load("digits", Request(subset=128))
    assert evaluate(model, data.test, 64) == pytest.approx(pruned["accuracy"])
