"""One run of one arm, in a process of its own: `python -m fastft.bench.worker job.json`.

The record goes to the path that the job names, never to standard output, which belongs to the libraries.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastft.bench.case import Case
from fastft.bench.record import Noise, Peak, Record
from fastft.errors import FastFTError


def main() -> None:
    """Run the job and leave its record; the exit code is 0 also for an arm that died in a way it could tell."""
    job = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    if job["kind"] == "ceiling":
        _write(Path(job["record"]), {"matmul_flops": matmul_ceiling(job["device"], job["dtype"])})
        os._exit(0)
    record = run(job)
    _write(Path(job["record"]), record.model_dump(mode="json"))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def run(job: dict[str, Any]) -> Record:
    """Return the record of the job, whatever happens to the arm."""
    case = Case.model_validate(job["case"])
    blank = {name: job[name] for name in ("table", "arm", "repeat", "order", "settings")}
    record = Record(**blank, status="crashed", warmup_steps=case.warmup_steps)
    load_before = os.getloadavg()[0]
    if job["cap_bytes"] and case.device == "cpu":
        # RLIMIT_DATA counts writable private memory; what lies beyond makes malloc fail, as a full machine does.
        resource.setrlimit(resource.RLIMIT_DATA, (job["cap_bytes"], job["cap_bytes"]))
    try:
        _train(job, case, record)
        record.status = "ok"
    except Exception as error:  # whatever an arm raises is what is being reported
        record.status, record.reason = _status_of(error)
        import traceback

        traceback.print_exc()
    record.peak = _Memory.peak()
    noise = record.noise or Noise(load_average_before=0, load_average_after=0)
    noise.load_average_before, noise.load_average_after = load_before, os.getloadavg()[0]
    noise.clock_mhz, noise.throttled = _clocks(case.device)
    record.noise = noise
    return record


def _train(job: dict[str, Any], case: Case, record: Record) -> None:
    """Load and train, filling the record as far as it gets."""
    from fastft.bench.arms import Job, make_arm
    from fastft.bench.workload import load

    workload = load(Path(job["workload"]))
    arm = make_arm(job["arm"], job["implementation"], job["settings"])
    names = ("table", "arm", "implementation", "settings", "model", "dtype", "cap_bytes")
    task = Job(case=case, workload=workload, work=Path(job["work"]), **{name: job[name] for name in names})
    started = time.perf_counter()
    _import_libraries(job["arm"], job["implementation"])
    imported = time.perf_counter()
    record.import_seconds = imported - started
    memory = _Memory(job["cap_bytes"] if case.device == "cuda" else None)
    model = arm.load(task)
    record.load_seconds = time.perf_counter() - imported
    from fastft.bench.witness import Witness

    witness = Witness(Path(job["gradient"]) if job["gradient"] else None)
    witness.watch(model, Path(job["start"]))
    record.trainable_parameters = witness.trainable_parameters
    clock = _CpuClock(witness, record.warmup_steps)
    try:
        with memory:
            record.claimed_tokens = arm.train(task, clock.attach())
    finally:
        record.steps = witness.steps
        record.first_step_seconds = witness.first_step_seconds
    record.noise = Noise(load_average_before=0, load_average_after=0, **clock.noise(job["threads"]))
    record.patches = _patches(arm)


def _import_libraries(arm: str, implementation: str | None) -> None:
    """Import what the arm needs before its clock for loading starts; Unsloth before everything else."""
    if implementation is None and arm == "unsloth":
        from fastft.bench.arms import _without_network

        _without_network()
        import unsloth  # noqa: F401
    elif implementation is None and arm == "fastft":
        import fastft

        _ = fastft.FastLanguageModel
    import peft  # noqa: F401
    import transformers  # noqa: F401


def _patches(arm: Any) -> dict[str, str]:
    session = getattr(arm, "session", None)
    return session.choices if session is not None else {}


class _CpuClock:
    """Whose time the cores spent in the timed steps: this process's, others', a hypervisor's."""

    def __init__(self, witness: Any, warmup: int) -> None:
        self.witness, self.warmup = witness, warmup
        self.started = self.ended = _cpu_times()

    def attach(self) -> Any:
        """Wrap the witness's step end, so that one callback does for both."""
        inner: Callable[..., None] = self.witness.on_step_end

        def on_step_end(*args: Any, **kwargs: Any) -> None:
            inner(*args, **kwargs)
            self.ended = _cpu_times()
            if len(self.witness.steps) == self.warmup:
                self.started = self.ended

        self.witness.on_step_end = on_step_end
        return self.witness

    def noise(self, threads: int) -> dict[str, float | None]:
        """Return cpu_share and others_share, see `Noise`."""
        wall, own, busy = (b - a for a, b in zip(self.started, self.ended, strict=True))
        if wall <= 0:
            return {}
        others = max(0.0, busy - own) / wall / (os.cpu_count() or 1) if self.ended[2] else None
        return {"cpu_share": own / wall / threads, "others_share": others}


