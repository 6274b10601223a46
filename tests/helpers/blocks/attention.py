"""Attention as it is written: fused, separate, with fewer heads of keys, eager, by einsum."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.blocks.parts import Case, Classifier, Sequence, image, tokens


def multihead_attention() -> Case:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(16, 4, batch_first=True)
            self.fc = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.attn(x, x, x, need_weights=False)[0])

    return Case(Sequence(Block()), tokens(7))


def multihead_attention_kdim() -> Case:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.memory = nn.Linear(16, 10)
            self.values = nn.Linear(16, 6)
            self.attn = nn.MultiheadAttention(16, 4, kdim=10, vdim=6, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attn(x, self.memory(x), self.values(x))[0]

    return Case(Sequence(Block()), tokens(7))


def transformer_encoder_layer() -> Case:
    return Case(Sequence(nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)), tokens(7))


class FusedAttention(nn.Module):
    """timm's: one matrix for q, k and v, heads by attributes."""

    def __init__(self, dim: int = 16, num_heads: int = 4, scaled: bool = True, bias: Any = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.scaled = scaled
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if self.scaled:
            x = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        else:
            attn = (q * self.scale) @ k.transpose(-2, -1)
            x = attn.softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).reshape(b, n, self.num_heads * self.head_dim))


def fused_attention() -> Case:
    return Case(Sequence(FusedAttention()), tokens(7))


def fused_attention_eager() -> Case:
    return Case(Sequence(FusedAttention(scaled=False)), tokens(7))


def fused_attention_computed() -> Case:
    """Heads computed from the width at hand (timm's older code): only whole widths would do."""

    class Computed(nn.Module):
        def __init__(self, dim: int = 16, num_heads: int = 4) -> None:
            super().__init__()
            self.num_heads = num_heads
            self.qkv = nn.Linear(dim, 3 * dim)
            self.proj = nn.Linear(dim, dim)

        def forward(self, x: Tensor) -> Tensor:
            B, N, C = x.shape
            qkv = (
                self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
            )
            q, k, v = qkv[0], qkv[1], qkv[2]
            x = F.scaled_dot_product_attention(q, k, v)
            return self.proj(x.transpose(1, 2).reshape(B, N, C))

    return Case(Sequence(Computed()), tokens(7))


class SeparateAttention(nn.Module):
    """q, k, v apart; heads counted by -1. Fewer heads for k and v if asked."""

    inv_freq: Tensor

    def __init__(self, kv_heads: int = 4, copies: str = "", rope: bool = False) -> None:
        super().__init__()
        dim, heads = 16, 4
        self.head_dim = dim // heads
        self.repeats = heads // kv_heads
        self.copies = copies
        self.q = nn.Linear(dim, dim, bias=False)
        self.k = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.v = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.o = nn.Linear(dim, dim, bias=False)
        self.rope = rope
        if rope:
            half = torch.arange(0, self.head_dim, 2) / self.head_dim
            self.register_buffer("inv_freq", 1.0 / 10000.0**half, persistent=False)

    def heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.head_dim).transpose(1, 2)

    def repeated(self, x: Tensor) -> Tensor:
        if self.copies == "repeat_interleave":
            return x.repeat_interleave(self.repeats, dim=1)
        if self.copies == "expand":
            b, h, n, d = x.shape
            return x[:, :, None].expand(b, h, self.repeats, n, d).reshape(b, h * self.repeats, n, d)
        return x

    def rotated(self, x: Tensor) -> Tensor:
        angles = torch.outer(torch.arange(x.shape[-2], device=x.device).float(), self.inv_freq)
        angles = torch.cat((angles, angles), -1)
        first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        return x * angles.cos() + torch.cat((-second, first), -1) * angles.sin()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))
        if self.rope:
            q, k = self.rotated(q), self.rotated(k)
        k, v = self.repeated(k), self.repeated(v)
        grouped = self.copies == "enable_gqa"
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        x = x.transpose(1, 2)
        return self.o(x.reshape(*x.shape[:2], -1))


def separate_attention() -> Case:
    return Case(Sequence(SeparateAttention()), tokens(7))


def rope_attention() -> Case:
    return Case(Sequence(SeparateAttention(rope=True)), tokens(7))


def grouped_query_interleave() -> Case:
    return Case(Sequence(SeparateAttention(kv_heads=2, copies="repeat_interleave")), tokens(7))


def grouped_query_expand() -> Case:
    return Case(Sequence(SeparateAttention(kv_heads=2, copies="expand")), tokens(7))


