"""Causal attention over a row without padding, with its own backward, on the CPU: of each sequence
over itself, or of each node of a trie over its ancestors and itself (data/trie.py).

Three ways to the same numbers. `_Compiled` runs attention.cpp: bfloat16 on processors with
AVX512-BF16 or AMX; it never writes scores to memory and sums in float32. `_Blocks` serves every
other type and processor with torch's batched products on blocks of equal length, in which the
heads that share a key are rows of one product. There a row with ancestors goes through
varlen.py's attention, a node at a time.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.autograd import Function

from fastft.kernels import native
from fastft.kernels.kept import Normed, keep, kept
from fastft.kernels.varlen import trie_attention

Rotary = tuple[torch.Tensor, torch.Tensor]
"""cos and sin, each (T, dim)."""

NO_WINDOW = 2**40


def row_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rotary: Rotary | None,
    plan: RowPlan,
    dim: int,
    scale: float,
    window: int | None,
    normed: tuple[Normed | None, Normed | None] = (None, None),
) -> torch.Tensor:
    """Return softmax(scale q k^T) v for q (T, H dim), k and v (T, KV dim), all before rotation;
    (T, H dim).

    Position i of a sequence sees position j of the same sequence where 0 <= i - j < `window`
    (None: all before it). `normed`: what q and k are the norms of, a head a row.
    """
    compiled = native.attends(q.dtype, dim)
    if plan.shares and not compiled:
        return _by_node(q, k, v, rotary, plan, dim, scale, window)
    way = _Compiled if compiled else _Blocks
    how = _How(plan, dim, scale, NO_WINDOW if window is None else window, normed)
    return way.apply(q, k, v, rotary, how)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class RowPlan:
    """The nodes of a row, and their layout for `_Blocks`: each padded to a multiple of PAD
    positions.
    """

    nodes: torch.Tensor  # (nodes, 4) int64: start, length, first position, parent (-1: none)
    table: torch.Tensor  # (nodes, 4) int64: start, length, padded start, padded length
    # (padded start, how many, padded length) of neighbours of equal length
    groups: list[tuple[int, int, int]]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return int((self.nodes[:, 1] + self.nodes[:, 2]).max())

    @property
    def shares(self) -> bool:
        """Whether any node has an ancestor."""
        return bool((self.nodes[:, 3] >= 0).any())


class _How(NamedTuple):
    """What of `row_attention` is no tensor of it."""

    plan: RowPlan
    dim: int
    scale: float
    window: int
    normed: tuple[Normed | None, Normed | None]


PAD = 32  # few distinct shapes, so that oneDNN's generated kernels are used again
QUERY_BLOCK = 256  # queries of one product; keys behind them are not computed
KEEP_PROBABILITIES = (
    256  # up to this length the backward reads them instead of computing them again
)


def plan_row(boundaries: Any) -> RowPlan:
    """Return the layout of a row whose sequences lie between `boundaries` [0, ..., T]."""
    edges = np.asarray([int(b) for b in boundaries], dtype=np.int64)
    lengths = np.diff(edges)
    roots = [edges[:-1], lengths, np.zeros_like(lengths), np.full_like(lengths, -1)]
    return plan_nodes(torch.from_numpy(np.stack(roots, axis=1)))


def plan_nodes(nodes: torch.Tensor) -> RowPlan:
    """Return the layout of a row with these `nodes` (N, 4) int64, depth first; see RowPlan."""
    starts_in_row, lengths = nodes[:, 0].numpy(), nodes[:, 1].numpy()
    padded = -(-lengths // PAD) * PAD
    starts = np.concatenate([[0], np.cumsum(padded)[:-1]])
    table = torch.from_numpy(
        np.stack([starts_in_row, lengths, starts, padded], axis=1).astype(np.int64)
    ).contiguous()
    groups: list[tuple[int, int, int]] = []
    for start, length in zip(starts.tolist(), padded.tolist(), strict=True):
        if groups and groups[-1][2] == length:
            first, count, _ = groups[-1]
            groups[-1] = (first, count + 1, length)
        else:
            groups.append((start, 1, length))
    return RowPlan(nodes.contiguous(), table, groups)


# --- compiled


class _Compiled(Function):
    """Keeps q and k as they came or what they are the norms of, v, the output, and one float a row
    and head.
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rotary: Rotary | None,
        how: _How,
    ) -> torch.Tensor:  # fmt: skip
        ctx.what = (how.plan.nodes, how.dim, how.scale, how.window)
        out, lse = native.attention_forward(q, k, v, rotary, *ctx.what)
        keep(ctx, how.normed[0] or q, how.normed[1] or k, v, out, lse, *(rotary or ()))
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> Any:
        q, k, v, out, lse, *rest = kept(ctx)
        q, k = q.view(dout.shape), k.view(v.shape)
        rotary = (rest[0], rest[1]) if rest else None
        grads = native.attention_backward(dout.contiguous(), q, k, v, out, lse, rotary, *ctx.what)
        return (*grads, None, None)


# --- a node at a time


