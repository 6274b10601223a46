"""Small networks built from the blocks that people write, as they write them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

BLOCKS: dict[str, Callable[[], Case]] = {}


@dataclass(frozen=True)
class Case:
    """A network and one batch for it."""

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


def block(make: Callable[[], Case]) -> Callable[[], Case]:
    BLOCKS[make.__name__] = make
    return make


def image(channels: int = 3, side: int = 8) -> tuple[Tensor]:
    return (torch.randn(2, channels, side, side),)


def tokens(width: int = 16, length: int = 6) -> tuple[Tensor]:
    return (torch.randn(2, length, width),)


class Conv(nn.Module):
    """Convolution, norm, activation."""

    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1, g: int = 1, act: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, s, k // 2, groups=g, bias=False)
        self.bn = nn.BatchNorm2d(c2)
        self.act = nn.SiLU() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Classifier(nn.Module):
    """A stem, a body on feature maps, and a linear head on their means."""

    def __init__(self, body: nn.Module, width: int, out: int) -> None:
        super().__init__()
        self.stem = Conv(3, width, 3)
        self.body = body
        self.head = nn.Linear(out, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).mean((2, 3)))


class Sequence(nn.Module):
    """An embedding, residual blocks on tokens behind layer norms, and a head."""

    def __init__(self, body: nn.Module, width: int = 16, given: int = 7) -> None:
        super().__init__()
        self.embed = nn.Linear(given, width)
        self.norm = nn.LayerNorm(width)
        self.body = body
        self.last = nn.LayerNorm(width)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.body(self.norm(x))
        return self.head(self.last(x))


# -- convolutional ------------------------------------------------------------------------------


class Bottleneck(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.cv1 = Conv(c, c, 3)
        self.cv2 = Conv(c, c, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x))


class C2f(nn.Module):
    """YOLOv8's: chunk, a chain of bottlenecks, everything concatenated."""

    def __init__(self, c1: int, c2: int, n: int = 2, e: float = 0.5, by_size: bool = False) -> None:
        super().__init__()
        self.c = int(c2 * e)
        self.by_size = by_size
        self.cv1 = Conv(c1, 2 * self.c)
        self.cv2 = Conv((2 + n) * self.c, c2)
        self.m = nn.ModuleList(Bottleneck(self.c) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        y = list(x.split((self.c, self.c), 1) if self.by_size else x.chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


@block
def c2f_chunk() -> Case:
    return Case(Classifier(C2f(8, 12), 8, 12), image())


@block
def c2f_split() -> Case:
    return Case(Classifier(C2f(8, 12, by_size=True), 8, 12), image())


class Csp(nn.Module):
    """Two branches side by side, one of them deep."""

    def __init__(self, c1: int, c2: int) -> None:
        super().__init__()
        c_ = c2 // 2
        self.cv1 = Conv(c1, c_)
        self.cv2 = Conv(c1, c_)
        self.cv3 = Conv(2 * c_, c2)
        self.m = nn.Sequential(Bottleneck(c_), Bottleneck(c_))

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


@block
def csp() -> Case:
    return Case(Classifier(Csp(8, 12), 8, 12), image())


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    batchsize, num_channels, height, width = x.size()
    channels_per_group = num_channels // groups
    x = x.view(batchsize, groups, channels_per_group, height, width)
    x = torch.transpose(x, 1, 2).contiguous()
    return x.view(batchsize, num_channels, height, width)


class ShuffleUnit(nn.Module):
    """ShuffleNetV2's: half of the channels pass, the other half is worked on, then they mix."""

    def __init__(self, c: int) -> None:
        super().__init__()
        half = c // 2
        self.branch = nn.Sequential(
            Conv(half, half), Conv(half, half, 3, g=half, act=False), Conv(half, half)
        )

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, dim=1)
        return channel_shuffle(torch.cat((x1, self.branch(x2)), dim=1), 2)


@block
def shuffle() -> Case:
    body = nn.Sequential(ShuffleUnit(12), ShuffleUnit(12), Conv(12, 10))
    return Case(Classifier(body, 12, 10), image())


class SqueezeExcite(nn.Module):
    def __init__(self, c: int, reduced: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(c, reduced, 1)
        self.fc2 = nn.Conv2d(reduced, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(self.pool(x)))))


@block
def squeeze_excite() -> Case:
    return Case(Classifier(nn.Sequential(SqueezeExcite(8, 4), Conv(8, 8, 3)), 8, 8), image())


