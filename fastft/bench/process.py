"""What every process of the benchmark does first."""

from __future__ import annotations

import signal
import sys


def end_with_the_runner() -> None:
    """Have the kernel end this process when the runner dies, of SIGKILL as well, so that no worker
    is left behind.
    """
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
