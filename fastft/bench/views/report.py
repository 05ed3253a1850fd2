"""benchmarks/README.md and its plots, from the committed results: the same results give the same
text.

The newest result of a case on a machine is shown, older ones are linked. A case that nobody
measured on its card says so; a result under another card's memory cap has a section of its own and
never fills that card's row.
"""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastft.bench.case import CASES, ArmSettings, Case, known_cases, load_case
from fastft.bench.record import Result, read_result
from fastft.bench.side_by_side import SideBySide, read_side_by_side
from fastft.bench.views import plots, tables
from fastft.errors import FastFTError
from fastft.files import write_atomically
from fastft.verification.evaluation_page import templates

TEMPLATES = Path(__file__).parent / "templates"
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Pair:
    """A column of the overview: fastft over an arm in a table."""

    table: str
    arm: str
    title: str


PAIRS = (
    Pair("defaults", "peft", "over peft, defaults"),
    Pair("defaults", "unsloth", "over unsloth, defaults"),
    Pair("matched", "peft", "over peft, matched"),
    Pair("matched", "unsloth", "over unsloth, matched"),
)


@dataclass(frozen=True)
class Entry:
    """A case on a machine: the newest result, and the older ones that it replaces."""

    path: Path
    result: Result
    older: tuple[tuple[Path, Result], ...] = ()


def write_report(
    results: Path, readme: Path, images: Path, *, cases: Path = CASES, check: bool = False
) -> list[Path]:
    """Bring `readme` and the plots in `images` up to date with the results; return the files that
    were not.

    `check`: write nothing. JSON files in `results` that are not results of the benchmark are
    passed over; one that is but cannot be read raises FastFTError. Plots of results that are gone
    are removed.
    """
    entries = newest(read_results(results))
    shown = [entry.result for entry in entries]
    others = read_others(results)
    drawings = {
        p.name: p
        for p in [
            *(p for result in shown for p in plots.plots_of(result)),
            *plots.plots_over_length(shown),
            *plots.plots_of_scaling([found for _, found in others]),
        ]
    }
    stale = _stale_images(drawings, images)
    text = readme_text(entries, others, readme.parent, images, cases)
    if not readme.is_file() or readme.read_text(encoding="utf-8") != text:
        stale.append(readme)
    if not check:
        _write(stale, drawings, readme, text)
    return sorted(stale)


def read_results(folder: Path) -> list[tuple[Path, Result]]:
    """Return the training results in `folder` by file name; other JSON files there are someone
    else's.
    """
    return [
        (path, read_result(path))
        for path in _with_keys(folder, {"schema_version", "case", "tables"})
    ]


def read_others(folder: Path) -> list[tuple[Path, SideBySide]]:
    """Return the newest export and generation result in `folder` of each case and machine."""
    latest: dict[tuple[str, str, str], tuple[Path, SideBySide]] = {}
    for path in _with_keys(folder, {"schema_version", "kind", "runs"}):
        found = read_side_by_side(path)
        key = (found.kind, found.case, found.machine)
        if key not in latest or latest[key][1].date < found.date:
            latest[key] = (path, found)
    return [latest[key] for key in sorted(latest)]


def _with_keys(folder: Path, keys: set[str]) -> list[Path]:
    if not folder.is_dir():
        raise FastFTError(f"{folder} is not a folder. Give the folder of results with --results.")
    return [path for path in sorted(folder.glob("*.json")) if keys <= _keys(path)]


def _keys(path: Path) -> set[str]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FastFTError(f"{path} is not JSON ({error}). Remove it, or measure again.") from error
    return set(values) if isinstance(values, dict) else set()


def newest(results: Sequence[tuple[Path, Result]]) -> list[Entry]:
    """Return one entry for each case and machine, by name; the newest first within it."""
    groups: dict[tuple[str, str], list[tuple[Path, Result]]] = {}
    for path, result in results:
        groups.setdefault((result.case.name, result.machine.label), []).append((path, result))
    entries = []
    for key in sorted(groups):
        first, *older = sorted(
            groups[key], key=lambda pair: (pair[1].date, pair[0].name), reverse=True
        )
        entries.append(Entry(*first, older=tuple(older)))
    return entries


# --- the text


