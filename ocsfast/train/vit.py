"""Vision transformers (arXiv 2010.11929) in the sizes of DeiT (arXiv 2012.12877), and a small one.

Parameters have timm's names and shapes, so that its checkpoints can be used with `--pretrained`. Each
size that the forward code needs is an integer attribute of the module that uses it. When heads are
removed, `num_heads` and `attn_dim` are updated; the other sizes are read from the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ocsfast.core.errors import ConfigError


class Attention(nn.Module):
    """Multi-head self-attention. One linear layer computes queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.head_dim = width // heads
        self.attn_dim = heads * self.head_dim  # not `width`, which is pruned independently
        self.qkv = nn.Linear(width, 3 * self.attn_dim)
        self.proj = nn.Linear(self.attn_dim, width)

    def forward(self, x: Tensor) -> Tensor:  # [batch, tokens, width]
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [batch, heads, tokens, head_dim]
        mixed = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, tokens, self.attn_dim))
        return out


class Mlp(nn.Module):
    """Two linear layers, applied to each token separately."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class TransformerBlock(nn.Module):
    """Attention and an MLP, each after a layer norm and with a shortcut around both."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class PatchEmbedding(nn.Module):
    """One token per patch, by a convolution whose stride equals its kernel size."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(x).flatten(2).transpose(1, 2)  # [batch, patches, width]
        return out


class VisionTransformer(nn.Module):
    """A transformer over an image's tokens and a class token, which a linear layer maps to logits."""

    def __init__(
        self, width: int, heads: int, depth: int, classes: int, channels: int, size: int
    ) -> None:
        super().__init__()
        patch = patch_size(size)
        self.patch_embed = PatchEmbedding(channels, width, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, (size // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, classes)
        self.initialise()

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        logits: Tensor = self.head(self.norm(self.blocks(x))[:, 0])
        return logits

    def initialise(self) -> None:
        """Draw DeiT's weights: normal ones of deviation 0.02, but for the patch embedding."""
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)


def patch_size(size: int) -> int:
    """Height and width of a patch, in pixels, for square images of `size` pixels.

    It is 16 for images of ImageNet's size, 4 for CIFAR's, 2 for smaller ones.

    Raises:
        ConfigError: no whole number of patches covers the image.
    """
    patch = 16 if size >= 112 else 4 if size >= 24 else 2
    if size % patch:
        raise ConfigError(
            f"images of {size} pixels cannot be divided into patches of {patch}: choose another size "
            "(--image-size, for folders)"
        )
    return patch
