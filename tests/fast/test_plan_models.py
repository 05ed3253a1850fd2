"""Reading a model's shape: config.json, safetensors headers, the Hub, and what is wrong with them."""

import json
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from fastft.errors import FastFTError
from fastft.hardware import named_gpu
from fastft.planning import (
    Situation,
    known_shape,
    load_shape,
    memory,
    plan,
    shape_from_config,
)
from fastft.planning.memory import weight_terms
from fastft.planning.shape import with_headers
from tests.plans import LLAMA, config, write_model


def test_local_folder_is_read_from_its_headers(tmp_path):
    folder = write_model(tmp_path / "m")
    shape = load_shape(str(folder))
    assert shape.stored == "float16"
    assert shape.parameters == shape_from_config(LLAMA).parameters
    assert shape.checkpoint_bytes == (folder / "model.safetensors").stat().st_size
    assert shape.local


def test_headers_win_over_the_config_and_say_so(tmp_path):
    folder = write_model(tmp_path / "m")
    (folder / "config.json").write_text(json.dumps(LLAMA | {"intermediate_size": 200}))
    shape = load_shape(str(folder))
    assert shape.parameters == shape_from_config(LLAMA).parameters
    assert any("headers" in note for note in shape.notes)
    assert shape.lora_parameters(4) == shape_from_config(LLAMA).lora_parameters(4)


def test_nonsense_is_refused_with_what_is_missing(tmp_path):
    broken = write_model(
        tmp_path / "a", {"model_type": "llama", "hidden_size": 8, "vocab_size": 3}, tensors=False
    )
    with pytest.raises(
        FastFTError, match="lacks num_hidden_layers, num_attention_heads, intermediate_size"
    ):
        load_shape(str(broken))
    (broken / "config.json").write_text("{")
    with pytest.raises(FastFTError, match="not valid JSON"):
        load_shape(str(broken))
    whole = write_model(tmp_path / "b")
    (whole / "model.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(FastFTError, match="not a safetensors file"):
        load_shape(str(whole))
    strange = shape_from_config(LLAMA | {"model_type": "brandnew"})
    assert any("taken for a Llama-like" in note for note in strange.notes)
    with pytest.raises(FastFTError, match=r"unknown GPU 't5'.*Known: "):
        named_gpu("t5")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads is 0, not a whole number from 1"),
        ({"num_hidden_layers": -3}, "num_hidden_layers is -3"),
        ({"hidden_size": 10**15}, "hidden_size is 1000000000000000"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"intermediate_size": [96, 96]}, r"intermediate_size is \[96, 96\]"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads is '2'"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "hidden_size 64 is no multiple of num_attention_heads 5"),
        ({"head_dim": "x"}, "head_dim is 'x'"),
        ({"max_position_embeddings": "long"}, "max_position_embeddings is 'long'"),
        ({"model_type": 5}, "model_type is 5, not a str"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', not a bool"),
        ({"quantization_config": "nf4"}, "quantization_config is 'nf4', not a dict"),
        ({"text_config": "x"}, "text_config is not a JSON object"),
        ({"num_local_experts": 8}, "lacks num_experts_per_tok"),
        ({"num_local_experts": 8, "num_experts_per_tok": 9}, "9 experts a token, but only 8"),
        ({"num_local_experts": "8", "num_experts_per_tok": 2}, "num_local_experts is '8'"),
    ],
)  # fmt: skip
def test_values_that_no_model_has_are_refused(changed, said):
    with pytest.raises(FastFTError, match=said):
        shape_from_config(LLAMA | changed)


def test_all_impossible_values_are_said_at_once():
    with pytest.raises(FastFTError, match=r"hidden_size is 0.*vocab_size is -1"):
        shape_from_config(LLAMA | {"hidden_size": 0, "vocab_size": -1})
    for whole in ([1, 2], None):
        with pytest.raises(FastFTError, match="not a JSON object"):
            shape_from_config(whole)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "./gone", "a/b/c/d", "a b/c", "owner/twice--dashed"]
)
def test_a_name_that_is_neither_folder_nor_hub_id_says_so(name):
    with pytest.raises(FastFTError, match=r"neither a folder( that exists)? nor a Hub id"):
        load_shape(name)


