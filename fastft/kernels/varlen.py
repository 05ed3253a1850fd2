"""Exact attention over a padding-free row: each sequence attends to itself alone.

Registered with transformers as an attention function. A row of T tokens holds several sequences;
their boundaries come in as `cu_seq_lens_q`, transformers' own keyword for it:

    tokens          a0 a1 a2 b0 b1 c0 c1 c2 c3
    position_ids     0  1  2  0  1  0  1  2  3
    cu_seq_lens_q   [0, 3, 5, 9]

A loop of causal attention calls beats one call with a block-diagonal mask, because nothing is
computed for pairs of different sequences (on 2 CPU cores by a factor of four). Sequences that share
beginnings are the paths of a trie, whose nodes come in as `trie_nodes` (data/trie.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from fastft.families import family_of

# The name must not contain "sdpa": transformers matches that substring and takes other paths.
NAME = "fastft_varlen"


def varlen_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | list[int] | None = None,
    trie_nodes: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Return (attention output (1, T, H, D), None) for query (1, H, T, D) and key, value (1, KV,
    T, D).

    `sliding_window` w lets position i see i-w+1 .. i; `softcap` c turns scores s into c tanh(s /
    c) (gemma2); `s_aux` (H,) are gpt-oss' sinks, one extra logit a head that takes probability and
    gives nothing. The row's sequences lie between `cu_seq_lens_q`, or are the paths of
    `trie_nodes`.
    """
    assert query.shape[0] == 1, "a padding-free batch is one row"
    if trie_nodes is None:
        if cu_seq_lens_q is None:  # StableLM's layers pass nothing on; the look at rows says so
            raise RuntimeError("the family's layers do not pass on where a row's sequences begin")
        starts = [int(start) for start in cu_seq_lens_q]
        trie_nodes = torch.tensor([(a, b - a, 0, -1) for a, b in pairwise(starts)])
    out = trie_attention(
        query,
        key,
        value,
        trie_nodes,
        scaling=scaling,
        sliding_window=sliding_window,
        softcap=softcap,
        s_aux=s_aux,
        dropout=dropout,
    )
    return out, None


def trie_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    nodes: torch.Tensor,
    *,
    scaling: float | None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Return (1, T, H, D): each node of a row over its ancestors and causally over itself.

    `nodes` (N, 4) int64, depth first: start in the row, length, position of the first token in its
    sequences, parent (-1: none). Keywords as in `varlen_attention`.
    """
    groups = query.shape[1] // key.shape[1]
    table: list[list[int]] = nodes.tolist()
    outputs: list[torch.Tensor] = []
    for start, length, position, _ in table:
        own = slice(start, start + length)
        before = _ancestors(table, len(outputs))
        if before and sliding_window is not None:
            before = _inside(before, position, sliding_window)
        q = query[:, :, own]  # (1, H, L, D)
        k, v = (
            torch.cat([*(t[:, :, part] for part in before), t[:, :, own]], dim=2)
            if before
            else t[:, :, own]
            for t in (key, value)
        )
        k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
        keys = k.shape[2]
        window = sliding_window if sliding_window is not None and sliding_window < keys else None
        if softcap is None and s_aux is None:
            causal = window is None and not before
            mask = None if causal else _window_mask(length, keys, window, q.device)
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scaling
            )
        else:
            out = _explicit_attention(q, k, v, scaling, window, softcap, s_aux, dropout)
        outputs.append(out)
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def _ancestors(table: list[list[int]], node: int) -> list[slice]:
    """Return the stretches of the row that `node` sees whole, the root's first: its sequences'
    tokens before it.
    """
    found = []
    while (node := table[node][3]) >= 0:
        found.append(slice(table[node][0], table[node][0] + table[node][1]))
    return found[::-1]


def _inside(before: list[slice], position: int, window: int) -> list[slice]:
    """Return what of `before`, the stretches of positions 0 to `position`, any query from
    `position` on sees: those after position - window.
    """
    hidden, kept = max(0, position - window + 1), []
    for part in before:
        first = min(part.start + hidden, part.stop)
        hidden -= first - part.start
        if first < part.stop:
            kept.append(slice(first, part.stop))
    return kept


def _window_mask(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Return (queries, keys) bool: True where position i may see position j, that is 0 <= i - j <
    window; the queries are the last positions of the keys.
    """
    positions = torch.arange(keys, device=device)
    distance = positions[keys - queries :, None] - positions[None, :]
    return (distance >= 0) & (distance < (window or keys))


def _explicit_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    s_aux: torch.Tensor | None,
    dropout: float,
) -> torch.Tensor:
    """Written-out attention for what SDPA cannot do (softcaps, sinks), in the families' own order
    of operations.
    """
    # (1, H, L, L)
    scores = (q @ k.transpose(-1, -2)) * (scaling if scaling is not None else q.shape[-1] ** -0.5)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    allowed = _window_mask(q.shape[2], k.shape[2], window, q.device)
    scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    if s_aux is not None:
        sinks = s_aux.reshape(1, -1, 1, 1).expand(1, -1, q.shape[2], 1).to(scores.dtype)
        scores = torch.cat([scores, sinks], dim=-1)
        # as gpt-oss does, against overflow
        scores = scores - scores.max(dim=-1, keepdim=True).values
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    weights = weights[..., : k.shape[2]]  # the sink's share is dropped
    return F.dropout(weights, p=dropout, training=dropout > 0) @ v


def is_known_family(model: Any) -> bool:
    """Return whether tests hold this family's padding-free rows to the padded gradient (CPU).

    Its attention needs nothing but scaling, sliding_window, softcap and s_aux. Any other family is
    looked at before it is trusted, because an ignored keyword is wrong without any message.
    """
    return family_of(text_config(model).model_type).rows == "exact"


def text_config(model: Any) -> Any:
    """Return the config of the language model (the inner one of a multimodal checkpoint)."""
    return model.config.get_text_config()


def rope_changes_at(model: Any) -> int | None:
    """Return the most tokens of a sequence for which `model` takes its first set of rope
    frequencies, where a longer one makes it take the second for its whole batch; None for others.

    That is longrope (arXiv 2402.13753, as transformers has it): Phi-3's variants for long contexts.
    """
    config = text_config(model)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    found = rope.get("original_max_position_embeddings") or getattr(
        config, "original_max_position_embeddings", None
    )
    return int(found) if found else None


@contextlib.contextmanager
def padding_free(model: Any) -> Iterator[None]:
    """Inside, `model` attends by `cu_seq_lens_q`; afterwards by what it had before (generation
    needs that).
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, varlen_attention)
    AttentionMaskInterface.register(NAME, _no_mask)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = inner.config._attn_implementation
    inner.set_attn_implementation(NAME)
    try:
        yield
    finally:
        inner.set_attn_implementation(before)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Transformers asks for a mask here; the boundaries make it needless."""
    return None
