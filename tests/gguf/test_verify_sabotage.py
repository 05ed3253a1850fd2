"""Files that are wrong in one way each: the certificate fails them and names what is wrong."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastft.exporting.certificate import certified
from fastft.exporting.gguf import export_gguf
from fastft.verification.reference import rotary_rows
from fastft.verification.verify import verify_files
from tests.families import FAMILIES, make_checkpoint
from tests.gguf.files import with_fields, with_tensor

# An end token that llama.cpp does not know by its name, so that the file itself must say what ends an answer.
ENDING = replace(
    FAMILIES["llama"],
    eos="<|fin|>",
    chat_template=FAMILIES["llama"].chat_template.replace("<|im_end|>", "<|fin|>"),
    specials=("<|im_start|>",),
)
PROMPT = [{"role": "user", "content": "Hello"}]
SAMPLES = [
    [*PROMPT, {"role": "assistant", "content": "The quick brown fox. 東京は日本の首都です。"}],
    "def main(argument):\n    return argument + 1  # two spaces",
]


def teach_to_end(folder, after: int = 3) -> None:
    """Change the output layer so that the greedy answer to PROMPT ends after at most `after` tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer.apply_chat_template(
        PROMPT, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        made = model.generate(**ids, max_new_tokens=after, do_sample=False)
        state = model(made, output_hidden_states=True).hidden_states[-1][0, -1]
        best = model.lm_head(state).max()
        model.lm_head.weight[tokenizer.eos_token_id] = state / state.square().sum() * (best + 5)
    model.save_pretrained(folder)


def sabotage(good: Path, folder: Path) -> dict[str, Path]:
    template = ENDING.chat_template
    q = "blk.0.attn_q.weight"
    back = np.argsort(rotary_rows(64, 4))
    files = {
        "permutation": with_tensor(good, folder / "permutation.gguf", q, lambda w: w[back]),
        "zeroed": with_tensor(good, folder / "zeroed.gguf", "blk.1.ffn_down.weight", np.zeros_like),
        "template": with_fields(
            good,
            folder / "template.gguf",
            tokenizer__chat_template=template.replace(
                "message['role'] +", "'the ' + message['role'] +", 1
            ),
        ),
        "second-bos": with_fields(
            good, folder / "second-bos.gguf", tokenizer__chat_template="{{ bos_token }}" + template
        ),
        "no-bos": with_fields(good, folder / "no-bos.gguf", tokenizer__ggml__add_bos_token=False),
        "end": with_fields(
            good,
            folder / "end.gguf",
            tokenizer__ggml__eos_token_id=5,
            tokenizer__ggml__eot_token_id=None,
        ),
        "pre": with_fields(good, folder / "pre.gguf", tokenizer__ggml__pre="deepseek-llm"),
        "crash": with_fields(
            good, folder / "crash.gguf", llama__attention__layer_norm_rms_epsilon=-1.0
        ),
        "truncated": folder / "truncated.gguf",
    }
    data = good.read_bytes()
    files["truncated"].write_bytes(data[: len(data) * 2 // 3])
    return files


@pytest.fixture(scope="module")
def findings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sabotage")
    FAMILIES["ending"] = ENDING
    try:
        base = make_checkpoint("ending", folder / "base")
    finally:
        del FAMILIES["ending"]
    teach_to_end(base)
    good = Path(export_gguf(base, folder, ["f32"], name="good")[0]["path"])
    files = {"good": good} | sabotage(good, folder)
    result = verify_files(
        list(files.values()), base=base, samples=SAMPLES, out=folder, max_new_tokens=16
    )
    return folder, files, dict(zip(files, result["files"], strict=True))


def failed(entry):
    return {
        check["name"]: check["detail"] for check in entry["checks"] if check["verdict"] == "fail"
    }


def test_the_untouched_file_passes(findings):
    entry = findings[2]["good"]
    assert entry["verdict"] == "pass", entry["checks"]
    assert entry["kl_mean"] < 1e-6
    assert entry["top1"] == 1.0
    generation = next(check for check in entry["checks"] if check["name"] == "generation")
    assert generation["detail"].startswith("1 of 1 greedy answers end")


@pytest.mark.parametrize(
    ("what", "check", "words"),
    [
        ("permutation", "weights", ["blk.0.attn_q.weight", "permutation of q and k"]),
        ("zeroed", "weights", ["blk.1.ffn_down.weight", "all zeros"]),
        ("template", "template", ["the file renders", "<|im_start|>user"]),
        ("second-bos", "bos", ["a conversation begins with 2 BOS tokens instead of 1"]),
        ("no-bos", "bos", ["a plain text begins with 0 BOS tokens instead of 1"]),
        ("end", "end", ["would not stop at <|fin|>"]),
        ("end", "generation", ["endless generation: 0 of 1"]),
        ("pre", "tokens", ["split differently", "pre-tokenizer deepseek-llm"]),
        ("crash", "distance", ["SIGABRT", "eps"]),
        ("truncated", "load", ["not within the file bounds"]),
    ],
)
def test_each_fault_fails_and_is_named(findings, what, check, words):
    entry = findings[2][what]
    assert entry["verdict"] == "fail"
    assert check in failed(entry), entry["checks"]
    for word in words:
        assert word in failed(entry)[check]


@pytest.mark.parametrize("what", ["template", "second-bos", "no-bos", "end", "pre"])
def test_a_fault_in_the_metadata_does_not_accuse_the_weights(findings, what):
    assert not {"tensors", "weights", "distance"} & set(failed(findings[2][what]))


def test_the_certificate_is_keyed_by_content(findings):
    folder, files, entries = findings
    written = json.loads((folder / "certificate.json").read_text(encoding="utf-8"))
    assert written["files"]["good.F32.gguf"]["sha256"] == entries["good"]["sha256"]
    assert "| zeroed.gguf | **fail** |" in (folder / "certificate.md").read_text(encoding="utf-8")
    assert certified(files["good"])["verdict"] == "pass"
    with files["pre"].open("ab") as file:
        file.write(b"\0")
    assert certified(files["pre"]) is None


def test_no_work_is_left_behind(findings):
    assert not list(findings[0].glob(".verify-*"))
    assert not list(findings[0].glob(".writing-*"))
