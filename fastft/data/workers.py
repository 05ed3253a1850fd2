"""Chunks through worker processes, in order, with a bounded number in flight.

A worker is this module as a child process, fed over its standard input: it never imports the
caller's main module (scripts without an `if __name__ == "__main__"` and notebooks work), and it is
not a fork of a process with threads.
"""

from __future__ import annotations

import collections
import os
import pickle
import queue
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from fastft import child
from fastft.errors import CouldNotFinishError


def map_in_order(work: Any, items: Iterable[Any], processes: int) -> Iterator[Any]:
    """Yield `work.chunk(item)` for each item, in order; `work` is pickled to each of `processes`
    workers.

    With one process or fewer the work is done here.
    """
    if processes <= 1:
        yield from map(work.chunk, items)
        return
    setup = pickle.dumps(work)
    workers = [_Worker(setup) for _ in range(processes)]
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    for worker in workers:
        idle.put(worker)
    threads = ThreadPoolExecutor(processes)
    try:
        yield from _in_order(threads, lambda item: _with_worker(idle, item), items, 2 * processes)
    finally:
        for worker in workers:
            worker.stop()
        threads.shutdown(cancel_futures=True)


def _in_order(
    threads: ThreadPoolExecutor, call: Callable[[Any], Any], items: Iterable[Any], most: int
) -> Iterator[Any]:
    waiting: collections.deque[Future[Any]] = collections.deque()
    for item in items:
        waiting.append(threads.submit(call, item))
        if len(waiting) >= most:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _with_worker(idle: queue.SimpleQueue[_Worker], item: Any) -> Any:
    worker = idle.get()
    try:
        return worker.ask(item)
    finally:
        idle.put(worker)


class _Worker:
    def __init__(self, setup: bytes) -> None:
        # One tokenizer thread a worker: the workers are the parallelism.
        self.process = subprocess.Popen(
            child.command("fastft.data.workers"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=child.environment(TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1"),
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.to, self.back = self.process.stdin, self.process.stdout
        self.to.write(setup)
        self.to.flush()

    def ask(self, item: Any) -> Any:
        try:
            pickle.dump(item, self.to, protocol=pickle.HIGHEST_PROTOCOL)
            self.to.flush()
            done, value = pickle.load(self.back)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            code = self.process.wait()
            raise CouldNotFinishError(
                "a data worker ended with code "
                f"{code}{' (out of memory?)' if code in (-9, 137) else ''}."
            ) from error
        if not done:
            raise value
        return value

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.back.close()


def _serve() -> None:
    """Answer chunks until standard input ends."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    # whatever a library prints must not mix with the answers
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    work = pickle.load(requests)
    while True:
        try:
            item = pickle.load(requests)
        except EOFError:
            return
        try:
            answer = (True, work.chunk(item))
        except Exception as error:  # handed to the asking process, which raises it
            answer = (False, error)
        pickle.dump(answer, answers, protocol=pickle.HIGHEST_PROTOCOL)
        answers.flush()


if __name__ == "__main__":
    _serve()
