"""What changed between two results of a case: conditions, speed and memory of every arm, and
whether it got worse.

A regression is slower, or more memory, by more than the threshold *and* outside the noise: the
20th to 80th percentile ranges of the repeats do not overlap. An arm that no longer ends well, or
no longer passes the gate, is one too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastft.bench.record import Record, Result, Spread, Strict
from fastft.bench.statistics import memory_bytes, spread
from fastft.bench.views.tables import TITLES, factor, gigabytes, number
from fastft.errors import FastFTError


class Difference(Strict):
    """Something other than a measurement that is not the same in both."""

    what: str
    before: str
    after: str


class Change(Strict):
    """One quantity of one arm in one table."""

    table: str
    arm: str
    quantity: str
    """non_padding_tokens_per_sec (larger is better) or peak_memory_bytes (smaller is better)."""
    before: Spread
    after: Spread
    relative: float
    """after / before - 1, of the medians."""
    overlap: bool
    """Whether the ranges from the 20th to the 80th percentile touch: then it may be noise."""
    regression: bool

    @property
    def text(self) -> str:
        """One line for a person."""
        show = gigabytes if self.quantity == "peak_memory_bytes" else number
        unit = "GB" if self.quantity == "peak_memory_bytes" else "tokens/s"
        word = (
            "REGRESSION"
            if self.regression
            else "within the noise"
            if self.overlap
            else "outside the noise"
        )
        ranges = " -> ".join(
            f"{show(s.median)} ({show(s.p20)} to {show(s.p80)})" for s in (self.before, self.after)
        )
        return f"{self.table}, {self.arm}: {ranges} {unit}, {self.relative:+.1%}, {word}"


class Comparison(Strict):
    """Everything that `compare` found."""

    case: str
    threshold: float
    differences: list[Difference]
    changes: list[Change]
    regressions: list[str]
    """A line for each; empty where nothing got worse."""
    notes: list[str]

    @property
    def exit_code(self) -> int:
        """1 where something got worse, else 0."""
        return 1 if self.regressions else 0

    def text(self) -> str:
        """Return what a person reads: the conditions that changed, every figure, the verdict."""
        lines = [f"{d.what}: {d.before} -> {d.after}" for d in self.differences] or [
            "same conditions"
        ]
        lines += ["", *(change.text for change in self.changes)]
        lines += [f"note: {note}" for note in self.notes]
        if self.regressions:
            verdict = [f"{len(self.regressions)} worse beyond {self.threshold:.0%} and the noise:"]
            verdict += [f"  {line}" for line in self.regressions]
        else:
            verdict = [f"nothing got worse beyond {self.threshold:.0%} and the noise"]
        return "\n".join([*lines, "", *verdict])


def compare(
    before: Result, after: Result, threshold: float = 0.05, *, force: bool = False
) -> Comparison:
    """Return what changed from `before` to `after`.

    `threshold`: 0.05 is 5 %. Raises FastFTError for results of different cases (another content
    counts as another case) unless `force`, and for a threshold outside 0 to 1.
    """
    if not 0 <= threshold < 1:
        raise FastFTError(f"--threshold is {threshold}; it is a share, for example 0.05 for 5 %.")
    if before.case_hash != after.case_hash and not force:
        raise FastFTError(
            f"these are different cases: {before.case.name} ({before.case_hash}) and "
            f"{after.case.name} "
            f"({after.case_hash}). Measure the same one, or compare nevertheless with --force."
        )
    changes: list[Change] = []
    broken: list[str] = []
    notes: list[str] = []
    for table, arm in _rows(before, after):
        pair = [_runs(result, table, arm) for result in (before, after)]
        notes += _one_sided(before, after, table, arm)
        broken += _broken(before, after, table, arm)
        if all(pair):
            changes += _changes(table, arm, pair[0], pair[1], threshold)
    if min(before.repeats, after.repeats) < 2:
        notes.append(
            "a result of one repeat says nothing about noise: any difference counts as "
            "outside of it"
        )
    if before.machine.label != after.machine.label:
        notes.append("two machines: what differs may be theirs")
    worse = [change.text for change in changes if change.regression]
    return Comparison(
        case=after.case.name,
        threshold=threshold,
        differences=_differences(before, after),
        changes=changes,
        regressions=[*broken, *worse],
        notes=notes,
    )


# --- the figures


def _rows(before: Result, after: Result) -> list[tuple[str, str]]:
    rows = [
        (name, arm)
        for result in (before, after)
        for name, table in result.tables.items()
        for arm in table.arms
    ]
    return list(dict.fromkeys(rows))


def _runs(result: Result, table: str, arm: str) -> list[Record]:
    return [r for r in result.records if (r.table, r.arm, r.status) == (table, arm, "ok")]


def _changes(
    table: str, arm: str, before: Sequence[Record], after: Sequence[Record], threshold: float
) -> list[Change]:
    quantities: dict[str, Callable[[Record], float | None]] = {
        "non_padding_tokens_per_sec": lambda record: record.non_padding_tokens_per_sec,
        "peak_memory_bytes": lambda record: memory_bytes(record.peak),
    }
    found = []
    for quantity, measure in quantities.items():
        old, new = [[v for r in runs if (v := measure(r)) is not None] for runs in (before, after)]
        if old and new:
            more_is_better = quantity == "non_padding_tokens_per_sec"
            found.append(
                _change(table, arm, quantity, spread(old), spread(new), threshold, more_is_better)
            )
    return found


def _change(
    table: str,
    arm: str,
    quantity: str,
    old: Spread,
    new: Spread,
    threshold: float,
    more_is_better: bool,
) -> Change:
    relative = new.median / old.median - 1 if old.median else 0.0
    overlap = old.p20 <= new.p80 and new.p20 <= old.p80
    worse = -relative if more_is_better else relative
    return Change(
        table=table,
        arm=arm,
        quantity=quantity,
        before=old,
        after=new,
        relative=relative,
        overlap=overlap,
        regression=worse > threshold and not overlap,
    )


def _broken(before: Result, after: Result, table: str, arm: str) -> list[str]:
    """Return what worked before and does not any more."""
    pair = [result.tables[table] for result in (before, after) if table in result.tables]  # type: ignore[index]
    if len(pair) < 2 or any(arm not in found.arms for found in pair):
        return []
    old, new = pair
    lines = []
    if old.arms[arm].status == "ok" and new.arms[arm].status != "ok":
        lines.append(f"{table}, {arm}: was ok, now {new.arms[arm].status} ({new.arms[arm].reason})")
    gates = [found.parity.get(arm) for found in pair]
    if gates[0] and gates[1] and gates[0].passed and not gates[1].passed:
        failed = "; ".join(check.text for check in gates[1].checks if not check.passed)
        lines.append(f"{table}, {arm}: passed the gate, now fails it ({failed})")
    return lines


def _one_sided(before: Result, after: Result, table: str, arm: str) -> list[str]:
    present = [table in r.tables and arm in r.tables[table].arms for r in (before, after)]  # type: ignore[index]
    if all(present):
        return []
    return [f"{TITLES[table]}, {arm}: only in the {'first' if present[0] else 'second'} result"]


# --- the conditions


def _differences(before: Result, after: Result) -> list[Difference]:
    pairs = [
        *_flat_pairs(
            "case", before.case.model_dump(mode="json"), after.case.model_dump(mode="json")
        ),
        ("case hash", before.case_hash, after.case_hash),
        *_flat_pairs("machine", _machine(before), _machine(after)),
        *_flat_pairs("version", before.versions, after.versions),
        ("commit", before.commit, after.commit),
        ("uncommitted changes", before.dirty, after.dirty),
        ("repeats", before.repeats, after.repeats),
        ("date", before.date, after.date),
    ]
    found = [
        Difference(what=what, before=_word(old), after=_word(new))
        for what, old, new in pairs
        if old != new
    ]
    ceilings = [result.machine.matmul_flops for result in (before, after)]
    if ceilings[0] and ceilings[1] and abs(ceilings[1] / ceilings[0] - 1) > 0.05:
        texts = [f"{number(flops / 1e9)} GFLOP/s" for flops in (ceilings[0], ceilings[1])]
        ratio = f" ({factor(ceilings[1] / ceilings[0])}x: the machine itself was not equally fast)"
        found.append(Difference(what="matmul ceiling", before=texts[0], after=texts[1] + ratio))
    return found


def _machine(result: Result) -> dict[str, Any]:
    # The ceiling is measured anew each time and never exactly equal; it is judged apart.
    return result.machine.model_dump(mode="json", exclude={"matmul_flops"})


def _flat_pairs(what: str, old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return (dotted key, old, new) of every leaf of two nested mappings, None where one has
    none.
    """
    a, b = _flat(old), _flat(new)
    return [(f"{what} {key}", a.get(key), b.get(key)) for key in dict.fromkeys([*a, *b])]


def _flat(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{above}{key}.")
        else:
            flat[f"{above}{key}"] = value
    return flat


def _word(value: object) -> str:
    return "none" if value is None else str(value)
