"""The families on pretend cards, with Unsloth's CUDA code: rows against their sequences alone."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from fastft.bench.case import load_case
from tests.families import longrope, make_checkpoint

ROOT = Path(__file__).parents[2]
FAMILIES = ("llama", "mistral", "qwen3", "phi3", "gemma3")
pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


CHANGED = {"phi3": {"rope_parameters": longrope(), "original_max_position_embeddings": 32}}
"""Of the sequences, some have at most 32 tokens and some have more: both sets of frequencies."""


def gradients(folder, card, quantizations, *bases):
    done = subprocess.run(
        [sys.executable, "-m", "tests.twin.gradients", card, quantizations, *map(str, bases)],
        capture_output=True, text=True, timeout=800, cwd=ROOT,
        env={**os.environ, "UNSLOTH_COMPILE_LOCATION": str(folder / "compiled")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [
        json.loads(line.removeprefix("RESULT "))
        for line in done.stdout.splitlines()
        if line.startswith("RESULT ")
    ]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return [make_checkpoint(f, folder / f, **CHANGED.get(f, {})) for f in FAMILIES]


@pytest.fixture(scope="module")
def expected(bases, tmp_path_factory):
    found = gradients(tmp_path_factory.mktemp("none"), "none", "none,nf4", *bases)
    return {(row["checkpoint"], row["quantization"]): row["losses"] for row in found}


@pytest.mark.parametrize("card", ["t4", "a100"])
def test_rows_are_their_sequences_alone(card, bases, expected, tmp_path):
    found = gradients(tmp_path, card, "none,nf4", *bases)
    assert len(found) == 2 * len(FAMILIES)
    for row in found:
        family = Path(row["checkpoint"]).name
        # bfloat16 has 8 bits: what only pads the sequences is as far from them.
        rounding = row["rounding"] if card == "a100" else 0.0
        assert row["error"] < max(1e-6, 2 * rounding), (family, row["reason"])
        assert row["exact"], (family, row["reason"])
        assert row["mixed"] == []
        forced = family == "gemma3" and card == "t4"
        dtype = {"t4": "float32" if forced else "float16", "a100": "bfloat16"}[card]
        assert row["dtype"] == dtype
        # phi3 keeps whole logits, which the plan knows.
        assert (row["fused_loss_calls"] == 0) == (family == "phi3")
        plain = expected[row["checkpoint"], row["quantization"]]
        assert row["losses"] == pytest.approx(plain, rel=0.01), family
        assert plain[2] < plain[0]


def test_a_mixture_of_experts_trains_its_attention_alone(tmp_path):
    """On a GPU Unsloth would add LoRA to the experts; the count, the plan and the export know none."""
    base = make_checkpoint("gpt-oss", tmp_path / "base")
    (found,) = gradients(tmp_path, "t4", "none", base)
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


def test_the_check_for_a_real_card_runs_to_its_end(tmp_path):
    """tools/gpu_check.sh where every Python process has a pretend H100, in the interpreter: most of
    its parts are cut off at their limits, and what was found by then is there.
    """
    case = load_case("h100-llama3.2-1b-lora").model_dump(mode="json", exclude_none=True)
    case["model"] = load_case("smoke").model.model_dump(mode="json", exclude_none=True)
    case["model"]["config"] |= {"hidden_size": 64, "intermediate_size": 96}
    case |= {"lengths": {"fixed": 12}, "effective_batch_size": 2, "warmup_steps": 1, "steps": 2}
    tiny, results, seconds = tmp_path / "tiny.yaml", tmp_path / "results", 420
    tiny.write_text(yaml.safe_dump(case), encoding="utf-8")
    began = time.monotonic()
    done = subprocess.run(
        ["bash", "tools/gpu_check.sh", "-", str(results), str(tiny)],
        capture_output=True, text=True, timeout=seconds + 120, cwd=ROOT,
        env={
            **os.environ, "TWIN": "h100", "PYTHONPATH": str(ROOT / "tests" / "twin" / "start"),
            "PYTHON": sys.executable, "SELFTEST_MINUTES": "1.5", "TOTAL_SECONDS": str(seconds),
            "UNSLOTH_COMPILE_LOCATION": str(tmp_path / "compiled"),
        },
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stdout + done.stderr
    assert time.monotonic() - began < seconds + 60
    found = json.loads((results / "selftest.json").read_text())
    assert found["card"] == "NVIDIA H100 80GB HBM3"
    assert found["checks"][0]["name"] == "machine"
    assert (results / "selftest.md").is_file()
    files = [path for path in results.rglob("*") if path.is_file()]
    assert len(files) <= 8
    assert max(path.stat().st_size for path in files) < 16 * 2**20
