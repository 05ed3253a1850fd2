"""Several processes, one optimizer step: each computes the gradient of its share of the sequences.

    torchrun --nproc_per_node 2 -m fastft train run.yaml
    fastft train run.yaml --processes 2        # the same

Every process holds the whole model, draws the same step and makes the same optimizer step on the
same summed gradient, so nothing wraps the model. Launchers tell each process who it is by
environment variables; `join` reads them and takes them away, before transformers and accelerate
are imported, and to those each process then looks like one of its own with one GPU. The first
process alone holds the lock, prints, logs and writes.

Everything that processes tell each other passes through this file. What is sent each step is one
flat all-reduce (a sum) of the LoRA gradients, the loss and the flags that stop a run.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from fastft.errors import CouldNotFinishError, FastFTError

if TYPE_CHECKING:
    import torch

    from fastft.data.batches import Segment

START_MINUTES = 24 * 60
"""How long the others wait for the first process to read and tokenise the data."""

OWN_LAUNCHER = "FASTFT_LAUNCHER"
"""Set by `--processes`: the launcher then says itself that a process was lost."""

LOST = 75
"""Exit code towards that launcher of a process that lost another one; the user sees 3."""

HANGS = 76
"""The same, where it waited for the other in vain: the launcher then kills that one."""

LAST_WORDS_SECONDS = 1.0
"""How much longer such a process stays, so that the launcher sees first who ended first."""

LAUNCHER_VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE",
    "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME",
)  # fmt: skip


@dataclass(frozen=True)
class World:
    """Which process of how many this is."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among the processes of this machine; also the number of its GPU."""
    local_size: int = 1
    launcher: str = ""
    """torchrun, Slurm, or nothing where the process stands alone."""


class LostProcessError(CouldNotFinishError):
    """Another process of the run ended, hangs, or cannot be reached. Exit code 3."""


_world = World()
_store: Any = None
_turns = 0


def world() -> World:
    """Return which process of how many this is; alone before `join`."""
    return _world


def first() -> bool:
    """Whether this process is the one that prints and writes."""
    return _world.rank == 0


def found(environment: Mapping[str, str]) -> World:
    """Return the world that a launcher's variables describe; raises FastFTError for half a world.

    torchrun and `accelerate launch` set RANK, WORLD_SIZE and LOCAL_RANK; Slurm's srun sets
    SLURM_PROCID, SLURM_STEP_NUM_TASKS and SLURM_LOCALID (a batch script has the first, but starts
    no step of its own, so the second tells the two apart).
    """
    if "WORLD_SIZE" in environment:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        defaults, launcher = ("", "", "0", "1"), "torchrun"
    elif environment.get("SLURM_STEP_NUM_TASKS", "1") not in ("", "1"):
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_TASKS_PER_NODE")
        defaults, launcher = ("", "", "0", "1"), "Slurm"
    else:
        _refuse_half_a_launch(environment)
        return World()
    values = [environment.get(name, default) for name, default in zip(names, defaults, strict=True)]
    # Slurm writes "4(x2)": four tasks on each of two machines.
    numbers = [re.match(r"\d+", value) for value in values]
    if None in numbers:
        listed = ", ".join(f"{n}={environment.get(n, '(absent)')}" for n in names)
        raise FastFTError(
            f"the launcher's variables do not say which process this is: {listed}. Start with "
            "torchrun, srun or fastft train --processes, or unset them to train alone."
        )
    rank, size, local, local_size = (int(number[0]) for number in numbers if number)
    if not 0 <= rank < size:
        raise FastFTError(f"{names[0]} is {rank}, and {names[1]} {size}: there is no such process.")
    return World(rank, size, local, local_size, launcher) if size > 1 else World()


def _refuse_half_a_launch(environment: Mapping[str, str]) -> None:
    """Raise FastFTError where `accelerate launch --cpu` was asked for several processes.

    It sets a meeting place for them, and then starts one process without saying so.
    """
    on_cpu = environment.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    if on_cpu and "MASTER_PORT" in environment:
        raise FastFTError(
            "accelerate launch --cpu started only one of the processes that it was asked for. "
            "On CPUs use fastft train run.yaml --processes N, or torchrun --nproc_per_node N -m "
            "fastft train run.yaml."
        )