def grouped_query_enabled() -> Case:
    return Case(Sequence(SeparateAttention(kv_heads=2, copies="enable_gqa", rope=True)), tokens(7))


class PooledAttention(nn.Module):
    """Keys and values of every head pooled by one convolution, to which heads are samples."""

    def __init__(self, dim: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.head_dim = dim // heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.pool = nn.Conv1d(self.head_dim, self.head_dim, 3, 2, 1, groups=self.head_dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, -1, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        pooled = [self.pool(y.flatten(0, 1).transpose(1, 2)).transpose(1, 2) for y in (k, v)]
        k, v = (y.reshape(b, -1, *y.shape[1:]) for y in pooled)
        attn = (q @ k.transpose(-2, -1) * self.head_dim**-0.5).softmax(dim=-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(b, n, -1))


def pooled_attention() -> Case:
    return Case(Sequence(PooledAttention()), tokens(7))


class EagerAttention(nn.Module):
    """BERT's: matmul, a scale from an attribute, a mask, softmax; ALiBi if asked."""

    slopes: Tensor

    def __init__(self, dim: int = 16, num_heads: int = 4, alibi: bool = False) -> None:
        super().__init__()
        self.num_attention_heads = num_heads
        self.attention_head_size = dim // num_heads
        self.all_head_size = dim
        self.query = nn.Linear(dim, self.all_head_size)
        self.key = nn.Linear(dim, self.all_head_size)
        self.value = nn.Linear(dim, self.all_head_size)
        self.dense = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(0.1)
        self.alibi = alibi
        if alibi:
            self.register_buffer("slopes", 2.0 ** -torch.arange(1.0, num_heads + 1))

    def transpose_for_scores(self, x: Tensor) -> Tensor:
        x = x.view(*x.size()[:-1], self.num_attention_heads, self.attention_head_size)
        return x.permute(0, 2, 1, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (self.transpose_for_scores(f(x)) for f in (self.query, self.key, self.value))
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(self.attention_head_size)
        if self.alibi:
            place = torch.arange(x.shape[1], device=x.device)
            scores = scores - self.slopes[:, None, None] * (place[:, None] - place[None]).abs()
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, None, :] == 0, torch.finfo(scores.dtype).min)
        context = torch.matmul(self.dropout(scores.softmax(-1)), v).permute(0, 2, 1, 3).contiguous()
        return self.dense(context.view(*context.size()[:-2], self.all_head_size))


def eager_attention() -> Case:
    return Case(Sequence(EagerAttention()), tokens(7))


def alibi_attention() -> Case:
    return Case(Sequence(EagerAttention(alibi=True)), tokens(7))


def masked_attention() -> Case:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 16)
            self.norm = nn.LayerNorm(16)
            self.attn = EagerAttention()
            self.head = nn.Linear(16, 3)

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
            x = self.embed(input_ids)
            x = x + self.attn(self.norm(x), attention_mask)
            return {"logits": self.head(x)}

    ids = torch.randint(11, (2, 6))
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    return Case(Masked(), kwargs={"input_ids": ids, "attention_mask": mask})


class EinsumAttention(nn.Module):
    """Heads in the einsum's letters."""

    def __init__(self, dim: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.wq = nn.Parameter(torch.randn(heads, dim, dim // heads) * dim**-0.5)
        self.wk = nn.Parameter(torch.randn(heads, dim, dim // heads) * dim**-0.5)
        self.wv = nn.Parameter(torch.randn(heads, dim, dim // heads) * dim**-0.5)
        self.wo = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("bnc,hcd->bhnd", x, w) for w in (self.wq, self.wk, self.wv))
        attn = torch.einsum("bhnd,bhmd->bhnm", q, k).softmax(-1)
        out = torch.einsum("bhnm,bhmd->bnhd", attn, v)
        return self.wo(out.flatten(2))


def einsum_attention() -> Case:
    return Case(Sequence(EinsumAttention()), tokens(7))


class ConvAttention(nn.Module):
    """Attention on feature maps with 1x1 convolutions (SAGAN, diffusion models)."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, c)
        self.q = nn.Conv2d(c, c // 2, 1)
        self.k = nn.Conv2d(c, c // 2, 1)
        self.v = nn.Conv2d(c, c, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = self.q(h).flatten(2), self.k(h).flatten(2), self.v(h).flatten(2)
        attn = torch.bmm(q.transpose(1, 2), k).softmax(-1)
        return x + self.gamma * torch.bmm(v, attn.transpose(1, 2)).view_as(x)


def conv_attention() -> Case:
    return Case(Classifier(ConvAttention(8), 8, 8), image(side=4))
