"""The importance matrix: sums by hand, names of the writer, adapters included."""

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fastft.errors import FastFTError
from fastft.exporting.gguf import export_gguf
from fastft.exporting.gguf.imatrix import collect_imatrix, load_imatrix, save_imatrix
from tests.families import make_checkpoint

BATCHES = [[1, 5, 9, 200, 31], torch.arange(40, 60).reshape(2, 10)]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3"])
def test_every_matrix_of_the_file_has_its_importance(family, tmp_path):
    base = make_checkpoint(family, tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    imatrix = collect_imatrix(model, BATCHES)
    path = export_gguf(base, tmp_path / "model.gguf", ["f32"])[0]["path"]
    matrices = {t.name: int(t.shape[0]) for t in gguf.GGUFReader(path).tensors if len(t.shape) == 2}
    tied = model.config.tie_word_embeddings
    expected = (
        matrices
        if tied
        else {name: n for name, n in matrices.items() if name != "token_embd.weight"}
    )
    assert {name: len(values) for name, values in imatrix.items()} == expected
    assert all(values.dtype == np.float32 and (values > 0).all() for values in imatrix.values())


def test_it_is_the_mean_square_of_the_inputs(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(
        make_checkpoint("llama", tmp_path / "base"), dtype=torch.float32
    )
    imatrix = collect_imatrix(model, BATCHES)
    states = []
    with torch.no_grad():
        for batch in BATCHES:
            found = model(
                torch.as_tensor(batch).reshape(-1, torch.as_tensor(batch).shape[-1]),
                output_hidden_states=True,
            )
            states.append(
                model.model.layers[0].input_layernorm(found.hidden_states[0]).reshape(-1, 64)
            )
    expected = torch.cat(states).double().square().mean(0).numpy()
    for name in ("attn_q", "attn_k", "attn_v"):
        np.testing.assert_allclose(imatrix[f"blk.0.{name}.weight"], expected, rtol=1e-5)


def test_an_adapter_is_measured_as_trained(tmp_path):
    from peft import LoraConfig, get_peft_model

    base = make_checkpoint("llama", tmp_path / "base")
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=4, target_modules="all-linear"),
    )
    plain = collect_imatrix(model, BATCHES)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    model.train()
    trained = collect_imatrix(model, BATCHES)
    merged = collect_imatrix(model.merge_and_unload(), BATCHES)
    assert model.training
    assert trained.keys() == merged.keys()
    for name in trained:
        np.testing.assert_allclose(trained[name], merged[name], rtol=1e-3)
    assert not np.allclose(
        trained["blk.1.ffn_down.weight"], plain["blk.1.ffn_down.weight"], rtol=0.05
    )


def test_it_is_what_the_writer_takes(tmp_path):
    base = make_checkpoint("llama", tmp_path / "base", hidden_size=256)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    imatrix = load_imatrix(save_imatrix(tmp_path / "imatrix.npz", collect_imatrix(model, BATCHES)))
    with pytest.raises(FastFTError, match="imatrix"):
        export_gguf(base, tmp_path, ["iq2_xs"])
    record = export_gguf(base, tmp_path, ["iq2_xs"], imatrix=imatrix)[0]
    assert "iq2_xs" in {t["type"] for t in record["tensors"].values()}


def test_no_data_is_an_error(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(make_checkpoint("llama", tmp_path / "base"))
    with pytest.raises(FastFTError, match="no token was given"):
        collect_imatrix(model, [])