def join(timeout_minutes: float) -> World:
    """Join the processes that a launcher started, where there are any; returns this one's place.

    Call it before transformers is imported and before CUDA is used. `timeout_minutes`: how long a
    process waits for the others within a step before it takes them for lost. A second call
    returns what the first found.
    """
    global _world, _store
    if _store is not None:
        return _world
    here = found(os.environ)
    if here.size == 1:
        return here
    _refuse_too_late()
    _one_gpu_each(here)
    _meeting_place(os.environ)
    import torch
    import torch.distributed as dist

    # So that a collective that waits too long raises here, and does not abort the process.
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    # What lies on the CPU (decisions, held-out losses) goes through gloo, gradients through NCCL.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    timeout = timedelta(minutes=timeout_minutes)
    try:
        meeting = dist.rendezvous("env://", rank=here.rank, world_size=here.size, timeout=timeout)
        store, _, _ = next(meeting)
        store.set_timeout(timeout)
        dist.init_process_group(
            backend, store=store, rank=here.rank, world_size=here.size, timeout=timeout
        )
    except (RuntimeError, ValueError) as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise LostProcessError(
            f"process {here.rank} of {here.size} could not meet the others at {place} within "
            f"{timeout_minutes:g} minutes ({str(error).splitlines()[0]}). Check that all were "
            "started, with the same MASTER_ADDR and MASTER_PORT, and that no firewall is between."
        ) from error
    # To transformers and accelerate each process is one of its own from here on.
    for name in LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
    _world, _store = here, store
    return here


def _refuse_too_late() -> None:
    """Raise FastFTError where the libraries were already told of the launcher."""
    state = sys.modules.get("accelerate.state")
    if state is not None and state.PartialState._shared_state:
        raise FastFTError(
            "accelerate was set up before fastft joined the processes of the launcher. Read "
            "fastft.FastSFTTrainer (or call fastft.train) before making an SFTConfig, a "
            "TrainingArguments or an Accelerator."
        )
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        raise FastFTError(
            "CUDA was used before fastft joined the processes of the launcher, so they would "
            "share one GPU. Call fastft first, or export CUDA_VISIBLE_DEVICES for each process."
        )


