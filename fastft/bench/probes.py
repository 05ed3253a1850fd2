"""What `fastft selftest` measures, each part in a process of its own: rows, runs, the plan, a step.

    python -m fastft.bench.probes PART FOLDER JSON      prints one finding a line, as JSON

Weights and sequences are random and made here, so nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, Field

Verdict = Literal["pass", "warn", "fail", "skip"]

ROW_LENGTHS, LONG = (61, 33, 17, 80, 24), 300
PLAN_ERROR = {"cuda": 0.10, "cpu": 0.20, "mps": 0.20}
"""How far a step's peak may be from the plan: docs/plan.md has the measured error of each."""
SLOW = 1.25
"""A row without padding may take so many times what a padded batch takes for each token in it."""
RESUMED = {"cpu": 1e-6, "cuda": 1e-3, "mps": 1e-3}
"""Largest relative difference of a resumed run's losses; a GPU adds gradients in any order."""

TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 320, "max_position_embeddings": 512,
}  # fmt: skip
_HALF_WINDOWED = {
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
}
OWN: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 16},
    "gemma2": {"sliding_window": 16},
    "gemma3_text": _HALF_WINDOWED,
    "phi3": {"sliding_window": 64, "original_max_position_embeddings": 512},
    "gpt_oss": _HALF_WINDOWED | {"num_local_experts": 4, "num_experts_per_tok": 2},
}
"""What a family's tiny model needs besides: windows shorter than the rows, so that they count."""


class Finding(BaseModel):
    """One thing that was looked at: what came out, its numbers, and what to do about it."""

    name: str
    verdict: Verdict
    numbers: dict[str, Any] = Field(default_factory=dict)
    advice: str = ""


# --- exact rows


def families() -> list[str]:
    """Return the model types whose rows without padding are known to be exact."""
    from fastft.families import FAMILIES

    return [name for name, row in FAMILIES.items() if row.rows == "exact"]


def look_at_rows(folder: Path, names: Sequence[str] | None = None) -> Iterator[Finding]:
    """Yield, for each family, whether a row without padding has the gradient of its sequences
    alone with this machine's kernels (see training/exactness.py).
    """
    for name in names or families():
        yield _guarded(f"rows: {name}", partial(_rows_of, folder / name, name))


def _rows_of(folder: Path, family: str) -> Finding:
    import torch

    from fastft.training.exactness import check_rows
    from fastft.training.step import Stepper, StepPolicy

    model, engine, choices = load_tiny(folder, family)
    dtype, device = getattr(torch, choices["dtype"].value), model.device
    rows = engine.accept_rows(model)
    stepper = Stepper(
        model, engine, StepPolicy(10_000, rows, 0), device=device, on_note=lambda note: None
    )
    mixed = dtype != torch.float32
    found = check_rows(
        stepper,
        random_segments(ROW_LENGTHS, TINY["vocab_size"]),
        lambda: torch.autocast(device.type, dtype, enabled=mixed),
        longest=random_segments((LONG,), TINY["vocab_size"]),
    )
    assert found is not None, "the row has five sequences"
    numbers = {
        "one_minus_cosine": found.error,
        "padded": found.rounding,
        "long_row": found.long_error,
        "ignored_boundaries": found.leak,
        "norm_ratio": found.norm_ratio,
        "loss_error": found.loss_error,
        "rows": rows,
        "dtype": choices["dtype"].value,
    }
    if found.exact:
        return Finding(name=f"rows: {family}", verdict="pass", numbers=numbers)
    advice = (
        f"Rows without padding are not exact for {family} with this machine's attention kernels "
        f"(1 - cosine {max(found.error, found.long_error):.1e}, rounding {found.rounding:.1e}). "
        "fastft train finds this out by itself and pads. Update xformers or flash-attn, and "
        "report it with this file."
    )
    return Finding(name=f"rows: {family}", verdict="fail", numbers=numbers, advice=advice)


