"""One decoder-only transformer for sequences of text and image tokens.

Blocks and key names of minGPT, as taming-transformers uses it (Radford et al. 2019; Esser et al. 2021); sparse masks of
DALL-E (Ramesh et al. 2021, figure 11); Sandwich-LN and the precision-bottleneck relaxations of CogView (Ding et al.
2021, section 2.4); rotary positions (Su et al. 2021).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.modules import sdpa
from ldm.modules.matmul import Linear, Packed, linear
from ldm.modules.sequence import Layout

POSITIONS = ("learned", "axial", "rotary")
RELAXATION = 32.0  # CogView's alpha


class ScaledLayerNorm(nn.LayerNorm):
    """LayerNorm(x / (max |x| / 8)), which is LayerNorm(x) with sums that fit into float16 (CogView's PB-relaxation).

    The maximum is each token's own, so that a token does not depend on its batch.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (torch's name)
        largest = input.detach().abs().amax(-1, keepdim=True).clamp_min(torch.finfo(input.dtype).tiny * 8)
        return super().forward(input / (largest / 8))


def stable_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0, alpha: float = RELAXATION
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v with scores divided by alpha until their maximum is subtracted (CogView, equation 5).

    q [B, H, n, d], k and v [B, H, m, d], mask bool [n, m] or None -> [B, H, n, d].
    """
    scores = (q / (alpha * q.shape[-1] ** 0.5)) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    scores = (scores - scores.detach().amax(-1, keepdim=True)) * alpha
    wide = torch.promote_types(scores.dtype, torch.float32)
    p = F.dropout(scores.softmax(-1, dtype=wide).to(v.dtype), dropout)
    return p @ v


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """[B, H, n, d] turned by the angles whose cosines and sines [n, d / 2] are given."""
    cos, sin = rotary
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class Cache:
    """Keys and values of the tokens that a model has seen, and each layer's products, packed for many calls.

    Args:
        model: the transformer; its weights must not change while the cache is in use.
        batch: sequences.
        length: tokens to make room for.
    """

    def __init__(self, model: Transformer, batch: int, length: int) -> None:
        model.check_length(length)
        like, layers = model.tok_emb.weight, len(model.blocks)
        shape = (2, batch, model.n_head, length, like.shape[1] // model.n_head)
        self.room = [torch.zeros(shape, device=like.device, dtype=like.dtype) for _ in range(layers)]
        self.length = 0
        with torch.no_grad():
            self.products = [block.products(batch) for block in model.blocks]

    def extend(self, layer: int, kv: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Writes k and v [2, B, H, n, d] of new tokens; gives those of all tokens, or of the places `seen` [m]."""
        n = kv.shape[3]
        room = self.room[layer]
        room.narrow(3, self.length, n).copy_(kv)
        k, v = (room.narrow(3, 0, self.length + n) if seen is None else room.index_select(3, seen)).unbind(0)
        return k, v


