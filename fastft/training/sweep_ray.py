"""A sweep's trials handed to Ray Tune: over the machines of a Ray cluster, or this one.

    ray start --head                      # once, and `ray start --address ...` on the others
    RAY_ADDRESS=auto fastft sweep run.yaml --vary lora.r=8,16 --ray

Ray places the trials and says which worker died; rungs, folders and what goes on after a kill are
the sweep's own. Every worker loads the base for itself, and must see the same folders.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastft.errors import FastFTError

if TYPE_CHECKING:
    from fastft.training.trials import Trial


def refuse_without_ray() -> None:
    """Raise FastFTError where Ray Tune is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise FastFTError('--ray needs Ray Tune: pip install "fastft[ray]"')


class RayTrials:
    """Trains trials to a step on the workers of a Ray cluster."""

    def __init__(self, folder: Path, *, gpu: bool) -> None:
        """`folder` takes Ray's own notes; `gpu`: each trial needs one."""
        refuse_without_ray()
        self.folder, self.gpu = folder.absolute(), gpu

    def __call__(self, trials: list[Trial], step: int | None) -> None:
        """Train them, and take over how each went."""
        import ray
        from ray import tune

        if not ray.is_initialized():
            # The address comes from RAY_ADDRESS; without one a cluster of this machine is started.
            ray.init(include_dashboard=False, log_to_driver=False)
        given = [(trial.settings, trial.config.model_dump(mode="json")) for trial in trials]
        tuner = tune.Tuner(
            tune.with_resources(_train_one, {"cpu": 1, "gpu": int(self.gpu)}),
            param_space={
                "trial": tune.grid_search(list(range(len(trials)))),
                "given": given,
                "step": step,
            },
            run_config=tune.RunConfig(
                name=f"to-step-{step or 'the-end'}", storage_path=str(self.folder), verbose=0
            ),
        )
        results = tuner.fit()
        for result in results:
            trial = trials[result.config["trial"] if result.config else 0]
            if result.error is not None:
                last = str(result.error).strip().splitlines()[-1]
                trial.status, trial.problem = "failed", f"its Ray worker ended: {last}"
                continue
            found = result.metrics or {}
            trial.status, trial.problem = found["status"], found["problem"]
            trial.eval_loss, trial.metric = found["eval_loss"], found["metric"]


def _train_one(settings: dict[str, Any]) -> None:
    """What a Ray worker runs: one trial, to a step."""
    import ray
    from ray import tune

    from fastft.config import make_config
    from fastft.progress import Reporter
    from fastft.training.kept import Kept
    from fastft.training.trials import Trial, train_to

    varied, config = settings["given"][settings["trial"]]
    trial = Trial(varied, make_config(config))
    train_to(trial, settings["step"], Kept(), Reporter(quiet=True))
    node = ray.get_runtime_context().get_node_id()
    tune.report(
        {
            "status": trial.status,
            "eval_loss": trial.eval_loss,
            "metric": trial.metric,
            "problem": trial.problem,
            "node": node,
        }
    )
