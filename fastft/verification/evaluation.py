"""`fastft eval`: a base, its adapter and every exported GGUF file asked the same questions.

read the questions -> ask each model -> score each row -> values with intervals -> what changed

Every difference comes with a paired interval, because on a few hundred questions most differences
between two exports of one model are chance.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastft.errors import FastFTError
from fastft.files import read_json, sha256, write_atomically
from fastft.inference import metrics
from fastft.inference.metrics import Scores
from fastft.progress import Reporter
from fastft.verification.evaluation_page import page, shown, tables
from fastft.verification.judges import Judged, open_judged
from fastft.verification.questions import Question, QuestionFile, read_questions

FILES = ("result.json", "answers.jsonl", "index.html")
MOST_NEW_TOKENS = 1024


@dataclasses.dataclass
class _Result:
    """What one model said and scored."""

    name: str
    kind: str
    seconds: float
    scores: dict[str, Scores]
    answers: list[str]


def evaluate(
    target: str | Path,
    *,
    data: str | Path,
    metric: Sequence[str] = ("auto",),
    against: Sequence[str | Path] = (),
    with_base: bool = True,
    with_exports: bool = True,
    base: str | None = None,
    out: str | Path | None = None,
    max_new_tokens: int | None = None,
    limit: int | None = None,
    dtype: str = "auto",
    gpu_layers: int | str = "auto",
    n_ctx: int | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Ask `target` (a run, an adapter or model folder, a .gguf file) the questions in `data`.

    A run is its base, its adapter and the GGUF files of its export/, side by side; `against` names
    more models. `metric`: names of `fastft.inference.metrics.METRICS`, or "auto" for those that
    the columns call for. `max_new_tokens` None: enough for twice the longest expected answer, at
    most 1,024.

    Returns {"data", "format", "rows", "dropped": {line: why}, "models": [{"name", "kind",
    "seconds", "scores": {metric: {"value", "low", "high"}}}], "comparisons": [{"model", "against",
    "metric", "difference", "low", "high", "better", "worse", "verdict"}], "changed": [{"line",
    "question", "reference", "model", "against", "metric", "answers", "scores"}], "files"}.
    `verdict` is better, worse or "not told apart": the interval of the difference (95 %, paired
    bootstrap) holds 0. Also writes result.json, answers.jsonl and index.html into `out` (default:
    the run's eval/NAME-OF-THE-DATA). Raises FastFTError for rows, metrics or targets that cannot
    be used.
    """
    report = reporter or Reporter()
    for option, value in (("--limit", limit), ("--max-new-tokens", max_new_tokens)):
        if value is not None and value < 1:
            raise FastFTError(f"{option} is {value}; it must be at least 1.")
    file = read_questions(str(data), limit=limit)
    names = file.metrics(list(metric))
    report.note(f"{len(file.questions):,} questions ({file.format}), judged by {', '.join(names)}")
    if file.dropped:
        shown = "; ".join(f"line {line}: {why}" for line, why in list(file.dropped.items())[:3])
        report.warn(f"{len(file.dropped):,} rows are left out: {shown}")
    tokens = max_new_tokens or _enough_tokens(file.questions)
    how = {"base": base, "dtype": dtype, "gpu_layers": gpu_layers, "n_ctx": n_ctx}
    folder = _out_folder(target, base, Path(str(data)).stem, out)
    _refuse_foreign(folder)
    if trained_on(target, str(data)):
        report.warn(
            f"{data} is what this run was trained on: the scores say how well it was learnt, not "
            "how well it answers new questions. Use rows that it has not seen."
        )
    results: list[_Result] = []
    for judged in _models(target, against, how, with_base, with_exports, report):
        results.append(_ask(judged, file, names, tokens))
        judged.close()
        report.note(_line(results[-1]))
    found = _findings(str(data), file, results)
    found["files"] = _write(folder, found, file, results)
    return found


def _models(
    target: str | Path,
    against: Sequence[str | Path],
    how: dict[str, Any],
    with_base: bool,
    with_exports: bool,
    report: Reporter,
) -> Any:
    """Yield the models one by one: a file is loaded when its turn comes, and closed after it."""
    yield from open_judged(target, with_base=with_base, **how)
    files = _exports(target, how["base"]) if with_exports else []
    if files and importlib.util.find_spec("llama_cpp") is None:
        report.warn(
            f"{len(files)} GGUF files are left out: llama-cpp-python is not installed "
            "(pip install 'fastft[gguf]')"
        )
        files = []
    for path in files:
        yield from open_judged(path, with_base=False, **how)
    for other in against:
        for judged in open_judged(other, with_base=False, **(how | {"base": None})):
            judged.name = str(other)  # two of them may have one file name
            yield judged


def _exports(target: str | Path, base: str | None) -> list[Path]:
    """Return the whole-model GGUF files in the run's export/."""
    from fastft.runs.target import resolve

    if Path(target).suffix == ".gguf":
        return []
    resolved = resolve(target, base=base)
    if resolved.run is None:
        return []
    return [
        path
        for path in sorted(resolved.run.export.glob("[!.]*.gguf"))
        if not path.name.endswith(".lora.gguf")
    ]