class CausalSelfAttention(nn.Module):
    def __init__(self, n_embd: int, n_head: int, attn_pdrop: float, resid_pdrop: float, stable: bool) -> None:
        super().__init__()
        self.n_head, self.dropout, self.stable = n_head, attn_pdrop, stable
        self.key = Linear(n_embd, n_embd)
        self.query = Linear(n_embd, n_embd)
        self.value = Linear(n_embd, n_embd)
        self.resid_drop = nn.Dropout(resid_pdrop)
        self.proj = Linear(n_embd, n_embd)

    def fused(self) -> tuple[Tensor, Tensor]:
        """Weight [3 n_embd, n_embd] and bias of query, key and value together: one product instead of three."""
        layers = (self.query, self.key, self.value)
        return torch.cat([m.weight for m in layers]), torch.cat([m.bias for m in layers])

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        rotary: tuple[Tensor, Tensor] | None = None,
        cache: Cache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """x [B, n, C] -> [B, n, C].

        mask: bool [n, all tokens]; None = causal (with a cache: one new token); int64 [m] = the places that one new
        token sees.
        """
        B, n, C = x.shape
        qkv = linear(x, *self.fused()) if cache is None else cache.products[layer]["qkv"](x)
        qkv = qkv.view(B, n, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        if cache is not None:
            seen = None
            if mask is not None and mask.ndim == 1:
                seen, mask = mask, None
            k, v = cache.extend(layer, qkv[1:] if rotary is None else torch.stack([k, v]), seen)
        dropout = self.dropout if self.training else 0.0
        if self.stable and q.dtype == torch.float16:  # the same numbers; other types reach as far as the kernel needs
            y = stable_attention(q, k, v, mask, dropout)
        else:
            causal = mask is None and n > 1
            y = sdpa.attention(q, k, v, mask, dropout, causal)
        y = y.transpose(1, 2).reshape(B, n, C)
        return self.resid_drop(self.proj(y)) if cache is None else cache.products[layer]["proj"](y)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); Sandwich-LN also normalises what is added."""

    def __init__(
        self,
        n_embd: int,
        n_head: int,
        attn_pdrop: float,
        resid_pdrop: float,
        stable: bool,
        scaled_norm: bool,
        sandwich: bool,
    ) -> None:
        super().__init__()
        norm = ScaledLayerNorm if scaled_norm else nn.LayerNorm
        self.ln1, self.ln2 = norm(n_embd), norm(n_embd)
        self.ln3, self.ln4 = (norm(n_embd), norm(n_embd)) if sandwich else (nn.Identity(), nn.Identity())
        self.attn = CausalSelfAttention(n_embd, n_head, attn_pdrop, resid_pdrop, stable)
        self.mlp = nn.Sequential(
            Linear(n_embd, 4 * n_embd), nn.GELU(), Linear(4 * n_embd, n_embd), nn.Dropout(resid_pdrop)
        )

    def products(self, rows: int) -> dict[str, Packed]:
        """The block's four products for inputs of so many rows, as long as the weights do not change."""
        up, _, down, _ = self.mlp
        return {
            "qkv": Packed(*self.attn.fused(), rows),
            "proj": Packed(self.attn.proj.weight, self.attn.proj.bias, rows),
            "up": Packed(up.weight, up.bias, rows, gelu=True),
            "down": Packed(down.weight, down.bias, rows),
        }

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        rotary: tuple[Tensor, Tensor] | None = None,
        cache: Cache | None = None,
        layer: int = 0,
    ) -> Tensor:
        x = x + self.ln3(self.attn(self.ln1(x), mask, rotary, cache, layer))
        if cache is None:
            return x + self.ln4(self.mlp(self.ln2(x)))
        products = cache.products[layer]
        return x + self.ln4(products["down"](products["up"](self.ln2(x))))