def readme_text(
    entries: Sequence[Entry],
    others: Sequence[tuple[Path, SideBySide]],
    home: Path,
    images: Path,
    cases: Path = CASES,
) -> str:
    """Return the README that lies in the folder `home`, with links relative to it."""
    known = {name: load_case(str(path)) for name, path in known_cases(cases).items()}
    overview = []
    here = [entry for entry in entries if tables.own_card(entry.result)]
    for name in sorted({*known, *(entry.result.case.name for entry in here)}):
        own = [entry for entry in here if entry.result.case.name == name]
        overview += [_overview_row(entry, known.get(name)) for entry in own]
        if not own:
            card = known[name].card or "CPU"
            overview.append(
                {"case": name, "card": card, "machine": NOT_MEASURED, "ratios": ["-"] * len(PAIRS)}
            )
    return (
        _environment()
        .get_template("README.md.jinja")
        .render(
            legend=textwrap.fill(tables.LEGEND, 125),
            headings=tables.HEADINGS,
            pairs=PAIRS,
            overview=overview,
            elsewhere=[
                _overview_row(e, known.get(e.result.case.name))
                for e in entries
                if not tables.own_card(e.result)
            ],
            length_plots=[
                _link(images / p.name, home)
                for p in plots.plots_over_length([e.result for e in entries])
            ],
            sections=[_section(entry, home, images, known) for entry in entries],
            side_by_side=[_other_section(path, found, home, images) for path, found in others],
        )
    )


def _environment() -> Any:
    # Markdown, not HTML: `cell` escapes what would break a table or open a tag.
    environment = templates(TEMPLATES, html=False)
    environment.filters["cell"] = markdown_cell
    return environment


def markdown_cell(text: object) -> str:
    """Return `text` on one line, with what Markdown or a table would read as its own escaped."""
    line = " ".join(str(text).split())
    for character in "\\|*_`[]":
        line = line.replace(character, f"\\{character}")
    return line.replace("&", "&amp;").replace("<", "&lt;")


def _overview_row(entry: Entry, known: Case | None) -> dict[str, Any]:
    result = entry.result
    case = known or result.case
    return {
        "case": f"[{result.case.name}](#{_anchor(tables.heading(result))})",
        "card": result.case.card or "CPU",
        "machine": f"{markdown_cell(result.machine.label)}, {result.date[:10]}, "
        f"{tables.repeats_text(result.repeats)}",
        "ratios": [_pair_text(result, pair) if _has(case, pair) else "-" for pair in PAIRS],
    }


def _has(case: Case, pair: Pair) -> bool:
    table = case.tables.get(pair.table)  # type: ignore[call-overload]
    return table is not None and pair.arm in table.arms


def _pair_text(result: Result, pair: Pair) -> str:
    table = result.tables.get(pair.table)  # type: ignore[call-overload]
    if table is None or pair.arm not in table.arms:
        return NOT_MEASURED
    verdict = next(v for v in tables.verdicts(table) if v.arm == pair.arm)
    if verdict.ratio is not None:
        return tables.ratio_text(verdict.ratio)
    status = table.arms[pair.arm].status
    return "parity failed" if verdict.parity_failed else status if status != "ok" else "no ratio"


