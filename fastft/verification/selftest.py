"""`fastft selftest`: does this machine train exactly, fit as planned, and how fast is it.

Every part runs in a process of its own with a time limit, and what it found is written as soon as
it ends: selftest.json (all numbers) and selftest.md (a page to read, and to send along with a
report). Nothing is downloaded; models and sequences are random.
"""

from __future__ import annotations

import datetime
import json
import math
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from fastft import child
from fastft.errors import FastFTError
from fastft.files import clear_errors, write_atomically
from fastft.files.scratch import scratch
from fastft.hardware import GIB, Hardware, compute_dtype, gpu_key, installed, probe

Verdict = Literal["pass", "warn", "fail", "skip"]
WORST = ("fail", "warn", "pass", "skip")
PACKAGES = (
    "fastft", "torch", "transformers", "peft", "unsloth", "unsloth_zoo", "bitsandbytes", "triton",
    "xformers", "flash-attn",
)  # fmt: skip
LEAST_MINUTES = 1.0
RESERVE = 5.0
"""Seconds at the end of `--minutes` in which nothing new is begun."""


class Check(BaseModel):
    """One thing that was looked at."""

    name: str
    verdict: Verdict
    numbers: dict[str, Any] = Field(default_factory=dict)
    advice: str = ""
    """What to do about it; empty where nothing is wrong."""


class SelfTest(BaseModel):
    """What `fastft selftest` found, and on what."""

    verdict: Verdict
    """The worst of the checks; skip where none ran."""
    card: str
    """The card (or processor) that was tested, as its driver names it."""
    seconds: float
    checks: list[Check]
    date: str
    versions: dict[str, str]
    machine: dict[str, Any]

    @property
    def page(self) -> str:
        """The findings as a Markdown page."""
        return page_of(self)


@dataclass(frozen=True)
class Part:
    """A process to run: what of `fastft.bench.probes`, on what, and how long it may take."""

    name: str
    probe: str
    what: Any
    seconds: float


def selftest(
    *,
    minutes: float = 10.0,
    out: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
    parts: list[Part] | None = None,
    hardware: Hardware | None = None,
) -> SelfTest:
    """Test this machine within `minutes`; returns what was found.

    `out` receives selftest.json and selftest.md, written anew as each part ends. `parts` and
    `hardware` are by default what this machine can do. Raises FastFTError for too few minutes.
    """
    if not math.isfinite(minutes) or minutes < LEAST_MINUTES:
        raise FastFTError(
            f"--minutes is {minutes:g}; a selftest needs at least {LEAST_MINUTES:g}: its parts are "
            "processes that load a model each."
        )
    if out is not None:
        with clear_errors(out):  # not after minutes
            out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    hardware = hardware or probe()
    found = SelfTest(
        verdict="skip",
        card=hardware.name,
        seconds=0.0,
        checks=[_machine_check(hardware)],
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions=installed(PACKAGES),
        machine=_machine(hardware),
    )
    with scratch("fastft-selftest-") as folder:
        for part in parts if parts is not None else parts_for(hardware):
            left = 60 * minutes - (time.monotonic() - began) - RESERVE
            say(f"{part.name} ...")
            for check in run_part(part, folder, min(part.seconds, left)):
                say(f"  {check.verdict}: {check.name}")
                found.checks.append(check)
            found.seconds = round(time.monotonic() - began, 1)
            found.verdict = verdict_of(found.checks)
            _write(found, out)
    return found


def verdict_of(checks: list[Check]) -> Verdict:
    """Return the worst verdict of `checks`."""
    seen = {check.verdict for check in checks}
    return next((one for one in WORST if one in seen), "skip")  # type: ignore[return-value]


def parts_for(hardware: Hardware) -> list[Part]:
    """Return what to look at on this machine, what matters most first."""
    kinds = [{"quantization": "none", "dtype": compute_dtype(hardware).value}]
    if hardware.kind == "cuda" and hardware.bf16:
        kinds.append({"quantization": "none", "dtype": "float16"})
    if hardware.kind != "mps" and "bitsandbytes" in installed(PACKAGES):
        kinds.append({"quantization": "nf4"})
    shape = _shape_for(hardware)
    return [
        Part("exact rows of every family", "rows", None, 240),
        *(
            Part(f"a run, stopped and resumed: {_listed(kind)}", "train", kind, 120)
            for kind in kinds
        ),
        *(
            Part(f"plan: {case['name']}", "plan", case, 180)
            for case in _plan_cases(hardware, shape)
        ),
        Part("speed of a step", "speed", _speed_case(hardware, shape), 180),
    ]