class SqueezeExciteLinear(nn.Module):
    """The same with linear layers and views, as in SENet's own code."""

    def __init__(self, c: int, reduced: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(c, reduced), nn.ReLU(True), nn.Linear(reduced, c), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.size()
        y = F.adaptive_avg_pool2d(x, 1).view(b, c)
        return x * self.fc(y).view(b, c, 1, 1).expand_as(x)


@block
def squeeze_excite_linear() -> Case:
    return Case(Classifier(nn.Sequential(SqueezeExciteLinear(8, 4), Conv(8, 8, 3)), 8, 8), image())


@block
def pixel_shuffle() -> Case:
    return Case(
        nn.Sequential(
            Conv(3, 8, 3), Conv(8, 12, 3), nn.PixelShuffle(2), Conv(3, 6, 3), nn.Conv2d(6, 3, 1)
        ),
        image(),
    )


@block
def pixel_unshuffle() -> Case:
    return Case(
        nn.Sequential(Conv(3, 6, 3), nn.PixelUnshuffle(2), Conv(24, 6, 3), nn.Conv2d(6, 3, 1)), image()
    )


@block
def depthwise_multiplier() -> Case:
    return Case(Classifier(nn.Sequential(Conv(8, 16, 3, g=8), Conv(16, 10)), 8, 10), image())


@block
def unequal_groups() -> Case:
    """Input and output of a grouped convolution have different widths."""
    return Case(Classifier(nn.Sequential(Conv(8, 12, 3, g=4), Conv(12, 10)), 8, 10), image())


class Shared(nn.Module):
    """One convolution at two scales, as in a detection head."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(c), nn.BatchNorm2d(c)])
        self.out = nn.Conv2d(c, 5, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        levels = [x, F.max_pool2d(x, 2)]
        return [
            self.out(F.relu(norm(self.conv(level))))
            for norm, level in zip(self.norms, levels, strict=True)
        ]


@block
def weight_sharing() -> Case:
    return Case(nn.Sequential(Conv(3, 8, 3), Shared(8)), image())


@block
def tied_autoencoder() -> Case:
    """The decoder's matrix is the encoder's, transposed."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(9, 12)
            self.bias = nn.Parameter(torch.zeros(9))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.relu(self.encoder(x)), self.encoder.weight.t(), self.bias)

    return Case(Tied(), (torch.randn(2, 9),))


@block
def transposed() -> Case:
    body = nn.Sequential(nn.ConvTranspose2d(8, 10, 2, 2), nn.BatchNorm2d(10), nn.ReLU(), Conv(10, 6, 3))
    return Case(Classifier(body, 8, 6), image())


@block
def transposed_groups() -> Case:
    body = nn.Sequential(
        nn.ConvTranspose2d(8, 12, 2, 2, groups=4), nn.BatchNorm2d(12), nn.ReLU(), Conv(12, 6)
    )
    return Case(Classifier(body, 8, 6), image())


@block
def transposed_depthwise() -> Case:
    body = nn.Sequential(nn.ConvTranspose2d(8, 8, 4, 2, 1, groups=8), nn.ReLU(), Conv(8, 6))
    return Case(Classifier(body, 8, 6), image())


class DoubleConv(nn.Sequential):
    def __init__(self, c1: int, c2: int) -> None:
        super().__init__(nn.Conv2d(c1, c2, 3, padding=1), nn.BatchNorm2d(c2), nn.ReLU(inplace=True))
        self.extend([nn.Conv2d(c2, c2, 3, padding=1), nn.BatchNorm2d(c2), nn.ReLU(inplace=True)])


class UNet(nn.Module):
    """Skips that are padded to size and concatenated."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.inc = DoubleConv(3, width)
        self.down1 = DoubleConv(width, 2 * width)
        self.down2 = DoubleConv(2 * width, 4 * width)
        self.up1 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.conv1 = DoubleConv(4 * width, 2 * width)
        self.up2 = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.conv2 = DoubleConv(2 * width, width)
        self.outc = nn.Conv2d(width, 2, 1)

    @staticmethod
    def join(x: Tensor, skip: Tensor) -> Tensor:
        dy, dx = skip.size(2) - x.size(2), skip.size(3) - x.size(3)
        x = F.pad(x, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])
        return torch.cat([skip, x], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.inc(x)
        x2 = self.down1(F.max_pool2d(x1, 2))
        x3 = self.down2(F.max_pool2d(x2, 2))
        x = self.conv1(self.join(self.up1(x3), x2))
        return self.outc(self.conv2(self.join(self.up2(x), x1)))


@block
def unet() -> Case:
    return Case(UNet(4), image(side=10))


@block
def group_norm() -> Case:
    body = nn.Sequential(nn.GroupNorm(4, 16), nn.Conv2d(16, 12, 3), nn.GroupNorm(1, 12), nn.ReLU())
    return Case(Classifier(body, 16, 12), image())


@block
def flatten_linear() -> Case:
    features = nn.Sequential(Conv(3, 8, 3), nn.MaxPool2d(2), nn.Flatten())
    return Case(
        nn.Sequential(features, nn.Linear(8 * 16, 12), nn.ReLU(), nn.Dropout(), nn.Linear(12, 4)),
        image(),
    )


class Reorganize(nn.Module):
    """Space to depth by slices (YOLOv5's Focus) inside a network."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = Conv(4 * c, 10)

    def forward(self, x: Tensor) -> Tensor:
        parts = (x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2])
        return self.conv(torch.cat(parts, 1))


