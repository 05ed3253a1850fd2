"""Runs a case: makes the work, starts one process a run, interleaves the arms, gates, and sums up.

Imports no torch, and lets no arm share a process: Unsloth patches the one it is imported in.
"""

from __future__ import annotations

import json
import os
import platform
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastft import child
from fastft.bench.case import TUNING, ArmSettings, Case
from fastft.bench.parity import Evidence, judge, judge_across
from fastft.bench.record import (
    Check,
    Machine,
    Parity,
    Record,
    Result,
    Table,
    TableResult,
    source_commit,
)
from fastft.bench.statistics import NOISY, not_idle, paired_ratio, summarise
from fastft.bench.workload import Workload, load, parameters_of
from fastft.errors import CouldNotFinishError, FastFTError, one_of
from fastft.hardware import Hardware, gpu_key, installed, nvidia_gpus, probe

if TYPE_CHECKING:
    from fastft.planning.shape import ModelShape

BASELINE = "peft"
# 0: the whole batch
REFERENCE = {"training": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 0}}
PACKAGES = (
    "fastft", "torch", "transformers", "peft", "trl", "unsloth", "unsloth_zoo", "liger-kernel",
    "bitsandbytes",
)  # fmt: skip
LOG_TAIL = 25
OTHERS = 0.05
"""Share of the cores that others may have before a note says so."""


@dataclass
class _Invocation:
    """What the parts of one invocation share."""

    case: Case
    machine: Machine
    folder: Path
    say: Callable[[str], None]
    seed: int
    order: int = 0
    records: list[Record] = field(default_factory=list)
    evidence: dict[tuple[str, str, int], Evidence] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


def run_case(
    case: Case,
    *,
    arms: Sequence[str] | None = None,
    tables: Sequence[str] | None = None,
    repeats: int | None = None,
    say: Callable[[str], None] = lambda text: None,
    keep: Path | None = None,
    profile: bool = False,
) -> Result:
    """Measure `case` on this machine and return the result; nothing is written but to `keep` and a
    temporary folder.

    `arms` and `tables` narrow the case, `repeats` overrides it. `keep`: a folder for the workers'
    logs, records and profiles. `profile`: after all rounds each arm runs once more, and its last
    step is profiled (TABLE-ARM-profile.profile.json in `keep`, see bench/profiling.py). Raises
    FastFTError for a case that cannot run here at all (no GPU),
    CouldNotFinishError where the reference dies.
    """
    case, machine = check_case(case, arms=arms, tables=tables)
    repeats = repeats or case.repeats
    folder = Path(tempfile.mkdtemp(prefix="fastft-bench-"))
    state = _Invocation(case, machine, folder, say, case.seed)
    try:
        say("making the model and the sequences")
        _make_work(state)
        machine.matmul_flops = _ceiling(state)
        plan = [(table, arm) for table, settings in case.tables.items() for arm in settings.arms]
        references = {table: _reference(state, table, case.parity_layers) for table in case.tables}
        small = _parity_at_few_layers(state, plan, references) if case.parity_layers else {}
        gates: dict[tuple[str, str], Parity] = {}
        for repeat in range(repeats):
            order = [pair for pair in plan if _goes_on(state, pair, gates)]
            random.Random(f"{case.seed} {repeat}").shuffle(order)
            for table, arm in order:
                _measure(state, table, arm, repeat)
            if repeat == 0:
                gates = _gates(state, references, small)
        if profile:
            for table, arm in plan:
                _profile(state, table, arm)
        return _summed_up(state, repeats, gates)
    finally:
        try:
            if keep is not None:
                _keep(folder, keep)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def run_alone(case: Case, arm: str) -> tuple[Record, ModelShape, Workload]:
    """Run one arm of `case` once, with nothing to compare with: no reference and no gate.

    Returns its record, the model's shape and the sequences. Raises CouldNotFinishError where the
    arm came to no end.
    """
    from fastft.planning.shape import load_shape

    case, machine = check_case(case, arms=[arm])
    with tempfile.TemporaryDirectory(prefix="fastft-bench-") as folder:
        state = _Invocation(case, machine, Path(folder), lambda text: None, case.seed)
        _make_work(state)
        record = _run_in_table(state, "alone", "defaults", arm, 0).record
        if record.status != "ok":
            tail = " | ".join(record.log_tail[-3:])
            raise CouldNotFinishError(
                f"case {case.name}, {arm}: {record.status}: {record.reason}. {tail}"
            )
        return record, load_shape(str(state.folder / "model")), _work_of(state, "defaults")