def _listed(settings: dict[str, Any]) -> str:
    return " ".join(str(value) for value in settings.values())


_LLAMA = {"rope_theta": 10_000.0, "max_position_embeddings": 4096}
_SHAPES = {
    "135M": _LLAMA | {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "vocab_size": 49_152, "num_attention_heads": 9, "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "1B": _LLAMA | {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "vocab_size": 128_256, "num_attention_heads": 32, "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
}  # fmt: skip
"""The shapes of SmolLM-135M and Llama-3.2-1B."""
SMALL_CARD = 6 * GIB


def _shape_for(hardware: Hardware) -> str:
    large = hardware.kind == "cuda" and hardware.vram_free_bytes > SMALL_CARD
    return "1B" if large else "135M"


def _plan_cases(hardware: Hardware, shape: str) -> list[dict[str, Any]]:
    """Runs whose peaks differ by what they keep: everything, layer inputs, 4-bit weights."""
    long = hardware.kind == "cuda"
    lengths = [1024, 700, 512, 300] * 2 if long else [256, 180, 120, 60]
    batch = {"effective_batch_size": len(lengths), "optimizer": "adamw"}
    common = {"family": "llama", "config": _SHAPES[shape], "shape": shape, "lengths": lengths}
    kinds: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "16 bit": ({"quantization": "none"}, {"gradient_checkpointing": False}),
        "16 bit, recomputed": ({"quantization": "none"}, {"gradient_checkpointing": True}),
    }
    # On a CPU the plan of 4-bit weights is an upper bound only: it does not know the layers that
    # unpack a block at a time.
    if hardware.kind == "cuda" and "bitsandbytes" in installed(PACKAGES):
        kinds["nf4"] = ({"quantization": "nf4"}, {"gradient_checkpointing": False})
    return [
        common | {"name": f"{shape} {name}", "model": model, "train": train | batch}
        for name, (model, train) in kinds.items()
    ]


def _speed_case(hardware: Hardware, shape: str) -> dict[str, Any]:
    """A step with the lengths of instruction data: median 120 tokens, half of that on a CPU."""
    lengths = [40, 61, 88, 104, 130, 171, 246, 480]
    if hardware.kind != "cuda":
        lengths = [length // 2 for length in lengths]
    return {
        "family": "llama",
        "config": _SHAPES[shape],
        "shape": shape,
        "model": {"quantization": "none"},
        "lengths": lengths * (4 if hardware.kind == "cuda" else 1),
        "turns": 5 if hardware.kind == "cuda" else 1,
    }


# --- running a part


def run_part(part: Part, folder: Path, seconds: float) -> Iterator[Check]:
    """Run `part` for at most `seconds`; yields what it found, and where it ended early, that."""
    if seconds < RESERVE:
        yield Check(
            name=part.name,
            verdict="skip",
            advice="No time was left for it. Give more with --minutes.",
        )
        return
    arguments = [part.probe, str(folder), json.dumps(part.what)]
    command = child.command("fastft.bench.probes", *arguments)
    log = folder / "log"
    with log.open("wb") as errors:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=child.environment(HF_HUB_OFFLINE="1"),
        )
        try:
            answer, _ = process.communicate(timeout=seconds)
            ended = process.returncode
        except subprocess.TimeoutExpired:
            process.kill()
            answer, _ = process.communicate()
            ended = None
    for line in answer.decode("utf-8", "replace").splitlines():
        yield Check.model_validate_json(line)
    if ended is None:
        yield Check(
            name=part.name,
            verdict="warn",
            numbers={"limit_seconds": seconds},
            advice=f"Not done after {seconds:.0f} s. A machine that is busy with other work is "
            "the usual cause; otherwise give more with --minutes.",
        )
    elif ended:
        yield Check(name=part.name, verdict="fail", advice=_last_words(log, ended))


