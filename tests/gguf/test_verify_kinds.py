"""Certificates of the other kinds of export, and the choice of a type within a KL budget."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from fastft.errors import AnswerIsNoError, CouldNotFinishError, FastFTError
from fastft.exporting.certificate import LIMITS, judge_distance, limits_for
from fastft.exporting.gguf import export_gguf
from fastft.exporting.gguf.lora import export_gguf_lora
from fastft.exporting.merged import export_merged
from fastft.exporting.ollama import write_modelfile
from fastft.verification.checks import check_weights_in_any_form
from fastft.verification.choose import choose_quantization, smallest
from fastft.verification.reference import rotary_rows
from fastft.verification.verify import kind_of, verify_files
from tests.families import make_checkpoint

SAMPLES = [
    "The quick brown fox. 東京は日本の首都です。",
    "def main(argument):\n    return argument + 1",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A base whose rows K-quants can hold, and an adapter (rank-stabilised, so that the scale matters)."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("kinds")
    base = make_checkpoint("llama", folder / "base", hidden_size=256)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules="all-linear")
    )
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    model.save_pretrained(folder / "final")
    AutoTokenizer.from_pretrained(base).save_pretrained(folder / "final")
    return folder, base, folder / "final"


@pytest.fixture(scope="module")
def findings(trained):
    from transformers import AutoTokenizer

    folder, base, adapter = trained
    out = folder / "export"
    export_merged(base, adapter, out / "merged")
    quantised = Path(export_gguf(base, out, ["q4_k_m"], adapter=adapter, name="model")[0]["path"])
    files = {
        "adapter": adapter,
        "merged": out / "merged",
        "gguf": quantised,
        "gguf-lora": Path(export_gguf_lora(base, adapter, out / "model.lora.gguf")["path"]),
        "ollama": write_modelfile(out, quantised, AutoTokenizer.from_pretrained(adapter)),
        "forgotten": Path(
            export_gguf(base, folder, ["f32"], name="base")[0]["path"]
        ),  # the base without the adapter
    }
    result = verify_files(
        list(files.values()),
        base=base,
        adapter=adapter,
        samples=SAMPLES,
        out=out,
        base_gguf=files["forgotten"],
    )
    return out, files, dict(zip(files, result["files"], strict=True))


@pytest.mark.parametrize("kind", ["adapter", "merged", "gguf", "gguf-lora", "ollama"])
def test_a_sound_export_passes(findings, kind):
    entry = findings[2][kind]
    assert entry["kind"] == kind
    assert entry["verdict"] == "pass", entry["checks"]


@pytest.mark.parametrize("kind", ["adapter", "merged", "gguf-lora"])
def test_exact_exports_are_exact(findings, kind):
    assert findings[2][kind]["kl_mean"] < 1e-6


def test_a_file_without_the_adapter_fails(findings):
    entry = findings[2]["forgotten"]
    assert entry["verdict"] == "fail"
    failed = {
        check["name"]: check["detail"] for check in entry["checks"] if check["verdict"] == "fail"
    }
    assert "is another weight than the trained one" in failed["weights"]
    assert {"weights", "distance"} <= set(failed)


def test_the_certificate_says_what_it_compared(findings):
    written = json.loads((findings[0] / "certificate.json").read_text(encoding="utf-8"))
    assert written["reference"]["compute"] == "float32 on cpu"
    assert "2 held-out samples" in written["reference"]["samples"]
    assert written["limits"]["q4_k_m"]["kl_pass"] == LIMITS["q4_k_m"].kl_pass


def test_what_cannot_be_checked_is_said(trained, tmp_path):
    folder, base, adapter = trained
    with pytest.raises(FastFTError, match="neither adapter_config"):
        kind_of(tmp_path)
    with pytest.raises(FastFTError, match="checked on a GGUF of its base"):
        verify_files(
            [folder / "export" / "model.lora.gguf"], base=base, adapter=adapter, out=tmp_path
        )
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(CouldNotFinishError, match="the trained model could not be run"):
        verify_files([tmp_path / "x.gguf"], base=tmp_path / "nowhere", out=tmp_path)


@pytest.mark.long
def test_the_smallest_type_within_the_budget_is_chosen(trained, tmp_path):
    _, base, adapter = trained
    types = ("q2_k", "q4_k_m", "q8_0")
    common = {"samples": SAMPLES, "out": tmp_path, "candidates": types, "name": "model"}
    choice = choose_quantization(base, adapter, max_kl=1e-3, **common)
    kls = {t["type"]: t["kl_mean"] for t in choice["tried"]}
    assert choice["chosen"] == "q8_0", kls
    assert kls["q8_0"] <= 1e-3 < kls["q4_k_m"]
    assert [p.name for p in tmp_path.iterdir()] == ["model.Q8_0.gguf"]
    with pytest.raises(AnswerIsNoError, match="no type keeps the mean KL within 1e-09"):
        choose_quantization(base, adapter, max_kl=1e-9, **common)


def test_bisection_finds_the_first_that_holds():
    for first in range(8):
        asked = []
        found = smallest(
            "abcdefg",
            lambda c, first=first, asked=asked: asked.append(c) or "abcdefg".index(c) >= first,
        )
        assert found == ("abcdefg"[first] if first < 7 else None)
        assert len(asked) <= 3


def test_limits_judge_kl_and_perplexity():
    good = {"kl_mean": 0.01, "kl_p99": 0.1, "top1": 0.99, "ppl_ratio": 1.01, "positions": 1000}
    assert judge_distance(good, "q4_k_m").verdict == "pass"
    assert judge_distance(good, "f32").verdict == "fail"
    assert judge_distance(good | {"kl_mean": 0.3}, "q4_k_m").verdict == "warn"
    assert judge_distance(good | {"ppl_ratio": 3.0}, "q4_k_m").verdict == "fail"
    assert judge_distance(good | {"kl_mean": float("nan")}, "q2_k").verdict == "fail"
    assert limits_for("q4_1") in LIMITS.values()
    assert all(limits.kl_pass < limits.kl_fail for limits in LIMITS.values())


def test_the_weights_of_a_family_without_a_row_are_compared_in_any_known_form(tmp_path):
    generator = np.random.default_rng(0)
    weights = {
        "model.layers.0.self_attn.q_proj.weight": generator.normal(size=(32, 8)),
        "model.layers.0.input_layernorm.weight": generator.normal(size=8),
        "model.layers.0.mlp.up_proj.weight": generator.normal(size=(16, 8)),
    }
    weights = {name: value.astype(np.float32) for name, value in weights.items()}
    rows = {f"{name}#rows": np.arange(len(value)) for name, value in weights.items()}
    np.savez(tmp_path / "weights.npz", **weights, **rows)
    config = {"model_type": "olmo2", "num_attention_heads": 4, "num_key_value_heads": 4}
    shapes = {name: list(value.shape) for name, value in weights.items()}
    reference = {"folder": tmp_path, "config": config, "tensors": shapes}
    names = dict(zip(("q", "norm", "up"), weights, strict=True))

    def verdict(**changes):
        q, norm, up = weights.values()
        held = {"q": q[rotary_rows(32, 4)], "norm": norm + 1, "up": up} | changes
        tensors = [
            SimpleNamespace(
                name=name,
                data=data,
                shape=np.array(data.shape[::-1]),
                tensor_type=GGMLQuantizationType.F32,
            )
            for name, data in held.items()
        ]
        found = check_weights_in_any_form(SimpleNamespace(tensors=tensors), reference, names)
        return found.verdict, found.detail

    assert verdict() == ("pass", "3 tensors, each in a known form")
    assert verdict(q=next(iter(weights.values())))[0] == "pass"
    for name, wrong in (("up", list(weights.values())[2][::-1].copy()), ("norm", np.ones(8, "f4"))):
        assert verdict(**{name: wrong}) == (
            "warn",
            f"1 of 3 tensors are in a form that is not known: {name}",
        )
