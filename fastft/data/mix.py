"""Several sources in one run: each prepared on its own, then mixed by a seeded draw.

    weights      a 3, b 1      samples   a 100, b 300      an epoch draws   a 300, b 100

An epoch is as many samples as the sources have together, shared by the weights: a source that
gives less than its share is drawn several times (each sample equally often, up to one), one that
gives more is drawn in part. Without weights each sample is drawn once. The draw depends on the seed
and the numbers of samples alone, so a resumed run sees the same order.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fastft.config import DataConfig, SourceConfig
from fastft.data.report import DataReport, Dropped, SourceShare, sizes
from fastft.data.store import TokenDataset
from fastft.data.template import ChatTemplate

if TYPE_CHECKING:
    from fastft.data.pipeline import Prepared


def each_config(config: DataConfig) -> list[DataConfig]:
    """Return the config of each source: its own settings over those of `data`."""
    made = []
    for one in config.sources:
        own = {k: v for k, v in one.model_dump(exclude={"weight"}).items() if v is not None}
        made.append(DataConfig(**{**config.model_dump(exclude={"sources", "source"}), **own}))
    return made


def draw(sizes: Sequence[int], weights: Sequence[float] | None, seed: int) -> list[np.ndarray]:
    """Return which samples of each source an epoch has; together as many as the sources have."""
    if weights is None:
        return [np.arange(size) for size in sizes]
    if not math.isfinite(sum(weights)):
        weights = [weight / max(weights) for weight in weights]
    total, sum_of_weights = sum(sizes), sum(weights)
    exact = np.array([total * weight / sum_of_weights for weight in weights])
    counts = np.floor(exact).astype(np.int64)
    # Largest remainders get what rounding left over.
    for at in np.argsort(-(exact - counts), kind="stable")[: total - int(counts.sum())]:
        counts[at] += 1
    drawn = []
    for at, (size, count) in enumerate(zip(sizes, counts.tolist(), strict=True)):
        if size == 0:
            drawn.append(np.zeros(0, np.int64))
            continue
        passes, rest = divmod(count, size)
        part = np.sort(np.random.default_rng([seed, at]).permutation(size)[:rest])
        drawn.append(np.concatenate([*[np.arange(size)] * passes, part]))
    return drawn


def mix(sources: Sequence[SourceConfig], prepared: Sequence[Prepared], seed: int) -> Prepared:
    """Return the mixture of prepared sources, in the order in which they were given."""
    given = [one.weight for one in sources if one.weight is not None]
    weights = given if len(given) == len(sources) else None
    drawn = draw([len(one.train) for one in prepared], weights, seed)
    parts = [one.train[order] for one, order in zip(prepared, drawn, strict=True)]
    held = [one.eval for one in prepared if one.eval is not None]
    train, evaluation = TokenDataset.mixed(parts), TokenDataset.mixed(held) if held else None
    about = {
        "sources": [one.fingerprint for one in prepared],
        "weights": weights,
        "seed": seed if weights else None,
    }
    turns = itertools.zip_longest(*(one.held_out for one in prepared))
    return dataclasses.replace(
        prepared[0],
        train=train,
        eval=evaluation,
        report=_joined_report(prepared, train, evaluation, _shares(sources, prepared, parts)),
        template=_template_of(prepared),
        fingerprint=hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest(),
        held_out=[one for turn in turns for one in turn if one is not None],
    )


def _template_of(prepared: Sequence[Prepared]) -> ChatTemplate:
    """Return the template that thinks where most of all answers come with reasoning."""
    turns = sum(one.report.turns for one in prepared)
    thinking = sum(one.report.reasoning_turns for one in prepared)
    chosen = next((one.template for one in prepared if one.report.turns), prepared[0].template)
    return chosen.with_thinking(thinking * 2 >= turns) if turns and thinking else chosen


def _shares(
    sources: Sequence[SourceConfig], prepared: Sequence[Prepared], parts: Sequence[TokenDataset]
) -> list[SourceShare]:
    tokens = [part.tokens for part in parts]
    return [
        SourceShare(
            source=source.source,
            weight=source.weight,
            rows_total=one.report.rows_total,
            rows_used=one.report.rows_used,
            samples=len(one.train),
            drawn=len(part),
            tokens=count,
            share=count / max(sum(tokens), 1),
            eval_samples=0 if one.eval is None else len(one.eval),
        )
        for source, one, part, count in zip(sources, prepared, parts, tokens, strict=True)
    ]


_ADDED = (
    "rows_total", "rows_used", "truncated", "truncated_tokens", "over_long", "duplicates",
    "near_duplicates", "leakage", "unrolled_tokens", "one_pass_tokens", "turns", "reasoning_turns",
)  # fmt: skip


def _joined_report(
    prepared: Sequence[Prepared],
    train: TokenDataset,
    evaluation: TokenDataset | None,
    shares: list[SourceShare],
) -> DataReport:
    """Return one report: sums of the sources', lengths of what is drawn, notices by source."""
    reports = [one.report for one in prepared]
    return reports[0].model_copy(
        update={name: sum(getattr(report, name) for report in reports) for name in _ADDED}
        | sizes(train, evaluation)
        | {
            "source": ", ".join(report.source for report in reports),
            "kind": "/".join(dict.fromkeys(report.kind for report in reports)),
            "format": "/".join(dict.fromkeys(report.format for report in reports)),
            "evidence": "; ".join(f"{r.source}: {r.evidence}" for r in reports),
            "dropped": _merged([report.dropped for report in reports]),
            "secrets": _sums([report.secrets for report in reports]),
            "secret_lines": [],
            "notices": [f"{r.source}: {notice}" for r in reports for notice in r.notices],
            "preview": [report.preview[0] for report in reports if report.preview],
            "sources": shares,
            "cached": all(report.cached for report in reports),
        }
    )


def _merged(dropped: Sequence[dict[str, Dropped]]) -> dict[str, Dropped]:
    """Return the rows not used of all sources; the line numbers are those of the first of them."""
    made: dict[str, Dropped] = {}
    for one in dropped:
        for reason, entry in one.items():
            known = made.get(reason)
            made[reason] = entry if known is None else known.model_copy(
                update={"count": known.count + entry.count}
            )  # fmt: skip
    return made


def _sums(counts: Sequence[dict[str, int]]) -> dict[str, int]:
    return {kind: sum(one.get(kind, 0) for one in counts) for one in counts for kind in one}
