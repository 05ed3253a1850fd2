"""Cases other than training: several ways to do the same thing, each run in a process of its own,
interleaved.

exporting.py (adapter to a quantised file) and generating.py (tokens per second) say what a way is;
here is what they share: the model, the processes, the record, and how it is printed. No ratio is
gated here: that the files are equal is the certificate's business (`fastft verify`).
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from fastft import child
from fastft.bench.case import Case
from fastft.bench.record import Spread, Strict, source_commit
from fastft.bench.statistics import spread
from fastft.bench.views.tables import gigabytes, number, spread_text
from fastft.errors import CouldNotFinishError, FastFTError
from fastft.files import write_atomically
from fastft.hardware import installed, probe

VOCABULARY = 1920
"""Tokens of the quickstart's tokenizer, which the models that are exported get."""
PACKAGES = ("torch", "transformers", "peft", "gguf", "llama-cpp-python", "fastft")
UNITS = {
    "seconds": "s",
    "seconds_per_step": "s",
    "flops_per_sec": "GFLOP/s",
    "peak_rss_bytes": "GB",
    "intermediate_bytes": "GB",
    "file_bytes": "GB",
}


class Run(Strict):
    """One way, once."""

    way: str
    repeat: int
    figures: dict[str, float]


class SideBySide(Strict):
    """The result of an export, generation or scaling case; a JSON file among the benchmark's
    results.
    """

    kind: Literal["export", "generate", "scaling"]
    schema_version: int = 1
    title: str
    case: str
    parameters: int
    machine: str
    date: str
    commit: str | None
    versions: dict[str, str]
    repeats: int
    summary: dict[str, dict[str, Spread]]
    """Way, then quantity: seconds, peak_rss_bytes, prompt_tokens_per_sec ..."""
    runs: list[Run]
    notes: list[str] = Field(default_factory=list)

    def write(self, path: Path) -> None:
        """Write the JSON file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, self.model_dump_json(indent=1) + "\n")

    @property
    def quantities(self) -> list[str]:
        """What was measured, in the order of the first way; without "at", where a point lies."""
        return [name for name in next(iter(self.summary.values())) if name != "at"]

    def rows(self) -> list[list[str]]:
        """Return a row of text a way: its name, then every quantity with its 20th to 80th
        percentile.
        """
        return [
            [way, *(_figure(name, found[name]) for name in self.quantities)]
            for way, found in self.summary.items()
        ]

    def headings(self) -> list[str]:
        """Return the headings of `rows`."""
        return ["way", *(name.replace("_bytes", "").replace("_", " ") for name in self.quantities)]


def _figure(name: str, figures: Spread) -> str:
    in_billions = name.endswith("_bytes") or name == "flops_per_sec"
    text = spread_text(figures, gigabytes if in_billions else number)
    return f"{text} {UNITS[name]}" if name in UNITS else text


def read_side_by_side(path: Path) -> SideBySide:
    """Return the result in `path`; raises FastFTError where it is not one."""
    try:
        return SideBySide.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        raise FastFTError(f"{path}: not an export or generation result ({error}).") from error


def measure_ways(
    ways: dict[str, Callable[[], dict[str, float]]],
    repeats: int,
    *,
    seed: int,
    say: Callable[[str], None],
) -> list[Run]:
    """Run every way `repeats` times, in a random order within each round, and return all runs."""
    if repeats < 1:
        raise FastFTError(f"--repeats is {repeats}; it must be at least 1.")
    runs = []
    for repeat in range(repeats):
        order = list(ways)
        random.Random(f"{seed} {repeat}").shuffle(order)
        for way in order:
            runs.append(Run(way=way, repeat=repeat, figures=ways[way]()))
            text = ", ".join(f"{name} {value:,.4g}" for name, value in runs[-1].figures.items())
            say(f"{way} #{repeat + 1}: {text}")
    return runs


def summarised(runs: Sequence[Run], ways: Sequence[str]) -> dict[str, dict[str, Spread]]:
    """Return median, p20 and p80 of every quantity of every way."""
    found: dict[str, dict[str, Spread]] = {}
    for way in ways:
        figures = [run.figures for run in runs if run.way == way]
        found[way] = {name: spread([f[name] for f in figures]) for name in figures[0]}
    return found


def paired(result: SideBySide, ours: str, other: str, quantity: str) -> float:
    """Return the median over the rounds of `ours` / `other`."""
    by_way = {(run.way, run.repeat): run.figures[quantity] for run in result.runs}
    return statistics.median(by_way[ours, i] / by_way[other, i] for i in range(result.repeats))


def assembled(
    kind: Literal["export", "generate", "scaling"], title: str, case: str, parameters: int,
    threads: int, runs: list[Run],
    ways: Sequence[str], notes: list[str],
) -> SideBySide:  # fmt: skip
    """Return the result of `runs` with what is known of this machine and its versions."""
    return SideBySide(
        kind=kind,
        title=title,
        case=case,
        parameters=parameters,
        machine=f"{probe().name}, {threads} threads",
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=source_commit()[0],
        versions=installed(PACKAGES),
        repeats=max(run.repeat for run in runs) + 1,
        summary=summarised(runs, ways),
        runs=runs,
        notes=notes,
    )


def in_a_process(module: str, *arguments: str, threads: int) -> tuple[float, dict[str, Any]]:
    """Run `module` in a safe child and return its seconds and the JSON of its last line.

    On Linux a child's peak RSS begins with its parent's: this process must not have imported
    torch. Raises CouldNotFinishError with the last lines of a process that failed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    start = time.perf_counter()
    pipe = subprocess.PIPE
    command = child.command(module, *arguments)
    process = subprocess.Popen(
        command,
        stdout=pipe,
        stderr=pipe,
        text=True,
        env=environment,
        errors="replace",
        start_new_session=True,
    )
    try:
        out, log = process.communicate()
    finally:
        if process.poll() is None:
            # interrupted: with what it has started, as the quantiser's own process
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    seconds = time.perf_counter() - start
    if process.returncode:
        last = " | ".join(log.strip().splitlines()[-3:])
        raise CouldNotFinishError(
            f"{module} {arguments[0]} ended with {process.returncode}: {last}"
        )
    return seconds, json.loads(out.strip().splitlines()[-1])


