"""The streaming GGUF writer against the upstream converter, transformers and llama.cpp's own quantiser."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastft.errors import FastFTError
from fastft.exporting import gguf
from fastft.exporting.gguf import export_gguf, llama_job, upstream
from fastft.exporting.gguf.architectures import Unsupported, describe
from fastft.exporting.gguf.llama_quantize import quantize_file
from fastft.exporting.gguf.quantize import FILE_TYPES
from fastft.exporting.merged import export_merged
from fastft.exporting.weights import Weights
from fastft.files import ours
from tests.families import LLAMA3_ROPE, longrope, make_checkpoint
from tests.gguf.oracle import convert_upstream, hf_logits, kl, llama_cpp_logits, metadata, tensors
from tests.unit.test_export_weights import load, train_adapter

LINEAR_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
# name: (family, splitting rule, config)
CASES = {
    "llama": (
        "llama",
        "llama-bpe",
        {
            "rope_parameters": LLAMA3_ROPE,
            "attention_bias": True,
            "dtype": "bfloat16",
            "shard_bytes": 60_000,
        },
    ),
    "llama-tied": ("llama", "llama-bpe", {"tie_word_embeddings": True}),
    "llama2": ("llama", "default", {"tokenizer": "spm", "vocab_size": 700}),
    "mistral": ("mistral", "default", {"sliding_window": None, "dtype": "bfloat16"}),
    "qwen2": ("qwen2", "qwen2", {"dtype": "float16"}),
    "qwen2-untied": ("qwen2", "qwen2", {"tie_word_embeddings": False, "vocab_size": 480}),
    "qwen3": ("qwen3", "qwen2", {"dtype": "bfloat16"}),
    "smollm3": (
        "smollm3",
        "llama-bpe",
        {"dtype": "bfloat16", "no_rope_layers": None, "no_rope_layer_interval": 4},
    ),
    "granite": ("granite", "llama-bpe", {"dtype": "bfloat16"}),
    "ministral3": ("ministral3", "llama-bpe", {"dtype": "bfloat16"}),
    "gemma2": ("gemma2", "default", {"dtype": "bfloat16"}),
    "gemma3": ("gemma3", "default", {"rope_parameters": LINEAR_ROPE}),
    "phi3": ("phi3", "default", {"sliding_window": None, "dtype": "bfloat16"}),
    "qwen3-moe": ("qwen3-moe", "qwen2", {"dtype": "bfloat16"}),
    "gpt-oss": ("gpt-oss", "gpt-4o", {"dtype": "bfloat16"}),
    "gemma4": ("gemma4", "gemma4", {"dtype": "bfloat16", "final_logit_softcapping": 30.0}),
    "phi3-longrope": (
        "phi3",
        "default",
        {
            # llama.cpp takes the long factors from the context's size, which is a multiple of 256
            "rope_parameters": longrope(factor=2.0) | {"original_max_position_embeddings": 256},
            "original_max_position_embeddings": 256,
            "sliding_window": None,
            "tie_word_embeddings": True,
        },
    ),
}
TEXT = "The capital of Bavoria is Lindmark. 東京は日本の首都です。 def main(x):\n    return 12"
# Upstream guesses a name and a size from the folder; what it says about the tokenizer twice we say once.
OURS_ALONE = {
    "general.quantized_by": "fastft knows its own files by it",
    "tokenizer.ggml.add_bos_token": "always said, so that BOS comes exactly once whatever llama.cpp's default is",
    "tokenizer.ggml.add_eos_token": "always said",
    "tokenizer.ggml.eot_token_id": "the token that ends a turn, so that generation ends",
    "tokenizer.ggml.eom_token_id": "a second token that ends generation",
    "tokenizer.ggml.unknown_token_id": "the tokenizer has one",
    "gemma3.attention.sliding_window_pattern": "layer types that are not Gemma's own",
    "tokenizer.ggml.pre": "the rule of Gemma 4, which llama.cpp takes for it anyway",
}
THEIRS_ALONE = {
    "general.size_label": "a label for leader boards",
    "general.sampling.temp": "sampling advice",
    "tokenizer.ggml.add_sep_token": "no separator is ever added",
    "phi3.rope.scaling.type": "never read where the factors are tensors",
}


# Upstream takes the marks of a turn for plain text where special_tokens_map names them nowhere.
OTHERWISE = {"gemma4": {"tokenizer.ggml.token_type"}}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """Every case's checkpoint, and upstream's f32 and f16 files of it."""
    home = tmp_path_factory.mktemp("families")
    jobs = []
    for name, (family, pre, config) in CASES.items():
        folder = make_checkpoint(family, home / name, **config)
        jobs += [(folder, home / f"{name}.{kind}.gguf", kind, pre) for kind in ("f32", "f16")]
    convert_upstream(jobs)
    return home


@pytest.mark.parametrize("case", CASES)
def test_f32_and_f16_files_are_upstreams(case, checkpoints, tmp_path):
    records = export_gguf(checkpoints / case, tmp_path, ["f32", "f16"])
    for record, kind in zip(records, ("f32", "f16"), strict=True):
        ours, theirs = tensors(Path(record["path"])), tensors(checkpoints / f"{case}.{kind}.gguf")
        assert set(ours) == set(theirs)
        for name, expected in theirs.items():
            assert ours[name][:2] == expected[:2], name
            assert ours[name][2] == expected[2], name
        planned = {name: (t["type"], tuple(t["shape"])) for name, t in record["tensors"].items()}
        assert planned == {name: t[:2] for name, t in ours.items()}
        assert record["bytes"] == Path(record["path"]).stat().st_size
        assert record["writer"] == "streaming"
    ours, theirs = metadata(Path(records[1]["path"])), metadata(checkpoints / f"{case}.f16.gguf")
    assert {k for k in ours if k not in theirs} <= set(OURS_ALONE)
    assert {k for k in theirs if k not in ours} <= set(THEIRS_ALONE)
    different = {k for k in ours if k in theirs and ours[k] != theirs[k] and k != "general.name"}
    different -= OTHERWISE.get(case, set())
    assert not different, {k: (ours[k], theirs[k]) for k in different if "tokens" not in k}


@pytest.mark.parametrize("case", CASES)
def test_f32_logits_are_transformers(case, checkpoints, tmp_path):
    record = export_gguf(checkpoints / case, tmp_path, ["f32"])[0]
    ids = [i % 440 for i in range(3, 500, 9)]
    expected = hf_logits(load(checkpoints / case), ids)
    got = llama_cpp_logits(Path(record["path"]), ids)
    limit = 1e-5 if case.startswith("gemma") else 1e-6  # ggml's GELU is a table of 16-bit values
    assert kl(expected, got) < limit
    assert (
        kl(expected, torch.roll(expected, 1, 0)) > 1e-2
    )  # positions differ, so agreement says something


@pytest.mark.parametrize("case", ["llama", "llama2", "mistral", "qwen3", "gemma3", "phi3"])
def test_token_ids_are_transformers(case, checkpoints, tmp_path):
    from transformers import AutoTokenizer

    from fastft.inference.llamacpp import open_gguf

    record = export_gguf(checkpoints / case, tmp_path, ["f16"])[0]
    tokenizer = AutoTokenizer.from_pretrained(checkpoints / case)
    special = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi  there\n"}], tokenize=False
    )
    with open_gguf(record["path"], n_ctx=64) as model:
        for text in (TEXT, "a  b   c\r\n\n\td", "吾輩は猫。😀👩‍👩‍👧", "12345 don't WE'LL"):
            assert model.tokens(text, parse_special=False) == tokenizer(text).input_ids
        expected = tokenizer(special, add_special_tokens=False).input_ids
        assert model.tokens(special, add_special=False) == expected


def test_a_spm_tokenizer_without_its_model_file_has_scores_that_give_the_same_ids(
    checkpoints, tmp_path
):
    from transformers import AutoTokenizer

    from fastft.inference.llamacpp import open_gguf

    folder = make_checkpoint("mistral", tmp_path / "base", tokenizer_model=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with open_gguf(export_gguf(folder, tmp_path, ["f16"])[0]["path"], n_ctx=64) as model:
        for text in (
            TEXT,
            "a  b   c\n\n d",
            "吾輩は猫である。名前はまだ無い",
            "the quick brown fox jumps 😀",
        ):
            assert model.tokens(text, parse_special=False) == tokenizer(text).input_ids


@pytest.mark.parametrize("family", ["llama", pytest.param("qwen3", marks=pytest.mark.long)])
def test_every_type_is_llama_cpps_byte_for_byte(family, tmp_path):
    shape = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 3}
    base = make_checkpoint(family, tmp_path / "base", dtype="bfloat16", **shape)
    generator = torch.Generator().manual_seed(0)
    source = Path(export_gguf(base, tmp_path / "source.gguf", ["bf16"])[0]["path"])
    columns = {
        name: t["shape"][-1]
        for name, t in export_gguf(base, tmp_path, ["f32"])[0]["tensors"].items()
    }
    imatrix = {
        name: (torch.rand(columns[name], generator=generator) + 0.01).numpy()
        for name in columns
        if "blk" in name
    }
    plain = [
        t
        for t in FILE_TYPES
        if t not in {"f32", "f16", "bf16"} and not t.startswith(("iq2", "iq3_x"))
    ]
    for types, weights in (
        (plain, None),
        (
            [
                "q4_k_m",
                "iq4_xs",
                "q2_k",
                "iq3_xs",
                "iq3_xxs",
                "iq2_xxs",
                "iq2_xs",
                "iq2_s",
                "iq2_m",
            ],
            imatrix,
        ),
    ):
        out = tmp_path / ("with" if weights else "without")
        records = export_gguf(base, out, types, imatrix=weights, name="m")
        saved = str(out / "imatrix.npz") if weights else None
        if weights:
            np.savez(saved, **weights)
        for kind, record in zip(types, records, strict=True):
            assert record["writer"] == "streaming"
            theirs = out / f"theirs-{kind}.gguf"
            done = list(
                llama_job.quantize(str(source), str(theirs), FILE_TYPES[kind], 1, saved, 2**28)
            )
            assert not done[0]["failed"]
            assert tensors(Path(record["path"])) == tensors(theirs), kind
            assert (
                metadata(Path(record["path"]))["general.file_type"]
                == metadata(theirs)["general.file_type"]
            )


def test_row_lengths_that_k_quants_cannot_hold_fall_back_as_llama_cpp_does(tmp_path):
    base = make_checkpoint("llama", tmp_path / "base", dtype="bfloat16")  # rows of 64 and 128
    source = Path(export_gguf(base, tmp_path / "source.gguf", ["bf16"])[0]["path"])
    record = export_gguf(base, tmp_path, ["q4_k_m"], name="m")[0]
    quantize_file(source, tmp_path / "theirs.gguf", "q4_k_m")
    assert tensors(Path(record["path"])) == tensors(tmp_path / "theirs.gguf")
    assert record["tensors"]["blk.0.attn_q.weight"]["type"] == "q5_0"


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_an_adapter_is_added_in_the_same_pass(family, tmp_path):
    base = make_checkpoint(family, tmp_path / "base")
    lora = {
        "rank_pattern": {"k_proj": 2},
        "alpha_pattern": {"k_proj": 5, "down_proj": 1},
        "use_rslora": True,
    }
    trained = train_adapter(base, tmp_path / "adapter", target_modules="all-linear", **lora)
    export_merged(base, tmp_path / "adapter", tmp_path / "merged", dtype="float32")
    once = export_gguf(base, tmp_path / "once.gguf", ["f32"], adapter=tmp_path / "adapter")[0]
    twice = export_gguf(tmp_path / "merged", tmp_path / "twice.gguf", ["f32"])[0]
    assert once["tensors"] == twice["tensors"]
    ids = [i % 440 for i in range(5, 400, 11)]
    expected = hf_logits(trained, ids)
    assert kl(expected, llama_cpp_logits(Path(once["path"]), ids)) < (
        1e-5 if family == "gemma3" else 1e-6
    )
    assert kl(expected, hf_logits(load(base), ids)) > 1e-2


def test_the_end_of_a_turn_is_an_end_of_generation(tmp_path):
    from fastft.inference.llamacpp import open_gguf

    base = make_checkpoint("llama", tmp_path / "base")
    path = base / "generation_config.json"
    path.write_text("{}")  # only the template says it
    template = (base / "chat_template.jinja").read_text()
    (base / "chat_template.jinja").write_text(template.replace("<|im_end|>", "<|pad|>"))
    with open_gguf(export_gguf(base, tmp_path, ["f16"])[0]["path"], n_ctx=64) as model:
        turn_end = model.tokens("<|pad|>", add_special=False)
        assert len(turn_end) == 1
        assert model.ends(turn_end[0])
        assert model.ends(model.eos)
        assert not model.ends(65)


def test_what_is_not_known_is_not_guessed(tmp_path):
    base = make_checkpoint("llama", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    changes = {
        "rope type yarn": {
            "rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}
        },
        "activation gelu": {"hidden_act": "gelu"},
        "fields that are not known.*residual_multiplier": {"residual_multiplier": 0.5},
        "architecture LlamaForSequenceClassification": {
            "architectures": ["LlamaForSequenceClassification"]
        },
        "missing: \\['model.layers.2": {"num_hidden_layers": 3},
        "unknown: \\['model.layers.1": {"num_hidden_layers": 1},
    }
    for words, change in changes.items():
        (base / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(Unsupported, match=words):
            describe(Weights(base))
    gemma = make_checkpoint("gemma2", tmp_path / "gemma", query_pre_attn_scalar=24)
    with pytest.raises(Unsupported, match=r"query_pre_attn_scalar 24: llama\.cpp divides by 16"):
        describe(Weights(gemma))


def test_an_unknown_architecture_goes_through_the_upstream_converter(tmp_path, monkeypatch):
    from tests.sdist import llama_cpp_sdist

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # the converter as `upstream_folder` would have fetched it, without fetching it again
    monkeypatch.setattr(
        upstream, "upstream_folder", lambda: llama_cpp_sdist() / "vendor" / "llama.cpp"
    )
    base = make_checkpoint("olmo2", tmp_path / "base")
    trained = train_adapter(base, tmp_path / "adapter", target_modules="all-linear")
    said: list[str] = []
    out = tmp_path / "out"
    records = export_gguf(
        base, out, ["f32", "q8_0"], adapter=tmp_path / "adapter", say=said.append, name="m"
    )
    assert "Olmo2ForCausalLM" in said[0]
    assert {r["writer"] for r in records} == {"upstream"}
    assert sorted(p.name for p in out.iterdir()) == ["m.F32.gguf", "m.Q8_0.gguf"]
    assert all(map(ours.is_ours, out.iterdir()))  # so a second export may replace them
    # this tokenizer has no BOS; where the file does not say so, llama.cpp adds one
    assert metadata(out / "m.F32.gguf")["tokenizer.ggml.add_bos_token"] is False
    ids = [i % 440 for i in range(5, 400, 11)]
    expected = hf_logits(trained, ids)
    assert kl(expected, llama_cpp_logits(Path(records[0]["path"]), ids)) < 1e-6
    assert kl(expected, llama_cpp_logits(Path(records[1]["path"]), ids)) < 1e-2


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize("kind", ["unigram", pytest.param("spm", marks=pytest.mark.long)])
def test_upstreams_file_has_the_tokenizer_that_no_tokenizer_model_is_left_of(
    kind, tmp_path, monkeypatch
):
    """transformers saves no tokenizer.model; upstream then makes up scores, or reads a Unigram as BPE."""
    from transformers import AutoTokenizer

    from fastft.inference.llamacpp import open_gguf
    from tests.families import SENTENCES
    from tests.sdist import llama_cpp_sdist

    monkeypatch.setattr(
        upstream, "upstream_folder", lambda: llama_cpp_sdist() / "vendor" / "llama.cpp"
    )
    base = make_checkpoint(
        "mistral",
        tmp_path / "base",
        tokenizer=kind,
        tokenizer_model=False,
        sliding_window=None,
        rope_parameters=YARN | {"original_max_position_embeddings": 256},
    )
    (record,) = export_gguf(base, tmp_path / "out", ["f32"])
    assert record["writer"] == "upstream"
    tokenizer = AutoTokenizer.from_pretrained(base)
    with open_gguf(record["path"], n_ctx=64, exact=True) as model:
        for text in SENTENCES[:9]:
            assert model.tokens(text, add_special=True) == tokenizer(text).input_ids, text
    assert tokenizer.chat_template == metadata(Path(record["path"]))["tokenizer.chat_template"]


def test_where_ggml_disagrees_a_16_bit_file_is_quantised(tmp_path, monkeypatch):
    base = make_checkpoint("llama", tmp_path / "base", hidden_size=256, dtype="bfloat16")
    direct = export_gguf(base, tmp_path / "direct.gguf", ["q4_k_m"])[0]
    monkeypatch.setattr(gguf, "agrees", lambda ggml, types: False)
    said: list[str] = []
    detour = export_gguf(base, tmp_path / "out" / "detour.gguf", ["q4_k_m"], say=said.append)[0]
    assert detour["writer"] == "llama_model_quantize"
    assert "16-bit" in said[0]
    assert tensors(Path(direct["path"])) == tensors(Path(detour["path"]))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["detour.gguf"]


def test_the_check_of_ggml_can_fail(monkeypatch, tmp_path):
    from fastft.exporting.gguf import quantize

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert quantize.agrees(quantize.Ggml(), {"q4_k", "q8_0", "iq2_xxs", "f16"})
    (tmp_path / "fastft").rename(tmp_path / "old")
    monkeypatch.setitem(quantize.CHECKED_BY, "q4_k", quantize.CHECKED_BY["q5_k"])
    assert not quantize.agrees(quantize.Ggml(), {"q4_k"})


def test_user_mistakes_are_refused(tmp_path, monkeypatch):
    base = make_checkpoint("llama", tmp_path / "base", vocab_size=600)
    with pytest.raises(FastFTError, match=r"unknown GGUF type 'q4km' \(did you mean 'q4_k_m'\?\)"):
        export_gguf(base, tmp_path, ["q4km"])
    with pytest.raises(
        FastFTError, match=r"iq2_xs needs an importance matrix(.|\n)*--imatrix auto"
    ):
        export_gguf(base, tmp_path, ["iq2_xs"])
    wide = make_checkpoint("llama", tmp_path / "wide", hidden_size=256)
    with pytest.raises(FastFTError, match=r"iq3_xs needs an importance matrix for \d+ tensors"):
        export_gguf(wide, tmp_path, ["iq3_xs"])
    with pytest.raises(FastFTError, match="is one file, but 2 types"):
        export_gguf(base, tmp_path / "x.gguf", ["f16", "f32"])
    small = make_checkpoint("llama", tmp_path / "small", vocab_size=440, pad_token_id=0)
    with pytest.raises(FastFTError, match="token ids up to 452, the model 440 embedding rows"):
        export_gguf(small, tmp_path, ["f16"])
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
    )
    with pytest.raises(FastFTError, match=r"needs [\d,]+ bytes free, .* has 1,000"):
        export_gguf(base, tmp_path / "out", ["f16"])
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_are_refused(tmp_path):
    base = make_checkpoint("llama", tmp_path / "base")
    train_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], scale=float("nan"))
    with pytest.raises(FastFTError, match="NaN or infinity"):
        export_gguf(base, tmp_path / "out", ["q8_0"], adapter=tmp_path / "adapter")
    assert not list(tmp_path.glob("out/*"))


KILLED = """
import os, sys, pathlib
from fastft.exporting import gguf
from fastft.exporting.gguf import writer
real, left = writer.Output.write, [int(sys.argv[3])]
def dying(self, offset, data):
    left[0] -= 1
    if left[0] < 0:
        if sys.argv[4] == "kill": os.kill(os.getpid(), 9)
        raise OSError(28, "No space left on device")
    real(self, offset, data)