def check_case(
    case: Case, *, arms: Sequence[str] | None = None, tables: Sequence[str] | None = None
) -> tuple[Case, Machine]:
    """Return the narrowed case and this machine; raises FastFTError for all that can be known
    before any work.
    """
    case = _narrowed(case, arms, tables)
    _check_settings(case)
    return case, describe_machine(case, probe())


def _narrowed(case: Case, arms: Sequence[str] | None, tables: Sequence[str] | None) -> Case:
    """Return the case with only these arms and tables; raises FastFTError for names that it does
    not have.
    """
    for name in tables or []:
        if name not in case.tables:
            raise one_of("table", name, case.tables)
    chosen = {
        name: set(table.arms) for name, table in case.tables.items() if not tables or name in tables
    }
    known = set().union(*chosen.values())
    for name in arms or []:
        if name not in known:
            raise one_of(f"arm of case {case.name}", name, known)
    wanted = set(arms or known)
    return case.only({name: there & wanted for name, there in chosen.items() if there & wanted})


def _check_settings(case: Case) -> None:
    """Raise FastFTError with every setting that would make an arm die only when its turn comes."""
    from fastft.bench.arms import make_arm

    problems = []
    for name, table in case.tables.items():
        batch = table.effective_batch_size or case.effective_batch_size
        for arm, values in table.arms.items():
            training = values.settings.get("training") or {}
            if not isinstance(training, dict):
                problems.append(f"{name}, {arm}: settings.training must hold names and values")
                continue
            product = training.get("per_device_train_batch_size", 8) * training.get(
                "gradient_accumulation_steps", 1
            )
            if training and product != batch:
                problems.append(
                    f"{name}, {arm}: per_device_train_batch_size x "
                    f"gradient_accumulation_steps is {product}, the "
                    f"effective batch is {batch}"
                )
            if values.implementation is None:
                try:
                    make_arm(arm, None, values.settings)
                except FastFTError as error:
                    problems.append(f"{name}: {error}")
    if problems:
        raise FastFTError(f"case {case.name}: " + "; ".join(problems))


# --- the machine


def describe_machine(case: Case, hardware: Hardware) -> Machine:
    """Return where the case runs and how its result is called; raises FastFTError where it cannot
    run here.
    """
    if case.device == "cuda" and hardware.kind != "cuda":
        raise FastFTError(
            f"case {case.name} needs an NVIDIA GPU and this machine has none ({hardware.name}). "
            "`python -m fastft.bench cases` lists those for a CPU."
        )
    threads = case.threads or hardware.cpu_cores
    cap = int(case.memory_cap_gb * 1e9) if case.memory_cap_gb else None
    machine = Machine(
        device=case.device,
        label=f"{hardware.name}, {threads} threads" if case.device == "cpu" else hardware.name,
        card=None,
        cpu=hardware.name if hardware.kind == "cpu" else platform.machine(),
        threads=threads,
        memory_bytes=hardware.ram_bytes,
        cap_bytes=cap,
    )
    if case.device == "cpu":
        if cap:
            machine.label += f", capped at {case.memory_cap_gb:g} GB"
        return machine
    assert hardware.vram_bytes is not None
    machine.gpu, machine.vram_bytes, machine.driver = hardware.name, hardware.vram_bytes, _driver()
    here = gpu_key(hardware.name, hardware.vram_bytes)
    if here == case.card or (case.card is None and cap is None):
        machine.card, machine.cap_bytes = here, None
    elif cap is None or cap > hardware.vram_bytes:
        meant = f"a {case.card}" if case.card else f"{case.memory_cap_gb:g} GB"
        raise FastFTError(
            f"case {case.name} is for {meant} and this is a {hardware.name}; it can stand in "
            "only for a smaller card, "
            "with memory_cap_gb in the case."
        )
    else:
        machine.label = f"{hardware.name}, capped at {case.memory_cap_gb:g} GB"
    return machine