def _last_words(log: Path, code: int) -> str:
    lines = log.read_text("utf-8", "replace").strip().splitlines()
    said = next((line for line in reversed(lines) if line.strip()), "nothing was said")
    return f"The process ended with code {code}: {said[:300]}"


# --- the machine


def _machine_check(hardware: Hardware) -> Check:
    dtype, why = compute_dtype(hardware)
    numbers = _machine(hardware) | {"dtype": dtype, "why": why}
    here = installed(PACKAGES)
    missing = [name for name in ("unsloth", "unsloth_zoo") if name not in here]
    if hardware.kind == "cuda" and not {"xformers", "flash-attn"} & here.keys():
        missing.append("xformers")
    if not missing:
        return Check(name="machine", verdict="pass", numbers=numbers)
    advice = f"Not installed: {', '.join(missing)}. Training is slower without; see fastft doctor."
    return Check(name="machine", verdict="warn", numbers=numbers, advice=advice)


def _machine(hardware: Hardware) -> dict[str, Any]:
    return {
        "kind": hardware.kind,
        "card": gpu_key(hardware.name, hardware.vram_bytes) if hardware.kind == "cuda" else None,
        "gpus": hardware.gpu_count,
        "capability": list(hardware.capability) if hardware.capability else None,
        "vram_bytes": hardware.vram_bytes,
        "vram_free_bytes": hardware.vram_free_bytes,
        "ram_bytes": hardware.ram_bytes,
        "cpu_cores": hardware.cpu_cores,
        "system": platform.system(),
        "python": platform.python_version(),
        "notes": list(hardware.notes),
    }


# --- what is kept


def _write(found: SelfTest, out: Path | None) -> None:
    if out is None:
        return
    write_atomically(out / "selftest.json", found.model_dump_json(indent=1) + "\n")
    write_atomically(out / "selftest.md", found.page)


MARKS = {"pass": "ok", "warn": "look", "fail": "WRONG", "skip": "not run"}


def page_of(found: SelfTest) -> str:
    """Return the findings as a Markdown page: a table, what to do, the longest kernels."""
    lines = [
        f"# fastft selftest: {found.card}",
        "",
        f"{MARKS[found.verdict]} after {found.seconds:.0f} s on {found.date}. "
        + ", ".join(f"{name} {version}" for name, version in found.versions.items())
        + ".",
        "",
        "| | check | numbers |",
        "|---|---|---|",
    ]
    lines += [
        f"| {MARKS[c.verdict]} | {c.name} | {_brief(c.numbers)} |".replace("\n", " ")
        for c in found.checks
    ]
    advice = [f"- **{c.name}**: {c.advice}" for c in found.checks if c.advice]
    if advice:
        lines += ["", "## What to do", "", *advice]
    for check in found.checks:
        lines += _profile_lines(check.numbers.get("profile"))
    return "\n".join(lines) + "\n"


def _brief(numbers: dict[str, Any]) -> str:
    parts = []
    for name, value in numbers.items():
        if isinstance(value, bool) or value is None or isinstance(value, dict | list):
            continue
        if isinstance(value, int) and name.endswith("_bytes"):
            parts.append(f"{name[:-6].replace('_', ' ')} {value / GIB:.2f} GiB")
        elif isinstance(value, float):
            parts.append(f"{name.replace('_', ' ')} {value:.3g}")
        else:
            parts.append(f"{name.replace('_', ' ')} {value}")
    return ", ".join(parts)


def _profile_lines(profile: Any) -> list[str]:
    if not profile:
        return []
    busy = profile["gpu_busy_share"]
    head = "CPU" if busy is None else f"GPU busy {busy:.0%}, {profile['launches']:,} launches"
    lines = ["", f"## One step: {profile['seconds']:.2f} s, {head}", "", "| calls | seconds | |"]
    lines += ["|---:|---:|---|"]
    return lines + [
        f"| {e['calls']:,} | {e['seconds']:.3f} | `{e['name']}` |" for e in profile["longest"]
    ]
