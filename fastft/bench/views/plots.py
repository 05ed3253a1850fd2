"""The benchmark's plots as PNG: step time, peak memory, speed-up, memory over sequence length.

The same results give the same bytes with the same matplotlib. Another matplotlib draws other
bytes, so every file carries a digest of what it shows (`digest_of`), by which `report --check`
knows a stale plot from a redrawn one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastft.bench.record import ArmSummary, Result, TableResult
from fastft.bench.side_by_side import SideBySide
from fastft.bench.statistics import memory_bytes
from fastft.bench.views.tables import TITLES, factor, heading, number
from fastft.files import written_aside

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which people with any common colour blindness can tell apart; the y
# labels name the arms too.
COLOURS = {
    "peft": "#767676",
    "trl": "#E69F00",
    "unsloth": "#009E73",
    "liger": "#CC79A7",
    "fastft": "#0072B2",
}
OTHERS = ("#56B4E9", "#D55E00", "#F0E442")
DARK = {COLOURS["peft"], COLOURS["unsloth"], COLOURS["fastft"]}  # white text is readable on these
INK, FAINT = "#222222", "#666666"
DPI = 130
MARK = "fastft-bench"


@dataclass(frozen=True)
class Plot:
    """A plot that can be drawn: its file name, what it shows, and the digest of that."""

    name: str
    title: str
    digest: str
    draw: Callable[[], Figure]

    def write(self, folder: Path) -> Path:
        """Draw it into `folder`, with the digest in the PNG's text; return the file."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / self.name
        marks = {"Software": None, MARK: self.digest}
        with written_aside(path) as aside:
            self.draw().savefig(aside, dpi=DPI, format="png", metadata=marks)
        return path


def plot_result(result: Result, folder: Path) -> list[Path]:
    """Write the plots of one result into `folder`; a plot that would be empty is left out."""
    return [plot.write(folder) for plot in plots_of(result)]


def plots_of(result: Result) -> list[Plot]:
    """Return the plots of one result: step time and memory where an arm ran, speed-up where there
    is a ratio.
    """
    ran = any(
        summary.status == "ok"
        for table in result.tables.values()
        for summary in table.arms.values()
    )
    compared = any(table.ratios for table in result.tables.values())
    kinds = [*(["step-time", "memory"] if ran else []), *(["speed-up"] if compared else [])]
    return [
        Plot(
            name=f"{slug(heading(result))}-{kind}.png",
            title=f"{kind.replace('-', ' ')}, {heading(result)}",
            digest=digest(result),
            draw=partial(DRAWINGS[kind], result),
        )
        for kind in kinds
    ]


def plots_over_length(results: Sequence[Result]) -> list[Plot]:
    """Return a plot of memory over sequence length for each group of results that differ only in
    length.
    """
    found = []
    for group in groups_by_length(results):
        about = f"{group[0].case.name} to {group[-1].case.name} on {group[0].machine.label}"
        found.append(
            Plot(
                name=f"{slug(about)}-memory-over-length.png",
                title=f"memory over sequence length, {about}",
                digest=digest(*group),
                draw=partial(memory_over_length, group),
            )
        )
    return found


# --- the drawings


def step_time(result: Result) -> Figure:
    """Return seconds per optimizer step by arm, with the 20th to 80th percentile."""

    def draw(axes: Axes, table: TableResult) -> None:
        spreads = {arm: s.seconds_per_step for arm, s in table.arms.items()}
        values = {arm: spread.median if spread else None for arm, spread in spreads.items()}
        ends = {arm: spread.p80 for arm, spread in spreads.items() if spread}
        _bars(axes, table, values, lambda value: f"{number(value)} s", ends)
        for row, spread in enumerate(spreads.values()):
            if spread is not None:
                low, high = spread.median - spread.p20, spread.p80 - spread.median
                axes.errorbar(
                    spread.median, row, xerr=[[low], [high]], color=INK, capsize=3, linewidth=1.2
                )
        axes.set_xlabel("seconds per optimizer step (less is better)")

    return _panels(result, "Step time", draw)


def peak_memory(result: Result) -> Figure:
    """Return the peak memory by arm: reserved VRAM, or resident memory on a CPU; the cap as a
    line.
    """

    def draw(axes: Axes, table: TableResult) -> None:
        sizes = {arm: memory_bytes(s.peak) for arm, s in table.arms.items()}
        _bars(
            axes,
            table,
            {arm: size and size / 1e9 for arm, size in sizes.items()},
            lambda v: f"{number(v)} GB",
        )
        if result.machine.cap_bytes:
            cap = result.machine.cap_bytes / 1e9
            axes.axvline(cap, color=INK, linestyle="--", linewidth=1)
            axes.annotate(
                f"cap {number(cap)} GB",
                (cap, -0.45),
                xytext=(-3, 0),
                textcoords="offset points",
                ha="right",
                va="bottom",
                fontsize=8,
                color=INK,
            )
            axes.set_xlim(right=max(axes.get_xlim()[1], cap * 1.05))
        what = "reserved VRAM" if result.machine.device == "cuda" else "resident memory"
        if result.machine.cap_bytes and result.machine.device == "cpu":
            what += " without mapped files"
        axes.set_xlabel(f"peak {what}, GB (less is better)")

    return _panels(result, "Peak memory", draw)


