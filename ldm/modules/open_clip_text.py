"""CLIP towers under the key names of OpenAI's and OpenCLIP's checkpoints (SD 2.x, SDXL): text, and a plain ViT."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.clip_text import quick_gelu
from ldm.modules.matmul import Linear, linear

# Text towers by OpenCLIP's name: width = embed_dim throughout, head width 64.
TEXT_ARCHS: dict[str, dict[str, int]] = {
    "ViT-B-32": {"width": 512, "layers": 12},
    "ViT-B-16": {"width": 512, "layers": 12},
    "ViT-L-14": {"width": 768, "layers": 12},
    "ViT-L-14-336": {"width": 768, "layers": 12},
    "ViT-H-14": {"width": 1024, "layers": 24},
    "ViT-g-14": {"width": 1024, "layers": 24},
    "ViT-bigG-14": {"width": 1280, "layers": 32},
}
# Image towers of OpenAI's releases: text width, then the ViT.
VISION_ARCHS: dict[str, dict[str, int]] = {
    "ViT-B-32": {"width": 768, "layers": 12, "patch_size": 32, "image_size": 224},
    "ViT-B-16": {"width": 768, "layers": 12, "patch_size": 16, "image_size": 224},
    "ViT-L-14": {"width": 1024, "layers": 24, "patch_size": 14, "image_size": 224},
    "ViT-L-14-336": {"width": 1024, "layers": 24, "patch_size": 14, "image_size": 336},
}


def text_arch(name: str) -> dict[str, int]:
    """Parameters of `OpenCLIPText` for an OpenCLIP name such as ViT-H-14.

    Raises:
        ValueError: unknown name.
    """
    if name not in TEXT_ARCHS:
        raise ValueError(f"got arch {name!r}, expected one of {', '.join(TEXT_ARCHS)}")
    return {**TEXT_ARCHS[name], "embed_dim": TEXT_ARCHS[name]["width"], "heads": TEXT_ARCHS[name]["width"] // 64}


class Attention(nn.Module):
    """Multi-head self-attention with one matrix for Q, K, V, as `nn.MultiheadAttention` names it."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"got width {width}, expected a multiple of heads {heads}")
        self.heads, self.causal = heads, causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = Linear(width, width)
        nn.init.normal_(self.in_proj_weight, std=width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        qkv = linear(x, self.in_proj_weight, self.in_proj_bias)  # [B, L, 3 D]
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, heads, L, D / heads]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers around the activation."""

    def __init__(self, width: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.activation = activation
        self.c_fc = Linear(width, 4 * width)
        self.c_proj = Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.activation(self.c_fc(x)))


class ResidualAttentionBlock(nn.Module):
    """Pre-norm transformer block, [B, L, D] -> [B, L, D]."""

    def __init__(self, width: int, heads: int, causal: bool, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, causal)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width, activation)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks.

    Args:
        width: D.
        layers: number of blocks.
        heads: heads per block.
        causal: each row attends only to itself and earlier rows (text).
        quick: OpenAI's GELU approximation instead of the exact one.
    """

    def __init__(self, width: int, layers: int, heads: int, causal: bool, quick: bool) -> None:
        super().__init__()
        activation = quick_gelu if quick else F.gelu
        self.resblocks = nn.ModuleList(ResidualAttentionBlock(width, heads, causal, activation) for _ in range(layers))

    def forward(self, x: Tensor, depth: int | None = None) -> Tensor:
        """[B, L, D] -> [B, L, D] after the first `depth` blocks (all if None)."""
        for block in self.resblocks[:depth]:
            x = block(x)
        return x


