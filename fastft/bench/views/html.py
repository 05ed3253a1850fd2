"""One HTML page of one or more results, for sharing: plots, tables, parity, settings, every run.
Needs no other file.
"""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastft.bench.record import Record, Result
from fastft.bench.statistics import memory_bytes
from fastft.bench.views import plots, tables
from fastft.bench.views.report import TEMPLATES, described, variables_text
from fastft.errors import FastFTError
from fastft.files import write_atomically
from fastft.verification.evaluation_page import templates

RECORD_HEADINGS = (
    "table", "arm", "repeat", "order", "status", "tokens/s", "seconds of each timed step", "losses",
    "peak GB", "import", "load", "first step", "load average", "CPU share", "clock MHz",
    "throttled",
)  # fmt: skip


def write_html(results: Sequence[Result], out: Path) -> Path:
    """Write the page of `results` to `out` and return it; raises FastFTError where there are
    none.
    """
    if not results:
        raise FastFTError("give at least one result: python -m fastft.bench html RESULT.json")
    page = (
        templates(TEMPLATES)
        .get_template("report.html.jinja")
        .render(
            legend=tables.LEGEND,
            headings=tables.HEADINGS,
            record_headings=RECORD_HEADINGS,
            sections=[_section(result) for result in results],
        )
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, page)
    return out


def _section(result: Result) -> dict[str, Any]:
    return described(result) | {
        "date": result.date,
        "plots": _embedded_plots(result),
        "notes": result.notes,
        "checks": [
            {"table": name, "arm": arm, **check.model_dump(include={"name", "passed", "text"})}
            for name, table in result.tables.items()
            for arm, gate in table.parity.items()
            for check in gate.checks
        ],
        "settings": [
            {
                "table": name,
                "arm": arm,
                "settings": json.dumps(settings.settings, sort_keys=True),
                "environment": variables_text(settings),
                "source": settings.source,
            }
            for name in result.tables
            for arm, settings in result.case.tables[name].arms.items()
        ],
        "records": [{"cells": _record_cells(r), "log": _log(r)} for r in result.records],
        "json": result.model_dump_json(indent=1),
    }


def _embedded_plots(result: Result) -> list[dict[str, str]]:
    with tempfile.TemporaryDirectory() as scratch:
        return [
            {
                "title": plot.title,
                "base64": base64.b64encode(plot.write(Path(scratch)).read_bytes()).decode(),
            }
            for plot in plots.plots_of(result)
        ]


def _record_cells(record: Record) -> list[str]:
    timed = record.measured
    noise = record.noise
    return [
        record.table,
        record.arm,
        str(record.repeat),
        str(record.order),
        record.status,
        tables.number(record.non_padding_tokens_per_sec) if timed else "-",
        " ".join(tables.number(step.seconds) for step in timed) or "-",
        " ".join("-" if step.loss is None else f"{step.loss:.4f}" for step in record.steps) or "-",
        tables.gigabytes(memory_bytes(record.peak)),
        tables.seconds(record.import_seconds),
        tables.seconds(record.load_seconds),
        tables.seconds(record.first_step_seconds),
        f"{noise.load_average_before:.1f} to {noise.load_average_after:.1f}" if noise else "-",
        tables.percent(noise.cpu_share) if noise else "-",
        tables.number(noise.clock_mhz) if noise and noise.clock_mhz else "-",
        noise.throttled or "-" if noise else "-",
    ]


def _log(record: Record) -> str:
    if record.status == "ok":
        return ""
    return "\n".join([record.reason or record.status, *record.log_tail])