def speed_up(result: Result) -> Figure:
    """Return how many times faster fastft is than each arm, with the 95 % interval and a line at
    1.
    """

    def draw(axes: Axes, table: TableResult) -> None:
        arms = [arm for arm in table.arms if arm != "fastft"]
        top = max([1.0, *(ratio.speed_high or ratio.speed for ratio in table.ratios.values())])
        for row, arm in enumerate(arms):
            ratio = table.ratios.get(arm)
            if ratio is None:
                gate = table.parity.get(arm)
                status = (
                    "the machine was not idle" if arm in table.withheld else table.arms[arm].status
                )
                failed = gate is not None and not gate.passed
                word = "parity failed" if failed else f"no ratio ({status})"
                axes.text(1, row, f"  {word}", va="center", fontsize=9, color=FAINT, style="italic")
                continue
            low, high = ratio.speed_low or ratio.speed, ratio.speed_high or ratio.speed
            error = [[ratio.speed - low], [high - ratio.speed]]
            axes.errorbar(
                ratio.speed,
                row,
                xerr=error,
                fmt="o",
                markersize=8,
                color=_colour(arm),
                capsize=5,
                linewidth=2.2,
            )
            axes.annotate(
                f"{factor(ratio.speed)}x",
                (ratio.speed, row),
                xytext=(0, 9),
                textcoords="offset points",
                ha="center",
                fontsize=9,
                color=INK,
            )
        axes.axvline(1, color=INK, linestyle="--", linewidth=1)
        axes.set_xlim(0, top * 1.12)
        _arm_labels(axes, arms)
        axes.set_xlabel(
            "fastft's speed over this arm's, 95 % interval\n(right of 1: fastft is faster)"
        )

    return _panels(result, "Speed-up", draw)


DRAWINGS: dict[str, Callable[[Result], Figure]] = {
    "step-time": step_time,
    "memory": peak_memory,
    "speed-up": speed_up,
}


def memory_over_length(results: Sequence[Result]) -> Figure:
    """Return the peak memory of each arm over the longest sequence, of results that differ only in
    length.
    """
    first = results[0]
    names = list(first.tables)
    figure, panels = _figure(len(names), 3.6)
    for axes, name in zip(panels, names, strict=True):
        arms = list(dict.fromkeys(arm for result in results for arm in result.tables[name].arms))  # type: ignore[index]
        for arm in arms:
            points = [
                (_longest(result, name), size / 1e9)
                for result in results
                if (size := memory_bytes(_peak(result.tables[name].arms.get(arm))))  # type: ignore[index]
            ]
            if points:
                axes.plot(
                    *zip(*sorted(points), strict=True),
                    marker="o",
                    label=arm,
                    color=_colour(arm),
                    linewidth=2,
                )
        axes.set_title(TITLES[name], fontsize=11, loc="left")
        axes.set_xlabel("longest sequence, tokens")
        axes.set_ylabel("peak memory, GB")
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=9)
    figure.suptitle(
        f"Memory over sequence length: {first.machine.label}", fontsize=12, x=0.01, ha="left"
    )
    return figure


def plots_of_scaling(found: Sequence[SideBySide]) -> list[Plot]:
    """Return a plot of speed and memory for each scaling result."""
    plots = []
    for result in found:
        if result.kind == "scaling":
            text = result.model_dump_json(exclude={"runs"})
            about = f"scaling over {result.case} on {result.machine}"
            plots.append(
                Plot(
                    name=f"{slug(about)}.png",
                    title=about,
                    digest=hashlib.sha256(text.encode()).hexdigest()[:16],
                    draw=partial(_scaling, result),
                )
            )
    return plots


