"""Vision Transformers ("An Image is Worth 16x16 Words", Dosovitskiy et al. 2020); torchvision's key names.

`vit_ti_16`, `vit_s_16`, `vit_b_16`, `vit_l_16`, `vit_h_14` and the same with patches of 32. Weights of timm
(`timm://vit_tiny_patch16_224`) are renamed on loading, and position embeddings of other image sizes are resized.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.classifiers.common import DropPath, ImageNetwork, drop_path_rates, is_small, named
from ldm.modules.classifiers.transformer import MultiHeadAttention

# name -> (hidden size, layers, heads): table 1 of the paper; Ti and S as in DeiT (Touvron et al. 2020, table 1)
SIZES = {"ti": (192, 12, 3), "s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "h": (1280, 32, 16)}
TIMM_KEYS = (
    (r"^cls_token$", "class_token"),
    (r"^pos_embed$", "encoder.pos_embedding"),
    (r"^patch_embed\.proj\.", "conv_proj."),
    (r"^norm\.", "encoder.ln."),
    (r"^head\.", "heads.head."),
    (r"^blocks\.(\d+)\.norm", r"encoder.layers.encoder_layer_\1.ln_"),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.encoder_layer_\1.self_attention.in_proj_"),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.encoder_layer_\1.self_attention.out_proj."),
    (r"^blocks\.(\d+)\.mlp\.fc1\.", r"encoder.layers.encoder_layer_\1.mlp.0."),
    (r"^blocks\.(\d+)\.mlp\.fc2\.", r"encoder.layers.encoder_layer_\1.mlp.3."),
    # torchvision's own files keep an older name of the two linear layers
    (r"\.mlp\.linear_1\.", ".mlp.0."),
    (r"\.mlp\.linear_2\.", ".mlp.3."),
)
EPS = 1e-6  # of the layer norms


class EncoderBlock(nn.Module):
    """Self-attention and a GELU feed-forward part, each after a layer norm (equations 2 and 3): [B, L, D] -> same."""

    def __init__(self, dim: int, heads: int, mlp_dim: int, dropout: float, drop_path: float) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(dim, eps=EPS), nn.LayerNorm(dim, eps=EPS)
        self.self_attention = MultiHeadAttention(dim, heads)
        self.dropout, self.drop_path = nn.Dropout(dropout), DropPath(drop_path)
        self.mlp = nn.Sequential(
            nn.Linear(dim, mlp_dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(mlp_dim, dim), nn.Dropout(dropout)
        )
        for layer in (self.mlp[0], self.mlp[3]):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.dropout(self.self_attention(self.ln_1(x))))
        return x + self.drop_path(self.mlp(self.ln_2(x)))


class Encoder(nn.Module):
    """Adds learned positions, then block after block and a last norm: [B, length, dim] -> the same shape."""

    def __init__(
        self, length: int, dim: int, depth: int, heads: int, mlp_dim: int, dropout: float, drop_path: float
    ) -> None:
        super().__init__()
        self.pos_embedding = nn.Parameter(torch.empty(1, length, dim).normal_(std=0.02))
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.Sequential()
        for i, rate in enumerate(drop_path_rates(drop_path, depth)):
            self.layers.add_module(f"encoder_layer_{i}", EncoderBlock(dim, heads, mlp_dim, dropout, rate))
        self.ln = nn.LayerNorm(dim, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.ln(self.layers(self.dropout(x + self.pos_embedding)))


class VisionTransformer(ImageNetwork):
    """Images [B, in_channels, S, S], S = `image_size` -> logits [B, num_classes].

    Args:
        dim, depth, heads: hidden size, layers and heads; the feed-forward part has 4 `dim` units.
        patch_size: pixels of a patch's side; must divide `image_size`.
        image_size: pixels of an image's side.
        num_classes: outputs.
        in_channels: of the images.
        pool: the logits are read from the class "token", or from the "mean" of the patches.
        dropout: of embeddings and hidden units.
        drop_path: stochastic depth of the last layer, growing linearly from 0.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        patch_size: int,
        image_size: int,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        pool: str = "token",
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(num_classes, in_channels, image_size=image_size)
        if image_size % patch_size:
            raise ValueError(f"got patch_size={patch_size}, expected a divisor of image_size={image_size}")
        if pool not in ("token", "mean"):
            raise ValueError(f"got pool={pool!r}, expected token or mean")
        self.pool, self.grid = pool, image_size // patch_size
        self.conv_proj = nn.Conv2d(in_channels, dim, patch_size, patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.encoder = Encoder(self.grid**2 + 1, dim, depth, heads, 4 * dim, dropout, drop_path)
        self.heads = nn.Sequential()
        self.heads.add_module("head", nn.Linear(dim, num_classes))
        nn.init.trunc_normal_(self.conv_proj.weight, std=math.sqrt(1 / (in_channels * patch_size**2)))
        for zero in (self.conv_proj.bias, self.heads.head.weight, self.heads.head.bias):
            nn.init.zeros_(zero)

    def tokens(self, x: Tensor) -> Tensor:
        """[B, in_channels, S, S] -> the class token and one vector a patch, [B, 1 + (S / patch_size)^2, dim]."""
        self.check(x.shape)
        x = self.conv_proj(x).flatten(2).transpose(1, 2)
        return torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(self.tokens(x))
        return self.heads(x[:, 0] if self.pool == "token" else x[:, 1:].mean(1))

    def adapt_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Renames keys of timm and of old torchvision files; resizes position embeddings to this image size.

        Raises:
            ValueError: position embeddings of an image that was not square.
        """
        renamed = {}
        for key, value in state.items():
            for old, new in TIMM_KEYS:
                key = re.sub(old, new, key)
            renamed[key] = value
        name = "encoder.pos_embedding"
        if name in renamed:
            renamed[name] = resize_positions(renamed[name], self.grid)
        return renamed


def resize_positions(embedding: Tensor, grid: int) -> Tensor:
    """Position embeddings [1, 1 + g^2, D] of a g x g grid -> [1, 1 + grid^2, D] by bicubic interpolation (section 3.2).

    Raises:
        ValueError: the grid was not square.
    """
    token, patches = embedding[:, :1], embedding[:, 1:]
    g = math.isqrt(patches.shape[1])
    if g * g != patches.shape[1]:
        raise ValueError(f"got {patches.shape[1]} position embeddings, expected a square number and one")
    if g == grid:
        return embedding
    patches = patches.transpose(1, 2).unflatten(2, (g, g))
    patches = F.interpolate(patches.float(), size=grid, mode="bicubic", align_corners=True).to(embedding.dtype)
    return torch.cat([token, patches.flatten(2).transpose(1, 2)], 1)


def _vit(name: str, size: str, patch: int) -> Callable[..., VisionTransformer]:
    dim, layers, head_count = SIZES[size]

    def build(
        num_classes: int = 1000,
        in_channels: int = 3,
        width: float = 1.0,
        stem: str = "imagenet",
        image_size: int | None = None,
        patch_size: int | None = None,
        depth: int | None = None,
        pool: str = "token",
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> VisionTransformer:
        small = is_small(stem)
        heads = max(1, round(head_count * width))
        return VisionTransformer(
            heads * (dim // head_count),
            depth or layers,
            heads,
            patch_size or (4 if small else patch),
            image_size or (32 if small else 224),
            num_classes=num_classes,
            in_channels=in_channels,
            pool=pool,
            dropout=dropout,
            drop_path=drop_path,
        )

    doc = (
        f"ViT-{size.title()}/{patch}: {dim} wide, {layers} layers, {head_count} heads. `width` multiplies the number "
        "of heads, `stem: small` means 32x32 images in patches of 4 unless `image_size` and `patch_size` say "
        "otherwise; the other parameters as in `VisionTransformer`."
    )
    return named(name, doc, build)


vit_ti_16 = _vit("vit_ti_16", "ti", 16)
vit_s_16, vit_s_32 = _vit("vit_s_16", "s", 16), _vit("vit_s_32", "s", 32)
vit_b_16, vit_b_32 = _vit("vit_b_16", "b", 16), _vit("vit_b_32", "b", 32)
vit_l_16, vit_l_32 = _vit("vit_l_16", "l", 16), _vit("vit_l_32", "l", 32)
vit_h_14 = _vit("vit_h_14", "h", 14)
