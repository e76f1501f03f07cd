"""Vision Transformers (Dosovitskiy et al., 2021, arXiv 2010.11929), dense or with MoE layers in place of some MLPs.

The details are those of V-MoE's code: layer norm before attention and MLP, a class token, learned positions, a head of
zeros. Attention is torch's scaled_dot_product_attention in every mode, so that training, attack and evaluation round
alike; nn.MultiheadAttention takes another path where no gradient is asked for, which the counting of FLOPs misses too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moebench.errors import UsageError
from moebench.models._base import Normalize, Shape


@dataclass(frozen=True)
class Size:
    """Blocks, width of a token, and attention heads; the MLP is four times as wide as a token."""

    blocks: int
    hidden: int
    heads: int


SIZES = {
    "digits": Size(4, 48, 3),
    "digits+": Size(4, 56, 4),
    "cifar": Size(6, 192, 3),
    "cifar+": Size(6, 216, 3),
    "S": Size(8, 512, 8),
    "S+": Size(8, 552, 8),
    "B": Size(12, 768, 12),
    "B+": Size(15, 832, 13),
    "B++": Size(18, 896, 14),
    "B+++": Size(21, 960, 15),
    "L": Size(24, 1024, 16),
}
"""S, B and the dense ladder from B+ to L are the paper's; digits and cifar are for small images.

digits+, cifar+ and S+ have the FLOPs of a V-MoE of the size without the plus, with K = 2 in its last two odd blocks.
"""


def parse_size(size: str, shape: Shape) -> tuple[Size, int]:
    """The size and the side of a patch that a text such as "B/32" names.

    "auto" is what fits the images: digits/2 up to 16 pixels, cifar/4 up to 64, S/32 above; "auto+" the one with a plus.

    Raises:
        UsageError: no such size, or the images cannot be cut into such patches.
    """
    _, height, width = shape
    if size in ("auto", "auto+"):
        name, patch = ("digits", 2) if height <= 16 else ("cifar", 4) if height <= 64 else ("S", 32)
        name += size.removeprefix("auto")
    else:
        name, _, text = size.partition("/") if isinstance(size, str) else ("", "", "")
        patch = int(text) if text.isdecimal() else 0
    if name not in SIZES or patch < 1:
        raise UsageError(f"size must be auto or NAME/PATCH such as S/32, NAME one of {', '.join(SIZES)}; got {size!r}")
    if height % patch or width % patch:
        raise UsageError(f"images of {height}×{width} cannot be cut into patches of {patch}×{patch}; use another size")
    return SIZES[name], patch


class Mlp(nn.Sequential):
    """The two dense layers of a block, (..., hidden) -> (..., hidden)."""

    def __init__(self, hidden: int, dropout: float = 0.0) -> None:
        if not 0 <= dropout < 1:
            raise UsageError(f"dropout must be in [0, 1), got {dropout}")
        widen, narrow = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)
        for dense in (widen, narrow):
            nn.init.xavier_uniform_(dense.weight)
            nn.init.normal_(dense.bias, std=1e-6)
        super().__init__(widen, nn.GELU("tanh"), nn.Dropout(dropout), narrow, nn.Dropout(dropout))


class SelfAttention(nn.Module):
    """Multi-head self-attention over the tokens of an image, (B, T, hidden) -> (B, T, hidden)."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.out = nn.Linear(hidden, hidden)
        for matrix in (*self.qkv.weight.chunk(3), self.out.weight):
            nn.init.xavier_uniform_(matrix)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """Attention and an MLP (or an MoE layer of MLPs), each behind a layer norm and beside a shortcut."""

    def __init__(self, hidden: int, heads: int, mlp: nn.Module) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden, eps=1e-6)
        self.attention = SelfAttention(hidden, heads)
        self.norm2 = nn.LayerNorm(hidden, eps=1e-6)
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class VisionTransformer(nn.Module):
    """A classifier of [0, 1] images by the tokens of their patches.

    Args:
        num_classes: K.
        shape: of the images.
        size: blocks, width and heads.
        patch: side of a patch in pixels.
        make_mlp: gives what stands for the MLP in block number i; None for a plain one.
        pre_logits: a dense layer and tanh before the head.
    """

    def __init__(
        self,
        num_classes: int,
        shape: Shape,
        size: Size,
        patch: int,
        *,
        make_mlp: Callable[[int], nn.Module | None] = lambda number: None,
        pre_logits: bool = False,
    ) -> None:
        super().__init__()
        channels, height, width = shape
        hidden = size.hidden
        self.normalize = Normalize()
        self.embedding = nn.Conv2d(channels, hidden, patch, stride=patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, hidden))
        self.positions = nn.Parameter(torch.empty(1, (height // patch) * (width // patch) + 1, hidden))
        mlps = (make_mlp(number) for number in range(size.blocks))
        self.blocks = nn.Sequential(*(Block(hidden, size.heads, Mlp(hidden) if mlp is None else mlp) for mlp in mlps))
        self.norm = nn.LayerNorm(hidden, eps=1e-6)
        self.pre_logits = nn.Sequential(nn.Linear(hidden, hidden), nn.Tanh()) if pre_logits else nn.Identity()
        self.head = nn.Linear(hidden, num_classes)
        nn.init.normal_(self.positions, std=0.02)
        nn.init.zeros_(self.head.weight)
        nn.init.constant_(self.head.bias, -math.log(num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of [0, 1] images (B, C, H, W)."""
        patches = self.embedding(self.normalize(x)).flatten(2).transpose(1, 2)
        tokens = torch.cat((self.class_token.expand(len(x), -1, -1), patches), dim=1) + self.positions
        out = self.norm(self.blocks(tokens))[:, 0]
        logits: Tensor = self.head(self.pre_logits(out))
        return logits
