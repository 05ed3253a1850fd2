"""The command line of the benchmark: fastft bench [--case NAME] and its subcommands."""

from __future__ import annotations

import contextlib
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from fastft.console import print_result
from fastft.errors import (
    AnswerIsNoError,
    CouldNotFinishError,
    FastFTError,
    InterruptedRunError,
    one_of,
)

app = typer.Typer(
    name="bench",
    help="Measure fastft against plain peft, trl, Unsloth and Liger: paired, isolated, "
    "parity-gated.",
    invoke_without_command=True,
    no_args_is_help=True,
)

RESULTS = Path("benchmarks/results")
Cases = Annotated[
    list[str] | None, typer.Option("--case", help="name of a case or a YAML file (repeatable)")
]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object on standard output")]
Shape = Annotated[str, typer.Option("--case", help="whose shape is measured")]
Repeats = Annotated[int, typer.Option("--repeats", min=1)]
Out = Annotated[Path, typer.Option("--out", help="where the result goes")]
HERE = Path("bench-results")
ResultFiles = Annotated[
    list[Path], typer.Argument(metavar="RESULT.json...", help="results of earlier runs")
]


@app.callback()
def measure(
    context: typer.Context,
    case: Cases = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu", help="all cases of this card: t4, l4, a100, h100, h200, rtx3060, rtx4090"
        ),
    ] = None,
    arms: Annotated[
        str | None, typer.Option("--arms", help="only these, comma-separated: peft,unsloth,fastft")
    ] = None,
    tables: Annotated[
        str | None, typer.Option("--tables", help="only these: defaults,matched")
    ] = None,
    repeats: Annotated[
        int | None, typer.Option("--repeats", min=1, help="rounds; default: the case's")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="where results, logs and plots go")
    ] = None,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile",
            help="run each arm once more and record what its last step spends its time on",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Run cases; exit 1 where an arm does not do the same work as plain peft."""
    _end_as_interrupted()
    if context.invoked_subcommand is not None:
        return
    from fastft.bench.case import load_case
    from fastft.bench.runner import check_case, run_case

    names = [*(case or []), *(_cases_of(gpu) if gpu else [])]
    if not names:
        raise FastFTError(
            "give --case NAME or --gpu CARD; `python -m fastft.bench cases` lists the cases."
        )
    part: dict[str, Any] = {"arms": _split("--arms", arms), "tables": _split("--tables", tables)}
    loaded = [load_case(name) for name in names]  # every mistake in them before hours of work
    for each in loaded:
        check_case(each, **part)
    out = _writable(out or HERE)
    results = []
    for each in loaded:
        _say(f"case {each.name}: {each.title}")
        logs = out / "logs" / each.name
        with _said_when_interrupted(each.name, out), _disk_errors():
            found = run_case(each, repeats=repeats, say=_say, keep=logs, profile=profile, **part)
            results.append(found)
            _written(found, out, show_tables=not as_json)
    _answer_all(results, out, as_json)


def _end_as_interrupted() -> None:
    """End as for Ctrl-C where the system asks for it: no worker and no folder is left behind."""
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, signal.default_int_handler)


def _answer_all(results: list[Any], out: Path, as_json: bool) -> None:
    """Print what was measured; raises where an arm fails the gate or nothing can be compared."""
    summaries = [found.summary() for found in results]
    _answer(summaries[0] if len(summaries) == 1 else {"cases": summaries}, as_json)
    if not all(found.parity_passed for found in results):
        raise AnswerIsNoError(
            "an arm does not do the same work as plain peft (see above), so it has no ratio."
        )
    dead = [f"{found.case.name}: {line}" for found in results for line in _dead(found)]
    if dead:
        raise CouldNotFinishError(
            f"nothing to compare: {'; '.join(dead)}. The logs are in {out / 'logs'}."
        )


@app.command()
def cases(as_json: Json = False) -> None:
    """List the cases."""
    from fastft.bench.case import known_cases, load_case

    rows = {name: load_case(str(path)) for name, path in known_cases().items()}
    if as_json:
        return _answer({name: case.title for name, case in rows.items()}, True)
    width = max(map(len, rows))
    print("\n".join(f"{name:<{width}}  {case.title}" for name, case in rows.items()))


@app.command()
def export(
    case: Shape = "cpu-135m", repeats: Repeats = 3, out: Out = HERE, as_json: Json = False
) -> None:
    """Adapter to q4_k_m: fastft's one pass against merging, converting and quantising (time,
    memory, disk).
    """
    from fastft.bench.case import load_case
    from fastft.bench.exporting import run_export

    out = _writable(out)
    with _disk_errors():
        _side_by_side(run_export(load_case(case), repeats=repeats, say=_say), out, as_json)


@app.command()
def generate(
    case: Shape = "cpu-135m", repeats: Repeats = 5, out: Out = HERE, as_json: Json = False
) -> None:
    """Tokens per second through transformers and through llama.cpp, prompt and decoding apart."""
    from fastft.bench.case import load_case
    from fastft.bench.generating import run_generate

    out = _writable(out)
    with _disk_errors():
        _side_by_side(run_generate(load_case(case), repeats=repeats, say=_say), out, as_json)


@app.command()
def scaling(
    axes: Annotated[
        str, typer.Option("--axes", help="of size, length, threads, rows")
    ] = "size,length,threads,rows",
    most: Annotated[
        int | None,
        typer.Option("--most", min=1, help="largest point: parameters, tokens, threads or rows"),
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1)] = 3,
    out: Annotated[Path, typer.Option("--out", help="where the results go")] = Path(
        "bench-results"
    ),
    as_json: Json = False,
) -> None:
    """Speed and memory over the model's size, the sequences' length, threads, and rows of data."""
    from fastft.bench.scaling import AXES, run_scaling

    names = _split("--axes", axes) or []
    for name in names:
        if name not in AXES:
            raise one_of("axis", name, AXES)
    if most is not None and len(names) > 1:
        raise FastFTError(
            f"--most {most:,} is in the unit of one axis, and there are {len(names)}; give one "
            "with --axes."
        )
    out, found = _writable(out), {}
    for name in names:  # each is kept before the next begins
        with _disk_errors():
            found[name] = run_scaling(name, repeats=repeats, most=most, say=_say)
            _kept(found[name], out, show_table=not as_json)
    _answer({name: each.model_dump(mode="json") for name, each in found.items()}, as_json)


@app.command()
def report(
    results: Annotated[Path, typer.Option("--results", help="folder of results")] = RESULTS,
    readme: Annotated[Path, typer.Option("--readme", help="the file to write")] = Path(
        "benchmarks/README.md"
    ),
    check: Annotated[
        bool, typer.Option("--check", help="write nothing; exit 1 where the file is not up to date")
    ] = False,
) -> None:
    """Write benchmarks/README.md and its plots from the committed results."""
    from fastft.bench.views.report import write_report

    if not check:
        _writable(readme.parent)
    with _disk_errors():
        stale = write_report(results, readme, readme.parent / "images", check=check)
    if check and stale:
        raise AnswerIsNoError(
            f"not up to date: {', '.join(map(str, stale))}. Run: python -m fastft.bench report"
        )
    print("\n".join(map(str, stale)) if stale else "up to date")


@app.command()
def html(
    files: ResultFiles,
    out: Annotated[Path, typer.Option("--out", help="the page to write")] = Path("benchmark.html"),
) -> None:
    """Write one self-contained HTML page of results, for sharing."""
    from fastft.bench.record import read_result
    from fastft.bench.views.html import write_html

    found = [read_result(path) for path in files]
    if out.is_dir():
        raise FastFTError(f"--out {out} is a folder; give the page's file name.")
    _writable(out.parent)
    with _disk_errors():
        write_html(found, out)
    print(out)


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(metavar="A", help="an earlier result")],
    after: Annotated[Path, typer.Argument(metavar="B", help="a later result")],
    threshold: Annotated[
        float, typer.Option("--threshold", help="regression that fails: 0.05 is 5 %")
    ] = 0.05,
    force: Annotated[
        bool, typer.Option("--force", help="compare different cases nevertheless")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say what changed between two results; exit 1 for a regression beyond the threshold."""
    from fastft.bench.compare import compare as compare_results
    from fastft.bench.record import read_result

    comparison = compare_results(
        read_result(before), read_result(after), threshold=threshold, force=force
    )
    _answer(comparison.model_dump(mode="json") if as_json else {}, as_json)
    if not as_json:
        print(comparison.text())
    if comparison.regressions:
        raise AnswerIsNoError(f"{len(comparison.regressions)} regressions beyond {threshold:.0%}.")


