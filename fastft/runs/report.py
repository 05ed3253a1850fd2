"""report.md of a run: what was trained, how it went, and answers before and after side by side."""

from __future__ import annotations

from typing import Any

from fastft.files import write_atomically
from fastft.runs.folder import RunFolder
from fastft.secrets import redact


def write_report(run: RunFolder) -> None:
    """Write report.md and loss.png from run.json and log.jsonl."""
    record, log = run.read_record(), run.read_log()
    plot = run.plot_loss()
    steps = [entry for entry in log if "loss" in entry]
    speeds = sorted(entry["tokens_per_sec"] for entry in steps)
    lines = [
        f"# {run.path.name}",
        "",
        *_table(
            {
                "Steps": f"{record.get('steps')} of {record.get('total_steps')}",
                "Held-out loss": f"{_number(record.get('eval_loss_before'))} before, "
                f"{_number(record.get('eval_loss_after'))} after"
                + (f" (step {record['best_step']})" if record.get("best_step") else ""),
                "Trained tokens": f"{record['dataset']['trained_tokens']:,} of "
                f"{record['dataset']['tokens']:,} (held-out rows included)",
                "Speed": f"{speeds[len(speeds) // 2]:,.0f} tokens/s without padding (median)"
                if speeds
                else "no step was logged",
                "Peak memory": f"{max(e['peak_memory_bytes'] for e in steps) / 2**30:.2f} GiB"
                if steps
                else "",
                "Trainable parameters": f"{record['trainable_parameters']:,}",
            }
        ),
        "",
        *_evaluations([entry for entry in log if "samples" in entry]),
        *([f"![loss]({plot.name})", ""] if plot else []),
        "## Answers before and after",
        "",
        *_answers(record.get("samples_before") or [], record.get("samples_after") or []),
        "## Automatic choices",
        "",
        *(
            f"- {name}: **{choice['value']}** ({choice['reason']})"
            for name, choice in record["choices"].items()
        ),
        "",
    ]
    write_atomically(run.path / "report.md", redact("\n".join(lines)))


def _evaluations(entries: list[dict[str, Any]]) -> list[str]:
    """What train.eval_metrics measured: a row an evaluation, and the first answer of each."""
    if not entries:
        return []
    names = [n for n in ("exact_match", "contains") if any(n in entry for entry in entries)]
    lines = ["## Evaluations", "", f"| step | loss | {' | '.join(names)} | an answer |"]
    lines.append("|---" * (3 + len(names)) + "|")
    for entry in entries:
        shares = (f"{entry[name]:.1%}" if name in entry else "" for name in names)
        values = [_number(entry["eval_loss"]), *shares]
        sample = entry["samples"][0]["answer"] if entry.get("samples") else ""
        lines.append(f"| {entry['step']} | {' | '.join(values)} | {_cell(sample)} |")
    return [*lines, ""]


def _table(rows: dict[str, str]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]


def _answers(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[str]:
    lines = ["| prompt | before | after | reference |", "|---|---|---|---|"]
    for old, new in zip(before, after, strict=False):
        cells = (new["prompt"][-1]["content"], old["answer"], new["answer"], new["reference"])
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return [*lines, ""]


def _cell(text: Any) -> str:
    return str(text).replace("|", "\\|").replace("\n", "<br>")[:400]


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"
