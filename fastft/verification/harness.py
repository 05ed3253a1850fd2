"""`fastft eval --tasks`: tasks of EleutherAI's lm-eval, on base and adapter.

An optional extra (`pip install lm-eval`). Most of its tasks download their questions from the Hub;
a task of your own over a local file (dataset_path: json, dataset_kwargs: {data_files: ...}) needs
no network.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastft.errors import CouldNotFinishError, FastFTError, did_you_mean

INSTALL = "install it with: pip install lm-eval"


def run_tasks(
    target: str | Path,
    tasks: Sequence[str],
    *,
    folder: Path | None = None,
    base: str | None = None,
    dtype: str = "auto",
    limit: int | None = None,
    chat_template: bool = True,
) -> dict[str, Any]:
    """Return lm-eval's own numbers for base and adapter of `target` in the shape of `evaluate`.

    `folder` holds tasks of your own (YAML). Questions are asked through the trained chat template
    unless `chat_template` is False. A value's interval is lm-eval's standard error times 1.96.
    Raises FastFTError where lm-eval or a task is not there, CouldNotFinishError where a task's
    questions cannot be loaded (no network).
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise FastFTError(f"--tasks needs lm-eval, which is not installed; {INSTALL}.")
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from fastft.inference.generate import HuggingFaceChat
    from fastft.runs.target import resolve

    names = [name.strip() for name in tasks if name.strip()]
    if folder is not None and not folder.is_dir():
        raise FastFTError(f"--task-folder {folder} is not a folder.")
    manager = TaskManager(include_path=str(folder) if folder else None)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown or not names:
        what = ", ".join(f"{n!r}{did_you_mean(n, manager.all_tasks)}" for n in unknown)
        raise FastFTError(
            f"lm-eval has no task {what or '(none was named)'}. lm-eval ls tasks lists them."
        )
    resolved = resolve(target, base=base)
    chat = HuggingFaceChat(resolved, dtype=dtype)
    chat.template.save(chat.tokenizer)
    models = []
    for name in ["model"] if resolved.adapter is None else ["base", "adapter"]:
        off = chat.model.disable_adapter() if name == "base" else contextlib.nullcontext()
        started = time.monotonic()
        with off, contextlib.redirect_stdout(sys.stderr):
            judge = HFLM(pretrained=chat.model, tokenizer=chat.tokenizer, batch_size=8)
            results = _evaluate(lm_eval, judge, names, manager, limit, chat_template)
        seconds = round(time.monotonic() - started, 1)
        scores = {f"{task} {k}": v for task in names for k, v in _scores(results[task]).items()}
        models.append({"name": name, "kind": name, "seconds": seconds, "scores": scores})
    return {
        "data": ", ".join(names), "format": "lm-eval", "rows": _rows(results, names), "dropped": {},
        "models": models, "comparisons": [], "changed": [], "files": [],
    }  # fmt: skip


def _evaluate(
    lm_eval: Any, judge: Any, names: list[str], manager: Any, limit: int | None, template: bool
) -> dict[str, Any]:
    try:
        found = lm_eval.simple_evaluate(
            model=judge,
            tasks=names,
            task_manager=manager,
            limit=limit,
            apply_chat_template=template,
            bootstrap_iters=1000,
            log_samples=False,
        )
    except OSError as error:
        # also what requests, httpx and huggingface_hub raise without a network
        raise CouldNotFinishError(
            f"the questions of {', '.join(names)} could not be loaded: {error}. lm-eval downloads "
            "them from the Hub; a task over a local file needs no network."
        ) from error
    return {
        name: found["results"].get(name, {}) | {"rows": _counted(found, name)} for name in names
    }


def _counted(found: dict[str, Any], name: str) -> dict[str, int]:
    """Return the questions asked of a task; of a group, those of its tasks together."""
    leaves = found.get("group_subtasks", {}).get(name) or [name]
    asked = [found["n-samples"][leaf]["effective"] for leaf in leaves if leaf in found["n-samples"]]
    return {"effective": sum(asked)}


def _scores(values: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return {metric: {value, low, high}} of lm-eval's {"acc,none": 0.5, "acc_stderr,none":
    ...}.
    """
    scores = {}
    for key, value in values.items():
        name, _, kind = key.partition(",")
        if not kind or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{name}_stderr,{kind}")
        half = 1.96 * error if isinstance(error, int | float) else 0.0
        scores[name] = {"value": value, "low": value - half, "high": value + half}
    return scores


def _rows(results: dict[str, Any], names: list[str]) -> int:
    return sum(results[name]["rows"]["effective"] for name in names)
