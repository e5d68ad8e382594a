"""Tables of names: one row says what a module or tensor is called in both layouts, and how its tensors differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

NOT_WEIGHTS = ("position_ids",)  # constants that some files store; no table holds them


class Row(NamedTuple):
    """One module (all tensors below it) or one tensor.

    Attributes:
        official: its name in official files.
        theirs: its name in diffusers; three names where the official tensor is Q, K and V in one.
        kernel: trailing axes of size one that only the official weight has: it is a convolution there, linear here.
        heads: with three names, attention heads whose parts alternate along the first axis: Q, K, V of the first head,
            then of the second, ...; 1 = all of Q, all of K, all of V.
        transpose: a matrix that is multiplied from the other side.
    """

    official: str
    theirs: str | tuple[str, ...]
    kernel: int = 0
    heads: int = 1
    transpose: bool = False


def under(official: str, theirs: str, rows: Iterable[Row]) -> list[Row]:
    """The rows of a part, at a place in both models."""

    def place(name: str) -> str:
        return f"{theirs}.{name}" if name else theirs

    return [
        row._replace(
            official=f"{official}.{row.official}" if row.official else official,
            theirs=place(row.theirs) if isinstance(row.theirs, str) else tuple(place(n) for n in row.theirs),
        )
        for row in rows
    ]


def to_theirs(state: Mapping[str, Tensor], rows: Iterable[Row], prefix: str = "") -> tuple[dict[str, Tensor], set[str]]:
    """The tensors below `prefix` under diffusers' names, and the official names of those that no row covers."""
    table = {row.official: row for row in rows}
    out: dict[str, Tensor] = {}
    left: set[str] = set()
    for name, tensor in state.items():
        if not name.startswith(prefix):
            continue
        found = _longest(name.removeprefix(prefix), table)
        if found is None or name.endswith(NOT_WEIGHTS):
            left.add(name)
            continue
        row, rest = found
        names = (row.theirs,) if isinstance(row.theirs, str) else row.theirs
        out |= {n + rest: t for n, t in zip(names, _split(tensor, row), strict=True)}
    return out, left


def to_official(
    state: Mapping[str, Tensor], rows: Iterable[Row], prefix: str = ""
) -> tuple[dict[str, Tensor], set[str]]:
    """The inverse of `to_theirs`: tensors under official names, and diffusers' names that no row covers."""
    table = {n: row for row in rows for n in ((row.theirs,) if isinstance(row.theirs, str) else row.theirs)}
    out: dict[str, Tensor] = {}
    left: set[str] = set()
    for name, tensor in state.items():
        found = _longest(name, table)
        if found is None or name.endswith(NOT_WEIGHTS):
            left.add(name)
            continue
        row, rest = found
        if isinstance(row.theirs, str):
            out[prefix + row.official + rest] = _join((tensor,), row)
        elif name == row.theirs[0] + rest:  # the first of the three brings the others along
            parts = tuple(state[n + rest] for n in row.theirs if n + rest in state)
            if len(parts) == len(row.theirs):
                out[prefix + row.official + rest] = _join(parts, row)
            else:
                left.add(name)
    return out, left


def _longest(name: str, table: Mapping[str, Row]) -> tuple[Row, str] | None:
    """The row of the longest leading part of a dotted name, and what follows it."""
    end = len(name)
    while end > 0:
        if name[:end] in table:
            return table[name[:end]], name[end:]
        end = name.rfind(".", 0, end)
    return (table[""], name) if "" in table else None


def _split(t: Tensor, row: Row) -> tuple[Tensor, ...]:
    if row.kernel and t.ndim > 1:
        t = t.flatten(1)
    if row.transpose:
        t = t.T
    if isinstance(row.theirs, str):
        return (t,)
    return tuple(part.flatten(0, 1) for part in t.unflatten(0, (row.heads, 3, -1)).unbind(1))


def _join(parts: tuple[Tensor, ...], row: Row) -> Tensor:
    t = parts[0]
    if len(parts) > 1:
        t = torch.stack([p.unflatten(0, (row.heads, -1)) for p in parts], dim=1).flatten(0, 2)
    if row.transpose:
        t = t.T
    return t.reshape(*t.shape, *[1] * row.kernel) if row.kernel and t.ndim > 1 else t
