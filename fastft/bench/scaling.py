"""How fastft grows: over the model's size, the sequences' length, threads, and rows of data.

One arm, nothing to compare with, so nothing is gated; what is judged is the growth. Training is
timed by tokens per second and by the arithmetic that it achieves (flops.py): where that falls from
one point to a larger one, time grows faster than the arithmetic does. Rows are prepared as `fastft
train` prepares them, from a file to tokens and labels that are proven.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fastft.bench.case import Case, Lengths
from fastft.bench.side_by_side import SideBySide, assembled, in_a_process, measure_ways
from fastft.errors import FastFTError, one_of
from fastft.hardware import peak_resident_bytes, probe

# Hidden, intermediate, layers, heads, heads of keys; a head has 64 dimensions. The last two are
# the shapes of SmolLM2-360M and Llama-3.2-1B.
SHAPES = {
    "20M": (320, 864, 8, 5, 5),
    "60M": (512, 1408, 14, 8, 4),
    "125M": (576, 1536, 30, 9, 3),
    "360M": (960, 2560, 32, 15, 5),
    "1B": (2048, 8192, 16, 32, 8),
}
VOCABULARY = 32_768
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
STEP_TOKENS = 8192  # of each step over LENGTHS, so that only the length differs
ROWS = (1_000, 10_000, 100_000, 1_000_000)
ROW_WORDS = 30
FALL = 0.10
"""Part of the achieved arithmetic (or of the rows a second) that a larger point may lose before the
page says so.
"""


def run_scaling(
    axis: str,
    *,
    repeats: int = 3,
    most: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> SideBySide:
    """Measure fastft at the points of `axis` (size, length, threads, rows) up to `most`, each in a
    process of its own, in a random order within each round.

    Raises FastFTError for an unknown axis, or where `most` leaves no point.
    """
    if axis not in AXES:
        raise one_of("axis", axis, AXES)
    points = [point for point in AXES[axis][1]() if most is None or point.value <= most]
    if not points:
        raise FastFTError(f"no point of axis {axis} is at most {most:,}.")
    ways = {point.way: point.run for point in points}
    runs = measure_ways(ways, repeats, seed=0, say=say)
    title = f"Scaling over {AXES[axis][0]}"
    threads = probe().cpu_cores
    for run in runs:  # where each point lies, for the plot
        run.figures["at"] = next(point.value for point in points if point.way == run.way)
    found = assembled("scaling", title, axis, 0, threads, runs, list(ways), [])
    found.notes.append(growth_text(found))
    return found


def growth_text(found: SideBySide) -> str:
    """Return what the page says of the growth: where a larger point does less of its work a second
    than the best smaller one by more than FALL, or that none does.

    The work is arithmetic for training, rows for preparation; over threads it is the speed-up.
    """
    quantity = "rows_per_sec" if found.case == "rows" else "flops_per_sec"
    what = "rows a second" if found.case == "rows" else "the arithmetic a second"
    speeds = {way: figures[quantity].median for way, figures in found.summary.items()}
    if found.case == "threads":
        one = next(iter(speeds.values()))
        return "speed over one thread: " + ", ".join(
            f"{w} {s / one:.2f}x" for w, s in speeds.items()
        )
    best, falls = 0.0, []
    for way, speed in speeds.items():
        if speed < best * (1 - FALL):
            falls.append(f"{way} {1 - speed / best:.0%}")
        best = max(best, speed)
    if falls:
        return f"{what} falls, against the best smaller point: {', '.join(falls)}"
    return f"{what} nowhere falls by more than {FALL:.0%} against a smaller point"


# --- the points

Shape = tuple[int, int, int, int, int]
Run = Callable[[], dict[str, float]]


@dataclass(frozen=True)
class Point:
    """A point of an axis: where it lies, what it is called, and how it is measured."""

    value: int
    way: str
    run: Run


def _sizes() -> list[Point]:
    return [
        Point(_parameters(shape), name, partial(_train, _case(shape, 512, 4)))
        for name, shape in SHAPES.items()
    ]


def _lengths() -> list[Point]:
    shape = SHAPES["60M"]
    return [
        Point(n, f"{n:,} tokens", partial(_train, _case(shape, n, STEP_TOKENS // n)))
        for n in LENGTHS
    ]


def _threads() -> list[Point]:
    cores = probe().cpu_cores
    counts = sorted({2**i for i in range(cores.bit_length()) if 2**i <= cores} | {cores})
    shape = SHAPES["125M"]
    return [
        Point(n, f"{n} thread" + "s" * (n > 1), partial(_train, _case(shape, 512, 4, n)))
        for n in counts
    ]


def _rows() -> list[Point]:
    return [Point(n, f"{n:,} rows", partial(_prepare, n)) for n in ROWS]


AXES: dict[str, tuple[str, Callable[[], list[Point]]]] = {
    "size": ("the model's size, 4 sequences of 512 tokens a step", _sizes),
    "length": (f"the sequences' length, {STEP_TOKENS:,} tokens a step, a model of 60M", _lengths),
    "threads": ("threads, a model of 125M, 4 sequences of 512 tokens a step", _threads),
    "rows": (f"the rows of the data, prepared, {ROW_WORDS} words each", _rows),
}


def _parameters(shape: Shape) -> int:
    hidden, intermediate, layers, heads, kv = shape
    a_layer = 2 * hidden * 64 * (heads + kv) + 3 * hidden * intermediate + 2 * hidden
    return VOCABULARY * hidden + layers * a_layer + hidden


def _case(shape: Shape, length: int, batch: int, threads: int | None = None) -> Case:
    """A case with fastft's arm alone."""
    hidden, intermediate, layers, heads, kv = shape
    arm = {
        "environment": {"OMP_WAIT_POLICY": "PASSIVE"},
        "source": "fastft's defaults (fastft/config.py); the command line sets OMP_WAIT_POLICY",
    }
    config = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": 64,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": max(LENGTHS),
        "tie_word_embeddings": True,
    }
    return Case.model_validate(
        {
            "name": f"scaling-{_parameters(shape)}-{length}",
            "title": "fastft alone",
            "device": "cpu",
            "model": {"family": "llama", "config": config},
            "lengths": Lengths(fixed=length),
            "effective_batch_size": batch,
            "steps": 2,
            "threads": threads,
            "tables": {"defaults": {"arms": {"fastft": arm}}},
        }
    )


