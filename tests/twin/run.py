"""python -m tests.twin.run CARD CONFIG [STOP]: fastft's own `train` on a pretend card, with accidents.

Step 2 and the second evaluation run out of memory once; with STOP the run is stopped after so many
steps, and resumed. Prints one JSON object.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.twin.twin import install


def accidents(happened: list[str]) -> None:
    """From here on, have the second training step and the second evaluation fail once."""
    import torch

    from fastft.training.step import Stepper

    real_accumulate, real_loss = Stepper._accumulate, Stepper._loss
    steps, evaluations = [0], [0]

    def accumulate(self: Any, *args: Any) -> float:
        steps[0] += 1
        if steps[0] == 2:
            happened.append("step")
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")
        return real_accumulate(self, *args)

    def loss(self: Any, *args: Any) -> float:
        evaluations[0] += 1
        if evaluations[0] == 2:
            happened.append("evaluation")
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real_loss(self, *args)

    Stepper._accumulate, Stepper._loss = accumulate, loss  # type: ignore[method-assign]


def main(card: str, config_file: str, stop: str = "0") -> None:
    install(card, count=2)  # fastft uses one of them
    from fastft.config import load_config
    from fastft.progress import Reporter
    from fastft.training import step
    from fastft.training.loop import StepTrainer
    from fastft.training.step import Stepper
    from fastft.training.train import train
    from tests.twin.card import LEDGER, STATE

    happened: list[str] = []
    cards: list[int] = []
    taken: list[bool] = []
    kept: list[int] = []
    real_init, real_take = StepTrainer.__init__, Stepper._take_ready
    real_keeping = step.keeping_activations

    def keeping(layers: Any) -> Any:
        if cards:
            kept.append(len(layers))
        return real_keeping(layers)

    def take(self: Any, segments: Any) -> Any:
        found = real_take(self, segments)
        if cards:  # rows are checked by now: what follows is training
            taken.append(found is not None)
        return found

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if not cards:
            accidents(happened)
        real_init(self, *args, **kwargs)
        cards.append(self.args.n_gpu)

    StepTrainer.__init__, Stepper._take_ready = init, take  # type: ignore[method-assign]
    step.keeping_activations = keeping
    config, left = load_config(config_file), []
    if int(stop):
        train(config, stop_after=int(stop), reporter=Reporter(quiet=True))
        left.append(LEDGER.allocated())
    result = train(config, reporter=Reporter(quiet=True))
    left.append(LEDGER.allocated())
    record = json.loads((Path(result.run) / "run.json").read_text())
    answer = {
        "status": result.status,
        "happened": happened,
        "left": left,
        "made_ready": taken,
        "kept": kept,
        "peak": LEDGER.peak,
        "emptied": STATE.emptied,
        "mixed": list(STATE.mixed),
        "kernels": dict(STATE.kernels),
        "choices": {name: choice["value"] for name, choice in record["choices"].items()},
        "why": record["choices"]["padding_free"]["reason"],
        "memory": record["memory"],
        "cards": cards,
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
