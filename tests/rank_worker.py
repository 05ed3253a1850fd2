"""`fastft train` in one process of several, with a fault: torchrun tests/rank_worker.py FAULT run.yaml ..."""

import os
import sys

RANK = int(os.environ["RANK"])


def unequal_budgets() -> None:
    """Every process cuts its rows to another size."""
    from dataclasses import replace

    from fastft.training.session import Prepared

    original = Prepared.policy_for
    Prepared.policy_for = lambda self, rows: replace(  # type: ignore[method-assign]
        original(self, rows), micro_batch_tokens=(90, 200, 50)[RANK]
    )


def out_of_memory(of: int) -> None:
    """The second process cannot allocate a row of more than `of` tokens."""
    import torch

    from fastft.training.step import Stepper

    original = Stepper.batches

    def batches(self, segments):  # type: ignore[no-untyped-def]
        for batch in original(self, segments):
            if RANK == 1 and batch.tokens > of and torch.is_grad_enabled():
                raise torch.OutOfMemoryError("CUDA out of memory (this is a test)")
            yield batch

    Stepper.batches = batches  # type: ignore[method-assign]


def full_disk() -> None:
    """The disk fills while the second checkpoint is written."""
    from fastft.runs import checkpoint

    real, calls = checkpoint.write_atomically, []

    def full(path, text):  # type: ignore[no-untyped-def]
        if path.name == checkpoint.MANIFEST and path.parent.name.startswith("checkpoint"):
            calls.append(path)
            if len(calls) == 2:
                raise OSError(28, "No space left on device")
        return real(path, text)

    checkpoint.write_atomically = full


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    from fastft import cli

    fault, *arguments = sys.argv[1:]
    {
        "none": lambda: None,
        "unequal budgets": unequal_budgets,
        "small memory": lambda: out_of_memory(130),
        "no memory": lambda: out_of_memory(5),
        "full disk": full_disk,
    }[fault]()
    os._exit(cli.run(["train", *arguments]))