def _one_gpu_each(here: World) -> None:
    """Leave this process one of the visible GPUs: the one of its local rank."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in {"", "-1"}:
        return  # the user has hidden them all
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if len(visible) == 1 and here.local_size > 1 and here.launcher == "Slurm":
        return  # --gpus-per-task: Slurm has given each its own
    if visible and here.local_rank >= len(visible):
        raise FastFTError(
            f"{here.local_size} processes were started on this machine and CUDA_VISIBLE_DEVICES "
            f"names {len(visible)} GPUs ({','.join(visible)}). Start one process a GPU."
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = (
        visible[here.local_rank] if visible else str(here.local_rank)
    )


def _meeting_place(environment: Any) -> None:
    """Set MASTER_ADDR and MASTER_PORT where Slurm started the processes, which sets neither."""
    if "MASTER_ADDR" not in environment:
        nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST", "")
        environment["MASTER_ADDR"] = first_host(nodes) or "127.0.0.1"
    if "MASTER_PORT" not in environment:
        # The same on every machine, another for each job.
        environment["MASTER_PORT"] = str(20000 + int(environment.get("SLURM_JOB_ID", "0")) % 20000)


def first_host(nodes: str) -> str:
    """Return the first machine of a Slurm node list: "gpu[07-09,12],big1" gives "gpu07"."""
    start = re.match(r"([^\[,]*)(?:\[([0-9]+)[^\]]*\]([^,\[]*))?", nodes)
    return "".join(part or "" for part in start.groups()) if start else ""


# --- what is shared out, and what is summed


def share(segments: Sequence[Segment], *, trie: bool = False) -> list[Segment]:
    """Return this process's sequences of a step; `trie` as in `split`.

    Every process works out the same split, so nothing is sent.
    """
    if _world.size == 1:
        return list(segments)
    return split(segments, _world.size, trie=trie)[_world.rank]


def split(segments: Sequence[Segment], parts: int, *, trie: bool = False) -> list[list[Segment]]:
    """Return `parts` lists of the sequences, balanced by their tokens: longest first, each to the
    part that is the shortest with it. Some are empty where there are fewer sequences than parts.

    At most 4/3 of the best possible largest part (Graham 1969, "Bounds on multiprocessing timing
    anomalies"). With `trie` a beginning that a part computes already costs nothing there, so that
    sequences with a common prefix stay together where that is shorter.
    """
    load, shares = [0] * parts, [[] for _ in range(parts)]  # type: list[int], list[list[Segment]]
    for index in sorted(range(len(segments)), key=lambda i: (-len(segments[i]), i)):
        segment = segments[index]
        known = [_longest_prefix(segment, others) if trie else 0 for others in shares]
        with_it = [load[part] + len(segment) - known[part] for part in range(parts)]
        to = with_it.index(min(with_it))
        load[to] = with_it[to]
        shares[to].append(segment)
    return shares


def _longest_prefix(segment: Segment, others: Sequence[Segment]) -> int:
    """Return the tokens at the beginning of `segment` that one of `others` begins with too."""
    longest = 0
    for other in others:
        length = min(len(segment), len(other))
        differs = segment.input_ids[:length] != other.input_ids[:length]
        longest = max(longest, int(differs.argmax()) if differs.any() else length)
    return longest


def add_up(
    parameters: Iterable[torch.nn.Parameter],
    loss: float,
    flags: Sequence[bool] = (),
    *,
    tokens: int = 0,
) -> tuple[float, list[bool], int]:
    """Sum the gradients of the trainable `parameters` over the processes, in place; returns the
    summed loss, for each flag whether it is up in any process, and the sum of `tokens`.

    A process whose share is empty has no gradients: it adds zeros and gets the sum. A loss or a
    gradient that is not finite stays so in the sum, so that all see it alike.
    """
    if _world.size == 1:
        return loss, list(flags), tokens
    import torch

    trained = [p for p in parameters if p.requires_grad]
    for p in trained:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    # The loss in two float32: what the first cannot hold is in the second.
    high = torch.tensor(loss, dtype=torch.float32).item()
    low = loss - high if math.isfinite(high) else 0.0
    # Tokens are exact up to 16.7 million a step.
    sent = [high, low, float(tokens), *map(float, flags)]
    numbers = torch.tensor(sent, device=trained[0].device)
    pieces = [p.grad.flatten().float() for p in trained if p.grad is not None]
    flat = torch.cat([*pieces, numbers])
    del pieces
    with _talking("adding up the gradients"):
        torch.distributed.all_reduce(flat)
        # In here, because with NCCL it is this copy that waits, and that fails.
        high, low, count, *raised = flat[-len(numbers) :].tolist()
    parts = flat[: -len(numbers)].split([p.numel() for p in trained])
    for p, part in zip(trained, parts, strict=True):
        assert p.grad is not None
        p.grad.copy_(part.view_as(p))
    # Where a gradient is not finite the count still is.
    return high + low, [times > 0 for times in raised], int(count)


def total(*numbers: float) -> list[float]:
    """Return the sum over the processes of each of `numbers`."""
    if _world.size == 1:
        return list(numbers)
    import torch

    values = torch.tensor(numbers, dtype=torch.float64)
    with _talking("adding up a loss"):
        torch.distributed.all_reduce(values)
    return [float(v) for v in values]


def everybodys(value: Any) -> list[Any]:
    """Return what each process gave as `value`, by rank; small, and picklable."""
    if _world.size == 1:
        return [value]
    import torch

    values: list[Any] = [None] * _world.size
    with _talking("exchanging decisions"):
        torch.distributed.all_gather_object(values, value)
    return values


def from_the_first(value: Any) -> Any:
    """Return what the first process gave as `value`."""
    return everybodys(value)[0]


def start_alike(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Give every process the first one's values of the trainable `parameters`.

    The seed makes them alike already, but for the last digits on unlike cards.
    """
    if _world.size == 1:
        return
    import torch

    trained = [p for p in parameters if p.requires_grad]
    flat = torch.cat([p.detach().flatten().float() for p in trained])
    with _talking("taking over the adapter"):
        torch.distributed.broadcast(flat, src=0)
        flat[0].item()  # with NCCL it is this copy that waits, and that fails
    for p, part in zip(trained, flat.split([p.numel() for p in trained]), strict=True):
        p.data.copy_(part.view_as(p))


def refuse_unlike(what: str, mine: Any) -> None:
    """Raise FastFTError, in every process, where `mine` is not the same in all of them."""
    values = everybodys(mine)
    if any(value != values[0] for value in values):
        listed = ", ".join(f"process {rank}: {value}" for rank, value in enumerate(values))
        raise FastFTError(f"the processes of this run differ in {what} ({listed}).")


def wait() -> None:
    """Wait until every process is here."""
    if _world.size > 1:
        total(0.0)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside, this process is one of its own again: it trains by itself (a trial of a sweep)."""
    global _world
    joined, _world = _world, World()
    try:
        yield
    finally:
        _world = joined


def gather_when_ready(value: Any) -> list[Any]:
    """Return what each process gave as `value` (anything that JSON holds), by rank, however long
    the slowest takes.
    """
    global _turns
    if _world.size == 1:
        return [value]
    _turns += 1
    keys = [f"fastft/{_turns}/{rank}" for rank in range(_world.size)]
    with _talking("waiting for the others' trials"):
        _store.set(keys[_world.rank], json.dumps(value))
        _store.wait(keys, timedelta(minutes=START_MINUTES))
        return [json.loads(_store.get(key)) for key in keys]


@contextlib.contextmanager
def first_before_the_others(what: str) -> Iterator[None]:
    """Let the first process through the block alone; the others enter once it is done.

    For what takes long once and is then read from the disk. Where the first fails, its error ends
    the others too.
    """
    global _turns
    if _world.size == 1:
        yield
        return
    _turns += 1  # alike in all processes, since all come by here
    key = f"fastft/{_turns}/{what}"
    if first():
        yield
        _store.set(key, "done")
        return
    with _talking(f"waiting for the first process ({what})"):
        _store.wait([key], timedelta(minutes=START_MINUTES))
    yield


def note_of_this_process(text: str) -> None:
    """Print a warning that concerns this process alone, where it is not the first."""
    print(f"warning: process {_world.rank} of {_world.size}: {text}", file=sys.stderr)


def tells_why() -> bool:
    """Whether this process is the first of all to end with an error, and so the one that says why.

    The others end because of it, and stay silent.
    """
    if _world.size == 1:
        return True
    try:
        return int(_store.add("fastft/failed", 1)) == 1
    except RuntimeError:  # the first process kept the store, and is gone
        return True


@contextlib.contextmanager
def putting_layers_together() -> Iterator[None]:
    """Inside, where FSDP2 talks by itself, its network's failures are LostProcessErrors.

    Told by their words, since whatever else fails in there is a RuntimeError too.
    """
    try:
        yield
    except RuntimeError as error:
        if not re.search(r"gloo|nccl|connection|timed out|broken pipe", str(error), re.IGNORECASE):
            raise
        with _talking("putting a layer together"):
            raise


@contextlib.contextmanager
def _talking(doing: str) -> Iterator[None]:
    """Inside, a failure of the network or of another process is a LostProcessError."""
    try:
        yield
    except RuntimeError as error:  # what torch.distributed's own errors derive from
        raise LostProcessError(
            f"another process of this run ended, hangs or cannot be reached (process "
            f"{_world.rank} of {_world.size} was {doing}: {str(error).splitlines()[0]}). Nothing "
            "of this step was kept; the last checkpoint is whole, and the same command goes on."
        ) from error