def models_and_threads(
    module: str, case: Case, home: Path, say: Callable[[str], None]
) -> tuple[dict[str, Any], int]:
    """Let `module` make the case's models in `home`; return what `make_model` says of them, and
    the threads of every run.
    """
    needs_a_shape(case)
    threads = case.threads or probe().cpu_cores
    say("making the models")
    _, made = in_a_process(module, "make", str(home), case.model_dump_json(), threads=threads)
    return made, threads


def needs_a_shape(case: Case) -> None:
    """Raise FastFTError for a case that export and generation cannot be measured with."""
    if case.model.family is None:
        raise FastFTError(
            f"case {case.name} names a model; give one that has a family and a config."
        )
    vocabulary = int(case.model.config.get("vocab_size", VOCABULARY))
    if vocabulary < VOCABULARY:
        raise FastFTError(
            f"case {case.name} has a vocabulary of {vocabulary:,}; the tokenizer that is "
            f"exported has {VOCABULARY:,}."
        )


def make_model(case: Case, folder: Path) -> dict[str, Any]:
    """Write the case's shape with random bfloat16 weights (base/) and an adapter (adapter/), and a
    real tokenizer.

    The tokenizer is the quickstart's (1,920 byte-level tokens); rows above it are never met.
    Returns the number of parameters and the name of the tokenizer's splitting rule. Needs torch:
    call it in a process of its own.
    """
    import torch
    from peft import get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from fastft.bench.workload import lora_config
    from fastft.exporting.gguf.tokenizer import tokenizer_metadata
    from fastft.quickstart import base_path

    needs_a_shape(case)
    assert case.model.family is not None
    tokenizer = AutoTokenizer.from_pretrained(base_path())
    config = AutoConfig.for_model(case.model.family, **case.model.config)
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(case.seed)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    base = folder / "base"
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    adapted = get_peft_model(model, lora_config(case))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    adapted.save_pretrained(str(folder / "adapter"))
    fields = tokenizer_metadata(base, int(config.vocab_size), "", base)
    return {"parameters": parameters, "pre": str(fields["tokenizer.ggml.pre"][0])}


def show_side_by_side(result: SideBySide, console: Any = None) -> None:
    """Print the table of `result` to a rich console (default: standard output)."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = console or Console()
    grid = Table(title=escape(f"{result.title}, {result.machine}"), title_justify="left")
    for column in result.headings():
        grid.add_column(column, justify="left" if column == "way" else "right")
    for row in result.rows():
        grid.add_row(*map(escape, row))
    console.print(grid)
    for note in result.notes:
        console.print(f"[dim]note: {escape(note)}[/]")
