"""All families, both engines: the padding-free step is the padded one, training works, what is saved is what was trained."""

import json
import subprocess
import sys

import pytest

from tests.families import FAMILIES

HELD = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt-oss", "smollm3")
HELD += ("granite", "ministral3")


@pytest.fixture(scope="module", params=["stock", "unsloth"])
def examined(request, tmp_path_factory):
    command = [
        sys.executable,
        "-m",
        "tests.e2e.family_worker",
        request.param,
        str(tmp_path_factory.mktemp("families")),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_the_families_that_are_promised_are_there():
    assert set(HELD) <= set(FAMILIES)


@pytest.mark.parametrize("family", HELD)
def test_any_cut_of_a_step_gives_the_padded_gradient(examined, family):
    result = examined[family]
    assert result["known"]
    assert result["gradient_norm"] > 0.1
    assert result["exactness"] < 1e-5


@pytest.mark.parametrize("family", HELD)
def test_fused_layers_give_the_padded_gradient(examined, family):
    result = examined[family]
    assert result["fused"], "nothing was replaced"
    assert result["exactness_fused"] < 1e-5
    assert result["exactness_fused_padded"] < 1e-5


@pytest.mark.parametrize("family", HELD)
def test_thirty_fused_steps_give_the_losses_of_the_padded_ones(examined, family):
    assert examined[family]["trace_difference"] < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_lower_the_loss_of_a_repeated_batch(examined, family):
    losses = examined[family]["losses"]
    assert losses[0] > losses[10] > losses[29]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reloaded_adapter_gives_the_same_logits(examined, family):
    assert examined[family]["reload_difference"] < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_attention_is_put_back(examined, family):
    assert examined[family]["attention_after"] in {"sdpa", "eager"}