def _out_folder(target: str | Path, base: str | None, name: str, out: str | Path | None) -> Path:
    if out is not None:
        return Path(out).expanduser()
    if Path(target).suffix == ".gguf":
        return Path("eval") / Path(target).stem / name
    from fastft.runs.target import resolve

    resolved = resolve(target, base=base)
    folder = resolved.run.path if resolved.run is not None else Path("eval") / resolved.name
    return folder / "eval" / name if resolved.run is not None else folder / name


def trained_on(target: str | Path, data: str) -> bool:
    """Whether the run `target` (or the one that it is final/ of) was trained on the file `data`, or
    on one with the same bytes.
    """
    from fastft.runs.folder import RunFolder

    folder, asked = Path(target).expanduser(), Path(data).expanduser()
    run = next((p for p in (folder, folder.parent) if (p / "run.yaml").is_file()), None)
    if run is None or not folder.is_dir() or not asked.is_file():
        return False
    config = RunFolder(run).read_config()
    sources = [config.data.source, *(one.source for one in config.data.sources)]
    files = [path for name in sources if name and (path := Path(name).expanduser()).is_file()]
    return any(path.samefile(asked) or sha256(path) == sha256(asked) for path in files)


def _enough_tokens(questions: list[Question]) -> int:
    """Room for twice the longest expected answer: a token holds a byte at least."""
    longest = max((len(text.encode()) for q in questions for text in q.accepted), default=256)
    return min(MOST_NEW_TOKENS, max(32, 2 * longest))


def _ask(judged: Judged, file: QuestionFile, names: list[str], max_new_tokens: int) -> _Result:
    started = time.monotonic()
    scores = {name: Scores(name) for name in names}
    answers = [""] * len(file.questions)
    if {*names} & {*metrics.ANSWER_METRICS}:
        answers = judged.answers(file.questions, max_new_tokens)
    for question, answer in zip(file.questions, answers, strict=True):
        _score_answer(scores, question, answer)
    if {*names} & {*metrics.TEXT_METRICS}:
        for question in file.questions:
            measured = judged.likelihood(question, question.reference)
            for name in {*names} & {*metrics.TEXT_METRICS}:
                scores[name].add_likelihood(measured)
    if {*names} & {*metrics.CHOICE_METRICS}:
        for i, question in enumerate(file.questions):
            chosen = _choose(judged, question, scores)
            answers[i] = answers[i] or question.choices[chosen]
    seconds = round(time.monotonic() - started, 1)
    return _Result(judged.name, judged.kind, seconds, scores, answers)


def _score_answer(scores: dict[str, Scores], question: Question, answer: str) -> None:
    if "exact_match" in scores:
        scores["exact_match"].add(metrics.exact_match(answer, question.accepted))
    if "contains" in scores:
        scores["contains"].add(metrics.contains(answer, question.accepted))
    if "regex" in scores:
        scores["regex"].add(metrics.matches(answer, question.pattern or ""))


def _choose(judged: Judged, question: Question, scores: dict[str, Scores]) -> int:
    """Score one multiple choice; returns the most likely choice.

    `choice` compares sums of log-probabilities, `choice_norm` those sums over the number of
    characters: lm-eval's acc and acc_norm.
    """
    sums = [judged.likelihood(question, text).log_probability for text in question.choices]
    normed = [total / len(text) for total, text in zip(sums, question.choices, strict=True)]
    for name, values in (("choice", sums), ("choice_norm", normed)):
        if name in scores:
            scores[name].add(float(values.index(max(values)) == question.right))
    return sums.index(max(sums))


def _findings(data: str, file: QuestionFile, results: list[_Result]) -> dict[str, Any]:
    pairs = _pairs(results)
    return {
        "data": data,
        "format": file.format,
        "rows": len(file.questions),
        "dropped": {str(line): why for line, why in file.dropped.items()},
        "models": [_model(result) for result in results],
        "comparisons": [
            _compare(mine, other, name) for mine, other in pairs for name in mine.scores
        ],
        "changed": [
            row
            for mine, other in pairs
            for name in mine.scores
            if name not in metrics.TEXT_METRICS
            for row in _changed(file.questions, mine, other, name)
        ],
    }


def _pairs(results: list[_Result]) -> list[tuple[_Result, _Result]]:
    """Every model beside what it should be compared with: the adapter with the base, all others
    with the adapter (or with the first model where there is none).
    """
    adapter = next((r for r in results if r.kind == "adapter"), results[0])
    pairs = [(adapter, results[0])] if adapter is not results[0] else []
    return pairs + [(r, adapter) for r in results if r is not adapter and r.kind != "base"]