def _driver() -> str | None:
    return next((card.driver for card in nvidia_gpus()), None)


# --- the work


def _make_work(state: _Invocation) -> None:
    jobs: list[dict[str, Any]] = [
        {
            "case": state.case.model_dump(mode="json"),
            "folder": str(state.folder / "model"),
            "layers": None,
        }
    ]
    if state.case.parity_layers:
        jobs.append(
            jobs[0] | {"folder": str(state.folder / "small"), "layers": state.case.parity_layers}
        )
    for job in jobs:
        Path(job["folder"]).mkdir()
    path = state.folder / "work.json"
    path.write_text(json.dumps(jobs), encoding="utf-8")
    log = state.folder / "work.log"
    code = _start(
        ["fastft.bench.workload", str(path)],
        log,
        {},
        state.machine.threads,
        state.case.timeout_seconds,
    )
    if code != 0:
        raise CouldNotFinishError(
            f"the model of case {state.case.name} could not be made: {' | '.join(_tail(log)[-3:])}"
        )


def _ceiling(state: _Invocation) -> float | None:
    record = state.folder / "ceiling.json"
    job = {
        "kind": "ceiling",
        "record": str(record),
        "device": "cuda" if state.machine.device == "cuda" else "cpu",
        "dtype": state.case.dtype,
    }
    code = _run_job(state, job, "ceiling")
    return json.loads(record.read_text("utf-8"))["matmul_flops"] if code == 0 else None


def _work_of(state: _Invocation, table: str) -> Workload:
    return load(state.folder / "model" / f"{table}.npz")


# --- one run


def _measure(state: _Invocation, table: str, arm: str, repeat: int) -> None:
    """Run one arm once and keep its record and its gradient."""
    evidence = _run_in_table(state, f"{table}-{arm}-{repeat}", table, arm, repeat)
    state.records.append(evidence.record)
    state.evidence[table, arm, repeat] = evidence
    record = evidence.record
    if record.status == "ok":
        state.say(f"{table} {arm} #{repeat + 1}: {record.non_padding_tokens_per_sec:,.0f} tokens/s")
    else:
        state.say(f"{table} {arm} #{repeat + 1}: {record.status}: {record.reason}")


def _run_in_table(
    state: _Invocation, name: str, table: str, arm: str, repeat: int, *, profile: bool = False
) -> Evidence:
    """Run an arm with the settings that its table gives it."""
    settings = state.case.tables[table].arms[arm]  # type: ignore[index]
    return _run_arm(
        state,
        name=name,
        table=table,
        arm=arm,
        repeat=repeat,
        settings=settings,
        profile=profile,
    )


def _profile(state: _Invocation, table: str, arm: str) -> None:
    """Run an arm once more with its last step under the profiler, and say what came out; its times
    are longer for that and go into no result.
    """
    name = f"{table}-{arm}-profile"
    record = _run_in_table(state, name, table, arm, 1, profile=True).record
    if record.status != "ok":
        return state.say(f"{table} {arm} profile: {record.status}: {record.reason}")
    found = json.loads((state.folder / f"{name}.profile.json").read_text("utf-8"))
    state.say(f"{table} {arm} profile: {profile_text(found)}")


def profile_text(found: dict[str, Any]) -> str:
    """Return a profile (see bench/profiling.py) as one line."""
    if found["gpu_busy_share"] is None:
        of = "no GPU, so the CPU's operations"
    else:
        of = f"GPU busy {found['gpu_busy_share']:.0%}, {found['launches']:,} launches"
    longest = ", ".join(
        f"{each['name'][:40]} {each['calls']:,} x, {each['seconds']:.3f} s"
        for each in found["longest"][:3]
    )
    return f"{found['seconds']:.2f} s a step; {of}; longest: {longest}"


