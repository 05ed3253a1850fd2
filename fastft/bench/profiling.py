"""What a step spends its time on, by torch's profiler: `fastft selftest`, `bench --profile`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

LISTED = 10


class StepProfile:
    """A profile from `begin` to `end`; the device's work is waited for at both."""

    def begin(self) -> None:
        """Start to record."""
        self.on_gpu = torch.cuda.is_available()
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_gpu else [])]
        self._wait()
        self._seen = profile(activities=kinds)
        self._seen.start()
        self._began = time.perf_counter()

    def end(self) -> dict[str, Any]:
        """Stop; returns seconds, gpu_busy_share (of those seconds), launches (kernels and copies)
        and the ten kernels that took longest. On a CPU the share and the launches are None, and
        the ten are the CPU's operations.
        """
        self._wait()
        seconds = time.perf_counter() - self._began
        self._seen.stop()
        averages = self._seen.key_averages()
        kernels = [e for e in averages if "cuda" in str(e.device_type).lower()]
        took = _on_the_gpu if self.on_gpu else _on_the_cpu
        longest = sorted(kernels if self.on_gpu else averages, key=took, reverse=True)[:LISTED]
        busy = sum(map(_on_the_gpu, kernels))
        return {
            "seconds": seconds,
            "gpu_busy_share": busy / seconds if self.on_gpu else None,
            "launches": sum(e.count for e in kernels) if self.on_gpu else None,
            "longest": [
                {"name": e.key[:120], "calls": e.count, "seconds": took(e)} for e in longest
            ],
        }

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


def _on_the_gpu(event: Any) -> float:
    return float(event.self_device_time_total) / 1e6


def _on_the_cpu(event: Any) -> float:
    return float(event.self_cpu_time_total) / 1e6


def profile_of(work: Callable[[], Any]) -> dict[str, Any]:
    """Run `work` under the profiler and return what `StepProfile.end` does."""
    step = StepProfile()
    step.begin()
    work()
    return step.end()
