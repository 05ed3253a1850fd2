"""`fastft runs`: the runs in a folder, each with its status, steps, held-out loss and exports."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.cells import cell_len, set_cell_size

from fastft.errors import FastFTError
from fastft.files.locks import is_held
from fastft.runs.folder import RunFolder, best_step

DEFAULT_FOLDER = Path("runs")


@dataclass(frozen=True)
class RunSummary:
    """One line of the list. A run that cannot be read has the status "damaged" and says why."""

    run: str
    """The run's folder."""
    status: str
    """running | done | paused | stopped (killed, or interrupted) | not started | damaged"""
    step: int
    total_steps: int | None
    eval_loss: float | None
    """Held-out loss, nats a trained token: that of final/ once done, else the best so far."""
    exports: list[str]
    """Names of the files and folders in export/, without the certificate."""
    problem: str | None = None


def list_runs(folder: str | Path = DEFAULT_FOLDER) -> list[RunSummary]:
    """Return the runs directly below `folder` and the trials of its sweeps, the one changed last
    first.

    Raises FastFTError where there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FastFTError(
            f"there is no folder {folder}. Runs lie in output_dir of the config (default: runs); "
            "name another folder: fastft runs FOLDER."
        )
    # A sweep's trials are runs in a folder of their own, beside sweep.json.
    sweeps = [path.parent for path in folder.glob("*/sweep.json")]
    places = [path for place in (folder, *sweeps) for path in place.iterdir()]
    found = [path for path in places if (path / "run.yaml").is_file()]
    found.sort(key=_last_change, reverse=True)
    return [_summary(RunFolder(path)) for path in found]


def as_json(summaries: list[RunSummary]) -> dict[str, Any]:
    """Return the object that `fastft runs --json` prints."""
    return {"runs": [asdict(summary) for summary in summaries]}


def as_table(summaries: list[RunSummary], folder: Path) -> str:
    """Return the list for a person."""
    if not summaries:
        return f"no run in {folder} yet. Start one with: fastft train run.yaml"
    rows = [["run", "status", "steps", "held-out loss", "exports"]]
    for one in summaries:
        steps = f"{one.step} of {one.total_steps}" if one.total_steps else str(one.step or "")
        loss = "" if one.eval_loss is None else f"{one.eval_loss:.4f}"
        rows.append([one.run, one.status, steps, loss, ", ".join(one.exports)])
    # As wide as a terminal shows them: a Japanese character takes two columns.
    widths = [max(cell_len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(map(set_cell_size, row, widths)).rstrip() for row in rows]
    lines += [f"{one.run}: {one.problem}" for one in summaries if one.problem]
    return "\n".join(lines)


def known_runs(near: Path) -> str:
    """Return the runs beside the path `near`, for the message that it is not there; "" for none."""
    folder = near.parent if near.parent != Path() else DEFAULT_FOLDER
    if not folder.is_dir():
        return ""
    names = sorted(str(p) for p in folder.iterdir() if (p / "run.yaml").is_file())
    return f" Runs in {folder}: {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}." * bool(
        names
    )


def _last_change(path: Path) -> float:
    return max(
        p.stat().st_mtime for p in (path, path / "run.yaml", path / "log.jsonl") if p.exists()
    )


def _summary(run: RunFolder) -> RunSummary:
    exports = sorted(
        p.name for p in run.export.glob("*") if not p.name.startswith((".", "certif", "README"))
    )
    try:
        record, log = run.read_record(), run.read_log()
    except FastFTError as error:
        return RunSummary(str(run.path), "damaged", 0, None, None, exports, str(error))
    step = max((entry["step"] for entry in log), default=0)
    best = best_step(log)
    losses = {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry}
    loss = record.get("eval_loss_after")
    return RunSummary(
        run=str(run.path),
        status=_status(run, record, log),
        step=step,
        total_steps=record.get("total_steps"),
        eval_loss=losses.get(best) if loss is None and best is not None else loss,
        exports=exports,
    )


def _status(run: RunFolder, record: dict[str, Any], log: list[dict[str, Any]]) -> str:
    if is_held(run.path / ".lock"):
        return "running"
    if record.get("status") in {"done", "paused"}:
        return record["status"]
    return "stopped" if log or record else "not started"