def _by_node(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rotary: Rotary | None,
    plan: RowPlan,
    dim: int,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """`row_attention` through varlen.py's attention over a trie."""
    q, k, v = (t.view(t.shape[0], -1, dim).transpose(0, 1)[None] for t in (q, k, v))
    if rotary is not None:
        cos, sin = rotary
        q, k = (t * cos + native.rotate_half(t) * sin for t in (q, k))
    out = trie_attention(q, k, v, plan.nodes, scaling=scale, sliding_window=window)
    return out.flatten(2)[0]


# --- blocks of torch's batched products


def _query_blocks(length: int, window: int) -> list[tuple[int, int, int]]:
    """Return (first query, end, first key) of the products that cover the causal triangle, or its
    band.
    """
    count = -(-length // QUERY_BLOCK)
    edges = [length * i // count // PAD * PAD for i in range(count)] + [length]
    return [(a, b, max(0, a - window + 1) // PAD * PAD) for a, b in itertools.pairwise(edges)]


class _Blocks(Function):
    """Keeps rotated q, k and v in blocks, and the attention weights of short sequences."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rotary: Rotary | None,
        how: _How,
    ) -> torch.Tensor:  # fmt: skip
        table, tokens = how.plan.table, q.shape[0]
        group = q.shape[1] // k.shape[1]
        wide = (k.shape[1] // how.dim, group, how.dim)
        narrow = (wide[0], 1, how.dim)
        packed_q = native.pack_heads(q, rotary, table, wide)
        packed_k = native.pack_heads(k, rotary, table, narrow)
        packed_v = native.pack_heads(v, None, table, narrow)
        out = torch.empty_like(packed_q)
        kept = []
        for at in how.plan.groups:
            qs, ks, vs, os = _views(at, wide, packed_q, packed_k, packed_v, out)
            for first, end, key in _query_blocks(at[2], how.window):
                p = _probabilities(qs, ks, (first, end, key), group, how)
                _into(os, first * group, end * group, p, vs[:, key:end])
                if at[2] <= KEEP_PROBABILITIES:
                    kept.append(p)
        ctx.save_for_backward(packed_q, packed_k, packed_v, *(rotary or ()), *kept)
        ctx.what = (rotary is not None, wide, tokens, how)
        return native.unpack_heads(out, None, table, wide, tokens)

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> Any:
        rotates, wide, tokens, how = ctx.what
        narrow, group, table = (wide[0], 1, how.dim), wide[1], how.plan.table
        packed_q, packed_k, packed_v, *rest = ctx.saved_tensors
        rotary = (rest.pop(0), rest.pop(0)) if rotates else None
        kept = iter(rest)
        packed_do = native.pack_heads(dout.contiguous(), None, table, wide)
        dq = torch.empty_like(packed_q)
        dk, dv = torch.zeros_like(packed_k), torch.zeros_like(packed_v)
        for at in how.plan.groups:
            qs, ks, vs, dos = _views(at, wide, packed_q, packed_k, packed_v, packed_do)
            dqs, dks, dvs, _ = _views(at, wide, dq, dk, dv, packed_do)
            for first, end, key in _query_blocks(at[2], how.window):
                rows = slice(first * group, end * group)
                if at[2] <= KEEP_PROBABILITIES:
                    p = next(kept)
                else:
                    p = _probabilities(qs, ks, (first, end, key), group, how)
                do = dos[:, rows]
                ds = torch.bmm(do, vs[:, key:end].transpose(1, 2))
                _add(dvs, key, end, p.transpose(1, 2), do)
                native.softmax_backward_(p, ds, how.scale)
                _into(dqs, rows.start, rows.stop, ds, ks[:, key:end])
                _add(dks, key, end, ds.transpose(1, 2), qs[:, rows])
        return (
            native.unpack_heads(dq, rotary, table, wide, tokens),
            native.unpack_heads(dk, rotary, table, narrow, tokens),
            native.unpack_heads(dv, None, table, narrow, tokens),
            None,
            None,
        )


def _views(
    at: tuple[int, int, int], heads: tuple[int, int, int], q: torch.Tensor, k: torch.Tensor,
    v: torch.Tensor, o: torch.Tensor,
) -> list[torch.Tensor]:  # fmt: skip
    """Return the blocks of one group of sequences: q, o (count kv, length group, dim), k, v (count
    kv, length, dim), where `heads` is (kv, group, dim).
    """
    (start, count, length), (kv, group, dim) = at, heads
    blocks = []
    for packed, of_key in ((q, group), (k, 1), (v, 1), (o, group)):
        width = kv * of_key * dim
        rows = packed[start * width : (start + count * length) * width]
        blocks.append(rows.view(count * kv, length * of_key, dim))
    return blocks


def _probabilities(
    q: torch.Tensor, k: torch.Tensor, block: tuple[int, int, int], group: int, how: _How
) -> torch.Tensor:
    """Return the attention weights of a `_query_blocks` block."""
    first, end, key = block
    p = torch.bmm(q[:, first * group : end * group], k[:, key:end].transpose(1, 2))
    native.softmax_forward_(
        p, group=group, first_query=first, first_key=key, window=how.window, scale=how.scale
    )
    return p


def _into(out: torch.Tensor, first: int, end: int, left: torch.Tensor, right: torch.Tensor) -> None:
    if end - first == out.shape[1]:
        torch.bmm(left, right, out=out)
    else:
        out[:, first:end] = torch.bmm(left, right)


def _add(out: torch.Tensor, first: int, end: int, left: torch.Tensor, right: torch.Tensor) -> None:
    if end - first == out.shape[1]:
        out.baddbmm_(left, right)
    else:
        out[:, first:end] += torch.bmm(left, right)
