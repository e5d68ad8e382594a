"""The diffusion transformer (DiT, Peebles & Xie 2023), with cross-attention to a text where there is one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.classifiers.transformer import MultiHeadAttention
from ldm.modules.layers import timestep_embedding

MAX_PERIOD = 100  # of the positions: grids are small


def grid_positions(height: int, width: int, dim: int) -> Tensor:
    """Sines and cosines of row and column, [height * width, dim] in [-1, 1], so that any size of grid has its own.

    Raises:
        ValueError: dim is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"dim: got {dim}, expected a multiple of 4")
    rows, columns = (timestep_embedding(torch.arange(n), dim // 2, MAX_PERIOD) for n in (height, width))
    both = torch.cat([rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)], dim=-1)
    return both.flatten(0, 1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """[B, L, D], shift and scale [B, D]."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


class DiTBlock(nn.Module):
    """Self-attention and a feed-forward part, both shifted, scaled and gated by the time (adaLN-Zero, section 3.2);
    between them attention to the text, which starts at zero too.

    Args:
        dim: of the tokens.
        heads: of each attention.
        mlp_ratio: hidden units of the feed-forward part as a multiple of `dim`.
        context_dim: of the text's tokens; None = there is no text.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: float = 4.0, context_dim: int | None = None) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.attn = MultiHeadAttention(dim, heads)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU("tanh"), nn.Linear(hidden, dim))
        self.modulation = nn.Linear(dim, 6 * dim)
        zeroed = [self.modulation]
        self.cross: MultiHeadAttention | None = None
        if context_dim is not None:
            self.norm_cross = nn.LayerNorm(dim, eps=1e-6)
            self.to_context = nn.Linear(context_dim, dim) if context_dim != dim else nn.Identity()
            self.cross = MultiHeadAttention(dim, heads)
            zeroed.append(self.cross.out_proj)
        for layer in zeroed:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, time: Tensor, context: Tensor | None) -> Tensor:
        """x [B, L, dim], time [B, dim] (after its SiLU), context [B, M, context_dim] -> [B, L, dim]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(time).chunk(6, dim=-1)
        x = torch.addcmul(x, gate1[:, None], self.attn(modulate(self.norm1(x), shift1, scale1)))
        if self.cross is not None:
            x = x + self.cross(self.norm_cross(x), self.to_context(context))
        return torch.addcmul(x, gate2[:, None], self.mlp(modulate(self.norm2(x), shift2, scale2)))


class DiT(nn.Module):
    """Patches of latents as tokens, transformer blocks, patches again; takes the place of `UNetModel` in any config.

    Args:
        image_size: of the latents the model is trained on; others work too, if patch_size divides them.
        in_channels: of the latents, and of maps beside them.
        out_channels: None = in_channels.
        patch_size: latents of p x p squares are one token (table 4: smaller is better, and dearer).
        hidden_size: width of the tokens.
        depth: blocks.
        num_heads: of the attention.
        mlp_ratio: of the feed-forward parts.
        context_dim: of the text's tokens, whose first is also added to the time; None = no text.
        num_classes: rows of the class table, the null class included; None = no classes.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        out_channels: int | None = None,
        patch_size: int = 2,
        hidden_size: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        context_dim: int | None = None,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        self.image_size, self.in_channels = image_size, in_channels
        self.out_channels = in_channels if out_channels is None else out_channels
        self.patch_size, self.hidden_size = patch_size, hidden_size
        self.embed = nn.Linear(in_channels * patch_size**2, hidden_size)
        self.time = nn.Sequential(nn.Linear(256, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))
        self.label = nn.Embedding(num_classes, hidden_size) if num_classes is not None else None
        self.text = nn.Linear(context_dim, hidden_size) if context_dim is not None else None
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, mlp_ratio, context_dim) for _ in range(depth))
        self.norm_out = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.modulation_out = nn.Linear(hidden_size, 2 * hidden_size)
        self.out = nn.Linear(hidden_size, self.out_channels * patch_size**2)
        for layer in (self.modulation_out, self.out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        """x [B, in_channels, H, W], timesteps [B] in [0, 1000], context [B, M, context_dim], y int64 [B] ->
        [B, out_channels, H, W].

        Raises:
            ValueError: patch_size does not divide H and W, or a condition is missing.
        """
        B, _, H, W = x.shape
        p = self.patch_size
        if H % p or W % p:
            raise ValueError(f"DiT: got latents of {H}x{W}, expected multiples of patch_size {p}")
        time = self._time(timesteps, context, y).to(x.dtype)
        tokens = F.pixel_unshuffle(x, p).flatten(2).transpose(1, 2)  # [B, H W / p^2, C p^2]
        positions = grid_positions(H // p, W // p, self.hidden_size).to(x)
        h = self.embed(tokens) + positions
        for block in self.blocks:
            h = block(h, time, context)
        shift, scale = self.modulation_out(time).chunk(2, dim=-1)
        h = self.out(modulate(self.norm_out(h), shift, scale))
        return F.pixel_shuffle(h.transpose(1, 2).reshape(B, -1, H // p, W // p), p)

    def _time(self, timesteps: Tensor, context: Tensor | None, y: Tensor | None) -> Tensor:
        """Time, class and text as one vector [B, hidden_size]."""
        dtype = self.embed.weight.dtype
        out = self.time(timestep_embedding(timesteps, 256).to(dtype))
        for name, part, value in (("y", self.label, y), ("context", self.text, context)):
            if part is not None:
                if value is None:
                    raise ValueError(f"DiT: got no {name}, expected one (the config names conditions)")
                out = out + part(value if name == "y" else value[:, 0])
        return F.silu(out)
