"""`fastft plan`: the plan of a config file, its table and its plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastft.checkpoint import write_atomically
from fastft.config import dump_config, load_config, make_config
from fastft.errors import FastFTError
from fastft.hardware import named_gpu, probe
from fastft.plan import Plan, apply_changes, plan, plan_table


def run(
    config: Path,
    overrides: list[str] | None = None,
    *,
    gpu: str | None = None,
    apply: Path | None = None,
    plot: Path | None = None,
    show: bool = True,
) -> Plan:
    """Return the plan of the config file for the card `gpu` or this machine; print, plot and apply as asked."""
    settings = load_config(config, overrides)
    result = plan(settings, named_gpu(gpu) if gpu else probe(settings.output_dir))
    if show:
        result.print()
    if plot is not None:
        result.plot(plot)
    if apply is not None:
        if result.verdict == "does_not_fit" and all(change.key == "gpu" for change in result.changes):
            raise FastFTError(
                f"nothing in {config} can be changed so that it fits {result.hardware}; nothing was written."
            )
        changed = make_config(apply_changes(settings, result.changes))
        write_atomically(apply, dump_config(changed))
    return result


def table() -> list[dict[str, Any]]:
    """Return the rows of `fastft plan --table`."""
    return plan_table()


def table_text(rows: list[dict[str, Any]]) -> str:
    """Return the table as Markdown."""
    from fastft.plan.show import table_markdown

    return table_markdown(rows)