def load_tiny(folder: Path, family: str) -> tuple[Any, Any, dict[str, Any]]:
    """Make a tiny random model of `family` in `folder`, and load it with LoRA as training does;
    returns (model, engine, choices). LoRA's B is not zero, so that A has a gradient.
    """
    import torch

    from fastft.config import make_config
    from fastft.engines import loading
    from fastft.hardware import probe

    make_model(folder, family, TINY | OWN.get(family, {}))
    config = make_config(
        {
            "project": "selftest",
            "model": {"name": str(folder), "quantization": "none", "max_seq_length": 512},
            "data": {"source": "none"},
            "lora": {"r": 4, "dropout": 0.0},
        },
        where="the selftest",
    )
    hardware = probe(folder)
    choices = loading.choose_loading(config, hardware)
    base, _, engine = loading.load_for_training(
        config.model, hardware, gradient_checkpointing=False, choices=choices
    )
    model, _ = loading.attach_lora(
        base, engine, config.lora, seed=1, gradient_checkpointing=False, train_token_ids=[]
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator) * 0.05
                parameter.add_(noise.to(parameter.device, parameter.dtype))
    return model, engine, choices


def make_model(folder: Path, family: str, config: dict[str, Any]) -> None:
    """Write a random model of `family` with a tokenizer to `folder`, unless it is there."""
    from fastft.bench.case import ModelSpec, load_case
    from fastft.bench.workload import make_checkpoint

    if (folder / "config.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    spec = ModelSpec(family=family, config=config)
    make_checkpoint(load_case("smoke").model_copy(update={"model": spec}), folder)
    # The benchmark's tokenizer never meets text; here words are separated by spaces.
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text("utf-8"))
    tokenizer["pre_tokenizer"] = {"type": "WhitespaceSplit"}
    path.write_text(json.dumps(tokenizer), encoding="utf-8")


