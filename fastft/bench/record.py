"""What the benchmark writes: one `Record` a worker process, one `Result` (a JSON file) an
invocation.

Plain pydantic, no torch: the runner, the report and the notebook read these. The JSON Schema is
committed as benchmarks/result.schema.json; `python -m fastft.bench schema` prints it.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fastft.bench.case import Case
from fastft.errors import FastFTError
from fastft.files import write_atomically

SCHEMA = 1

Status = Literal["ok", "oom", "timeout", "crashed", "unsupported"]
Table = Literal["defaults", "matched"]


class Strict(BaseModel):
    """A part of a result; a key that it does not know is an error."""

    model_config = ConfigDict(extra="forbid")


class Step(Strict):
    """One optimizer step, as the witness in the worker saw it (not as the arm reports it)."""

    seconds: float
    loss: float | None
    """Mean over the step's supervised tokens, as the trainer logs it."""
    grad_norm: float | None
    tokens: int
    """Non-padding tokens that went through the embedding: fewer than the sequences have where an
    arm computes a common beginning once.
    """
    padded_tokens: int
    """All tokens that went through the embedding."""


class Peak(Strict):
    """Largest memory of the worker's life, in bytes; VRAM is None on a CPU."""

    rss_bytes: int
    anonymous_bytes: int | None = None
    """What of it is no page of a file, on a CPU with a cap: what the cap goes by."""
    vram_allocated_bytes: int | None = None
    vram_reserved_bytes: int | None = None
    vram_device_bytes: int | None = None
    """What the driver says is in use on the device, less what was in use before the worker began
    (its CUDA context included; where nvidia-smi does not answer, the context is not).
    """


class Noise(Strict):
    """What else the machine did meanwhile."""

    load_average_before: float
    load_average_after: float
    cpu_share: float | None = None
    """CPU seconds of the worker over wall seconds x threads, in the measured steps."""
    others_share: float | None = None
    """CPU time of other processes, and time stolen by a hypervisor, over wall x all cores, in the
    measured steps.
    """
    clock_mhz: float | None = None
    throttled: str | None = None
    """The GPU's throttle reasons, where there were any."""


class Record(Strict):
    """One run of one arm in a process of its own."""

    table: Table
    arm: str
    repeat: int
    order: int
    """Position among all runs of the invocation: the arms are interleaved in random order."""
    status: Status
    reason: str | None = None
    """Why the status is not ok, in a line."""
    log_tail: list[str] = Field(default_factory=list)
    """The last lines of the log of a run that was not ok."""
    settings: dict[str, Any] = Field(default_factory=dict)
    import_seconds: float | None = None
    load_seconds: float | None = None
    """From the libraries' import done to the model with LoRA ready."""
    first_step_seconds: float | None = None
    """From the start of training to the end of the first step: compilation and caches are in here.
    """
    warmup_steps: int = 0
    steps: list[Step] = Field(default_factory=list)
    """All steps; the first `warmup_steps` are not timed."""
    step_tokens: list[int] = Field(default_factory=list)
    """Tokens of each step's own sequences, without padding: the same for all arms. Speeds are over
    them. Empty in older results, where they are what the embedding saw.
    """
    claimed_tokens: int | None = None
    """Tokens that the arm itself says it trained on, where it says so."""
    trainable_parameters: int | None = None
    adapter_change: float | None = None
    """L2 norm of what the steps changed in the adapter: an optimizer that does nothing leaves 0."""
    environment: dict[str, str] = Field(default_factory=dict)
    """The variables that tune speed or memory, as the worker had them."""
    peak: Peak | None = None
    noise: Noise | None = None
    patches: dict[str, str] = Field(default_factory=dict)

    @property
    def measured(self) -> list[Step]:
        """The timed steps."""
        return self.steps[self.warmup_steps :]

    @property
    def seconds(self) -> float:
        """Seconds of the timed steps together."""
        return sum(step.seconds for step in self.measured)

    @property
    def non_padding_tokens_per_sec(self) -> float:
        """Non-padding tokens of the timed steps' sequences over their seconds; 0 where no step was
        timed.
        """
        tokens = self.step_tokens or [step.tokens for step in self.steps]
        return sum(tokens[self.warmup_steps :]) / self.seconds if self.seconds else 0.0


class Check(Strict):
    """One line of the parity gate: `value` against the reference must lie within `limit`."""

    name: str
    passed: bool
    value: float | None
    expected: float | None = None
    limit: float | None = None
    text: str
    """What a person reads: what was compared, the numbers."""


class Parity(Strict):
    """The gate of one arm in one table."""

    passed: bool
    checks: list[Check]


