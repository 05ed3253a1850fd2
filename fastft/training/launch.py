"""`fastft train run.yaml --processes N`: torchrun's agent starts N processes of the same command.

The agent is torch.distributed's own. What is added: its log and traceback stay away, and what ends
is said once, in one sentence, with fastft's exit codes.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence
from typing import Any

from fastft import child
from fastft.errors import FastFTError
from fastft.hardware import usable_cores
from fastft.training.ranks import HANGS, LOST, OWN_LAUNCHER, found

MOST_PROCESSES = 64
SHUTDOWN_SECONDS = 120
"""How long processes may take to finish their step and save, once they were told to stop."""


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Run `fastft ARGUMENTS` in `processes` processes of this machine; returns the exit code.

    Raises FastFTError where there are fewer GPUs than processes.
    """
    _refuse_too_many(processes)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    os.environ[OWN_LAUNCHER] = "1"
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_SECONDS))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // processes)))
    agent = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
    )
    try:
        program, *words = child.command("fastft", *arguments)
        elastic_launch(agent, program)(*words)
    except SignalException:  # the agent has passed it on, and waited
        return 130
    except ChildFailedError as error:
        return _exit_code(error.failures, processes)
    return 0


def _refuse_too_many(processes: int) -> None:
    """Raise FastFTError for fewer than one process, or more than there are GPUs."""
    if processes < 1:
        raise FastFTError(f"--processes is {processes}; it must be at least 1.")
    if found(os.environ).size > 1:
        raise FastFTError(
            "--processes starts the processes itself, and a launcher has started this one already. "
            "Use one of the two."
        )
    if processes > MOST_PROCESSES:
        raise FastFTError(
            f"--processes is {processes:,}; one machine starts at most {MOST_PROCESSES}, one a "
            "GPU. Use torchrun over several machines (docs/processes.md)."
        )
    import torch

    cards = torch.cuda.device_count()
    if torch.cuda.is_available() and processes > cards:
        raise FastFTError(
            f"--processes {processes} needs as many GPUs, and {cards} can be seen here. Use "
            f"--processes {cards}, or torchrun over several machines (docs/processes.md)."
        )


def _exit_code(failures: dict[int, Any], processes: int) -> int:
    """Return the exit code of the processes that failed; where none of them could say why, say it
    here.
    """
    codes = {rank: failure.exitcode for rank, failure in failures.items()}
    hangs = HANGS in codes.values()  # what was killed then, this launcher killed
    killed = {rank: code for rank, code in codes.items() if code < 0 and not hangs}
    said = [code for code in codes.values() if code > 0 and code not in (LOST, HANGS)]
    if said and not killed:
        return said[0]
    why = "one of them hangs, or could not reach the others in time (train.lost_after_minutes)"
    if killed:
        rank, code = next(iter(killed.items()))
        why = f"process {rank} was killed by {_signal_name(-code)}"
        if -code == signal.SIGKILL:
            why += " (by you, or by the system, which does that where memory runs out)"
    print(
        f"error: the run's {processes} processes were ended: {why}. The last checkpoint is whole; "
        "the same command goes on.",
        file=sys.stderr,
    )
    return 3


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