def _train(case: Case) -> dict[str, float]:
    from fastft.bench.flops import step_flops
    from fastft.bench.runner import run_alone

    record, shape, work = run_alone(case, "fastft")
    timed = range(record.warmup_steps, len(record.steps))
    flops = sum(
        step_flops(shape, work.parts(i), work.supervised(i), record.trainable_parameters or 0)
        for i in timed
    )
    assert record.peak is not None
    return {
        "tokens_per_sec": record.non_padding_tokens_per_sec,
        "seconds_per_step": record.seconds / len(timed),
        "flops_per_sec": flops / record.seconds,
        "peak_rss_bytes": record.peak.rss_bytes,
    }


def _prepare(rows: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="fastft-scaling-") as scratch:
        threads = probe().cpu_cores
        in_a_process(__name__, "write", scratch, str(rows), threads=threads)
        _, found = in_a_process(__name__, "prepare", scratch, threads=threads)
    return {
        "rows_per_sec": rows / found["seconds"],
        "seconds": found["seconds"],
        "peak_rss_bytes": found["peak_rss_bytes"],
    }


# --- what runs in the processes of the data


def _write_rows(folder: str, count: str) -> dict[str, Any]:
    """Write rows of one question and one answer, of the words of the quickstart's questions."""
    from fastft.quickstart import write_task

    rng = random.Random(0)
    words = sorted(set(write_task(folder).train.read_text(encoding="utf-8").split()))
    with (Path(folder) / "rows.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(int(count)):
            text = rng.choices(words, k=ROW_WORDS)
            asked, told = (
                " ".join(part) for part in (text[: ROW_WORDS // 2], text[ROW_WORDS // 2 :])
            )
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return {}


def _prepare_rows(folder: str) -> dict[str, Any]:
    from transformers import AutoTokenizer

    from fastft.config import DataConfig
    from fastft.data import prepare
    from fastft.quickstart import base_path

    tokenizer = AutoTokenizer.from_pretrained(base_path())
    config = DataConfig(source=str(Path(folder) / "rows.jsonl"), eval_fraction=0.0)
    started = time.perf_counter()
    made = prepare(config, tokenizer, max_seq_length=512, cache_dir=Path(folder) / "cache")
    assert made.report.rows_used == made.report.rows_total, made.report
    return {"seconds": time.perf_counter() - started}


STEPS: dict[str, Callable[..., dict[str, Any]]] = {"write": _write_rows, "prepare": _prepare_rows}

if __name__ == "__main__":
    answer = STEPS[sys.argv[1]](*sys.argv[2:])
    print("\n" + json.dumps(answer | {"peak_rss_bytes": peak_resident_bytes(children=True)}))