def _anchor(heading: str) -> str:
    """The id that GitHub gives a heading: lower case, punctuation dropped, spaces to dashes."""
    kept = "".join(c for c in heading.lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")


def _section(entry: Entry, home: Path, images: Path, known: dict[str, Case]) -> dict[str, Any]:
    result = entry.result
    return described(result) | {
        "date": result.date[:10],
        "case_note": _case_note(result.case, known.get(result.case.name)),
        "file": _link(entry.path, home),
        "plots": [
            {"title": p.title, "path": _link(images / p.name, home)} for p in plots.plots_of(result)
        ],
        "settings": [line for name in result.tables for line in settings_lines(result, name)],
        "notes": [*result.notes, *_inherited(result)],
        "older": [
            {
                "date": old.date[:10],
                "commit": tables.commit_text(old),
                "file": _link(path, home),
                "other_case": old.case_hash != result.case_hash,
            }
            for path, old in entry.older
        ],
    }


def _case_note(measured: Case, known: Case | None) -> str:
    """Say where what was measured is not the committed case: a part of it, or an earlier
    version.
    """
    if known is None or measured.hash == known.hash:
        return ""
    narrowed = known.only({name: table.arms for name, table in measured.tables.items()})
    part = narrowed.hash == measured.hash
    return " (some of its arms or tables only)" if part else " (the case has changed since)"


def _inherited(result: Result) -> list[str]:
    """Say of a result from before records told their environment what its cases do not."""
    if any(record.environment for record in result.records):
        return []
    return [
        "every arm of this measurement had OMP_WAIT_POLICY=PASSIVE, which fastft's command "
        "line handed on to it"
    ]


def _other_section(path: Path, found: SideBySide, home: Path, images: Path) -> dict[str, Any]:
    return {
        "title": found.title,
        "machine": found.machine,
        "date": found.date[:10],
        "commit": f"commit {found.commit[:10]}" if found.commit else "unknown commit",
        "repeats": tables.repeats_text(found.repeats),
        "file": _link(path, home),
        "headings": found.headings(),
        "rows": found.rows(),
        "notes": found.notes,
        "plots": [
            {"title": p.title, "path": _link(images / p.name, home)}
            for p in plots.plots_of_scaling([found])
        ],
    }


def described(result: Result) -> dict[str, Any]:
    """Return what the README and the HTML page both say of a result."""
    return {
        "heading": tables.heading(result),
        "title": result.case.title,
        "commit": tables.commit_text(result),
        "case_hash": result.case_hash,
        "repeats": tables.repeats_text(result.repeats),
        "machine": machine_lines(result),
        "tables": [
            {
                "title": tables.TITLES[name],
                "rows": [tables.cells(arm, summary) for arm, summary in table.arms.items()],
                "verdicts": tables.verdicts(table),
            }
            for name, table in result.tables.items()
        ],
    }


def machine_lines(result: Result) -> list[str]:
    """Return what the machine was and which versions ran, a line each."""
    machine = result.machine
    lines = [
        f"{machine.cpu}, {machine.threads} threads, {tables.gigabytes(machine.memory_bytes)} "
        "GB of memory"
    ]
    if machine.gpu:
        cap = f", capped at {tables.gigabytes(machine.cap_bytes)} GB" if machine.cap_bytes else ""
        lines.append(
            f"{machine.gpu}, {tables.gigabytes(machine.vram_bytes)} GB{cap}, driver "
            f"{machine.driver}"
        )
    elif machine.cap_bytes:
        lines.append(
            f"memory of a worker, without mapped files, capped at "
            f"{tables.gigabytes(machine.cap_bytes)} GB"
        )
    if machine.matmul_flops:
        lines.append(
            f"measured ceiling of a matrix product: {tables.flops_text(machine.matmul_flops)}"
        )
    lines.append(
        ", ".join(f"{name} {version}" for name, version in sorted(result.versions.items()))
    )
    return lines


def settings_lines(result: Result, table: str) -> list[str]:
    """Return one line for each arm of a table: what was set, and its source."""
    arms = result.case.tables[table].arms  # type: ignore[index]
    return [
        f"{tables.TITLES[table]}, {arm}: {settings_text(settings)}"
        for arm, settings in arms.items()
    ]


def settings_text(settings: ArmSettings) -> str:
    """Return an arm's settings, its environment and their source."""
    what = json.dumps(settings.settings, sort_keys=True) if settings.settings else "nothing set"
    environment = variables_text(settings)
    return f"{what}{', ' + environment if environment else ''}. Source: {settings.source}"


def variables_text(settings: ArmSettings) -> str:
    """Return the variables that an arm's processes get."""
    return " ".join(f"{key}={value}" for key, value in sorted(settings.environment.items()))


def _link(path: Path, home: Path) -> str:
    return Path(os.path.relpath(path, home)).as_posix()


# --- the files


def _stale_images(drawings: dict[str, plots.Plot], images: Path) -> list[Path]:
    """Return the images that are missing, show something else than the new ones would, or whose
    result is gone.
    """
    old = {path.name: plots.digest_of(path) for path in images.glob("*.png")}
    gone = {name for name, digest in old.items() if digest is not None and name not in drawings}
    return [
        images / name
        for name in sorted(gone | {n for n, plot in drawings.items() if plot.digest != old.get(n)})
    ]


def _write(stale: Sequence[Path], drawings: dict[str, plots.Plot], readme: Path, text: str) -> None:
    for path in stale:
        if path == readme:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, text)
        elif path.name in drawings:
            drawings[path.name].write(path.parent)
        else:
            path.unlink()


def schema_text() -> str:
    """Return the JSON Schema of a result, as benchmarks/result.schema.json holds it."""
    return json.dumps(Result.model_json_schema(), indent=1) + "\n"
