"""Loading and running GGUF files: logits, ids, chat, adapters on one base, the server."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastft.errors import CouldNotFinishError, FastFTError
from fastft.exporting.gguf import export_gguf
from fastft.exporting.gguf.lora import export_gguf_lora
from fastft.inference.llamacpp import GgufChat, open_gguf, sample
from fastft.inference.sampling import Sampling
from fastft.inference.serve import make_app, require_free_port
from tests.families import make_checkpoint

CHAT = [{"role": "user", "content": "Hello 東京"}]
TEXT = "The quick  brown fox\r\n 東京は日本の首都です。 👩‍👩‍👧 caf\u00e9"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runtime")


@pytest.fixture(scope="module")
def base(folder):
    return make_checkpoint("llama", folder / "base")


@pytest.fixture(scope="module")
def gguf(base, folder):
    return Path(export_gguf(base, folder, ["f32"], name="model")[0]["path"])


@pytest.fixture(scope="module")
def adapters(base, folder):
    """Two LoRA adapters with weights that matter: (peft folder, GGUF file) of each."""
    from peft import LoraConfig, get_peft_model

    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.2)
        model.save_pretrained(folder / f"adapter{seed}")
        path = export_gguf_lora(base, folder / f"adapter{seed}", folder / f"adapter{seed}.gguf")[
            "path"
        ]
        made.append((folder / f"adapter{seed}", Path(path)))
    return made


def hf_logits(base, ids, adapter=None):
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager"
    )
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def kl(p, q):
    p, q = (torch.tensor(np.asarray(x)).double().log_softmax(-1) for x in (p, q))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_logits_over_several_chunks_are_those_of_transformers(base, gguf, monkeypatch):
    monkeypatch.setattr(
        "fastft.inference.llamacpp.LOGITS_CHUNK_BYTES", 40 * 4 * 453
    )  # 40 rows at a time
    with open_gguf(gguf, n_ctx=256, exact=True) as model:
        ids = model.tokens(TEXT * 4)
        chunks = list(model.logits(ids))
        assert len(chunks) == -(-len(ids) // 40) > 2
        found = np.concatenate(chunks)
        assert found.shape == (len(ids), model.n_vocab)
        assert kl(hf_logits(base, ids), found) < 1e-9
        with pytest.raises(FastFTError, match="do not fit into a context of 256"):
            list(model.logits(ids * 2))


def test_ids_and_text_are_those_of_transformers(base, gguf):
    tokenizer = AutoTokenizer.from_pretrained(base)
    with open_gguf(gguf, n_ctx=256) as model:
        assert model.tokens(TEXT) == tokenizer(TEXT)["input_ids"]
        assert (
            model.tokens(TEXT, add_special=False)
            == tokenizer(TEXT, add_special_tokens=False)["input_ids"]
        )
        assert model.text(model.tokens(TEXT)) == TEXT
        assert len(model.tokens("<|im_end|>", add_special=False)) == 1
        assert len(model.tokens("<|im_end|>", add_special=False, parse_special=False)) > 1
        expected = tokenizer.apply_chat_template(
            CHAT, add_generation_prompt=True, return_dict=True
        )["input_ids"]
        assert model.chat_tokens(CHAT) == expected
        assert expected.count(model.bos) == 1


def test_greedy_chat_is_that_of_transformers_and_streams_whole_characters(base, gguf):
    tokenizer, model = (
        AutoTokenizer.from_pretrained(base),
        AutoModelForCausalLM.from_pretrained(base),
    )
    given = tokenizer.apply_chat_template(
        CHAT, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    made = model.generate(**given, max_new_tokens=24, do_sample=False)[
        0, given["input_ids"].shape[1] :
    ].tolist()
    chat = GgufChat(gguf, n_ctx=256)
    pieces = list(chat.stream(CHAT, Sampling(24)))
    assert chat.last_tokens == [t for t in made if t not in {tokenizer.eos_token_id, 452}]
    assert "".join(pieces) == tokenizer.decode(chat.last_tokens, skip_special_tokens=True)
    assert list(chat.stream(CHAT, Sampling(24))) == pieces  # from the cache of the first turn
    chat.close()


def test_sampling_is_seeded_and_top_p_cuts_the_tail():
    row = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))
    rng = np.random.default_rng(0)
    drawn = [sample(row, temperature=1.0, top_p=0.8, rng=rng) for _ in range(2000)]
    assert set(drawn) == {0, 1}
    assert abs(drawn.count(0) / 2000 - 0.5 / 0.8) < 0.04
    assert {sample(row, temperature=0.0, top_p=1.0, rng=rng)} == {0}
    assert {sample(row, temperature=1.0, top_p=0.01, rng=rng)} == {0}


def test_adapters_switch_on_one_base(base, gguf, adapters):
    with open_gguf(gguf, n_ctx=256, exact=True, loras=[path for _, path in adapters]) as model:
        ids = model.tokens(TEXT)
        plain = hf_logits(base, ids)
        for folder, path in [*adapters, *adapters]:
            model.use_lora(path.stem)
            found = np.concatenate(list(model.logits(ids)))
            assert kl(hf_logits(base, ids, folder), found) < 1e-6
            assert kl(plain, found) > 1e-3
        model.use_lora(None)
        assert kl(plain, np.concatenate(list(model.logits(ids)))) < 1e-9
        with pytest.raises(
            FastFTError, match=r"no adapter 'x' is loaded\. Loaded: adapter1, adapter2"
        ):
            model.use_lora("x")


def test_damaged_files_say_what_llama_cpp_says(gguf, tmp_path, capfd):
    (tmp_path / "cut.gguf").write_bytes(gguf.read_bytes()[:-1000])
    with pytest.raises(FastFTError, match="not within the file bounds"):
        open_gguf(tmp_path / "cut.gguf")
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(FastFTError, match="begins with b'hell'"):
        open_gguf(tmp_path / "text.gguf")
    with pytest.raises(FastFTError, match="is not a file"):
        open_gguf(tmp_path / "none.gguf")
    assert capfd.readouterr().err == ""  # llama.cpp's log is in the message, not on the screen


def test_the_server_answers_an_openai_client(gguf, adapters):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    loras = [str(path) for _, path in adapters]
    code = f"from fastft.inference.serve import serve; serve({str(gguf)!r}, port={port}, loras={loras!r}, n_ctx=256)"
    server = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, env=os.environ)
    try:
        client = httpx.Client(base_url=f"http://127.0.0.1:{port}/v1", timeout=30)
        wait_for(client, server)
        assert [m["id"] for m in client.get("/models").json()["data"]] == [
            gguf.stem,
            "adapter1",
            "adapter2",
        ]
        body = {"messages": CHAT, "max_tokens": 12, "temperature": 0, "repeat_penalty": 1.0}
        answers = {}
        for name, lora in [(gguf.stem, []), ("adapter1", [adapters[0][1]])]:
            got = client.post("/chat/completions", json=body | {"model": name}).json()
            chat = GgufChat(gguf, loras=lora, n_ctx=256)
            answers[name] = got["choices"][0]["message"]["content"]
            expected = "".join(chat.stream(CHAT, Sampling(12))).replace(
                "\ufffd", ""
            )  # the server drops those bytes
            assert answers[name].replace("\ufffd", "").strip() == expected.strip()
            assert got["usage"]["prompt_tokens"] == len(chat.last_prompt_tokens)
            chat.close()
        assert len(set(answers.values())) == 2
        with client.stream("POST", "/chat/completions", json=body | {"stream": True}) as lines:
            assert [line for line in lines.iter_lines() if line][-1] == "data: [DONE]"
        with pytest.raises(CouldNotFinishError, match="cannot listen on"):
            require_free_port("127.0.0.1", port)
    finally:
        server.terminate()
        server.communicate(timeout=20)


def wait_for(client, server):
    for _ in range(150):
        assert server.poll() is None, server.stderr.read().decode()
        try:
            client.get("/models")
            return
        except httpx.TransportError:
            time.sleep(0.2)
    raise AssertionError("the server did not come up within 30 s")


def test_the_server_refuses_what_is_no_adapter(gguf, tmp_path):
    with pytest.raises(FastFTError, match="a LoRA adapter in GGUF form is expected"):
        make_app(gguf, loras=[tmp_path / "none.gguf"], n_ctx=256)


@pytest.mark.parametrize(("flags", "extra"), [({"avx2", "amx_int8"}, False), ({"avx2"}, True)])
def test_models_are_loaded_without_kernels_for_amx(flags, extra):
    """In a process of its own, since the bindings are prepared once; some builds of those kernels end the process."""
    code = (
        "import sys; from fastft.inference import llamacpp; "
        f"llamacpp.cpu_flags = lambda: {flags!r}; api = llamacpp.bindings(); "
        "print(api.llama_model_default_params().use_extra_bufts, api.llama_cpp.llama_model_default_params().use_extra_bufts)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(extra)] * 2


def test_a_quantised_model_answers(base, folder):
    """The kernels of quantised types are others than those of f32, which the tests above go through."""
    (entry,) = export_gguf(base, folder, ["q8_0"], name="small")
    with open_gguf(entry["path"], n_ctx=256, exact=True) as model:
        ids = model.tokens(TEXT)
        assert kl(hf_logits(base, ids), np.concatenate(list(model.logits(ids)))) < 1e-2