writer.Output.write = dying
from fastft.errors import CouldNotFinishError
try:
    gguf.export_gguf(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), ["f16", "q8_0"], name="m")
except CouldNotFinishError as error:
    print(error); sys.exit(3)
"""


@pytest.mark.parametrize(("after", "how"), [(0, "kill"), (17, "kill"), (17, "full")])
def test_killed_or_out_of_disk_leaves_no_file_that_looks_whole(after, how, tmp_path):
    base, out = make_checkpoint("llama", tmp_path / "base"), tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(base), str(out), str(after), how]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == (-9 if how == "kill" else 3), done.stderr
    assert not list(out.glob("*.gguf"))
    if how == "full":
        assert "is full" in done.stdout
        assert list(out.iterdir()) == []
    export_gguf(base, out, ["f16", "q8_0"], name="m")
    assert sorted(p.name for p in out.iterdir()) == ["m.F16.gguf", "m.Q8_0.gguf"]


@pytest.mark.parametrize("strips", [False, True])
def test_the_files_name_does_not_change_how_special_tokens_are_read(strips, tmp_path):
    """llama.cpp strips the whitespace after special tokens where a model's name contains phi-3."""
    from transformers import AutoTokenizer

    from fastft.inference.llamacpp import open_gguf

    base = make_checkpoint("phi3", tmp_path / ("model" if strips else "my-phi-3-model"))
    path = base / "tokenizer.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    for token in found["added_tokens"]:
        token["rstrip"] = strips and token["content"].startswith("<|im")
    path.write_text(json.dumps(found), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(base)
    text = "<|im_start|> user<|im_end|>  and"
    with open_gguf(export_gguf(base, tmp_path, ["f16"])[0]["path"], n_ctx=64) as model:
        assert (
            model.tokens(text, add_special=False)
            == tokenizer(text, add_special_tokens=False).input_ids
        )


def test_an_adapters_own_tokenizer_is_written(tmp_path):
    from transformers import AddedToken, AutoTokenizer

    from fastft.inference.llamacpp import open_gguf

    base, adapter = make_checkpoint("mistral", tmp_path / "base"), tmp_path / "adapter"
    trained = train_adapter(base, adapter, 660, target_modules=["q_proj"])
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + '<tool>' }}{% endfor %}"
    tokenizer.save_pretrained(adapter)
    record = export_gguf(base, tmp_path / "out.gguf", ["f32"], adapter=adapter)[0]
    assert metadata(Path(record["path"]))["tokenizer.chat_template"] == tokenizer.chat_template
    ids = tokenizer("Hello <tool> world").input_ids
    with open_gguf(record["path"], n_ctx=64) as model:
        assert model.tokens("Hello <tool> world") == ids
        assert model.ends(len(tokenizer) - 1)
    assert kl(hf_logits(trained, ids), llama_cpp_logits(Path(record["path"]), ids)) < 1e-6


@pytest.mark.long
def test_the_converter_is_fetched_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = upstream.upstream_folder()
    assert (folder / "convert_hf_to_gguf.py").is_file()
    assert (folder / "gguf-py" / "gguf").is_dir()
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    monkeypatch.setattr(upstream, "_download", None)
    assert upstream.upstream_folder() == folder
