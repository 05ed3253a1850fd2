"""Exact attention over a padding-free row: each sequence attends to itself alone.

Registered with transformers as an attention function. A row of T tokens holds several sequences;
their boundaries come in as `cu_seq_lens_q`, transformers' own keyword for it:

    tokens          a0 a1 a2 b0 b1 c0 c1 c2 c3
    position_ids     0  1  2  0  1  0  1  2  3
    cu_seq_lens_q   [0, 3, 5, 9]

A loop of causal attention calls beats one call with a block-diagonal mask, because nothing is
computed for pairs of different sequences (on 2 CPU cores by a factor of four).
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
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Return (attention output (1, T, H, D), None) for query (1, H, T, D) and key, value (1, KV,
    T, D).

    `sliding_window` w lets position i see i-w+1 .. i; `softcap` c turns scores s into c tanh(s /
    c) (gemma2); `s_aux` (H,) are gpt-oss' sinks, one extra logit a head that takes probability and
    gives nothing.
    """
    assert query.shape[0] == 1, "a padding-free batch is one row"
    assert cu_seq_lens_q is not None, "a padding-free row needs its sequence boundaries"
    groups = query.shape[1] // key.shape[1]
    starts = [int(start) for start in cu_seq_lens_q]
    outputs = []
    for start, end in pairwise(starts):
        q = query[:, :, start:end]  # (1, H, L, D)
        k, v = (t[:, :, start:end].repeat_interleave(groups, dim=1) for t in (key, value))
        window = (
            sliding_window if sliding_window is not None and sliding_window < end - start else None
        )
        if softcap is None and s_aux is None:
            mask = None if window is None else _window_mask(end - start, window, q.device)
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling
            )
        else:
            out = _explicit_attention(q, k, v, scaling, window, softcap, s_aux, dropout)
        outputs.append(out)
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _window_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Return (L, L) bool: True where position i may see position j, that is 0 <= i - j < window."""
    distance = (
        torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None, :]
    )
    return (distance >= 0) & (distance < (window or length))


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
    scores = (q @ k.transpose(-1, -2)) * (
        scaling if scaling is not None else q.shape[-1] ** -0.5
    )  # (1, H, L, L)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    allowed = _window_mask(q.shape[2], window, q.device)
    scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    if s_aux is not None:
        sinks = s_aux.reshape(1, -1, 1, 1).expand(1, -1, q.shape[2], 1).to(scores.dtype)
        scores = torch.cat([scores, sinks], dim=-1)
        scores = (
            scores - scores.max(dim=-1, keepdim=True).values
        )  # as gpt-oss does, against overflow
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
