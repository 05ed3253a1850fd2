"""benchmarks/README.md and its plots, from the committed results: the same results give the same text.

The newest result of a case on a machine is shown, older ones are linked. A case that nobody measured on its card says
so; a result under another card's memory cap has a section of its own and never fills that card's row.
"""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastft.bench import plots, tables
from fastft.bench.case import CASES, ArmSettings, known_cases, load_case
from fastft.bench.record import Result, read_result
from fastft.errors import FastFTError

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


def write_report(results: Path, readme: Path, images: Path, *, cases: Path = CASES, check: bool = False) -> list[Path]:
    """Bring `readme` and the plots in `images` up to date with the results; return the files that were not.

    `check`: write nothing. JSON files in `results` that are not results of the benchmark are passed over; one that is
    but cannot be read raises FastFTError. Plots of results that are gone are removed.
    """
    entries = newest(read_results(results))
    shown = [entry.result for entry in entries]
    drawings = {
        p.name: p for p in [*(p for result in shown for p in plots.plots_of(result)), *plots.plots_over_length(shown)]
    }
    stale = _stale_images(drawings, images)
    text = readme_text(entries, readme.parent, images, cases)
    if not readme.is_file() or readme.read_text(encoding="utf-8") != text:
        stale.append(readme)
    if not check:
        _write(stale, drawings, readme, text)
    return sorted(stale)


def read_results(folder: Path) -> list[tuple[Path, Result]]:
    """Return the benchmark's results in `folder` by file name; other JSON files there are someone else's."""
    if not folder.is_dir():
        raise FastFTError(f"{folder} is not a folder. Give the folder of results with --results.")
    return [(path, read_result(path)) for path in sorted(folder.glob("*.json")) if _looks_like_one(path)]


def _looks_like_one(path: Path) -> bool:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FastFTError(f"{path} is not JSON ({error}). Remove it, or measure again.") from error
    return isinstance(values, dict) and {"schema_version", "case"} <= values.keys()


def newest(results: Sequence[tuple[Path, Result]]) -> list[Entry]:
    """Return one entry for each case and machine, by name; the newest first within it."""
    groups: dict[tuple[str, str], list[tuple[Path, Result]]] = {}
    for path, result in results:
        groups.setdefault((result.case.name, result.machine.label), []).append((path, result))
    entries = []
    for key in sorted(groups):
        first, *older = sorted(groups[key], key=lambda pair: (pair[1].date, pair[0].name), reverse=True)
        entries.append(Entry(*first, older=tuple(older)))
    return entries


# --- the text


def readme_text(entries: Sequence[Entry], home: Path, images: Path, cases: Path = CASES) -> str:
    """Return the README that lies in the folder `home`, with links relative to it."""
    known = {name: load_case(str(path)) for name, path in known_cases(cases).items()}
    overview = []
    for name in sorted({*known, *(entry.result.case.name for entry in entries if tables.own_card(entry.result))}):
        own = [entry for entry in entries if entry.result.case.name == name and tables.own_card(entry.result)]
        overview += [_overview_row(entry) for entry in own]
        if not own:
            card = known[name].card or "CPU"
            overview.append({"case": name, "card": card, "machine": NOT_MEASURED, "ratios": ["-"] * len(PAIRS)})
    hashes = {name: case.hash for name, case in known.items()}
    return _environment().get_template("README.md.jinja").render(
        legend=textwrap.fill(tables.LEGEND, 125),
        headings=tables.HEADINGS,
        pairs=PAIRS,
        overview=overview,
        elsewhere=[_overview_row(entry) for entry in entries if not tables.own_card(entry.result)],
        length_plots=[_link(images / p.name, home) for p in plots.plots_over_length([e.result for e in entries])],
        sections=[_section(entry, home, images, hashes) for entry in entries],
    )  # fmt: skip


def _environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    # Markdown, not HTML: `cell` escapes what would break a table or open a tag.
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = markdown_cell
    return environment


def markdown_cell(text: object) -> str:
    """Return `text` on one line, with what Markdown or a table would read as its own escaped."""
    line = " ".join(str(text).split())
    for character in "\\|*_`[]":
        line = line.replace(character, f"\\{character}")
    return line.replace("&", "&amp;").replace("<", "&lt;")


def _overview_row(entry: Entry) -> dict[str, Any]:
    result = entry.result
    return {
        "case": f"[{result.case.name}](#{_anchor(markdown_heading(result))})",
        "card": result.case.card or "CPU",
        "machine": f"{markdown_cell(result.machine.label)}, {result.date[:10]}",
        "ratios": [_pair_text(result, pair) for pair in PAIRS],
    }


