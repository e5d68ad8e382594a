"""Drawing tokens from a transformer one by one: temperature, top-k, top-p, guidance, a part given before."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.modules.gpt import Cache, Transformer

Progress = Callable[[int, Tensor], None]


def check_filters(n: int, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None) -> None:
    """Raises ValueError for a filter that makes no sense over `n` tokens."""
    if temperature < 0:
        raise ValueError(f"temperature: got {temperature}, expected 0 (the most probable token) or more")
    if top_k is not None and not (isinstance(top_k, int) and 1 <= top_k <= n):
        raise ValueError(f"top_k: got {top_k}, expected 1 to {n}, the number of tokens to choose from")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: got {top_p}, expected a probability above 0")


def filter_logits(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Logits [..., n] divided by the temperature, -inf where a token may not be drawn.

    Args:
        temperature: above 0.
        top_k: only the k most probable tokens (and those that tie with the last of them).
        top_p: of these only the most probable ones that together reach probability p (Holtzman et al. 2020).

    Raises:
        ValueError: top_k above the number of tokens, or another value that makes no sense.
    """
    check_filters(logits.shape[-1], temperature, top_k, top_p)
    if temperature != 1.0:
        logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, -1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None and top_p < 1:
        values, order = torch.sort(logits, dim=-1, descending=True, stable=True)
        p = values.softmax(-1, dtype=torch.float64)
        enough = p.cumsum(-1) - p >= top_p  # those before it reach p already
        logits = logits.masked_fill(torch.zeros_like(enough).scatter(-1, order, enough), -torch.inf)
    return logits


def draw(logits: Tensor, u: Tensor) -> Tensor:
    """Logits [B, n] and uniform numbers [B] in [0, 1) -> tokens int64 [B], by the inverse of the distribution function.

    One number per row, so that a row's tokens do not depend on the rows beside it.
    """
    cdf = logits.softmax(-1, dtype=torch.float64).cumsum(-1)
    place = u.to(cdf).unsqueeze(-1) * cdf[:, -1:]
    return torch.searchsorted(cdf, place, right=True).squeeze(-1).clamp_max(logits.shape[-1] - 1)


def choose(logits: Tensor, u: Tensor | None, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """Logits [B, n] -> tokens [B]; the most probable ones without random numbers or at temperature 0."""
    if u is None or temperature == 0:
        return logits.argmax(-1)
    return draw(filter_logits(logits, temperature, top_k, top_p), u)


def _given(prefix: Tensor, primed: Tensor | None, steps: int) -> tuple[Tensor, int]:
    """(tokens [B, steps] with -1 where they are to be drawn, how many at the beginning are given in all rows)."""
    if prefix.shape[1] == 0:
        raise ValueError("prefix: got no tokens, expected at least one to start from")
    tokens = prefix.new_full((len(prefix), steps), -1)
    if primed is not None:
        tokens[:, : primed.shape[1]] = primed[:, :steps]
    return tokens, int((tokens >= 0).all(0).long().cumprod(0).sum())


@torch.no_grad()
def generate(
    model: Transformer,
    prefix: Tensor,
    steps: int,
    *,
    u: Tensor | None = None,
    uncond: Tensor | None = None,
    scale: float = 1.0,
    primed: Tensor | None = None,
    first: int = 0,
    last: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    image_start: int | None = None,
    end: int | None = None,
    callback: Progress | None = None,
) -> Tensor:
    """Tokens that go on where `prefix` ends: int64 [B, steps], counted from `first`.

    Args:
        model: in eval mode.
        prefix: [B, T] with T at least 1.
        steps: tokens to make, the primed ones included.
        u: uniform numbers [B, steps] in [0, 1); None takes the most probable tokens.
        uncond, scale: prefix [B, T] without the condition, and guidance: logits u + scale (c - u) (Ho & Salimans 2022).
        primed: [B, P] tokens (counted from `first`) that are given; -1 is to be drawn.
        first, last: the range of the vocabulary that tokens are drawn from.
        temperature, top_k, top_p: see `filter_logits`; temperature 0 takes the most probable tokens.
        image_start: see `Transformer.features`.
        end: the token (counted from `first`) that ends a sequence: it fills the rest once all sequences are ended.
        callback: called with (number of tokens, tokens [B, number]) after each token.

    Raises:
        ValueError: sequence over the position table, empty prefix, or filters that make no sense.
    """
    check_filters((model.vocab_size if last is None else last) - first, temperature, top_k, top_p)
    tokens, begun = _given(prefix, primed, steps)
    known, T = tokens >= 0, prefix.shape[1]
    guided = uncond is not None and scale != 1.0
    starts = [prefix, uncond] if guided else [prefix]
    new = torch.cat([torch.cat([start, tokens[:, :begun] + first], 1) for start in starts])
    cache = Cache(model, len(new), T + steps - 1)
    for i in range(begun, steps):
        logits = model.logits(model.features(new, cache=cache, image_start=image_start)[:, -1], first, last)
        if guided:
            c, n = logits.chunk(2)
            logits = n + scale * (c - n)
        drawn = choose(logits, None if u is None else u[:, i], temperature, top_k, top_p)
        tokens[:, i] = drawn if primed is None else torch.where(known[:, i], tokens[:, i], drawn)
        if end is not None and bool((tokens[:, : i + 1] == end).any(1).all()):
            tokens[:, i + 1 :] = end
            break
        new = tokens[:, i : i + 1] + first
        if guided:
            new = torch.cat([new, new])
        if callback is not None:
            callback(i + 1, tokens[:, : i + 1])
    return tokens
