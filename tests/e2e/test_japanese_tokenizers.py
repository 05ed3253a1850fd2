"""The kinds of tokenizers that Japanese bases use, each through data, training, GGUF and certificate."""

import json

import pytest

from tests.e2e.conftest import fastft
from tests.families import make_checkpoint

ROWS = [
    ("日本の首都は?", "東京は日本の首都です。"),
    ("天気はどう?", "今日はとても良い天気ですね。"),
    ("名前は?", "名前はまだ無い。"),
    ("What is the capital of Bavoria?", "The capital of Bavoria is Lindmark."),
] * 8
# kind: (family, config, verdicts of the GGUF file that are right)
KINDS = {
    "unigram": ("mistral", {"sliding_window": None}),  # LLM-jp, Sarashina
    "unigram-metaspace": (
        "mistral",
        {"sliding_window": None},
    ),  # the same, converted by transformers
    "unigram-nfkc": ("mistral", {"sliding_window": None}),  # rinna's GPT-NeoX, Stockmark
    "unigram-nobytes": ("mistral", {"sliding_window": None}),  # rinna's GPT-2
    "spm": ("mistral", {"sliding_window": None}),  # Llama 2, Swallow
    "spm-added": ("mistral", {"sliding_window": None, "tokenizer_model": False}),  # ELYZA fast
    "gemma": ("gemma2", {}),  # SentencePiece BPE without a space in front
    "llama3": ("llama", {}),  # Llama 3 ELYZA and Swallow
    "llama3-added": ("llama", {}),
    "qwen2": ("qwen2", {}),  # Qwen-based: rinna's Nekomata and Bakeneko
}


NOT_YET = pytest.mark.xfail(
    strict=True,
    reason="llama.cpp splits hard texts, and a special token's text inside a message, otherwise "
    "than these Unigrams of 560 pieces; the certificate refuses the file",
)
VERDICTS = {"spm-added": "warn"}  # spaces beside a special token, a known limit of llama.cpp


@pytest.mark.long
@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=NOT_YET if k.startswith("unigram") else ()) for k in KINDS]
)
def test_a_run_in_japanese_ends_in_a_gguf_file_that_passes(kind, tmp_path):
    family, config = KINDS[kind]
    base = make_checkpoint(family, tmp_path / "base", tokenizer=kind, **config)
    lines = [json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in ROWS]
    (tmp_path / "data.jsonl").write_text("".join(lines), encoding="utf-8")
    values = {
        "project": "ja",
        "output_dir": str(tmp_path / "runs"),
        "model": {"name": str(base), "max_seq_length": 128, "engine": "stock", "dtype": "float32"},
        "data": {"source": str(tmp_path / "data.jsonl"), "eval_fraction": 0.1},
        "train": {"max_steps": 3, "effective_batch_size": 4, "eval_steps": 3},
        "export": {"to": ["gguf:f32"]},
    }
    (tmp_path / "ja.yaml").write_text(json.dumps(values))
    done = fastft("train", tmp_path / "ja.yaml", "--json")
    assert done.code == 0, done.err
    certificate = json.loads((tmp_path / "runs/ja/export/certificate.json").read_text())
    (file,) = (file for file in certificate["files"].values() if file["kind"] == "gguf")
    others = [check for check in file["checks"] if check["verdict"] != "pass"]
    assert file["verdict"] == VERDICTS.get(kind, "pass"), others
