"""The check of rows without padding inside a real session of `fastft train`, with both engines."""

import pytest

from tests.e2e.conftest import run_python

SESSION = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from fastft.config import make_config
from fastft.hardware import probe
from fastft.progress import Reporter
from fastft.training.session import Session
base, folder, engine, dtype = sys.argv[1:]
data = Path(folder) / "data.jsonl"
data.write_text("\\n".join(json.dumps({"prompt": f"Count to {i}.", "completion": " ".join(map(str, range(i)))}) for i in range(1, 30)))
config = make_config({"project": "checked", "output_dir": folder, "model": {"name": base, "engine": engine, "dtype": dtype, "max_seq_length": 128},
    "data": {"source": str(data), "eval_fraction": 0}, "lora": {"dropout": 0.1}}, where="here")
session = Session(config, probe(Path(folder)), report=Reporter(quiet=True))
opened = session.open()
prepared = session.prepare(opened, session.read_data(opened))
found = session.check_rows(prepared, "varlen")
print(json.dumps(asdict(found) | {"exact": found.exact, "reason": found.reason, "rows": prepared.rows}))
"""


FLOAT16 = """
import json, sys
import fastft.engines.unsloth as unsloth_engine
import torch
import torch.nn.functional as F
from unsloth_zoo.fused_losses.cross_entropy_loss import unsloth_fused_ce_loss
from fastft.data.batches import Segment
from fastft.training.step import Stepper, StepPolicy

class Head(torch.nn.Module):
    \"\"\"The end of a model on a T4: float16 hidden states into Unsloth's fused loss, which asks for the scale as theirs do.\"\"\"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.hidden = torch.nn.Parameter(torch.randn(1, 256, 64).half())
        self.head = (torch.randn(4000, 64) * 0.05).half()
    def forward(self, input_ids, labels, num_items_in_batch, **ignored):
        loss = unsloth_fused_ce_loss(trainer=None, hidden_states=self.hidden, lm_head_weight=self.head, lm_head_bias=None, labels=labels,
            mask=None, n_items=num_items_in_batch * 1000, scaling=getattr(self, "accelerator_scaler", None), target_gb=None,
            torch_compile=False, shift_labels=True)
        return type("Output", (), {"loss": loss})

model = Head()
ids = torch.randint(0, 4000, (256,)).numpy()
labels = ids.copy(); labels[0] = -100
exact = model.hidden.detach().double().requires_grad_()
(F.cross_entropy((exact[0] @ model.head.double().T)[:-1], torch.tensor(ids[1:]), reduction="sum") / 255000).backward()
errors = []
for scale in (65536.0, None):
    step = Stepper(model, unsloth_engine.ENGINE, StepPolicy(1000, "padded", 0), device="cpu", on_note=print, scale=scale)
    model.zero_grad()
    import contextlib
    step.gradient(model, [Segment(ids, labels)], lambda loss: (loss * 65536.0).backward(), contextlib.nullcontext)
    found = model.hidden.grad.double() / 65536.0
    errors.append(float((found - exact.grad).norm() / exact.grad.norm()))
print(json.dumps(errors))
"""


def test_the_loss_scale_reaches_unsloths_fused_loss():
    told, untold = run_python(FLOAT16)
    assert told < 2e-3
    assert untold > 10 * told


@pytest.mark.parametrize(("engine", "dtype"), [("unsloth", "bfloat16"), ("stock", "float32")])
def test_the_first_step_is_looked_at_in_the_precision_of_the_run(
    checkpoint_of, tmp_path, engine, dtype
):
    found = run_python(SESSION, checkpoint_of("llama"), tmp_path, engine, dtype)
    assert found["rows"] == "varlen"
    assert found["exact"], found["reason"]
    assert found["sequences"] >= 2
    assert found["leak"] > 0.01
    assert found["error"] < (1e-9 if dtype == "float32" else 1e-3)
