"""Arms that cheat or break, for the benchmark's tests: each must be caught by name."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from fastft.bench.arms import PeftArm


class Frozen(PeftArm):
    """Trains nothing: the adapter is frozen, but the parameters are counted before."""

    def train(self, job: Any, witness: Any) -> Any:
        import torch

        for name, weight in self.model.named_parameters():
            if "lora_" in name:
                weight.register_hook(torch.zeros_like)
        return super().train(job, witness)


class OtherRank(PeftArm):
    """Half the rank: less work."""

    def load(self, job: Any) -> Any:
        lora = job.case.lora.model_copy(update={"r": job.case.lora.r // 2})
        return super().load(replace(job, case=job.case.model_copy(update={"lora": lora})))


class DropsEveryThird(PeftArm):
    """Leaves out every third sequence, in batches of the same number."""

    def train(self, job: Any, witness: Any) -> Any:
        work = job.workload
        kept = [i - i % 3 % 2 if i % 3 == 2 else i for i in range(len(work.input_ids))]
        short = replace(
            work,
            input_ids=[work.input_ids[i] if i % 3 != 2 else work.input_ids[i][:2] for i in kept],
            labels=[work.labels[i] if i % 3 != 2 else work.labels[i][:2] for i in kept],
        )
        return super().train(replace(job, workload=short), witness)


class NeverUpdates(PeftArm):
    """Computes everything and then changes nothing."""

    def train(self, job: Any, witness: Any) -> Any:
        case = job.case.model_copy(update={"learning_rate": 0.0})
        return super().train(replace(job, case=case), witness)


class StopsEarly(PeftArm):
    """Is content after the warm-up, and says nothing of it."""

    def train(self, job: Any, witness: Any) -> Any:
        witness.on_step_begin = lambda args, state, control, **rest: self.stop(state, control)
        return super().train(job, witness)

    @staticmethod
    def stop(state: Any, control: Any) -> None:
        control.should_training_stop = state.global_step == 0


class CountsPadding(PeftArm):
    """Claims padding as tokens."""

    def train(self, job: Any, witness: Any) -> Any:
        super().train(job, witness)
        return sum(step.padded_tokens for step in witness.steps)


class Raises(PeftArm):
    """Dies with an exception in the middle of training."""

    def train(self, job: Any, witness: Any) -> Any:
        raise ValueError("planted")


class Aborts(PeftArm):
    """Dies without a word of its own."""

    def train(self, job: Any, witness: Any) -> Any:
        print("last words", flush=True)
        os.abort()


class Allocates(PeftArm):
    """Wants more memory than the cap."""

    def train(self, job: Any, witness: Any) -> Any:
        import torch

        self.hoard = torch.ones(int(2 * job.case.memory_cap_gb * 1e9), dtype=torch.uint8)
        return super().train(job, witness)