@app.command()
def schema() -> None:
    """Print the JSON Schema of a result."""
    from fastft.bench.views.report import schema_text

    sys.stdout.write(schema_text())


def _cases_of(gpu: str) -> list[str]:
    """Return the names of the cases of a card; raises FastFTError for a card without any."""
    from fastft.bench.case import known_cases, load_case

    by_card: dict[str, list[str]] = {}
    for name, path in known_cases().items():
        card = load_case(str(path)).card
        if card:
            by_card.setdefault(card.split("-")[0], []).append(name)
    wanted = gpu.lower().split("-")[0]
    if wanted not in by_card:
        raise one_of("card with cases", gpu, by_card)
    return by_card[wanted]


def _writable(out: Path) -> Path:
    """Return `out`, made if need be; raises FastFTError where nothing could be written to it after
    hours of work.
    """
    if out.exists() and not out.is_dir():
        raise FastFTError(f"{out} is a file; give a folder with --out.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise FastFTError(
            f"{out} cannot be written to ({error.strerror}); give another folder."
        ) from error
    return out


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    """Turn a full or failing disk into one message."""
    try:
        yield
    except OSError as error:
        what = f"{error.strerror} ({error.filename})" if error.filename else str(error)
        raise CouldNotFinishError(
            f"{what}. Models and logs of a run are in {tempfile.gettempdir()} (TMPDIR)."
        ) from error


