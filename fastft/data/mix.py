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

import numpy as np

from fastft.config import DataConfig, SourceConfig
from fastft.data.report import DataReport, Dropped, SourceShare, histogram
from fastft.data.rows import Conversation
from fastft.data.store import TokenDataset
from fastft.data.template import ChatTemplate


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


@dataclasses.dataclass(frozen=True)
class Mixed:
    """What `mix` makes of prepared sources."""

    train: TokenDataset
    eval: TokenDataset | None
    report: DataReport
    held_out: list[Conversation]
    fingerprint: str


def mix(
    sources: Sequence[SourceConfig],
    trains: Sequence[TokenDataset],
    evals: Sequence[TokenDataset | None],
    reports: Sequence[DataReport],
    held_out: Sequence[list[Conversation]],
    fingerprints: Sequence[str],
    seed: int,
) -> Mixed:
    """Return the mixture of prepared sources, in the order in which they were given."""
    given = [one.weight for one in sources if one.weight is not None]
    weights = given if len(given) == len(sources) else None
    drawn = draw([len(train) for train in trains], weights, seed)
    parts = [train[order] for train, order in zip(trains, drawn, strict=True)]
    held = [one for one in evals if one is not None]
    parts_of = {
        "sources": list(fingerprints),
        "weights": weights,
        "seed": seed if weights else None,
    }
    shares = _shares(sources, trains, parts, evals, reports)
    train, evaluation = TokenDataset.mixed(parts), TokenDataset.mixed(held) if held else None
    return Mixed(
        train,
        evaluation,
        _joined_report(reports, train, evaluation, shares),
        [c for turn in itertools.zip_longest(*held_out) for c in turn if c is not None],
        hashlib.sha256(json.dumps(parts_of, sort_keys=True).encode()).hexdigest(),
    )


def template_of(templates: Sequence[ChatTemplate], reports: Sequence[DataReport]) -> ChatTemplate:
    """Return the template that thinks where most of all answers come with reasoning."""
    turns = sum(report.turns for report in reports)
    thinking = sum(report.reasoning_turns for report in reports)
    chosen = next((t for t, r in zip(templates, reports, strict=True) if r.turns), templates[0])
    return chosen.with_thinking(thinking * 2 >= turns) if turns and thinking else chosen


def _shares(
    sources: Sequence[SourceConfig],
    trains: Sequence[TokenDataset],
    parts: Sequence[TokenDataset],
    evals: Sequence[TokenDataset | None],
    reports: Sequence[DataReport],
) -> list[SourceShare]:
    tokens = [part.tokens for part in parts]
    return [
        SourceShare(
            source=one.source,
            weight=one.weight,
            rows_total=report.rows_total,
            rows_used=report.rows_used,
            samples=len(train),
            drawn=len(part),
            tokens=count,
            share=count / max(sum(tokens), 1),
            eval_samples=0 if held is None else len(held),
        )
        for one, train, part, held, report, count in zip(
            sources, trains, parts, evals, reports, tokens, strict=True
        )
    ]


_ADDED = (
    "rows_total", "rows_used", "truncated", "truncated_tokens", "over_long", "duplicates",
    "near_duplicates", "leakage", "unrolled_tokens", "one_pass_tokens", "turns", "reasoning_turns",
)  # fmt: skip


def _joined_report(
    reports: Sequence[DataReport],
    train: TokenDataset,
    evaluation: TokenDataset | None,
    shares: list[SourceShare],
) -> DataReport:
    """Return one report: sums of the sources', lengths of what is drawn, notices by source."""
    lengths = train.lengths
    lengths = np.concatenate([lengths, evaluation.lengths]) if evaluation is not None else lengths
    quantile = {"min": 0, "median": 50, "p95": 95, "p99": 99, "max": 100}
    first = reports[0]
    held = (0, 0, 0) if evaluation is None else (
        len(evaluation), evaluation.tokens, evaluation.trained_tokens
    )  # fmt: skip
    return first.model_copy(
        update={name: sum(getattr(report, name) for report in reports) for name in _ADDED}
        | {
            "source": ", ".join(report.source for report in reports),
            "kind": "/".join(dict.fromkeys(report.kind for report in reports)),
            "format": "/".join(dict.fromkeys(report.format for report in reports)),
            "evidence": "; ".join(f"{r.source}: {r.evidence}" for r in reports),
            "dropped": _merged([report.dropped for report in reports]),
            "secrets": _sums([report.secrets for report in reports]),
            "secret_lines": [],
            "samples": len(train) + held[0],
            "train_samples": len(train),
            "eval_samples": held[0],
            "tokens": train.tokens + held[1],
            "trained_tokens": train.trained_tokens + held[2],
            "lengths": {k: int(np.percentile(lengths, q)) for k, q in quantile.items()}
            | {"mean": int(lengths.mean())},
            "histogram": histogram(lengths),
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