def _pair_text(result: Result, pair: Pair) -> str:
    table = result.tables.get(pair.table)  # type: ignore[call-overload]
    if table is None or pair.arm not in table.arms:
        return NOT_MEASURED
    verdict = next(v for v in tables.verdicts(table) if v.arm == pair.arm)
    if verdict.ratio is not None:
        return tables.ratio_text(verdict.ratio)
    status = table.arms[pair.arm].status
    return "parity failed" if verdict.parity_failed else status if status != "ok" else "no ratio"


def markdown_heading(result: Result) -> str:
    """Return the heading of a result's section."""
    return tables.heading(result)


def _anchor(heading: str) -> str:
    """The id that GitHub gives a heading: lower case, punctuation dropped, spaces to dashes."""
    kept = "".join(c for c in heading.lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")


def _section(entry: Entry, home: Path, images: Path, hashes: dict[str, str]) -> dict[str, Any]:
    result = entry.result
    return {
        "heading": markdown_heading(result),
        "title": result.case.title,
        "date": result.date[:10],
        "commit": tables.commit_text(result),
        "case_hash": result.case_hash,
        "case_changed": hashes.get(result.case.name, result.case_hash) != result.case_hash,
        "repeats": result.repeats,
        "file": _link(entry.path, home),
        "machine": machine_lines(result),
        "tables": [
            {
                "title": tables.TITLES[name],
                "rows": [tables.cells(arm, summary) for arm, summary in table.arms.items()],
                "verdicts": tables.verdicts(table),
            }
            for name, table in result.tables.items()
        ],
        "plots": [{"title": p.title, "path": _link(images / p.name, home)} for p in plots.plots_of(result)],
        "settings": [line for name in result.tables for line in settings_lines(result, name)],
        "notes": result.notes,
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


def machine_lines(result: Result) -> list[str]:
    """Return what the machine was and which versions ran, a line each."""
    machine = result.machine
    lines = [f"{machine.cpu}, {machine.threads} threads, {tables.gigabytes(machine.memory_bytes)} GB of memory"]
    if machine.gpu:
        cap = f", capped at {tables.gigabytes(machine.cap_bytes)} GB" if machine.cap_bytes else ""
        lines.append(f"{machine.gpu}, {tables.gigabytes(machine.vram_bytes)} GB{cap}, driver {machine.driver}")
    elif machine.cap_bytes:
        lines.append(f"memory of a worker capped at {tables.gigabytes(machine.cap_bytes)} GB")
    if machine.matmul_flops:
        lines.append(f"measured ceiling of a matrix product: {tables.flops_text(machine.matmul_flops)}")
    lines.append(", ".join(f"{name} {version}" for name, version in sorted(result.versions.items())))
    return lines


def settings_lines(result: Result, table: str) -> list[str]:
    """Return one line for each arm of a table: what was set, and its source."""
    arms = result.case.tables[table].arms  # type: ignore[index]
    return [f"{tables.TITLES[table]}, {arm}: {settings_text(settings)}" for arm, settings in arms.items()]


def settings_text(settings: ArmSettings) -> str:
    """Return an arm's settings, its environment and their source."""
    what = json.dumps(settings.settings, sort_keys=True) if settings.settings else "nothing set"
    environment = " ".join(f"{key}={value}" for key, value in sorted(settings.environment.items()))
    return f"{what}{', ' + environment if environment else ''}. Source: {settings.source}"


def _link(path: Path, home: Path) -> str:
    return Path(os.path.relpath(path, home)).as_posix()


# --- the files


def _stale_images(drawings: dict[str, plots.Plot], images: Path) -> list[Path]:
    """Return the images that are missing, show something else than the new ones would, or whose result is gone."""
    old = {path.name: plots.digest_of(path) for path in images.glob("*.png")}
    gone = {name for name, digest in old.items() if digest is not None and name not in drawings}
    return [images / name for name in sorted(gone | {n for n, plot in drawings.items() if plot.digest != old.get(n)})]


def _write(stale: Sequence[Path], drawings: dict[str, plots.Plot], readme: Path, text: str) -> None:
    for path in stale:
        if path == readme:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        elif path.name in drawings:
            drawings[path.name].write(path.parent)
        else:
            path.unlink()


def schema_text() -> str:
    """Return the JSON Schema of a result, as benchmarks/result.schema.json holds it."""
    return json.dumps(Result.model_json_schema(), indent=1) + "\n"