@block
def focus() -> Case:
    return Case(Classifier(Reorganize(6), 6, 10), image())


@block
def prelu() -> Case:
    body = nn.Sequential(nn.Conv2d(8, 10, 3), nn.PReLU(10), nn.Conv2d(10, 6, 1), nn.PReLU())
    return Case(Classifier(body, 8, 6), image())


# -- attention ------------------------------------------------------------------------------------


@block
def multihead_attention() -> Case:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(16, 4, batch_first=True)
            self.fc = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.attn(x, x, x, need_weights=False)[0])

    return Case(Sequence(Block()), tokens(7))


@block
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


@block
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


@block
def fused_attention() -> Case:
    return Case(Sequence(FusedAttention()), tokens(7))


@block
def fused_attention_eager() -> Case:
    return Case(Sequence(FusedAttention(scaled=False)), tokens(7))


@block
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

    def __init__(
        self, dim: int = 16, heads: int = 4, kv_heads: int = 4, copies: str = "", rope: bool = False
    ) -> None:
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


@block
def separate_attention() -> Case:
    return Case(Sequence(SeparateAttention()), tokens(7))


@block
def rope_attention() -> Case:
    return Case(Sequence(SeparateAttention(rope=True)), tokens(7))


@block
def grouped_query_interleave() -> Case:
    return Case(Sequence(SeparateAttention(kv_heads=2, copies="repeat_interleave")), tokens(7))


@block
def grouped_query_expand() -> Case:
    return Case(Sequence(SeparateAttention(kv_heads=2, copies="expand")), tokens(7))


@block
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


@block
def pooled_attention() -> Case:
    return Case(Sequence(PooledAttention()), tokens(7))


class EagerAttention(nn.Module):
    """BERT's: matmul, a scale from an attribute, a mask, softmax; ALiBi if asked."""

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


@block
def eager_attention() -> Case:
    return Case(Sequence(EagerAttention()), tokens(7))


@block
def alibi_attention() -> Case:
    return Case(Sequence(EagerAttention(alibi=True)), tokens(7))


@block
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


@block
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


@block
def conv_attention() -> Case:
    return Case(Classifier(ConvAttention(8), 8, 8), image(side=4))