class Transformer(nn.Module):
    """Tokens -> logits of the next token.

    Args:
        vocab_size: tokens, of text and image together.
        block_size: longest sequence.
        n_layer, n_head, n_embd: depth, heads, width.
        embd_pdrop, resid_pdrop, attn_pdrop: dropout of embeddings, of what blocks add, of attention.
        n_unmasked: the first so many tokens see each other in both directions.
        positions: learned (a table); axial (learned rows and columns in the image, a table elsewhere); rotary (rows and
            columns each turn half of a head).
        grid: [height, width] of the image in tokens; axial positions and sparse masks need it.
        image_start: place of its first token.
        attention: full | row | column | conv, repeated over the layers. Sparse layers see all tokens outside the image,
            and of the image those before in the row, in the column, or within a window.
        kernel_size: side of the window of conv.
        sandwich_norm, scaled_norm, stable_attention: CogView's measures against overflow in float16.
        tie_weights: the token table is the last layer's matrix too.
        use_checkpoint: recompute each block in the backward pass.

    Raises:
        ValueError: unknown option, or sizes that do not fit together.
    """

    def __init__(
        self,
        vocab_size: int,
        block_size: int,
        n_layer: int = 12,
        n_head: int = 8,
        n_embd: int = 256,
        embd_pdrop: float = 0.0,
        resid_pdrop: float = 0.0,
        attn_pdrop: float = 0.0,
        n_unmasked: int = 0,
        positions: str = "learned",
        grid: Sequence[int] | None = None,
        image_start: int = 0,
        attention: str | Sequence[str] = "full",
        kernel_size: int = 11,
        sandwich_norm: bool = False,
        scaled_norm: bool = False,
        stable_attention: bool = False,
        tie_weights: bool = False,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.layout = Layout(block_size, image_start, *(grid or (0, 0)))
        kinds = [attention] if isinstance(attention, str) else list(attention)
        self.kinds = [kinds[i % len(kinds)] for i in range(n_layer)]
        self.vocab_size, self.block_size, self.n_head = vocab_size, block_size, n_head
        self.n_unmasked, self.kernel_size, self.positions = n_unmasked, kernel_size, positions
        self.stable, self.use_checkpoint = stable_attention, use_checkpoint
        self._check(n_embd)
        self.tok_emb = nn.Embedding(vocab_size, n_embd)
        self._add_positions(n_embd)
        self.drop = nn.Dropout(embd_pdrop)
        self.blocks = nn.ModuleList(
            Block(n_embd, n_head, attn_pdrop, resid_pdrop, stable_attention, scaled_norm, sandwich_norm)
            for _ in range(n_layer)
        )
        self.ln_f = (ScaledLayerNorm if scaled_norm else nn.LayerNorm)(n_embd)
        self.head = None if tie_weights else nn.Linear(n_embd, vocab_size, bias=False)
        self._tables: dict[tuple[object, ...], Tensor] = {}
        self.apply(_initialise)

    def _check(self, n_embd: int) -> None:
        if n_embd % self.n_head:
            raise ValueError(f"n_embd: got {n_embd}, expected a multiple of n_head ({self.n_head})")
        if self.positions not in POSITIONS:
            raise ValueError(f"positions: got {self.positions!r}, expected one of {', '.join(POSITIONS)}")
        step = 4 if self.layout.height else 2
        if self.positions == "rotary" and n_embd // self.n_head % step:
            raise ValueError(f"rotary positions: got heads of {n_embd // self.n_head}, expected a multiple of {step}")
        sparse = sorted(set(self.kinds) - {"full"})
        if (sparse or self.positions == "axial") and not self.layout.height:
            raise ValueError(f"{' '.join(sparse) or 'axial'}: got no grid, expected [height, width] of the image")
        for kind in self.kinds:
            self.layout.check_kind(kind)

    def _add_positions(self, n_embd: int) -> None:
        outside = self.block_size - (self.layout.area if self.positions == "axial" else 0)
        if self.positions != "rotary":
            self.pos_emb = nn.Parameter(torch.zeros(1, outside, n_embd))
        if self.positions == "axial":
            self.row_emb = nn.Parameter(0.02 * torch.randn(self.layout.height, n_embd))
            self.column_emb = nn.Parameter(0.02 * torch.randn(self.layout.width, n_embd))

    # --- places and masks ---------------------------------------------------------------------------------------------

    def check_length(self, length: int) -> None:
        """Raises ValueError for a sequence longer than the position table."""
        if length > self.block_size:
            raise ValueError(f"sequence: got {length} tokens, expected at most {self.block_size} (block_size)")

    def _table(self, name: str, layout: Layout, like: Tensor) -> Tensor:
        """A table of the layout on the device of `like`, made once."""
        dtype = like.dtype if name == "angles" else None
        key = (name, layout, like.device, dtype)
        if key not in self._tables:
            with torch.device("cpu"):  # whatever the default device is
                if name == "angles":
                    table = layout.angles(like.shape[-1] // self.n_head)
                    table = torch.stack([table.cos(), table.sin()]).to(dtype)
                elif name == "places":
                    table = layout.places()
                else:
                    table = layout.mask(name, self.kernel_size, self.n_unmasked)
            self._tables[key] = table.to(like.device)
        return self._tables[key]

    def _positions(self, layout: Layout, start: int, stop: int, like: Tensor) -> Tensor:
        """Position embeddings [1, stop - start, n_embd]."""
        if self.positions == "learned":
            return self.pos_emb[:, start:stop]
        outside, row, column = self._table("places", layout, like)[start:stop].unbind(1)
        image = self.row_emb[row] + self.column_emb[column]
        if self.pos_emb.shape[1] == 0:
            return image[None]
        inside = (outside < 0)[:, None]
        return torch.where(inside, image, self.pos_emb[0, outside.clamp_min(0)])[None]

    def _mask(self, kind: str, layout: Layout, start: int, stop: int, like: Tensor) -> Tensor | None:
        """bool [stop - start, stop]; None where the attention needs none; the places int64 [m] that one token sees."""
        one, whole = stop - start == 1, start == 0
        if kind == "full" and (one or (whole and not self.n_unmasked and not self.stable)):
            return None
        mask = self._table(kind, layout, like)[start:stop, :stop]
        # far fewer keys than there are: the last token of a picture then takes no longer than the first one
        return mask[0].nonzero().flatten() if one and not whole else mask

    # --- passes -------------------------------------------------------------------------------------------------------

    def features(
        self,
        idx: Tensor,
        *,
        cache: Cache | None = None,
        image_start: int | None = None,
        embeddings: Tensor | None = None,
    ) -> Tensor:
        """Tokens [B, n] (those after the cached ones) -> the last layer's vectors [B, n, n_embd].

        Args:
            idx: int64.
            cache: of the tokens before; grows by n. There are no gradients then.
            image_start: place of the image, where it is not where the constructor put it.
            embeddings: [B, m, n_embd], vectors that stand before the tokens.

        Raises:
            ValueError: sequence over the position table.
        """
        if cache is not None and torch.is_grad_enabled():
            with torch.no_grad():
                return self.features(idx, cache=cache, image_start=image_start, embeddings=embeddings)
        x = self.tok_emb(idx)
        if embeddings is not None:
            x = torch.cat([embeddings, x], 1)
        start = 0 if cache is None else cache.length
        stop = start + x.shape[1]
        self.check_length(stop)
        if 0 < stop < self.n_unmasked and cache is not None:
            raise ValueError(f"cache: got {stop} first tokens, expected all {self.n_unmasked} unmasked ones at once")
        layout = self.layout if image_start is None else self.layout.moved(image_start)
        rotary = None
        if self.positions == "rotary":
            cos, sin = self._table("angles", layout, x)[:, start:stop]
            rotary = (cos, sin)
        else:
            x = x + self._positions(layout, start, stop, x)
        x = self.drop(x)
        masks = {kind: self._mask(kind, layout, start, stop, x) for kind in set(self.kinds)}
        for i, (kind, block) in enumerate(zip(self.kinds, self.blocks, strict=True)):
            if self.use_checkpoint and self.training and cache is None:
                x = checkpoint(block, x, masks[kind], rotary, use_reentrant=False)
            else:
                x = block(x, masks[kind], rotary, cache, i)
        if cache is not None:
            cache.length = stop
        return self.ln_f(x)

    def logits(self, features: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Vectors [..., n_embd] -> logits of the tokens start..stop, [..., stop - start]."""
        weight = self.tok_emb.weight if self.head is None else self.head.weight
        return linear(features, weight if start == 0 and stop is None else weight[start:stop])

    def forward(
        self, idx: Tensor, embeddings: Tensor | None = None, targets: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens [B, n] -> (logits [B, n, vocab_size], cross-entropy [] with `targets` [B, n], else None)."""
        logits = self.logits(self.features(idx, embeddings=embeddings))
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss


class GPT(Transformer):
    """minGPT as taming-transformers has it: learned positions, full attention, and its state-dict keys.

    Args: as for `Transformer`.
    """

    def __init__(
        self,
        vocab_size: int,
        block_size: int,
        n_layer: int = 12,
        n_head: int = 8,
        n_embd: int = 256,
        embd_pdrop: float = 0.0,
        resid_pdrop: float = 0.0,
        attn_pdrop: float = 0.0,
        n_unmasked: int = 0,
    ) -> None:
        super().__init__(
            vocab_size, block_size, n_layer, n_head, n_embd, embd_pdrop, resid_pdrop, attn_pdrop, n_unmasked
        )
        mask = torch.tril(torch.ones(block_size, block_size))
        mask[:n_unmasked, :n_unmasked] = 1
        for block in self.blocks:  # one tensor for all layers: official files hold it, nothing reads it
            block.attn.register_buffer("mask", mask[None, None])


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