@contextlib.contextmanager
def _said_when_interrupted(case: str, out: Path) -> Iterator[None]:
    """Say what an interrupted measurement leaves; typer alone would end without a word."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise InterruptedRunError(
            f"interrupted: there is no result of case {case}; its runs so far and their logs "
            f"are in {out / 'logs' / case}."
        ) from error


def _dead(found: Any) -> list[str]:
    """Return a line for each table in which fastft, or where it takes no part every arm, came to
    no end.
    """
    from fastft.bench.views.tables import status_text

    lines = []
    for name, table in found.tables.items():
        ours = table.arms.get("fastft")
        judged = {"fastft": ours} if ours else table.arms
        if judged and all(summary.status != "ok" for summary in judged.values()):
            lines += [f"{name}, {arm}: {status_text(summary)}" for arm, summary in judged.items()]
    return lines


def _written(found: Any, out: Path, *, show_tables: bool) -> Path:
    """Write the result and its plots, print the tables; return the JSON file."""
    from rich.console import Console

    from fastft.bench.views.plots import plot_result
    from fastft.bench.views.tables import show

    label = "".join(c if c.isalnum() else "-" for c in found.machine.label.lower()).strip("-")
    path = out / f"{found.case.name}--{label}--{_when(found)}.json"
    found.write(path)
    plots = plot_result(found, out)
    if show_tables:
        show(found, Console())
    _say(f"{path}" + "".join(f"\n{plot}" for plot in plots))
    return path


def _side_by_side(found: Any, out: Path, as_json: bool) -> None:
    """Write an export or generation result and print its table, or all of it as JSON."""
    _kept(found, out, show_table=not as_json)
    _answer(found.model_dump(mode="json"), as_json)


def _kept(found: Any, out: Path, *, show_table: bool) -> None:
    """Write a result of several ways, and print its table."""
    from rich.console import Console

    from fastft.bench.side_by_side import show_side_by_side

    path = out / f"{found.kind}--{found.case}--{_when(found)}.json"
    found.write(path)
    if show_table:
        show_side_by_side(found, Console())
    _say(str(path))


def _when(found: Any) -> str:
    return f"{found.date[:10]}--{found.commit or 'no-commit'}"


def _answer(values: Any, as_json: bool) -> None:
    if as_json:
        print_result(values, True)


def _split(option: str, text: str | None) -> list[str] | None:
    names = [part.strip() for part in (text or "").split(",") if part.strip()]
    if text is not None and not names:
        raise FastFTError(f"{option} {text!r} names nothing; leave it out for all.")
    return names or None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