def _reference(state: _Invocation, table: str, layers: int | None) -> Evidence:
    """Run plain peft in float32, one sequence at a time: padding-free by construction, and
    small.
    """
    batch = _work_of(state, table).effective_batch_size
    training = REFERENCE["training"] | {"gradient_accumulation_steps": batch}
    if state.case.device == "cuda":
        training |= {"gradient_checkpointing": True}
    state.say(f"{table}: float32 reference")
    evidence = _run_arm(
        state,
        name=f"{table}-reference",
        table=table,
        arm=BASELINE,
        repeat=0,
        settings=ArmSettings(settings={"training": training}, source="the reference"),
        dtype="float32",
        model="small" if layers else "model",
    )
    if evidence.record.status != "ok":
        tail = " | ".join(evidence.record.log_tail[-3:])
        raise CouldNotFinishError(
            f"the float32 reference of case {state.case.name} died ({evidence.record.status}: "
            f"{evidence.record.reason}), so "
            f"nothing could be compared with it. {tail}"
        )
    return evidence


def _run_arm(
    state: _Invocation,
    *,
    name: str,
    table: str,
    arm: str,
    repeat: int,
    settings: ArmSettings,
    dtype: str | None = None,
    model: str = "model",
    profile: bool = False,
) -> Evidence:
    """Start the worker, wait for it, and return its record: of a dead one as well.

    `model`: the folder that the model was made in; `dtype`: another one than the case's.
    """
    work, made = state.folder / name, state.folder / model
    work.mkdir()
    record_path, gradient = work / "record.json", work / "gradient.safetensors"
    is_reference = name.endswith("-reference")
    job = {
        "kind": "train",
        "case": state.case.model_dump(mode="json"),
        "table": table,
        "arm": arm,
        "implementation": settings.implementation,
        "repeat": repeat,
        "order": state.order,
        "settings": settings.settings,
        "model": str(made) if model == "small" else state.case.model.id or str(made),
        "start": str(made / "start.safetensors"),
        "dtype": dtype or state.case.dtype,
        "workload": str(made / f"{table}.npz"),
        "work": str(work),
        "record": str(record_path),
        "gradient": str(gradient) if repeat == 0 else None,
        "profile": str(state.folder / f"{name}.profile.json") if profile else None,
        "cap_bytes": None if is_reference else state.machine.cap_bytes,
        "threads": state.machine.threads,
    }
    state.order += 1
    code = _run_job(state, job, name, settings.environment)
    log = state.folder / f"{name}.log"
    if record_path.exists() and code == 0:
        record = Record.model_validate_json(record_path.read_text("utf-8"))
    else:
        record = _record_of_the_dead(job, code, log, state.case)
    if record.status != "ok":
        record.log_tail = _tail(log)
    shutil.rmtree(work / "trainer", ignore_errors=True)
    shutil.rmtree(work / "bench", ignore_errors=True)
    return Evidence(record, gradient)


def _run_job(
    state: _Invocation, job: dict[str, Any], name: str, environment: dict[str, str] | None = None
) -> int | None:
    path = state.folder / f"{name}.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    module = ["fastft.bench.worker", str(path)]
    log = state.folder / f"{name}.log"
    return _start(module, log, environment or {}, state.machine.threads, state.case.timeout_seconds)


def _start(
    module: list[str], log: Path, environment: dict[str, str], threads: int, timeout: int
) -> int | None:
    """Run MODULE in a safe child with its output in `log`; return the exit code, None after a
    timeout.
    """
    variables = _environment(threads, environment)
    with log.open("wb") as sink:
        process = subprocess.Popen(
            child.command(module[0], *module[1:]),
            stdout=sink,
            stderr=sink,
            env=variables,
            start_new_session=True,
        )
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _environment(threads: int, own: dict[str, str]) -> dict[str, str]:
    """Return a worker's variables: the caller's, without what tunes speed or memory, and what the
    arm's case sets.

    fastft's command line sets OMP_WAIT_POLICY for itself; the other arms run without it unless
    their case says so.
    """
    quiet = {
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TQDM_DISABLE": "1",
    }
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(TUNING)}
    return inherited | quiet | {"OMP_NUM_THREADS": str(threads)} | own


