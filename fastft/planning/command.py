"""`fastft plan`: the plan of a config file, its table and its plot."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from fastft.config import DATA_SUFFIXES, RunConfig, dump_config, load_config, make_config
from fastft.errors import AnswerIsNoError, FastFTError
from fastft.files import write_atomically
from fastft.hardware import named_gpu, probe
from fastft.planning import Plan, apply_changes, plan, plan_table, several


def run(
    config: Path,
    overrides: list[str] | None = None,
    *,
    gpu: str | None = None,
    gpus: int = 1,
    apply: Path | None = None,
    plot: Path | None = None,
    show: bool = True,
) -> Plan:
    """Return the plan of the config file for the card `gpu` or this machine; print, plot and apply
    as asked.
    """
    _check_outputs(apply, plot)
    settings = load_config(config, overrides)
    hardware = named_gpu(gpu) if gpu is not None else probe(settings.output_dir)
    result = plan(settings, several.machine_with(hardware, gpus), gpus=gpus)
    if show:
        result.print()
        for source in _not_here(settings):
            print(
                f"note: the data file {source} is not on this machine, so nothing is known of its "
                "rows. Training needs it.",
                file=sys.stderr,
            )
    if plot is not None:
        result.plot(plot)
    if apply is not None:
        elsewhere = next((change for change in result.changes if "." not in change.key), None)
        if elsewhere is not None:
            instead = f"; with {elsewhere.key} {elsewhere.new} it would" if elsewhere.new else ""
            raise AnswerIsNoError(
                f"nothing in {config} can be changed so that it fits "
                f"{result.hardware}{instead}. Nothing was written."
            )
        changed = make_config(apply_changes(settings, result.changes))
        write_atomically(apply, dump_config(changed))
    return result


def _not_here(settings: RunConfig) -> list[str]:
    """Return the data files that are named and not there; people plan for another machine, too."""
    sources = [settings.data.source, *(part.source for part in settings.data.sources)]
    files = [(s, Path(s).expanduser()) for s in sources if s]
    return [s for s, path in files if path.suffix in DATA_SUFFIXES and not path.exists()]


def _check_outputs(apply: Path | None, plot: Path | None) -> None:
    """Raise FastFTError for a file that could not be written, before anything is printed."""
    for option, path in (("--apply", apply), ("--plot", plot)):
        if path is not None and path.is_dir():
            raise FastFTError(f"{option} {path} is a folder; name a file.")
    if apply is not None and not apply.absolute().parent.is_dir():
        raise FastFTError(
            f"--apply {apply}: there is no folder {apply.parent}. Make it, or name another."
        )
    if plot is not None and plot.suffix.lower() != ".png":
        raise FastFTError(f"--plot {plot}: the plot is a PNG; name a file that ends in .png.")


def table() -> list[dict[str, Any]]:
    """Return the rows of `fastft plan --table`."""
    return plan_table()


def table_text(rows: list[dict[str, Any]]) -> str:
    """Return the table as Markdown."""
    from fastft.planning.show import table_markdown

    return table_markdown(rows)
