"""Which file of a run is served, and the command that vLLM gets. No server runs here."""

import json
import os

import pytest

from fastft.errors import FastFTError
from fastft.exporting.certificate import CERTIFICATE
from fastft.files import sha256
from fastft.verification import serving


@pytest.fixture
def adapter(tmp_path):
    return make_adapter(tmp_path / "first")


def make_adapter(folder, base="some/base", **changes):
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir()
    config = {"base_model_name_or_path": base, "r": 16, "peft_type": "LORA"} | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({"a": np.zeros(1)}, folder / "adapter_model.safetensors")
    (folder / "generation_config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("")
    return folder


def after(arguments, name):
    return arguments[arguments.index(name) + 1]


def certify(out, **verdicts):
    """Write files of the names (dots as underscores) with their certificate."""
    entries = {}
    for age, (name, verdict) in enumerate(verdicts.items()):
        file = out / f"{name.replace('_', '.')}.gguf"
        file.write_bytes(name.encode())
        os.utime(file, ns=(age, age))
        if verdict:
            entries[file.name] = {"path": file.name, "verdict": verdict, "sha256": sha256(file)}
    (out / CERTIFICATE).write_text(json.dumps({"files": entries}))


def test_the_newest_certified_file_is_served(adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "export/first"
    out.mkdir(parents=True)
    certify(out, a_Q4="pass", b_Q8="warn", c_Q2="fail", d_F16=None)
    path, why = serving.gguf_of(adapter)
    assert path.name == "b.Q8.gguf"
    assert "(warn) of 4" in why
    path.write_bytes(b"other bytes")  # changed since: its certificate is not for these
    assert serving.gguf_of(adapter)[0].name == "a.Q4.gguf"


def test_without_a_certified_file_the_error_says_what_there_is(adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FastFTError, match=r"fastft export .*first --to gguf:q4_k_m"):
        serving.gguf_of(adapter)
    out = tmp_path / "export/first"
    out.mkdir(parents=True)
    certify(out, a_Q4="fail", b_Q8=None)
    with pytest.raises(FastFTError, match=r"b\.Q8\.gguf \(no cert.*a\.Q4\.gguf \(its check failed"):
        serving.gguf_of(adapter)


def test_an_adapter_is_served_on_its_base_with_its_own_ends_and_template(adapter):
    arguments = serving.vllm_command(adapter, port=8001, n_ctx=4096)
    assert arguments[:2] == ["serve", "some/base"]
    assert after(arguments, "--generation-config") == str(adapter)
    assert after(arguments, "--chat-template") == str(adapter / "chat_template.jinja")
    assert after(arguments, "--lora-modules") == f"first={adapter}"
    assert after(arguments, "--max-lora-rank") == "16"
    assert after(arguments, "--max-model-len") == "4096"
    assert arguments[-4:] == ["--host", "127.0.0.1", "--port", "8001"]


def test_several_adapters_share_one_base(adapter, tmp_path):
    second = make_adapter(tmp_path / "second", r=20)
    arguments = serving.vllm_command(adapter, adapters=[f"other={second}"])
    at = arguments.index("--lora-modules")
    assert arguments[at + 1 : at + 3] == [f"first={adapter}", f"other={second}"]
    assert after(arguments, "--max-lora-rank") == "32"
    assert after(arguments, "--max-loras") == "2"
    stranger = make_adapter(tmp_path / "stranger", base="another/base")
    with pytest.raises(FastFTError, match=r"stands on another/base, but first on some/base"):
        serving.vllm_command(adapter, adapters=[f"x={stranger}"])
    with pytest.raises(FastFTError, match="two adapters are called first"):
        serving.vllm_command(adapter, adapters=[f"first={second}"])
    with pytest.raises(FastFTError, match="NAME=RUN"):
        serving.vllm_command(adapter, adapters=[str(second)])


def test_the_certified_merged_model_comes_before_the_adapter(adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    merged = tmp_path / "export/first/merged"
    merged.mkdir(parents=True)
    (merged / "config.json").write_text("{}")
    assert "--enable-lora" in serving.vllm_command(adapter)  # no certificate yet
    entry = {"merged": {"path": "merged", "verdict": "pass", "sha256": sha256(merged)}}
    (merged.parent / CERTIFICATE).write_text(json.dumps({"files": entry}))
    arguments = serving.vllm_command(adapter)
    assert arguments[1:4] == [str(merged), "--served-model-name", "first"]
    assert after(arguments, "--generation-config") == str(adapter)
    assert "--enable-lora" not in arguments


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"trainable_token_indices": [3]}, "trained token rows"),
        ({"r": 1024}, "rank 1024"),
    ],
)
def test_what_vllm_would_leave_out_is_refused(tmp_path, changes, what):
    folder = make_adapter(tmp_path / "odd", **changes)
    with pytest.raises(FastFTError, match=f"{what}.*--to merged"):
        serving.vllm_command(folder)
