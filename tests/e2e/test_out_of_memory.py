"""An out-of-memory in the middle of a run, provoked by a cap on the process, is survived without losing the step."""

import pytest

from tests.e2e.conftest import run_python

TRAINER = """
import json, resource, sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np, torch
from fastft.engines import get_engine
engine = get_engine("stock")
from transformers import LlamaConfig, LlamaForCausalLM
from fastft.kernels.fused import FusedLayers
from fastft.errors import CouldNotFinishError
from fastft.training.step import StepPolicy
from fastft.training.loop import StepTrainer, training_arguments

capped_step, room, fused = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "fused"
torch.manual_seed(0)
config = LlamaConfig(vocab_size=300, hidden_size=192, intermediate_size=512, num_hidden_layers=3, num_attention_heads=6,
                     num_key_value_heads=2, max_position_embeddings=2048)
model = engine.get_peft_model(LlamaForCausalLM(config), r=4, target_modules="all-linear", random_state=1)
rng = np.random.default_rng(0)
rows, place = [], np.argsort(np.random.default_rng([0, 0]).permutation(48))  # where StepBatches puts each row
for index in range(48):
    # The first two steps are short: memory that they leave behind must not serve the third.
    length = int(rng.integers(60, 90) if place[index] < 16 else rng.integers(600, 900))
    ids = rng.integers(0, 300, length)
    rows.append(SimpleNamespace(input_ids=ids, labels=ids.copy(), segments=[length]))
notes, losses, grown = [], [], []

def address_space(field):  # bytes
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))

args = training_arguments(Path(sys.argv[1]), dtype="float32", seed=0, learning_rate=3e-3, scheduler="constant", warmup_steps=0,
    weight_decay=0.0, max_grad_norm=1.0, optimizer="adamw_torch_fused", max_steps=6, epochs=1, save_steps=1000, report_to=[],
    log_dir=Path(sys.argv[1]), use_cpu=True)

class Capped(StepTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.state.global_step + 1 != capped_step:
            return super().training_step(model, inputs, num_items_in_batch)
        now, before = address_space("VmSize"), resource.getrlimit(resource.RLIMIT_AS)
        if room:
            resource.setrlimit(resource.RLIMIT_AS, (now + room, before[1]))
        try:
            return super().training_step(model, inputs, num_items_in_batch)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)
            grown.append(address_space("VmPeak") - now)

trainer = Capped(model, args, engine=engine, train_dataset=rows, eval_dataset=None, effective_batch_size=8,
    policy=StepPolicy(100_000, "varlen", 0), on_log=lambda r: losses.append(r["loss"]), on_note=notes.append,
    save_extra=lambda p: None, fused=FusedLayers(model, torch.float32) if fused else None)
ended = "done"
try:
    trainer.train()
except CouldNotFinishError as error:
    ended = str(error)
print(json.dumps({"losses": losses, "notes": notes, "budget": trainer.policy.micro_batch_tokens, "ended": ended,
                  "grown": grown}))
"""

MIB = 2**20
# One arena: each further one would reserve 64 MiB of address space whenever its thread first allocates, which a cap counts.
ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}


@pytest.mark.parametrize("layers", ["fused", "plain"])
def test_a_capped_step_is_done_again_in_smaller_rows_and_nothing_is_lost(tmp_path, layers):
    free = run_python(TRAINER, tmp_path, 3, 0, layers, env=ONE_ARENA)
    assert free["notes"] == []
    (grown,) = free["grown"]  # by all eight sequences in one row
    capped = run_python(TRAINER, tmp_path, 3, grown * 6 // 10, layers, env=ONE_ARENA)
    assert capped["ended"] == "done"
    assert capped["notes"], "the cap was too wide to be felt"
    assert all(
        "out of memory with" in note and "effective batch stays" in note for note in capped["notes"]
    )
    assert capped["budget"] < 4000
    assert len(capped["losses"]) == len(free["losses"]) == 6
    for a, b in zip(free["losses"], capped["losses"], strict=True):
        assert abs(a - b) < 1e-5


def test_where_not_even_one_sequence_fits_it_says_so(tmp_path):
    ended = run_python(TRAINER, tmp_path, 3, 1 * MIB, "fused", env=ONE_ARENA)
    assert "out of memory on a single sequence of" in ended["ended"]
    assert "gradient_checkpointing" in ended["ended"]
    assert len(ended["losses"]) == 2