def _record_of_the_dead(job: dict[str, Any], code: int | None, log: Path, case: Case) -> Record:
    """Return the record of a worker that could not write one."""
    tail = "\n".join(_tail(log))
    if code is None:
        status, reason = "timeout", f"no end after {case.timeout_seconds} s"
    elif code == -signal.SIGKILL:
        status, reason = "oom", "killed (SIGKILL), as the kernel does where memory is full"
    elif "bad_alloc" in tail or "MemoryError" in tail:
        status, reason = "oom", f"ended with {code}: memory could not be allocated"
    else:
        status, reason = "crashed", f"ended with exit code {code} and no record"
    names = ("table", "arm", "repeat", "order", "settings")
    return Record.model_validate(
        {name: job[name] for name in names} | {"status": status, "reason": reason}
    )


def _tail(log: Path) -> list[str]:
    lines = log.read_text("utf-8", errors="replace").splitlines() if log.exists() else []
    return [line.rstrip() for line in lines if line.strip()][-LOG_TAIL:]


# --- the gate


def _goes_on(
    state: _Invocation, pair: tuple[str, str], gates: dict[tuple[str, str], Parity]
) -> bool:
    """Whether an arm is run once more: it lived, and its gate did not fail."""
    alive = all(r.status == "ok" for r in state.records if (r.table, r.arm) == pair)
    return alive and (pair not in gates or gates[pair].passed)


def _gates(
    state: _Invocation, references: dict[Any, Evidence], small: dict[tuple[str, str], Parity]
) -> dict[tuple[str, str], Parity]:
    """Judge every arm by the run that was timed, not by another one."""
    gates = {}
    for (table, arm, repeat), evidence in state.evidence.items():
        if repeat or evidence.record.status != "ok":
            continue
        work = _work_of(state, table)
        steps = [work.parts(i) for i in range(work.steps)]
        limits = state.case.tolerances
        if state.case.parity_layers:
            trainable = parameters_of(state.folder / "model" / "start.safetensors")
            baseline = _baseline_at_full_size(state, table, arm)
            gate = judge_across(
                evidence.record, baseline, small[table, arm], steps, trainable, limits.loss
            )
        else:
            gate = judge(evidence, references[table], steps, limits)
        gates[table, arm] = gate
        for check in gate.checks:
            if not check.passed:
                state.say(f"{table} {arm}: parity failed: {check.text}")
    return gates


def _baseline_at_full_size(state: _Invocation, table: str, arm: str) -> Record | None:
    """Return plain peft's first run (for peft as well), or another arm's where peft died, or
    None.
    """
    others = state.case.tables[table].arms  # type: ignore[index]
    arms = [BASELINE, *(name for name in others if name not in {BASELINE, arm})]
    runs = [
        state.evidence[table, name, 0].record for name in arms if (table, name, 0) in state.evidence
    ]
    return next((run for run in runs if run.status == "ok"), None)


def _parity_at_few_layers(
    state: _Invocation, plan: list[tuple[Any, str]], references: dict[Any, Evidence]
) -> dict[tuple[str, str], Parity]:
    """Run every arm once on the same shape with few layers, and judge it against the float32
    reference there.
    """
    gates = {}
    for table, arm in plan:
        settings = state.case.tables[table].arms[arm]
        state.say(f"{table} {arm}: parity at {state.case.parity_layers} layers")
        evidence = _run_arm(
            state,
            name=f"{table}-{arm}-small",
            table=table,
            arm=arm,
            repeat=0,
            settings=settings,
            model="small",
        )
        if evidence.record.status == "ok":
            work = load(state.folder / "small" / f"{table}.npz")
            steps = [work.parts(i) for i in range(work.steps)]
            gates[table, arm] = judge(evidence, references[table], steps, state.case.tolerances)
        else:
            record = evidence.record
            text = f"with {state.case.parity_layers} layers: {record.status}: {record.reason}"
            gates[table, arm] = Parity(
                passed=False, checks=[Check(name="ends", passed=False, value=None, text=text)]
            )
    return gates


