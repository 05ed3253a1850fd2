"""The families on pretend cards, with Unsloth's CUDA code: rows against their sequences alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.families import make_checkpoint

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


def gradients(folder, card, base, *quantizations):
    done = subprocess.run(
        [sys.executable, "-m", "tests.twin.gradients", card, str(base), *quantizations],
        capture_output=True, text=True, timeout=800, cwd=ROOT,
        env={**os.environ, "UNSLOTH_COMPILE_LOCATION": str(folder / "compiled")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [
        json.loads(line.removeprefix("RESULT "))
        for line in done.stdout.splitlines()
        if line.startswith("RESULT ")
    ]


@pytest.mark.parametrize("card", ["t4", "a100"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "phi3", "gemma3"])
def test_rows_are_their_sequences_alone(family, card, tmp_path):
    base = make_checkpoint(family, tmp_path / "base")
    for found in gradients(tmp_path, card, base, "none", "nf4"):
        assert found["error"] < 1e-6, found["reason"]
        assert found["exact"], found["reason"]
        assert found["mixed"] == []
        forced = family == "gemma3" and card == "t4"
        assert (
            found["dtype"] == {"t4": "float32" if forced else "float16", "a100": "bfloat16"}[card]
        )
        # phi3 keeps whole logits, which the plan knows.
        assert (found["fused_loss_calls"] == 0) == (family == "phi3")


def test_a_mixture_of_experts_trains_its_attention_alone(tmp_path):
    """On a GPU Unsloth would add LoRA to the experts; the count, the plan and the export know none."""
    base = make_checkpoint("gpt-oss", tmp_path / "base")
    (found,) = gradients(tmp_path, "t4", base, "none")
    assert found["trainable"] == 3584
    assert found["dtype"] == "float32"


ROPE = """
import json
from tests.twin import twin
twin.install("t4", interpret_rope=True)
import torch
import unsloth
from tests.twin import kernels
from unsloth.kernels.rope_embedding import _rope_launch
torch.manual_seed(0)
q, k = torch.randn(1, 4, 12, 16), torch.randn(1, 2, 12, 16)
cos, sin = torch.randn(64, 16), torch.randn(64, 16)
positions = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3], dtype=torch.int32)
worst = 0.0
for backward in (False, True):
    results = []
    for interpret in (True, False):
        out = [torch.zeros_like(q).to("cuda"), torch.zeros_like(k).to("cuda")]
        inputs = [t.to("cuda") for t in (q, k, cos, sin, positions)]
        def launch(kernel):
            if interpret:
                return kernel
            class Grid:
                def __getitem__(self, grid):
                    return kernels.rope
            return Grid()
        _rope_launch(inputs[0], out[0], inputs[1], out[1], inputs[2], inputs[3], inputs[4], True, backward, False, launch)
        results.append([t.cpu() for t in out])
    worst = max(worst, *((a - b).abs().max().item() for a, b in zip(*results)))
    norm = results[0][0].norm().item()
print(json.dumps([worst, norm]))
"""


def test_the_rope_that_stands_in_is_unsloths(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", ROPE], capture_output=True, text=True, timeout=300, cwd=ROOT,
        env={**os.environ, "UNSLOTH_COMPILE_LOCATION": str(tmp_path / "compiled")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    worst, norm = json.loads(done.stdout.strip().splitlines()[-1])
    assert worst < 1e-5
    assert norm > 1
