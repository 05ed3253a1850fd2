"""Embedding rows that a base model never learnt, found by looking at them.

Some bases ship a chat template whose tokens were never trained (Qwen2.5 base's <|im_end|>): their
rows are still those of any unused token. Trained on such a template with LoRA alone, a model
answers and never ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

ALIKE = 0.999
"""Cosine from which two rows of an embedding count as the same: two trained rows are far from it.
"""
FAINT = 0.01
"""A row shorter than this share of the mean length was never moved by training."""
SAMPLES = 64
"""Samples of the data that are looked through for special tokens."""
_PART = 8192  # rows of the embedding compared at a time


def special_tokens_of(samples: Sequence[Any], tokenizer: Any) -> list[int]:
    """Return the ids of the added tokens in the first samples (objects with input_ids), sorted."""
    added = set(tokenizer.added_tokens_decoder)
    first: Iterable[Any] = (samples[i] for i in range(min(SAMPLES, len(samples))))
    return sorted({int(i) for sample in first for i in sample.input_ids} & added)


def untrained_rows(embedding: Any, ids: Sequence[int]) -> list[int]:
    """Return those of `ids` whose row of `embedding` (V, H) was never trained.

    Such a row has no length, or points where another row of the vocabulary points: unused rows all
    stay where they began, or are copies of one.
    """
    import torch

    if not ids:
        return []
    with torch.no_grad():
        rows = embedding[list(ids)].float()  # (N, H)
        lengths = rows.norm(dim=1)
        directions = rows / lengths.clamp_min(1e-30)[:, None]
        nearest = torch.full((len(ids),), -1.0, device=embedding.device)
        total = 0.0
        for first in range(0, embedding.shape[0], _PART):
            part = embedding[first : first + _PART].float()
            sizes = part.norm(dim=1)
            total += float(sizes.sum())
            cosines = directions @ (part / sizes.clamp_min(1e-30)[:, None]).T
            for place, index in enumerate(ids):  # a row is no evidence about itself
                if first <= index < first + len(part):
                    cosines[place, index - first] = -1.0
            nearest = torch.maximum(nearest, cosines.max(dim=1).values)
        faint = lengths < FAINT * total / embedding.shape[0]
    return [i for i, near, no in zip(ids, nearest, faint, strict=True) if no or near >= ALIKE]