# --- the sum


def _summed_up(state: _Invocation, repeats: int, gates: dict[tuple[str, str], Parity]) -> Result:
    from fastft.planning.shape import load_shape

    case, machine = state.case, state.machine
    shape = load_shape(case.model.id or str(state.folder / "model"))
    tables: dict[Table, TableResult] = {}
    for table, settings in case.tables.items():
        work = _work_of(state, table)
        parts = [work.parts(i) for i in range(work.steps)]
        supervised = [work.supervised(i) for i in range(work.steps)]
        runs = {
            arm: [r for r in state.records if (r.table, r.arm) == (table, arm)]
            for arm in settings.arms
        }
        summaries = {
            arm: summarise(found, shape, parts, supervised, machine) for arm, found in runs.items()
        }
        parity = {arm: gates[table, arm] for arm in settings.arms if (table, arm) in gates}
        passed = [
            arm for arm, gate in parity.items() if gate.passed and summaries[arm].status == "ok"
        ]
        ok = {arm: [r for r in runs[arm] if r.status == "ok"] for arm in passed}
        ratios, withheld = {}, {}
        for arm in passed if "fastft" in passed else []:
            if arm == "fastft":
                continue
            if reason := not_idle(ok["fastft"], ok[arm]):
                withheld[arm] = reason
            else:
                ratios[arm] = paired_ratio(ok["fastft"], ok[arm])
        tables[table] = TableResult(arms=summaries, ratios=ratios, parity=parity, withheld=withheld)
    commit, dirty = source_commit()
    return Result(
        case=case,
        case_hash=case.hash,
        date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        commit=commit,
        dirty=dirty,
        machine=machine,
        versions={"python": platform.python_version()} | installed(PACKAGES),
        repeats=repeats,
        tables=tables,
        records=state.records,
        notes=_notes(state, tables),
    )


def _notes(state: _Invocation, tables: dict[Table, TableResult]) -> list[str]:
    """Return what a reader must know beside the figures."""
    notes = []
    if state.machine.device == "cuda" and state.machine.cap_bytes:
        notes.append(
            f"{state.machine.label}: memory is meaningful, speed is that of the card it ran "
            f"on, not of a {state.case.card}"
        )
    for name, table in tables.items():
        for arm, summary in table.arms.items():
            if summary.noisy and summary.non_padding_tokens_per_sec:
                share = summary.non_padding_tokens_per_sec.relative
                notes.append(
                    f"{name} {arm}: spread p20 to p80 is {share:.0%} of the median, above "
                    f"{NOISY:.0%}"
                )
            if summary.status != "ok":
                notes.append(f"{name} {arm}: {summary.status}: {summary.reason}")
    for record in state.records:
        if record.status != "ok" and record.repeat:
            what = f"{record.status} in round {record.repeat + 1}: {record.reason}"
            notes.append(
                f"{record.table} {record.arm}: {what}; its figures are those of the rounds before"
            )
    others = [
        r.noise.others_share for r in state.records if r.noise and r.noise.others_share is not None
    ]
    if others and max(others) > OTHERS:
        notes.append(
            f"other processes (or the hypervisor) had up to {max(others):.0%} of the cores "
            "during a run, "
            f"{sum(others) / len(others):.0%} on average"
        )
    return notes


def _keep(folder: Path, keep: Path) -> None:
    """Copy logs, records and profiles for a person who wants to look closer."""
    keep.mkdir(parents=True, exist_ok=True)
    for path in [*folder.glob("*.log"), *folder.glob("*.profile.json")]:
        shutil.copy(path, keep)
    for path in folder.glob("*/record.json"):
        shutil.copy(path, keep / f"{path.parent.name}.record.json")
    (keep / "finished").write_text(time.strftime("%Y-%m-%dT%H:%M:%S"), encoding="utf-8")