# -- recurrent -----------------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embed = nn.Linear(7, 10)
        self.rnn = kind(10, 12, batch_first=True, bidirectional=True)
        self.mlp = nn.Sequential(nn.Linear(24, 14), nn.ReLU(), nn.Linear(14, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.rnn(F.relu(self.embed(x)))[0][:, -1])


@block
def lstm() -> Case:
    return Case(Recurrent(nn.LSTM), tokens(7))


@block
def gru() -> Case:
    return Case(Recurrent(nn.GRU), tokens(7))


# -- gates, scales, positions -----------------------------------------------------------------------


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


@block
def glu() -> Case:
    return Case(Sequence(Glu(how="glu")), tokens(7))


@block
def swiglu_chunk() -> Case:
    return Case(Sequence(Glu()), tokens(7))


@block
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


@block
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


@block
def rms_norm() -> Case:
    return Case(Sequence(nn.Sequential(RmsNorm(16), SwiGlu(), nn.RMSNorm(16))), tokens(7))


class LayerScale(nn.Module):
    def __init__(self, body: nn.Module, dim: int) -> None:
        super().__init__()
        self.body = body
        self.gamma = nn.Parameter(1e-1 * torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.gamma


@block
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


@block
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


@block
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


@block
def experts() -> Case:
    return Case(Sequence(Experts()), tokens(7))


# -- parametrizations, checkpoints, containers -------------------------------------------------------


def normed(wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    body = nn.Sequential(wrap(nn.Conv2d(8, 10, 3)), nn.ReLU(), wrap(nn.Conv2d(10, 6, 1)))
    return Classifier(body, 8, 6)


@block
def weight_norm_old() -> Case:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Case(normed(nn.utils.weight_norm), image())


@block
def weight_norm_new() -> Case:
    return Case(normed(nn.utils.parametrizations.weight_norm), image())


@block
def spectral_norm_old() -> Case:
    return Case(normed(nn.utils.spectral_norm), image())


@block
def spectral_norm_new() -> Case:
    return Case(normed(nn.utils.parametrizations.spectral_norm), image())


class Checkpointed(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.requires_grad:
            return checkpoint(self.body, x, use_reentrant=False)
        return self.body(x)


@block
def checkpointed() -> Case:
    return Case(Classifier(Checkpointed(Csp(8, 12)), 8, 12), image())


@block
def checkpointed_always() -> Case:
    class Always(Checkpointed):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.body, x, use_reentrant=False)

    return Case(Classifier(Always(Csp(8, 12)), 8, 12), image())


@block
def containers() -> Case:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages = nn.ModuleDict(
                {
                    "a": nn.ModuleList(
                        [Conv(8, 8, 3), nn.Sequential(Conv(8, 8), nn.Sequential(Conv(8, 8)))]
                    ),
                    "b": nn.ModuleList([Conv(8, 12, 3)]),
                }
            )
            self.scales = nn.ParameterList([nn.Parameter(torch.ones(8, 1, 1)) for _ in range(2)])
            self.extra = nn.ParameterDict({"shift": nn.Parameter(torch.zeros(1, 12, 1, 1))})

        def forward(self, x: Tensor) -> Tensor:
            for layer, scale in zip(self.stages["a"], self.scales, strict=True):
                x = x + layer(x) * scale
            return self.stages["b"][0](x) + self.extra["shift"]

    return Case(Classifier(Nested(), 8, 12), image())


@block
def used_twice() -> Case:
    """One module, two places (and two names)."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = Conv(8, 8, 3)
            self.again = self.first
            self.out = Conv(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.again(F.relu(self.first(x))))

    return Case(Classifier(Twice(), 8, 6), image())


# -- calls -------------------------------------------------------------------------------------------


class Named(NamedTuple):
    maps: Tensor
    aux: dict[str, Any]


@block
def nested_outputs() -> Case:
    class Outputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = Conv(3, 8, 3)
            self.body = Conv(8, 8, 3)
            self.head = nn.Conv2d(8, 4, 1)
            self.aux = nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Named:
            x = self.body(self.stem(x))
            return Named(self.head(x), {"aux": [self.aux(x), None], "stride": 1, "none": None})

    return Case(Outputs(), image())


@dataclass
class Detections:
    boxes: Tensor
    scores: Tensor | None = None


@block
def dataclass_output() -> Case:
    class Boxes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = Conv(3, 8, 3)
            self.head = nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Detections:
            return Detections(self.head(self.stem(x)))

    return Case(Boxes(), image())


@block
def several_inputs() -> Case:
    class Fused(nn.Module):
        """An image, ids, a number, a flag and an option that is None."""

        def __init__(self) -> None:
            super().__init__()
            self.visual = nn.Sequential(Conv(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            self.words = nn.EmbeddingBag(11, 8)
            self.time = nn.Linear(1, 8)
            self.mlp = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))

        def forward(
            self,
            image: Tensor,
            ids: Tensor,
            *,
            time: Tensor,
            scale: float = 1.0,
            mode: str = "cat",
            extra: Any = None,
        ) -> Tensor:
            assert mode == "cat"
            assert extra is None
            a = self.visual(image) + self.time(time[:, None])
            return self.mlp(torch.cat([a * scale, self.words(ids)], 1))

    kwargs = {"time": torch.rand(2), "scale": 0.5, "mode": "cat", "extra": None}
    return Case(Fused(), (*image(), torch.randint(11, (2, 6))), kwargs)


@block
def mixed_leading_sizes() -> Case:
    """A mask without a batch dimension beside a batch of three."""

    class Causal(Sequence):
        def forward(self, x: Tensor, mask: Tensor, step: Tensor) -> Tensor:
            x, body = self.embed(x), self.body
            projections = (body.query, body.key, body.value)
            q, k, v = (body.transpose_for_scores(f(self.norm(x))) for f in projections)
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.5).transpose(1, 2)
            return self.head(body.dense(x.reshape(*x.shape[:2], body.all_head_size)) * step)

    mask = torch.ones(7, 7).tril().bool()
    model = Causal(EagerAttention())
    del model.last
    return Case(model, (torch.randn(3, 7, 7), mask, torch.tensor(2.0)))


@block
def nested_inputs() -> Case:
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lateral = nn.ModuleList([Conv(3, 8), Conv(5, 8)])
            self.out = nn.Conv2d(8, 2, 3, padding=1)

        def forward(self, inputs: dict[str, Any]) -> Tensor:
            fine, (coarse,) = inputs["fine"], inputs["rest"]
            a, b = self.lateral[0](fine), self.lateral[1](coarse)
            return self.out(a + F.interpolate(b, size=a.shape[-2:], mode="nearest"))

    return Case(Pyramid(), ({"fine": image()[0], "rest": [image(5, 4)[0]], "name": "x"},))