def _scaling(result: SideBySide) -> Figure:
    """Speed, and peak memory, over where the points lie; both axes logarithmic, so that what grows
    in proportion is a straight line.
    """
    figure, panels = _figure(2, 3.6)
    speed = "rows_per_sec" if result.case == "rows" else "tokens_per_sec"
    for axes, (name, unit) in zip(panels, ((speed, 1.0), ("peak_rss_bytes", 1e9)), strict=True):
        points = [(way["at"].median, way[name]) for way in result.summary.values()]
        at, spreads = [x for x, _ in points], [spread for _, spread in points]
        middle = [spread.median / unit for spread in spreads]
        error = [
            [(s.median - s.p20) / unit for s in spreads],
            [(s.p80 - s.median) / unit for s in spreads],
        ]
        axes.errorbar(at, middle, yerr=error, marker="o", capsize=3, color=COLOURS["fastft"])
        for x, y in zip(at, middle, strict=True):
            axes.annotate(
                number(y),
                (x, y),
                xytext=(0, 7),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylim(min(middle) / 2, max(middle) * 2)
        axes.set_xticks(at, list(result.summary), fontsize=8, rotation=20)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.set_ylabel(name.replace("_per_sec", " per second"), fontsize=9)
    panels[1].set_ylabel("peak resident memory, GB", fontsize=9)
    figure.suptitle(f"{result.title}: {result.machine}", fontsize=11, x=0.01, ha="left")
    return figure


# --- which results belong together


def groups_by_length(results: Sequence[Result]) -> list[list[Result]]:
    """Return the groups of at least two results, same machine, whose cases differ in nothing but
    length.
    """
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(_but_length(result), []).append(result)
    several = [g for g in groups.values() if len({_first_longest(result) for result in g}) > 1]
    return [sorted(group, key=_first_longest) for group in several]


def _but_length(result: Result) -> str:
    """The case without its lengths and without what changes no memory, as a key."""
    case = result.case.model_dump(mode="json")
    for key in ("name", "title", "lengths", "timeout_seconds", "repeats", "steps"):
        case.pop(key)
    for table in case["tables"].values():
        table.pop("lengths")
    return json.dumps([result.machine.label, sorted(result.tables), case], sort_keys=True)


def _first_longest(result: Result) -> int:
    return _longest(result, next(iter(result.tables)))


def _longest(result: Result, table: str) -> int:
    lengths = result.case.tables[table].lengths or result.case.lengths  # type: ignore[index]
    return lengths.fixed or lengths.longest


def _peak(summary: ArmSummary | None) -> Any:
    return summary.peak if summary else None


# --- how a figure is made and kept


def _panels(result: Result, title: str, draw: Callable[[Axes, TableResult], None]) -> Figure:
    """Return a figure with a panel for each table."""
    rows = max(len(table.arms) for table in result.tables.values())
    figure, panels = _figure(len(result.tables), 1.7 + 0.45 * rows)
    for axes, (name, table) in zip(panels, result.tables.items(), strict=True):
        draw(axes, table)
        axes.set_title(TITLES[name], fontsize=11, loc="left")
    text = f"{title}: {heading(result)}"
    size = 12 * min(1.0, 57 * len(panels) / len(text))  # so many letters of 12 points fit on one
    figure.suptitle(text, fontsize=size, x=0.01, ha="left")
    return figure


def _figure(panels: int, height: float) -> tuple[Figure, list[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6 * panels, height), layout="constrained")
    FigureCanvasAgg(figure)
    every = [figure.add_subplot(1, panels, i + 1) for i in range(panels)]
    for axes in every:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, every


def _bars(
    axes: Axes,
    table: TableResult,
    values: dict[str, float | None],
    text: Callable[[float], str],
    ends: dict[str, float] | None = None,
) -> None:
    """Draw a horizontal bar for each arm, its value inside at the foot; what did not run says so
    in its place.

    `ends`: how far an arm's whisker reaches, which neither the axis nor the value beside a short
    bar may cut.
    """
    reach = {
        arm: max(value, (ends or {}).get(arm, 0.0))
        for arm, value in values.items()
        if value is not None
    }
    widest = max(reach.values(), default=1.0)
    for row, (arm, value) in enumerate(values.items()):
        if value is None:
            status = table.arms[arm].status
            axes.text(0, row, f"  {status}", va="center", fontsize=9, color=FAINT, style="italic")
            continue
        axes.barh(row, value, height=0.62, color=_colour(arm))
        inside = value > 0.25 * widest
        x = 0.02 * widest if inside else reach[arm] + 0.03 * widest
        colour = "white" if inside and _colour(arm) in DARK else INK
        axes.text(x, row, text(value), va="center", fontsize=9, color=colour, fontweight="bold")
    _arm_labels(axes, list(values))
    axes.set_xlim(0, 1.05 * widest)


def _arm_labels(axes: Axes, arms: list[str]) -> None:
    axes.set_yticks(range(len(arms)), arms)
    axes.set_ylim(len(arms) - 0.5, -0.6)
    for label in axes.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() == "fastft" else "normal")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def _colour(arm: str) -> str:
    return (
        COLOURS.get(arm) or OTHERS[int(hashlib.sha256(arm.encode()).hexdigest(), 16) % len(OTHERS)]
    )


def slug(text: str) -> str:
    """Return `text` as a file name: lower case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def digest(*results: Result) -> str:
    """Return 16 hex digits of what the plots of `results` show."""
    text = json.dumps(
        [r.model_dump(mode="json", exclude={"records"}) for r in results], sort_keys=True
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest_of(path: Path) -> str | None:
    """Return the digest kept in a PNG, or None where it is missing, damaged, or not one of ours."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.info.get(MARK)
    except (OSError, UnidentifiedImageError):
        return None
