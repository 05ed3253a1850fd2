"""The other processes of a fastft arm that trains in several: setting `processes` of the arm.

The worker is the first process and is measured like any other; its siblings run the same session on
the same job and compute their share of each step.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from fastft import child
from fastft.bench.process import end_with_the_runner


def gather(processes: int) -> None:
    """Start this worker's siblings, and tell this process that it is the first of all; call before
    any library is imported.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = child.command("fastft.bench.sibling", sys.argv[1])
    for rank in range(1, processes):
        here = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        subprocess.Popen(command, env=child.environment(**place, **here))
    os.environ |= place | {"RANK": "0", "LOCAL_RANK": "0"}


def main() -> None:
    """Train the job of the worker beside it, and leave no record."""
    end_with_the_runner()
    import fastft

    _ = fastft.FastLanguageModel  # joins the worker, and imports Unsloth first
    from fastft.bench.case import Case
    from fastft.bench.job import Job
    from fastft.bench.session import open_session
    from fastft.bench.witness import Witness
    from fastft.bench.workload import load
    from fastft.training import ranks

    job = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    names = ("table", "arm", "implementation", "settings", "model", "dtype", "cap_bytes")
    task = Job(
        case=Case.model_validate(job["case"]),
        workload=load(Path(job["workload"])),
        work=Path(job["work"]) / f"process-{ranks.world().rank}",
        **{name: job[name] for name in names},
    )
    task.work.mkdir(parents=True, exist_ok=True)
    session = open_session(task)
    witness = Witness(None, task.workload.never)
    witness.watch(session.model, Path(job["start"]))
    session.loop.trainer.add_callback(witness)
    session.run()
    os._exit(0)


if __name__ == "__main__":
    main()