def test_a_file_is_not_a_model_folder(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(FastFTError, match=r"is a file; give the folder that holds config\.json"):
        load_shape(str(file))


def test_files_beside_the_model_do_not_count(tmp_path):
    """Mistral's folders hold a second copy, others an adapter."""
    folder = write_model(tmp_path / "m")
    once = load_shape(str(folder))
    (folder / "consolidated.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    assert load_shape(str(folder)) == once


def test_a_missing_shard_is_said(tmp_path):
    folder = write_model(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    )
    with pytest.raises(FastFTError, match=r"lacks 1 of 2 files: model-2\.safetensors"):
        load_shape(str(folder))
    index.write_text("[]")
    with pytest.raises(FastFTError, match="is not valid JSON for its name"):
        load_shape(str(folder))


@pytest.mark.parametrize(
    "header", [[], {"a": 1}, {"a": {"dtype": "F16"}}, {"a": {"dtype": "F16", "shape": 3}}]
)
def test_a_header_of_another_form_is_damaged(tmp_path, header):
    folder = write_model(tmp_path / "m", tensors=False)
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(FastFTError, match="damaged header"):
        load_shape(str(folder))


def test_empty_target_modules_are_refused():
    with pytest.raises(FastFTError, match=r"lora\.target_modules is empty"):
        plan(config("qwen3-0.6b", lora__target_modules=[]), named_gpu("t4"))


def test_what_gemma3_leaves_out_of_its_text_config_is_known():
    """google/gemma-3-4b-it's text_config has no heads and no vocabulary: they are the family's defaults."""
    text = {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
    }
    shape = shape_from_config(
        {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 1152}}
    )
    assert shape.parameters == 3_880_263_168  # as `language_model` of the published checkpoint
    assert (shape.heads, shape.kv_heads, shape.head_dim, shape.tied) == (8, 4, 256, True)
    assert any("not the vision tower" in note for note in shape.notes)


@pytest.mark.parametrize(
    ("family", "values", "billions"),
    [
        ("qwen2_moe", {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 5632,
                           "vocab_size": 151936, "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
                           "shared_expert_intermediate_size": 5632}, 14.3),
        ("deepseek_v3", {"hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128, "intermediate_size": 18432,
                             "vocab_size": 129280, "n_routed_experts": 256, "num_experts_per_tok": 8,
                             "moe_intermediate_size": 2048, "n_shared_experts": 1}, 671),
        ("mixtral", {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
                         "intermediate_size": 14336, "vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2}, 46.7),
        ("qwen3_moe", {"hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
                           "head_dim": 128, "intermediate_size": 6144, "vocab_size": 151936, "num_experts": 128,
                           "num_experts_per_tok": 8, "moe_intermediate_size": 768}, 30.5),
    ],
)  # fmt: skip
def test_experts_are_counted_whatever_they_are_called(family, values, billions):
    """Published sizes; DeepSeek's own attention and its dense first layers are not modelled, and its experts decide."""
    shape = shape_from_config({"model_type": family} | values)
    assert shape.parameters / 1e9 == pytest.approx(billions, rel=0.06)


def test_modules_that_a_4_bit_checkpoint_skips_stay_in_16_bit(tmp_path):
    skipped = {"load_in_4bit": True, "quant_method": "bitsandbytes"}
    skipped["llm_int8_skip_modules"] = [
        "lm_head",
        "model.layers.1.mlp",
        "model.layers.0.self_attn.q_proj",
    ]
    shape = shape_from_config(LLAMA | {"quantization_config": skipped})
    kept = 3 * 64 * 96 + 64 * 64
    assert shape.kept_in_16_bit == kept
    s = Situation(device="cuda", kernels="unsloth", tokens=1, longest=1, quantization="nf4")
    all_packed = weight_terms(replace(shape, kept_in_16_bit=0), s)
    more = sum(t.bytes for t in weight_terms(shape, s)) - sum(t.bytes for t in all_packed)
    assert more == pytest.approx(kept * (2 - memory.NF4_BITS / 8), abs=2)
    # The headers say the same: what is not packed bytes was skipped.
    headers = {
        "model.layers.0.self_attn.q_proj.weight": ("BF16", (64, 64)),
        "model.layers.0.self_attn.k_proj.weight": ("U8", (1024, 1)),
        "model.embed_tokens.weight": ("BF16", (500, 64)),
        "lm_head.weight": ("BF16", (500, 64)),
    }
    assert with_headers(shape, headers, 1).kept_in_16_bit == 64 * 64


def test_packed_checkpoints_of_other_tools_keep_their_logical_size():
    shape = shape_from_config(LLAMA | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    assert any("stored as gptq" in note for note in shape.notes)
    headers = {"model.layers.0.self_attn.q_proj.qweight": ("I32", (8, 64))}
    assert with_headers(shape, headers, 1).parameters == shape_from_config(LLAMA).parameters


def test_hub_model_by_headers_alone(tmp_path):
    """A loopback Hub serves config.json and ranges of the weights; the bytes served stay far below the file."""
    folder = write_model(tmp_path / "m", LLAMA | {"vocab_size": 20_000})
    served = {"bytes": 0}

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer(body=True)

        def do_HEAD(self):
            self.answer(body=False)

        def answer(self, body):
            if "/api/models/" in self.path:
                files = [{"rfilename": file.name} for file in folder.iterdir()]
                return self.send(
                    json.dumps({"id": "own/er", "sha": "a" * 40, "siblings": files}).encode(), body
                )
            file = folder / self.path.split("?")[0].rsplit("/", 1)[-1]
            if not file.is_file():
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            return self.send(file.read_bytes(), body)

        def send(self, data, body):
            total, wanted = len(data), self.headers.get("Range")
            if wanted:
                first, last = wanted.removeprefix("bytes=").split("-")
                data = data[int(first) : int(last) + 1]
            self.send_response(206 if wanted else 200)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", '"' + "b" * 40 + '"')
            self.send_header("X-Repo-Commit", "a" * 40)
            if wanted:
                self.send_header("Content-Range", f"bytes {first}-{last}/{total}")
            self.end_headers()
            if body:
                served["bytes"] += len(data)
                self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = (
        "from fastft.planning import load_shape; s = load_shape('own/er');"
        "print(s.parameters, s.stored, s.checkpoint_bytes, s.local)"
    )
    environment = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "cache"),
    }
    environment |= {
        "PATH": "/usr/bin:/bin",
        "NO_PROXY": "127.0.0.1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    shape = load_shape(str(folder))
    parameters, stored, size, local = done.stdout.split()
    assert (int(parameters), stored, local) == (shape.parameters, "float16", "False")
    assert int(size) == 2 * shape.parameters
    assert served["bytes"] < (folder / "model.safetensors").stat().st_size / 4


def test_without_the_hub_known_models_still_plan(tmp_path):
    code = "from fastft.planning import load_shape; s = load_shape('Qwen/Qwen3-4B'); print(s.parameters, '; '.join(s.notes))"
    environment = {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path),
        "PATH": "/usr/bin:/bin",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.stdout.startswith(
        f"{known_shape('qwen3-4b').parameters} sizes from fastft's own table"
    ), done.stderr
    packed = code.replace("Qwen/Qwen3-4B", "unsloth/Qwen3-4B-unsloth-bnb-4bit").replace(
        "s.parameters", "s.stored"
    )
    done = subprocess.run(
        [sys.executable, "-c", packed], capture_output=True, text=True, env=environment
    )
    assert done.stdout.startswith("nf4 "), done.stderr
    code = code.replace("Qwen/Qwen3-4B", "no/such")
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert "the Hub cannot be reached" in done.stderr