def random_segments(lengths: Sequence[int], vocabulary: int) -> list[Any]:
    """Return random sequences; the last three quarters of each are trained on."""
    from fastft.data.batches import Segment

    numbers, found = np.random.default_rng(0), []
    for length in lengths:
        ids = numbers.integers(5, vocabulary, length)
        labels = ids.copy()
        labels[: 1 + length // 4] = -100
        found.append(Segment(ids, labels))
    return found


# --- runs: precision, resume, memory


def train_and_resume(folder: Path, changes: dict[str, Any]) -> Iterator[Finding]:
    """Yield whether a run of six steps learns, and whether the same run in two slices has the same
    losses. `changes` are the settings of its model section.
    """
    name = "run: " + " ".join(str(value) for value in changes.values())
    yield _guarded(name, partial(_train_and_resume, name, folder, changes))


def _train_and_resume(name: str, folder: Path, changes: dict[str, Any]) -> Finding:
    from fastft.hardware import probe

    base = folder / "llama"
    make_model(base, "llama", TINY)
    kind = "-".join(str(value) for value in changes.values())
    whole = _losses(_run(folder, f"{kind}-whole", base, changes))
    _run(folder, f"{kind}-sliced", base, changes, stop_after=3)
    sliced = _losses(_run(folder, f"{kind}-sliced", base, changes))
    apart = max(abs(a - b) / abs(a) for a, b in zip(whole, sliced, strict=True))
    numbers = {"losses": whole, "resumed": sliced, "largest_difference": apart}
    limit = RESUMED[probe(folder).kind]
    if apart > limit:
        advice = (
            f"A resumed run's losses differ by {apart:.1e} from those of the run that was not "
            f"stopped (at most {limit:.0e}). Report it with this file."
        )
        return Finding(name=name, verdict="fail", numbers=numbers, advice=advice)
    if not whole[-1] < whole[0]:
        advice = f"The loss went from {whole[0]:.3f} to {whole[-1]:.3f} in six steps."
        return Finding(name=name, verdict="fail", numbers=numbers, advice=advice)
    return Finding(name=name, verdict="pass", numbers=numbers)


def _run(
    folder: Path,
    project: str,
    base: Path,
    model: dict[str, Any],
    *,
    stop_after: int | None = None,
    lengths: tuple[int, ...] = (12, 20, 40, 9, 31, 16, 26, 48),
    steps: int = 6,
    **train: Any,
) -> Path:
    """Train on random words as `fastft train` does; returns the run's folder."""
    from fastft.config import make_config
    from fastft.progress import silent
    from fastft.training.train import train as train_run

    data = folder / f"words-{max(lengths)}.jsonl"
    if not data.is_file():
        _write_words(data, lengths, vocabulary=_vocabulary(base))
    values = {
        "project": project,
        "output_dir": str(folder / "runs"),
        "model": {"name": str(base), "max_seq_length": 2 * max(lengths), **model},
        "data": {"source": str(data), "eval_fraction": 0, "long_text": "truncate"},
        "lora": {"r": 8, "dropout": 0.0},
        "train": {"max_steps": steps, "save_steps": 3, "learning_rate": 5e-3, **train},
    }
    config = make_config(values, where="the selftest")
    train_run(config, stop_after=stop_after, reporter=silent())
    return config.run_dir


def _vocabulary(base: Path) -> int:
    return int(json.loads((base / "config.json").read_text("utf-8"))["vocab_size"])


def _write_words(path: Path, lengths: Sequence[int], vocabulary: int) -> None:
    """Eight texts of so many words each, of which one word in two repeats: there is something to
    learn.
    """
    numbers = np.random.default_rng(1)
    lines = []
    for length in lengths:
        words = numbers.integers(5, vocabulary, length)
        words[::2] = 7
        lines.append(json.dumps({"text": " ".join(f"t{word}" for word in words)}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text("utf-8").splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def look_at_plan(folder: Path, case: dict[str, Any]) -> Iterator[Finding]:
    """Yield how far the plan was from the peak of a real run: `case` has family, config, lengths,
    and the settings of its model and train sections.
    """
    yield _guarded(f"plan: {case['name']}", partial(_plan_case, folder, case))


def _plan_case(folder: Path, case: dict[str, Any]) -> Finding:
    from fastft.hardware import probe

    base = folder / case["shape"]
    make_model(base, case["family"], case["config"])
    run = _run(
        folder, re.sub(r"[^A-Za-z0-9]+", "-", case["name"]), base, case["model"], steps=3,
        lengths=tuple(case["lengths"]), **case["train"],
    )  # fmt: skip
    record = json.loads((run / "run.json").read_text("utf-8"))
    return judge_plan(f"plan: {case['name']}", record["memory"], probe(folder).kind)


def judge_plan(name: str, memory: dict[str, Any], kind: str) -> Finding:
    """Return the finding on a run's planned and measured peak (run.json's `memory`)."""
    planned, measured = memory["predicted_bytes"], memory["measured_bytes"]
    error, limit = planned / measured - 1, PLAN_ERROR[kind]
    numbers = {"planned_bytes": planned, "measured_bytes": measured, "error": error}
    if abs(error) <= limit:
        return Finding(name=name, verdict="pass", numbers=numbers)
    advice = (
        f"The plan is off by {error:+.0%} (planned {planned / 2**30:.2f} GiB, measured "
        f"{measured / 2**30:.2f} GiB; within {limit:.0%} is expected). Runs that the plan calls "
        "tight may not fit on this machine. Report it with this file."
    )
    return Finding(name=name, verdict="fail", numbers=numbers, advice=advice)


# --- speed


def look_at_speed(folder: Path, case: dict[str, Any]) -> Iterator[Finding]:
    """Yield what a token costs in rows without padding and in padded batches, and what a step
    spends its time on.
    """
    yield _guarded("speed", partial(_speed, folder, case))


def _speed(folder: Path, case: dict[str, Any]) -> Finding:
    from fastft.bench.profiling import profile_of

    model, engine, choices = _load(folder, case)
    stepper_of = partial(_stepper, model, engine, choices)
    segments = random_segments(case["lengths"], case["config"]["vocab_size"])
    rows = engine.accept_rows(model)
    fast, padded = stepper_of(rows), stepper_of("padded")
    seconds: dict[str, list[float]] = {"rows": [], "padded": []}
    for turn in range(case["turns"] + 1):
        for name, step in (("rows", fast), ("padded", padded)):
            taken = _seconds(step, segments)
            if turn:  # the first of each compiles and allocates
                seconds[name].append(taken)
    sizes = {
        name: sum(batch.padded_tokens for batch in step.batches(segments))
        for name, step in (("rows", fast), ("padded", padded))
    }
    tokens = sum(map(len, segments))
    numbers = {f"{name}_seconds": float(np.median(values)) for name, values in seconds.items()} | {
        f"{name}_tokens": sizes[name] for name in sizes
    }
    numbers["tokens_per_sec"] = tokens / numbers["rows_seconds"]
    numbers["profile"] = profile_of(partial(_seconds, fast, segments))
    return judge_speed(numbers)


def judge_speed(numbers: dict[str, Any]) -> Finding:
    """Return the finding on a step's seconds in rows and padded: rows that cost more for each token
    than padded batches run on slow kernels.
    """
    each = {
        name: numbers[f"{name}_seconds"] / numbers[f"{name}_tokens"] for name in ("rows", "padded")
    }
    ratio = each["rows"] / each["padded"]
    numbers = numbers | {"row_token_over_padded_token": ratio}
    if ratio <= SLOW:
        return Finding(name="speed", verdict="pass", numbers=numbers)
    advice = (
        f"A token in a row without padding takes {ratio:.2f} times as long as one in a padded "
        f"batch (at most {SLOW} is expected): rows run on a slow path here. On a GPU, install "
        "xformers (fastft doctor shows which attention is used); see numbers.profile for where "
        "the time goes."
    )
    return Finding(name="speed", verdict="warn", numbers=numbers, advice=advice)


def _load(folder: Path, case: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    from fastft.config import make_config
    from fastft.engines import loading
    from fastft.hardware import probe

    base = folder / case["shape"]
    make_model(base, case["family"], case["config"])
    config = make_config(
        {
            "project": "selftest",
            "model": {"name": str(base), "max_seq_length": 2048, **case["model"]},
            "data": {"source": "none"},
            "lora": {"dropout": 0.0},
        },
        where="the selftest",
    )
    hardware = probe(folder)
    choices = loading.choose_loading(config, hardware)
    loaded, _, engine = loading.load_for_training(
        config.model, hardware, gradient_checkpointing=False, choices=choices
    )
    model, _ = loading.attach_lora(
        loaded, engine, config.lora, seed=1, gradient_checkpointing=False, train_token_ids=[]
    )
    return model, engine, choices


def _stepper(model: Any, engine: Any, choices: dict[str, Any], rows: Any) -> Any:
    import torch

    from fastft.kernels.fused import FusedLayers
    from fastft.training.step import Stepper, StepPolicy

    dtype = getattr(torch, choices["dtype"].value)
    fused = FusedLayers(model, dtype) if model.device.type == "cpu" else None
    return Stepper(
        model, engine, StepPolicy(4096, rows, 0), device=model.device,
        on_note=lambda note: None, fused=fused if fused and fused.forwards else None,
    )  # fmt: skip


def _seconds(stepper: Any, segments: list[Any]) -> float:
    """Return the time of one step's gradient, the device's work included."""
    import torch

    model, device = stepper.model, torch.device(stepper.device)
    dtype = (
        torch.bfloat16
        if device.type == "cpu" or torch.cuda.is_bf16_supported(False)
        else torch.float16
    )
    model.train()
    began = time.perf_counter()
    stepper.gradient(
        model, segments, lambda loss: loss.backward(), lambda: torch.autocast(device.type, dtype)
    )
    model.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


# --- the process


def _guarded(name: str, look: Callable[[], Finding]) -> Finding:
    """Return what `look` finds; what it raises, a kernel or a library, is a finding, too: the other
    families and parts are still of interest.
    """
    try:
        return look()
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        return Finding(name=name, verdict="fail", advice=f"{type(error).__name__}: {first}"[:400])


PARTS: dict[str, Callable[..., Iterator[Finding]]] = {
    "rows": look_at_rows,
    "train": train_and_resume,
    "plan": look_at_plan,
    "speed": look_at_speed,
}


def main(part: str, folder: str, what: str) -> None:
    """Run one part; findings go to standard output, one JSON object a line, all else to standard
    error.
    """
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        for finding in PARTS[part](Path(folder), json.loads(what)):
            print(finding.model_dump_json(), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
