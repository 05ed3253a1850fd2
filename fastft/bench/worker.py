"""One run of one arm, in a process of its own: `python -m fastft.bench.worker job.json`.

The record goes to the path that the job names, never to standard output, which belongs to the
libraries.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from fastft.bench.case import TUNING, Case
from fastft.bench.process import end_with_the_runner
from fastft.bench.record import Noise, Peak, Record
from fastft.errors import FastFTError
from fastft.files import write_atomically
from fastft.hardware import anonymous_bytes, peak_resident_bytes


def main() -> None:
    """Run the job and leave its record; the exit code is 0 also for an arm that died in a way it
    could tell.
    """
    end_with_the_runner()
    job = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    if job["kind"] == "ceiling":
        write_atomically(
            Path(job["record"]),
            json.dumps({"matmul_flops": matmul_ceiling(job["device"], job["dtype"])}),
        )
        os._exit(0)
    _leave(job, run(job))


def _leave(job: dict[str, Any], record: Record) -> NoReturn:
    """Write the record and end the process, whatever its other threads do."""
    write_atomically(Path(job["record"]), json.dumps(record.model_dump(mode="json")))
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
        _fail_what_cannot_fit(job["cap_bytes"], Path(job["model"]))
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


def _fail_what_cannot_fit(cap_bytes: int, model: Path) -> None:
    """Make malloc fail, as on a full machine, where the process would get more than the cap and
    the files of `model` together: the kernel counts these as data while they are mapped (privately
    and writable, as safetensors does). `_Memory` watches the cap itself.
    """
    files = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    resource.setrlimit(resource.RLIMIT_DATA, (cap_bytes + files, cap_bytes + files))


def _train(job: dict[str, Any], case: Case, record: Record) -> None:
    """Load and train, filling the record as far as it gets."""
    from fastft.bench.arms import make_arm
    from fastft.bench.job import Job
    from fastft.bench.workload import load

    workload = load(Path(job["workload"]))
    arm = make_arm(job["arm"], job["implementation"], job["settings"])
    record.environment = {
        name: value for name, value in sorted(os.environ.items()) if name.startswith(TUNING)
    }
    before = _used_on_the_device() if case.device == "cuda" else None
    names = ("table", "arm", "implementation", "settings", "model", "dtype", "cap_bytes")
    task = Job(
        case=case, workload=workload, work=Path(job["work"]), **{name: job[name] for name in names}
    )
    started = time.perf_counter()
    _import_libraries(arm, job["settings"].get("processes", 1))
    imported = time.perf_counter()
    record.import_seconds = imported - started
    if case.device == "cuda" and not case.flash_attention_2:
        _no_flash_attention()

    def too_much(reason: str) -> NoReturn:
        record.status, record.reason, record.peak = "oom", reason, _Memory.peak()
        _leave(job, record)

    with _Memory(case.device, job["cap_bytes"], before, too_much):
        model = arm.load(task)
        record.load_seconds = time.perf_counter() - imported
        from fastft.bench.witness import Witness

        gradient = Path(job["gradient"]) if job["gradient"] else None
        profiled = workload.steps if job["profile"] else None  # the last: all is warm by then
        witness = Witness(gradient, workload.never, profiled)
        witness.watch(model, Path(job["start"]))
        record.trainable_parameters = witness.trainable_parameters
        clock = _CpuClock(witness, record.warmup_steps)
        try:
            record.claimed_tokens = arm.train(task, clock.attach())
        finally:
            record.steps = witness.steps
            record.step_tokens = [workload.tokens(i) for i in range(len(witness.steps))]
            record.first_step_seconds = witness.first_step_seconds
    if len(record.steps) != workload.steps:
        raise FastFTError(
            f"the arm stopped by itself after {len(record.steps)} of {workload.steps} steps."
        )
    record.adapter_change = witness.adapter_change()
    record.noise = Noise(load_average_before=0, load_average_after=0, **clock.noise(job["threads"]))
    record.patches = _patches(arm)
    if job["profile"]:
        write_atomically(Path(job["profile"]), json.dumps(witness.profile))


def _import_libraries(arm: Any, processes: int) -> None:
    """Import what the arm needs before its clock for loading starts; Unsloth before everything
    else.

    Told by what the arm is, not by its name: a second fastft in a case must not get peft imported
    before Unsloth. An arm that is none of ours imports its libraries itself, and its loading time
    says so.
    """
    from fastft.bench.arms import FastftArm, PeftArm, UnslothArm
    from fastft.bench.job import without_network

    if isinstance(arm, UnslothArm):
        without_network()
        import unsloth  # noqa: F401
    elif isinstance(arm, FastftArm):
        import fastft

        if processes > 1:
            from fastft.bench.sibling import gather

            gather(processes)
        _ = fastft.FastLanguageModel
    elif not isinstance(arm, PeftArm):
        return
    import peft  # noqa: F401
    from transformers import AutoModelForCausalLM, Trainer  # noqa: F401  # transformers is lazy: the names do the work


def _no_flash_attention() -> None:
    """Keep torch's own attention off the kernels that a card without FlashAttention 2 does not
    have, for every arm.
    """
    import torch

    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


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
    """Return (wall seconds, CPU seconds of this process and of those that it started, CPU seconds
    of everything; 0 where the kernel does not tell).
    """
    import psutil

    busy = 0.0
    stat = Path("/proc/stat")
    if stat.exists():
        user, nice, system, _idle, _wait, irq, softirq, steal = map(
            int, stat.read_text("utf-8").split()[1:9]
        )
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    own = time.process_time()
    for sibling in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            own += sum(sibling.cpu_times()[:2])
    return time.perf_counter(), own, busy


class _Memory:
    """Caps and watches the memory of a GPU, or, where there is a cap, of a process on a CPU.

    On a CPU that is the process's anonymous memory: pages of files that it maps, as those of a
    checkpoint that is being read, go where the system needs the room. (16-bit weights that an arm
    goes on reading there do not count either.) The kernel itself keeps the peak of all that is
    resident. Processes that an arm starts are not watched.

    `before`: bytes in use on the GPU before this process made its CUDA context. `too_much`: called
    from a thread, with the reason, when a process on a CPU has more than the cap.
    """

    device_bytes: int | None = None
    anonymous_bytes: int | None = None

    def __init__(
        self,
        device: str,
        cap_bytes: int | None,
        before: int | None,
        too_much: Callable[[str], None],
    ) -> None:
        self.stop = threading.Event()
        self.thread: threading.Thread | None = None
        self.too_much = too_much
        self.watch: Callable[[], None] | None = None
        import torch

        if cap_bytes and device == "cpu":
            self.watch = partial(self._see_the_process, cap_bytes)
        elif torch.cuda.is_available():
            self.watch = self._see_the_gpu
            free, total = torch.cuda.mem_get_info()
            self.before = min(total - free, total if before is None else before)
            if cap_bytes:
                torch.cuda.set_per_process_memory_fraction(min(1.0, cap_bytes / total))

    def __enter__(self) -> None:
        if self.watch:
            self.thread = threading.Thread(target=self._sample, args=(self.watch,), daemon=True)
            self.thread.start()

    def __exit__(self, *unused: object) -> None:
        self.stop.set()
        if self.thread:  # it may be writing the record, and then ends the process
            self.thread.join()

    def _sample(self, watch: Callable[[], None]) -> None:
        while not self.stop.wait(0.02):
            watch()

    def _see_the_gpu(self) -> None:
        import torch

        free, total = torch.cuda.mem_get_info()
        _Memory.device_bytes = max(_Memory.device_bytes or 0, total - free - self.before)

    def _see_the_process(self, cap_bytes: int) -> None:
        if (own := anonymous_bytes()) is None:
            return
        _Memory.anonymous_bytes = max(_Memory.anonymous_bytes or 0, own)
        if own > cap_bytes:
            self.too_much(
                f"the process's own memory, {own / 1e9:.2f} GB, is above the cap of "
                f"{cap_bytes / 1e9:g} GB"
            )

    @staticmethod
    def peak() -> Peak:
        """Return the peaks of this process so far."""
        rss = peak_resident_bytes()
        torch = sys.modules.get("torch")
        if torch is None or not torch.cuda.is_available():
            return Peak(rss_bytes=rss, anonymous_bytes=_Memory.anonymous_bytes)
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
    out_of_memory = (
        type(error).__name__ in {"OutOfMemoryError", "MemoryError"} or "out of memory" in lowered
    )
    if out_of_memory or "can't allocate memory" in lowered or "bad_alloc" in lowered:
        return "oom", text
    if isinstance(error, FastFTError):
        return "crashed", str(error)
    return "crashed", text


def _clocks(device: str) -> tuple[float | None, str | None]:
    """Return (clock in MHz, the GPU's throttle reasons) where the kernel or the driver tells."""
    if device == "cuda":
        for reasons in ("clocks_event_reasons.active", "clocks_throttle_reasons.active"):
            # older drivers: the second
            if (found := _nvidia_smi("clocks.sm", reasons)) and found[0].isdigit():
                idle = found[1].startswith("0x") and int(found[1], 16) in {0, 1}  # 1 is "idle"
                return float(found[0]), None if idle else found[1]
        return None, None
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return None, None
    clocks = [float(line.split(":")[1]) for line in lines if line.startswith("cpu MHz")]
    return (sum(clocks) / len(clocks) if clocks else None), None


def _used_on_the_device() -> int | None:
    """Return the bytes in use on the first visible GPU, without making a CUDA context; None where
    nobody tells.
    """
    found = _nvidia_smi("memory.used")
    return int(found[0]) * 2**20 if found and found[0].isdigit() else None


def _nvidia_smi(*fields: str) -> list[str] | None:
    """Return what the driver says of the first visible GPU, without units, or None."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip() or "0"
    query = [
        "nvidia-smi",
        "-i",
        first,
        f"--query-gpu={','.join(fields)}",
        "--format=csv,noheader,nounits",
    ]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    values = [part.strip() for part in done.stdout.partition("\n")[0].split(",")]
    return values if len(values) == len(fields) else None


def matmul_ceiling(device: str, dtype: str) -> float:
    """Return the FLOP/s of a 2048^3 (CPU) or 8192^3 (GPU) matrix product: the best within a second
    or two, in `dtype`.

    At least twelve, and on a GPU long enough for its clocks to rise.
    """
    import torch

    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    times: list[float] = []
    while len(times) < 12 or (device == "cuda" and sum(times) < 1):
        started = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    best = min(times)
    return 2.0 * size**3 / best


if __name__ == "__main__":
    main()
