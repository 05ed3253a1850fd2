"""Medians, spreads, and the bootstrap interval of a paired ratio."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import numpy as np

from fastft.bench.flops import step_flops
from fastft.bench.record import ArmSummary, Machine, Peak, Ratio, Record, Spread
from fastft.planning.shape import ModelShape

NOISY = 0.10
"""A spread above this is flagged beside the figure."""


def spread(values: Sequence[float]) -> Spread:
    """Return median, 20th and 80th percentile (linear interpolation)."""
    low, middle, high = np.percentile(values, [20, 50, 80])
    return Spread(median=float(middle), p20=float(low), p80=float(high))


FEWEST_ROUNDS = 3
"""Rounds from which an interval means something."""
OTHERS_LIMIT = 0.10
"""Share of the cores that other processes may have in a round before its speed means nothing."""


def not_idle(ours: Sequence[Record], theirs: Sequence[Record]) -> str | None:
    """Return why these records give no ratio: others had the cores meanwhile. None: they do."""
    shares = [
        record.noise.others_share
        for record in (*ours, *theirs)
        if record.noise is not None and record.noise.others_share is not None
    ]
    if not shares or max(shares) <= OTHERS_LIMIT:
        return None
    return (
        f"other processes had up to {max(shares):.0%} of the cores in a round (at most "
        f"{OTHERS_LIMIT:.0%} for a ratio); measure again on an idle machine"
    )


def paired_ratio(
    ours: Sequence[Record], theirs: Sequence[Record], *, draws: int = 5000, seed: int = 0
) -> Ratio:
    """Return how much faster `ours` is than `theirs`, and the memory ratio.

    Records are paired by repeat, steps by index: the same sequences at about the same time. The
    interval is the 2.5th to 97.5th percentile of a two-stage bootstrap (Efron and Tibshirani 1993,
    chapter 8): rounds are drawn with replacement, and within each round steps. Fewer than three
    rounds give no interval.
    """
    by_repeat = {record.repeat: record for record in theirs}
    pairs = [(record, by_repeat[record.repeat]) for record in ours if record.repeat in by_repeat]
    # (rounds, steps)
    fast = np.array([[step.seconds for step in mine.measured] for mine, _ in pairs])
    slow = np.array([[step.seconds for step in other.measured] for _, other in pairs])
    rng = np.random.default_rng(seed)
    rounds, steps = fast.shape
    chosen = rng.integers(rounds, size=(draws, rounds))[:, :, None]
    within = rng.integers(steps, size=(draws, rounds, steps))
    drawn = slow[chosen, within].sum(-1) / fast[chosen, within].sum(-1)  # (draws, rounds)
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    middle = float(np.median(slow.sum(-1) / fast.sum(-1)))
    mine, other = [memory_bytes(_peak(records)) for records in (ours, theirs)]
    # The median of all rounds lies inside unless nearly all resampled medians lie to one side of
    # it.
    enough = rounds >= FEWEST_ROUNDS
    return Ratio(
        speed=middle,
        speed_low=min(float(low), middle) if enough else None,
        speed_high=max(float(high), middle) if enough else None,
        memory=mine / other if mine and other else None,
    )


def memory_bytes(peak: Peak | None) -> int | None:
    """Return the memory that arms are compared by: reserved VRAM, or where there is no GPU resident
    memory, without mapped files where that is what a cap went by.
    """
    if peak is None:
        return None
    if peak.vram_reserved_bytes is not None:
        return peak.vram_reserved_bytes
    return peak.rss_bytes if peak.anonymous_bytes is None else peak.anonymous_bytes


def summarise(
    records: Sequence[Record],
    shape: ModelShape,
    parts: list[list[tuple[int, int]]],
    supervised: list[int],
    machine: Machine,
) -> ArmSummary:
    """Return an arm's row over its ok records; `parts` (Workload.parts) and `supervised` are those
    of every step.
    """
    good = [record for record in records if record.status == "ok"]
    if not good:
        worst = records[-1]
        return ArmSummary(status=worst.status, reason=worst.reason, repeats=0)
    speed = spread([record.non_padding_tokens_per_sec for record in good])
    first = good[0]
    timed = range(first.warmup_steps, first.warmup_steps + len(first.measured))
    seconds = median(record.seconds for record in good)
    trainable = first.trainable_parameters or 0
    flops = sum(step_flops(shape, parts[i], supervised[i], trainable) for i in timed) / seconds
    tokens, padded = (
        sum(s.tokens for s in first.measured),
        sum(s.padded_tokens for s in first.measured),
    )
    return ArmSummary(
        status="ok",
        repeats=len(good),
        non_padding_tokens_per_sec=speed,
        trained_tokens_per_sec=sum(supervised[i] for i in timed) / seconds,
        seconds_per_step=spread([record.seconds / len(record.measured) for record in good]),
        first_step_seconds=_median([record.first_step_seconds for record in good]),
        import_seconds=_median([record.import_seconds for record in good]),
        load_seconds=_median([record.load_seconds for record in good]),
        padding_share=1 - tokens / padded if padded else None,
        peak=_peak(good),
        flops=flops,
        ceiling_share=flops / machine.matmul_flops if machine.matmul_flops else None,
        noisy=speed.relative > NOISY,
    )


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _peak(records: Sequence[Record]) -> Peak | None:
    peaks = [record.peak for record in records if record.peak is not None and record.status == "ok"]
    if not peaks:
        return None
    fields: dict[str, int | None] = {}
    for name in Peak.model_fields:
        value = _median([getattr(peak, name) for peak in peaks])
        fields[name] = None if value is None else int(value)
    return Peak.model_validate(fields)