def _model(result: _Result) -> dict[str, Any]:
    scores = {}
    for name, score in result.scores.items():
        low, high = score.interval()
        scores[name] = {"value": score.value(), "low": low, "high": high}
    return {
        "name": result.name, "kind": result.kind, "seconds": result.seconds, "scores": scores,
    }  # fmt: skip


def _compare(mine: _Result, other: _Result, name: str) -> dict[str, Any]:
    ours, theirs = mine.scores[name], other.scores[name]
    difference, low, high = ours.difference(theirs)
    sign = -1 if ours.lower_is_better else 1
    pairs = list(zip(ours.each(), theirs.each(), strict=True))
    better = sum(sign * a > sign * b for a, b in pairs)
    worse = sum(sign * a < sign * b for a, b in pairs)
    verdict = "not told apart"
    if low > 0 or high < 0:
        verdict = "better" if sign * difference > 0 else "worse"
    return {
        "model": mine.name, "against": other.name, "metric": name,
        "difference": difference, "low": low, "high": high, "better": better, "worse": worse,
        "verdict": verdict,
    }  # fmt: skip


def _changed(
    questions: list[Question], mine: _Result, other: _Result, name: str
) -> list[dict[str, Any]]:
    """Return the rows that one of the two models has right and the other wrong."""
    ours, theirs = mine.scores[name].each(), other.scores[name].each()
    return [
        {
            "line": question.line, "question": question.asked, "reference": question.reference,
            "model": mine.name, "against": other.name, "metric": name,
            "answers": [mine.answers[i], other.answers[i]], "scores": [ours[i], theirs[i]],
        }
        for i, question in enumerate(questions)
        if ours[i] != theirs[i]
    ]  # fmt: skip


def _refuse_foreign(folder: Path) -> None:
    """Raise FastFTError where what is to be written would replace files of somebody else.

    result.json is written first, so the other two are an evaluation's only beside one.
    """
    there = [name for name in FILES if (folder / name).is_symlink() or (folder / name).exists()]
    try:
        whole = {"models", "comparisons"} <= read_json(folder / FILES[0]).keys()
    except FastFTError:
        whole = False
    if there and not whole:
        raise FastFTError(
            f"{', '.join(there)} in {folder} would be replaced, but was not written by "
            "fastft eval. Move it away, or choose another --out."
        )


def _write(
    folder: Path, found: dict[str, Any], file: QuestionFile, results: list[_Result]
) -> list[str]:
    """Write result.json, answers.jsonl and index.html; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, question in enumerate(file.questions):
        said = {r.name: r.answers[i] for r in results}
        each = {r.name: {n: s.each()[i] for n, s in r.scores.items()} for r in results}
        row = {"line": question.line, "messages": question.messages}
        row |= {"reference": question.reference, "answers": said, "scores": each}
        lines.append(json.dumps(row, ensure_ascii=False))
    contents = (
        json.dumps(found, indent=1, ensure_ascii=False),
        "\n".join(lines) + "\n",
        page(found),
    )
    for name, text in zip(FILES, contents, strict=True):
        write_atomically(folder / name, text)
    return [str(folder / name) for name in FILES]


def _line(result: _Result) -> str:
    values = ", ".join(f"{name} {shown(name, s.value())}" for name, s in result.scores.items())
    return f"{result.name}: {values} ({result.seconds:.0f} s)"


def text(found: dict[str, Any]) -> str:
    """Return the findings as a terminal shows them."""
    from rich.console import Console

    console = Console(highlight=False)
    with console.capture() as captured:
        console.print(*tables(found), sep="")
    pages = [path for path in found.get("files", []) if path.endswith(".html")]
    return captured.get().rstrip() + "".join(f"\n{path}" for path in pages)


def parse_floors(texts: Sequence[str]) -> dict[str, float]:
    """Return {metric: value} of `--at-least` METRIC=VALUE; raises FastFTError where one is not."""
    floors = {}
    for entry in texts:
        name, _, value = entry.partition("=")
        try:
            floors[name.strip()] = float(value)
            if not math.isfinite(floors[name.strip()]):
                raise ValueError(value)
        except ValueError:
            raise FastFTError(
                f"--at-least {entry!r}: write METRIC=VALUE, for example exact_match=0.9."
            ) from None
    return floors


def below(found: dict[str, Any], floors: dict[str, float]) -> list[str]:
    """Return a line for each floor that the examined model (the adapter, or the only one) misses.

    Metrics where smaller is better must lie at or under the value. Raises FastFTError for a metric
    that was not measured.
    """
    models = found["models"]
    model = next((m for m in models if m["kind"] == "adapter"), models[0])
    lines = []
    for name, floor in floors.items():
        if name not in model["scores"]:
            raise FastFTError(
                f"--at-least {name}: not measured here. Measured: {', '.join(model['scores'])}."
            )
        value = model["scores"][name]["value"]
        if value > floor if name in metrics.TEXT_METRICS else value < floor:
            lines.append(f"{model['name']}: {name} is {value:.4g}, asked for was {floor:g}")
    return lines
