"""How fine one can cut: a language model whose code ties heads and width, as nanoGPT's does."""

import logging

import pytest
import torch
from helpers.networks import Net, batch, sgd
from torch import nn
from torch.nn import functional as F

import ocsfast


class Attention(nn.Module):
    def __init__(self, n_embd, n_head):
        super().__init__()
        self.c_attn = nn.Linear(n_embd, 3 * n_embd)
        self.c_proj = nn.Linear(n_embd, n_embd)
        self.n_head, self.n_embd = n_head, n_embd

    def forward(self, x):
        B, T, C = x.size()
        parts = self.c_attn(x).split(self.n_embd, dim=2)
        q, k, v = (p.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for p in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))


class Block(nn.Module):
    def __init__(self, n_embd, n_head):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
        self.attn = Attention(n_embd, n_head)
        self.c_fc, self.c_proj = nn.Linear(n_embd, 4 * n_embd), nn.Linear(4 * n_embd, n_embd)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.c_proj(F.gelu(self.c_fc(self.ln_2(x))))


class GPT(nn.Module):
    def __init__(self, n_embd=48, n_head=6, n_layer=2, vocab=65, block=16):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, n_embd), nn.Embedding(block, n_embd)
        self.h = nn.ModuleList(Block(n_embd, n_head) for _ in range(n_layer))
        self.ln_f, self.lm_head = nn.LayerNorm(n_embd), nn.Linear(n_embd, vocab, bias=False)

    def forward(self, tokens):
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


X = torch.zeros(2, 16, dtype=torch.long)


def gpt():
    torch.manual_seed(0)
    return GPT()


def test_what_a_group_takes():
    model = gpt()
    dense = ocsfast.inspect(model, X, 0.5, give_back=False)
    families = ocsfast.group(model, X)
    assert [f.size for f in families.families] == [6, 192, 192]
    for facts, family in zip(dense.families, families.families, strict=True):
        small = gpt()
        pruned = torch.zeros(families.num_groups, dtype=torch.bool)
        pruned[family.first] = True
        ocsfast.cut_model(small, families, pruned)
        assert facts.step == (dense.macs - ocsfast.inspect(small, X).macs) / dense.macs
    assert dense.overshoot == (dense.macs // 2 - dense.macs_left) / dense.macs
    assert dense.overshoot > 0.05
    text = str(dense)
    assert "a group" in text.splitlines()[0]
    assert f"; {100 * dense.overshoot:.1f} % more goes than asked for" in text
    freed = ocsfast.inspect(ocsfast.as_graph(model, X), X, 0.5)  # the way out that is named
    assert freed.overshoot < 0.02
    assert max(f.step for f in freed.families) < 0.05
    assert ocsfast.inspect(model, X).overshoot is None


def test_what_a_group_takes_of_a_model_that_was_cut():
    """It is a share of the dense cost still, and no more than it was."""
    model, x = Net(), batch(0)[0]
    before = ocsfast.inspect(model, x).families
    ocsfast.attach(model, 0.5, optimizer=sgd(model), example_inputs=x).cut()
    after = ocsfast.inspect(model, x, again=True).families
    assert [f.name for f in after] == [f.name for f in before]
    assert all(0 < now.step <= then.step for now, then in zip(after, before, strict=True))


@pytest.mark.parametrize("uniform", [False, True])
def test_finer_groups_stay_beside_a_coarse_one(uniform):
    """All neurons that may go do, and then a head of all layers, which takes more than is missing."""
    model, options = gpt(), {"uniform": uniform}
    less = ocsfast.inspect(model, X, 0.5, give_back=False, **options)
    more = ocsfast.inspect(model, X, 0.58, give_back=False, **options)
    assert less.macs_left == more.macs_left  # what lies between them cannot be asked for
    assert [f.kept for f in less.families] == [5, 48, 48]  # neurons at their limit
    found = ocsfast.inspect(model, X, 0.5, **options)
    assert found.families[0].kept == 5
    assert min(f.kept for f in found.families[1:]) > 75
    finest = min(f.step for f in found.families) * (2 if uniform else 1)
    assert 0 <= found.overshoot < finest
    assert found.macs_left <= found.macs // 2


def test_a_coarse_cut_is_warned_of(caplog):
    model = gpt()
    optimizer = torch.optim.AdamW(model.parameters())
    # Nothing finer may go, which could stay for what the last head took.
    run = {"kinds": ("head", "width"), "example_inputs": X, "total_steps": 9}
    with caplog.at_level(logging.WARNING, logger="ocsfast"):
        report = ocsfast.attach(model, 0.5, optimizer=optimizer, **run).cut()
    over = (report.cost_dense // 2 - report.cost_at_cut) / report.cost_dense
    step = ocsfast.inspect(gpt(), X).families[0].step
    (said,) = [r.getMessage() for r in caplog.records if "more than asked for" in r.getMessage()]
    assert said == (
        f"the cut takes {100 * over:.3g} % of the cost more than asked for: one group of wte (a head in "
        f"8 layers) is {100 * step:.1f} % of the dense cost. It may be finer with "
        "ocsfast.as_graph(model, x), or a head count of its own in each layer"
    )


@pytest.mark.parametrize("widths", [(8, 12, 10), (40, 60, 50)])
def test_narrow_layers_are_coarse_and_wide_ones_are_not(widths, caplog):
    torch.manual_seed(0)
    model, here = Net(widths), {"example_inputs": batch(0)[0], "target": "params", "total_steps": 9}
    here["give_back"] = False  # with it, other layers' groups stay for what the last one took
    report = ocsfast.attach(model, 0.3, optimizer=sgd(model), **here).cut()
    over = 0.7 - report.cost_at_cut / report.cost_dense
    assert (over > 0.02) == (widths[0] == 8)
    assert ("more than asked for: one group of conv1 (a channel in 1 layer)" in caplog.text) == (
        over > 0.02
    )
    assert "finer" not in caplog.text  # there is nothing to untie
