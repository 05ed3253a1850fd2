"""`fastft quickstart`: the whole main job on the embedded tiny model, judged by exact match before
and after.

write the task -> train -> answer held-out and unknown questions -> export -> the same questions
through llama.cpp
"""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from typing import Any

from fastft.config import make_config
from fastft.errors import AnswerIsNoError
from fastft.progress import Reporter
from fastft.quickstart import (
    MAX_ANSWER_TOKENS,
    TaskFiles,
    exact_match,
    quickstart_config,
    write_task,
)

QUANTIZATIONS = ("q8_0", "q4_k_m")
AT_LEAST = 0.9  # held-out exact match after training; below it the quickstart has failed


def quickstart(
    out: Path, *, engine: str = "auto", reporter: Reporter | None = None
) -> dict[str, Any]:
    """Run the quickstart in `out`/quickstart and return its numbers (shares 0 to 1, seconds, file
    paths).

    Raises AnswerIsNoError where the trained model does not answer what it should.
    """
    from fastft.verbs import export, train

    report = reporter or Reporter()
    folder = Path(out) / "quickstart"
    files = write_task(folder / "data")
    config = make_config(
        quickstart_config(folder / "data", engine) | {"output_dir": str(out)}, where="quickstart"
    )
    started = time.monotonic()
    trained = train(config, reporter=report)
    seconds = round(time.monotonic() - started, 1)
    report.note("asking the held-out questions, before and after")
    result: dict[str, Any] = {
        "run": trained.run,
        "seconds_training": seconds,
        "exact_match": _judge(trained.run, files),
    }

    targets = ["merged"]
    if importlib.util.find_spec("llama_cpp") is not None:
        targets += [f"gguf:{name}" for name in QUANTIZATIONS]
    else:
        report.warn("llama-cpp-python is not installed: no GGUF files (pip install 'fastft[gguf]')")
    exported = export(trained.run, targets, reporter=report)
    assert exported.certificate is not None
    result["files"] = exported["files"]
    result["certificate"] = exported.certificate.verdict
    for file in exported.files:
        if file.path.endswith(".gguf"):
            name = file.kind.removeprefix("gguf:")
            result["exact_match"][f"heldout_{name}"] = _judge_gguf(Path(file.path), files)
    result["chat"] = _chat(trained.run, files)
    _show(result, report)
    if result["exact_match"]["heldout_after"] < AT_LEAST:
        raise AnswerIsNoError(
            f"the trained model answers {result['exact_match']['heldout_after']:.1%} of the "
            "held-out questions; at least "
            f"{AT_LEAST:.0%} were expected. `fastft doctor` looks for a cause."
        )
    if exported.certificate.verdict == "fail":
        raise AnswerIsNoError(
            "an exported file is not the trained model; see "
            f"{Path(trained.run) / 'export/certificate.md'}."
        )
    return result


def read_questions(path: Path) -> list[tuple[list[dict[str, str]], str]]:
    """Return (messages of the question, expected answer) of each row of a task file."""
    rows = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]
    return [(messages[:-1], messages[-1]["content"]) for messages in rows]


def _judge(run: str, files: TaskFiles) -> dict[str, float]:
    """Return exact match of base and adapter, on plain transformers + peft in float32."""
    from fastft.inference.generate import HuggingFaceChat
    from fastft.runs.target import resolve

    chat = HuggingFaceChat(resolve(run), dtype="float32")
    heldout, unknown = read_questions(files.heldout), read_questions(files.unknown)
    with chat.model.disable_adapter():
        before = _share_right(chat, heldout)
    return {
        "heldout_before": before,
        "heldout_after": _share_right(chat, heldout),
        "unknown_after": _share_right(chat, unknown),
    }


def _share_right(chat: Any, questions: list[tuple[list[dict[str, str]], str]]) -> float:
    answers = chat.answer_all(
        [messages for messages, _ in questions], max_new_tokens=MAX_ANSWER_TOKENS
    )
    return exact_match(answers, [expected for _, expected in questions])


def _judge_gguf(path: Path, files: TaskFiles) -> float:
    from fastft.inference.generate import ask
    from fastft.inference.llamacpp import GgufChat
    from fastft.inference.sampling import Sampling

    chat = GgufChat(path, gpu_layers=0, n_ctx=256)
    questions = read_questions(files.heldout)
    answers = [ask(chat, messages, Sampling(MAX_ANSWER_TOKENS)).text for messages, _ in questions]
    return exact_match(answers, [expected for _, expected in questions])


def _chat(run: str, files: TaskFiles) -> list[dict[str, str]]:
    """Return two questions (English and Japanese) with the trained model's answers."""
    from fastft.inference.sampling import Sampling
    from fastft.verbs import Chat

    chat = Chat(run, sampling=Sampling(MAX_ANSWER_TOKENS))
    questions = read_questions(files.heldout)[:2]
    return [{"question": m[-1]["content"], "answer": chat.ask(m).text} for m, _ in questions]


def _show(result: dict[str, Any], report: Reporter) -> None:
    from rich.table import Table

    names = {
        "heldout_before": "held-out questions, before training",
        "heldout_after": "held-out questions, after training",
        "unknown_after": "questions about facts that are in no text",
    }
    table = Table("exact match", "", title="quickstart")
    for key, share in result["exact_match"].items():
        name = names.get(
            key, f"held-out questions through llama.cpp, {key.removeprefix('heldout_')}"
        )
        table.add_row(name, f"{share:.1%}")
    report.console.print(table)
    for turn in result["chat"]:
        report.note(f"  {turn['question']}  ->  {turn['answer']}")
    report.note(
        f"trained in {result['seconds_training']} s; talk to it: fastft chat {result['run']}"
    )