def _cpu_times() -> tuple[float, float, float]:
    """Return (wall seconds, CPU seconds of this process, CPU seconds of everything; 0 where the kernel does not tell)."""
    busy = 0.0
    stat = Path("/proc/stat")
    if stat.exists():
        user, nice, system, _idle, _wait, irq, softirq, steal = map(int, stat.read_text("utf-8").split()[1:9])
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return time.perf_counter(), time.process_time(), busy


class _Memory:
    """Caps and watches the GPU's memory; on a CPU the kernel keeps the peak of resident memory itself."""

    device_bytes: int | None = None

    def __init__(self, cap_bytes: int | None) -> None:
        self.stop = threading.Event()
        self.thread: threading.Thread | None = None
        import torch

        self.cuda = torch.cuda.is_available()
        if self.cuda:
            free, total = torch.cuda.mem_get_info()
            self.before = total - free
            if cap_bytes:
                torch.cuda.set_per_process_memory_fraction(min(1.0, cap_bytes / total))

    def __enter__(self) -> None:
        if self.cuda:
            self.thread = threading.Thread(target=self._sample, daemon=True)
            self.thread.start()

    def __exit__(self, *unused: object) -> None:
        self.stop.set()

    def _sample(self) -> None:
        import torch

        while not self.stop.wait(0.02):
            free, total = torch.cuda.mem_get_info()
            _Memory.device_bytes = max(_Memory.device_bytes or 0, total - free - self.before)

    @staticmethod
    def peak() -> Peak:
        """Return the peaks of this process so far."""
        kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        rss = kib if sys.platform == "darwin" else kib * 1024
        torch = sys.modules.get("torch")
        if torch is None or not torch.cuda.is_available():
            return Peak(rss_bytes=rss)
        return Peak(
            rss_bytes=rss,
            vram_allocated_bytes=torch.cuda.max_memory_allocated(),
            vram_reserved_bytes=torch.cuda.max_memory_reserved(),
            vram_device_bytes=_Memory.device_bytes,
        )


def _status_of(error: Exception) -> tuple[Any, str]:
    """Return the status and one line for what an arm raised."""
    text = f"{type(error).__name__}: {error}".strip().splitlines()[0][:400]
    lowered = str(error).lower()
    if type(error).__name__ == "UnsupportedError":
        return "unsupported", str(error)
    out_of_memory = type(error).__name__ in {"OutOfMemoryError", "MemoryError"} or "out of memory" in lowered
    if out_of_memory or "can't allocate memory" in lowered or "bad_alloc" in lowered:
        return "oom", text
    if isinstance(error, FastFTError):
        return "crashed", str(error)
    return "crashed", text


def _clocks(device: str) -> tuple[float | None, str | None]:
    """Return (clock in MHz, the GPU's throttle reasons) where the kernel or the driver tells."""
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks_event_reasons.active", "--format=csv,noheader,nounits"]
        try:
            done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
            clock, reasons = (part.strip() for part in done.stdout.splitlines()[0].split(","))
            return float(clock), None if int(reasons, 16) in {0, 1} else reasons  # 1 is "idle"
        except (OSError, subprocess.SubprocessError, ValueError, IndexError):
            return None, None
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return None, None
    clocks = [float(line.split(":")[1]) for line in lines if line.startswith("cpu MHz")]
    return (sum(clocks) / len(clocks) if clocks else None), None


def matmul_ceiling(device: str, dtype: str) -> float:
    """Return the FLOP/s of a 2048^3 (CPU) or 8192^3 (GPU) matrix product: the best of several, in `dtype`."""
    import torch

    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    best = float("inf")
    for _ in range(12):
        started = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best


def _write(path: Path, values: Any) -> None:
    aside = path.with_suffix(".writing")
    aside.write_text(json.dumps(values), encoding="utf-8")
    aside.replace(path)


if __name__ == "__main__":
    main()