class OpenCLIPText(nn.Module):
    """Text tower with OpenCLIP's key names (`token_embedding`, `transformer.resblocks.N`, `ln_final`, ...).

    Args:
        embed_dim: width of the space shared with images.
        width: D.
        heads: heads per block.
        layers: number of blocks.
        vocab_size: number of tokens.
        context_length: longest input.
        quick: quick GELU (OpenAI's own weights) instead of GELU.
    """

    def __init__(
        self,
        embed_dim: int,
        width: int,
        heads: int,
        layers: int,
        vocab_size: int = 49408,
        context_length: int = 77,
        quick: bool = False,
    ) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        self.transformer = Transformer(width, layers, heads, causal=True, quick=quick)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=width**-0.5)

    @property
    def layers(self) -> int:
        return len(self.transformer.resblocks)

    def features(self, tokens: Tensor, depth: int | None = None) -> Tensor:
        """[B, L] int64 -> [B, L, D] after `depth` blocks (all if None), no final norm."""
        length, limit = tokens.shape[1], len(self.positional_embedding)
        if length > limit:
            raise ValueError(f"got {length} tokens, expected at most {limit}")
        return self.transformer(self.token_embedding(tokens) + self.positional_embedding[:length], depth)

    def states(self, tokens: Tensor, depth: int) -> tuple[Tensor, Tensor]:
        """[B, L] -> outputs [B, L, D] of block `depth` and of the last one, in one pass, no final norm."""
        inner = self.features(tokens, depth)
        last = inner
        for block in self.transformer.resblocks[depth:]:
            last = block(last)
        return inner, last

    def pool(self, x: Tensor, tokens: Tensor) -> Tensor:
        """[B, L, D] after `ln_final` -> [B, embed_dim]: the row of the end token (the largest id), projected."""
        return x[torch.arange(len(x), device=x.device), tokens.argmax(-1)] @ self.text_projection

    def encode_text(self, tokens: Tensor) -> Tensor:
        """[B, L] -> [B, embed_dim], not normalised."""
        return self.pool(self.ln_final(self.features(tokens)), tokens)


class VisionTransformer(nn.Module):
    """CLIP's image tower (Dosovitskiy et al. 2021 with an extra norm before the blocks).

    Args:
        image_size: side of the input picture.
        patch_size: side of a patch.
        width: D.
        layers: number of blocks.
        embed_dim: width of the output.
        quick: quick GELU.
    """

    def __init__(
        self, image_size: int, patch_size: int, width: int, layers: int, embed_dim: int, quick: bool = True
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        scale = width**-0.5
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn((image_size // patch_size) ** 2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, width // 64, causal=False, quick=quick)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, embed_dim))

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, image_size, image_size], CLIP's mean and deviation taken out -> [B, embed_dim]."""
        x = self.conv1(x).flatten(2).transpose(1, 2)  # [B, patches, D]
        x = torch.cat((self.class_embedding.expand(len(x), 1, -1), x), dim=1)
        x = self.transformer(self.ln_pre(x + self.positional_embedding))
        return self.ln_post(x[:, 0]) @ self.proj


class CLIP(OpenCLIPText):
    """Both towers, keys as in OpenAI's checkpoints: text at the top level, images under `visual`.

    Args:
        vision: parameters of `VisionTransformer` but embed_dim and quick.
        text: parameters of `OpenCLIPText`.
    """

    def __init__(self, vision: dict[str, Any], text: dict[str, Any]) -> None:
        super().__init__(**text)
        self.visual = VisionTransformer(**vision, embed_dim=text["embed_dim"], quick=text.get("quick", False))

    @classmethod
    def from_name(cls, name: str) -> CLIP:
        """OpenAI's model by its own name (ViT-L/14, ViT-L/14@336px, ViT-B/32, ViT-B/16).

        Raises:
            ValueError: unknown name.
        """
        arch = name.replace("/", "-").replace("@336px", "-336")
        if arch not in VISION_ARCHS:
            raise ValueError(f"got CLIP model {name!r}, expected ViT-B/32, ViT-B/16, ViT-L/14 or ViT-L/14@336px")
        return cls(VISION_ARCHS[arch], {**text_arch(arch), "quick": True})

    def encode_image(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, embed_dim], not normalised."""
        return self.visual(x)