class Spread(Strict):
    """Median and the 20th and 80th percentile over the repeats."""

    median: float
    p20: float
    p80: float

    @property
    def relative(self) -> float:
        """(p80 - p20) / median."""
        return (self.p80 - self.p20) / self.median if self.median else 0.0


class ArmSummary(Strict):
    """One arm's row of a table, over its ok runs."""

    status: Status
    reason: str | None = None
    repeats: int
    non_padding_tokens_per_sec: Spread | None = None
    trained_tokens_per_sec: float | None = None
    seconds_per_step: Spread | None = None
    first_step_seconds: float | None = None
    import_seconds: float | None = None
    load_seconds: float | None = None
    padding_share: float | None = None
    """Padding tokens over all tokens that went through the model."""
    peak: Peak | None = None
    """Median over the repeats, field by field."""
    flops: float | None = None
    """Achieved FLOP/s: the case's arithmetic (see flops.py) over the seconds."""
    ceiling_share: float | None = None
    """Achieved FLOP/s over the measured matmul ceiling."""
    noisy: bool = False
    """The spread is above 10 %."""


class Ratio(Strict):
    """fastft over another arm: speed (larger is better), memory (smaller is better)."""

    speed: float
    """Median of the paired ratios of seconds, round by round."""
    speed_low: float | None
    speed_high: float | None
    """95 % bootstrap interval of that median; None from fewer than three rounds."""
    memory: float | None


class TableResult(Strict):
    """One of the two tables."""

    arms: dict[str, ArmSummary]
    ratios: dict[str, Ratio]
    """Only arms that passed the gate, as fastft did too."""
    parity: dict[str, Parity]
    withheld: dict[str, str] = {}
    """{arm: why it has no ratio, though it passed}: the machine was not idle."""


class Machine(Strict):
    """Where it ran."""

    device: Literal["cpu", "cuda"]
    label: str
    """How the result is called: "H200", "H200, capped at 15 GB", or the CPU's name and threads."""
    card: str | None
    """Key of the card whose row this fills (t4, l4 ...); None on a CPU or under another card's cap.
    """
    cpu: str
    threads: int
    memory_bytes: int
    gpu: str | None = None
    vram_bytes: int | None = None
    driver: str | None = None
    cap_bytes: int | None = None
    matmul_flops: float | None = None
    """Measured ceiling: FLOP/s of a large matrix product in the case's dtype."""


class Result(Strict):
    """Everything one invocation of one case measured."""

    schema_version: int = SCHEMA
    case: Case
    case_hash: str
    date: str
    commit: str | None
    dirty: bool
    """Whether the working tree had changes that `commit` does not hold."""
    machine: Machine
    versions: dict[str, str]
    repeats: int
    tables: dict[Table, TableResult]
    records: list[Record]
    notes: list[str] = Field(default_factory=list)
    """Noise, caps, what was not measured: printed below the tables."""

    @property
    def parity_passed(self) -> bool:
        """Whether every arm that ran passed its gate."""
        return all(gate.passed for table in self.tables.values() for gate in table.parity.values())

    def summary(self) -> dict[str, Any]:
        """Return what --json prints: parity, ratios by table and arm, records."""
        return {
            "case": self.case.name,
            "machine": self.machine.model_dump(mode="json"),
            "parity": {
                name: {arm: gate.passed for arm, gate in t.parity.items()}
                for name, t in self.tables.items()
            },
            "ratios": {
                name: {arm: ratio.model_dump() for arm, ratio in t.ratios.items()}
                for name, t in self.tables.items()
            },
            "records": [record.model_dump(mode="json") for record in self.records],
            "notes": self.notes,
        }

    def write(self, path: Path) -> None:
        """Write the JSON file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, self.model_dump_json(indent=1) + "\n")


def read_result(path: Path) -> Result:
    """Return the result in `path`; raises FastFTError where it is not one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.get("schema_version") != SCHEMA:
            raise FastFTError(
                f"{path}: schema_version is {values.get('schema_version')}, this fastft reads "
                f"{SCHEMA}. Measure again."
            )
        return Result.model_validate(values)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, AttributeError) as error:
        raise FastFTError(f"{path}: not a result of fastft bench ({error}).") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise FastFTError(
            f"{path}: not a result of fastft bench ({where}: {first['msg']})."
        ) from error


def source_commit() -> tuple[str | None, bool]:
    """Return the commit of the source tree that fastft is imported from, and whether it has
    changes.
    """
    home = Path(__file__).parents[2]
    try:
        head = ["git", "-C", str(home), "rev-parse", "--short=12", "HEAD"]
        commit = subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()
        state = ["git", "-C", str(home), "status", "--porcelain", "--untracked-files=no"]
        return commit, bool(
            subprocess.run(state, capture_output=True, text=True, check=True).stdout.strip()
        )
    except (OSError, subprocess.SubprocessError):
        return None, False
