"""Gated layers, norms and scales by hand, positions, mixers and experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.blocks.attention import FusedAttention
from helpers.blocks.parts import Case, Sequence, image, tokens


class Glu(nn.Module):
    def __init__(self, dim: int = 16, hidden: int = 12, how: str = "chunk") -> None:
        super().__init__()
        self.how = how
        self.hidden = hidden
        self.up = nn.Linear(dim, 2 * hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if self.how == "glu":
            return self.down(F.glu(x))
        if self.how == "slice":
            return self.down(F.silu(x[..., : self.hidden]) * x[..., self.hidden :])
        gate, x = x.chunk(2, dim=-1)
        return self.down(F.silu(gate) * x)


def glu() -> Case:
    return Case(Sequence(Glu(how="glu")), tokens(7))


def swiglu_chunk() -> Case:
    return Case(Sequence(Glu()), tokens(7))


def swiglu_slice() -> Case:
    return Case(Sequence(Glu(how="slice")), tokens(7))


class SwiGlu(nn.Module):
    def __init__(self, dim: int = 16, hidden: int = 12) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def swiglu() -> Case:
    return Case(Sequence(SwiGlu()), tokens(7))


class RmsNorm(nn.Module):
    """Llama's, by hand."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * x.to(dtype)


def rms_norm() -> Case:
    return Case(Sequence(nn.Sequential(RmsNorm(16), SwiGlu(), nn.RMSNorm(16))), tokens(7))


class LayerScale(nn.Module):
    def __init__(self, body: nn.Module, dim: int) -> None:
        super().__init__()
        self.body = body
        self.gamma = nn.Parameter(1e-1 * torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.gamma


def layer_scale() -> Case:
    mlp = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
    return Case(Sequence(LayerScale(mlp, 16)), tokens(7))


class Vit(nn.Module):
    """Patches, class token, learned positions."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, dim, 2, 2)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 17, dim) * 0.02)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = FusedAttention(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return self.head(self.norm(x)[:, 0])


def class_token() -> Case:
    return Case(Vit(), image())


class Mixer(nn.Module):
    """Mixes tokens and channels, the second through a gate."""

    def __init__(self, dim: int = 16, length: int = 6) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mix = nn.Sequential(nn.Linear(length, 10), nn.GELU(), nn.Linear(10, length))
        self.norm2 = nn.LayerNorm(dim)
        self.glu = Glu(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return x + self.glu(self.norm2(x))


def mixer() -> Case:
    return Case(Sequence(nn.Sequential(Mixer(), Mixer())), tokens(7))


class Experts(nn.Module):
    """A dense mixture: every expert's matrix in one stack."""

    def __init__(self, dim: int = 16, hidden: int = 10, experts: int = 3) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, experts)
        self.w1 = nn.Parameter(torch.randn(experts, dim, hidden) * dim**-0.5)
        self.w2 = nn.Parameter(torch.randn(experts, hidden, dim) * hidden**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        h = F.relu(torch.einsum("bnc,ech->bneh", x, self.w1))
        return (torch.einsum("bneh,ehc->bnec", h, self.w2) * weights[..., None]).sum(2)


def experts() -> Case:
    return Case(Sequence(Experts()), tokens(7))
