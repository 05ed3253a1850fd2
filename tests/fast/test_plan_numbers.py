"""The plan against published numbers and closed forms: parameters, weights, adapters, files."""

from dataclasses import replace

import pytest

from fastft.errors import FastFTError
from fastft.hardware import GIB, named_gpu
from fastft.planning import (
    Situation,
    known_shape,
    plan,
    shape_from_config,
)
from fastft.planning.disk import adapter_bytes, gguf_bytes
from fastft.planning.memory import loss_term, train_terms, trainable, weight_terms
from fastft.planning.resolve import resolve
from tests.plans import LLAMA, PUBLISHED, config, peak


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("llama-2-7b", 6_738_415_616), ("llama-3.1-8b", 8_030_261_248), ("llama-3.3-70b", 70_553_706_496),
     ("llama-3.2-1b", 1_235_814_400), ("llama-65b", 65_285_660_672), ("mistral-7b", 7_241_732_096),
     ("qwen3-0.6b", 596_049_920), ("gpt-oss-20b", 20_914_757_184), ("gpt-oss-120b", 116_829_156_672)],
)  # fmt: skip
def test_published_parameter_counts(name, parameters):
    assert known_shape(name).parameters == parameters


def test_gpt_oss_checkpoints_have_their_published_size():
    assert known_shape("gpt-oss-20b").checkpoint_bytes == pytest.approx(13.76e9, rel=0.01)
    assert known_shape("gpt-oss-120b").checkpoint_bytes == pytest.approx(65.25e9, rel=0.01)


def test_7b_in_fp16_is_14_gb_of_weights():
    s = Situation(device="cuda", kernels="unsloth", tokens=1, longest=1)
    for name in ("llama-2-7b", "mistral-7b"):
        assert sum(t.bytes for t in weight_terms(known_shape(name), s)) == pytest.approx(
            14e9, rel=0.05
        )


def test_qlora_of_65b_fits_one_48_gb_card():
    """QLoRA's claim (arXiv 2305.14314): 65B on one 48 GB card, at its length of 512."""
    result = plan(
        config("llama-65b", 512, lora__r=64), replace(named_gpu("a6000"), disk_assumed_bytes=10**12)
    )
    assert result.choices["quantization"][0] == "nf4"
    assert result.phases["train"].vram_bytes <= named_gpu("a6000").vram_bytes


def test_full_finetuning_of_8b_does_not_fit_40_gb():
    s = Situation(
        device="cuda", kernels="unsloth", tokens=512, longest=512, full_finetuning=True, lora_bytes=2,
        checkpointing="offload",
    )  # fmt: skip
    assert trainable(known_shape("llama-3.1-8b"), s) == 8_030_261_248
    assert peak(known_shape("llama-3.1-8b"), s) > 40 * GIB


def test_gpt_oss_120b_does_not_train_on_an_a100_40():
    result = plan(config("gpt-oss-120b", 1024), named_gpu("a100-40"))
    assert result.verdict == "does_not_fit"
    assert result.phases["train"].vram_bytes > 55e9
    assert [change.key for change in result.changes] == ["gpu"]
    assert result.changes[0].new in {"a100-80", "h100"}


def test_gpt_oss_20b_trains_on_a_colab_t4():
    """Unsloth's published claim: gpt-oss-20b QLoRA in 14 GB."""
    result = plan(config("gpt-oss-20b", 1024, train__micro_batch_tokens=1024), named_gpu("t4"))
    assert result.phases["train"].vram_bytes < 14 * GIB


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row["name"])
def test_published_measurements_within_15_percent(row):
    situation = dict(row["situation"])
    if "target_modules" in situation:
        situation["target_modules"] = tuple(situation["target_modules"])
    s = Situation(**situation, allocator_slack=row["counts"] == "reserved")
    terms = train_terms(known_shape(row["model"]), s)
    predicted = sum(t.bytes for t in terms if t.name != "CUDA context") / GIB
    assert predicted == pytest.approx(row["measured"], rel=0.15)


def test_unsloths_loss_keeps_a_few_hundred_rows_and_phi3_all_of_them():
    """Its chunks on a GPU: 512 rows of float32 logits and hidden states for a vocabulary of 151,936,
    where half of the free memory was planned once.
    """
    shape = known_shape("qwen3-4b")
    s = Situation(device="cuda", kernels="unsloth", tokens=2048, longest=2048)
    assert loss_term(shape, s).bytes == 512 * (151_936 + 2560) * 4 + 2048 * 2560 * 2
    for kind, expected in (("llama", "chunked"), ("phi3", "full")):
        values = shape_from_config(LLAMA | {"model_type": kind})
        found = resolve(config("x", 1024, model__quantization="none"), named_gpu("t4"), values)
        assert found.situation.loss == expected


def test_lora_parameters_closed_form():
    shape = known_shape("llama-3.1-8b")
    assert shape.lora_parameters(16) == 41_943_040  # what Unsloth prints for this model
    assert shape.lora_parameters(16, ["q_proj", "v_proj"]) == 32 * 16 * (
        (4096 + 4096) + (4096 + 1024)
    )
    dora = shape.lora_parameters(16, use_dora=True) - shape.lora_parameters(16)
    assert dora == 32 * (4096 + 1024 + 1024 + 4096 + 14336 + 14336 + 4096)
    assert shape.lora_parameters(16, train_tokens=3) == 41_943_040 + 3 * 4096
    assert known_shape("gpt-oss-20b").lora_parameters(8) == 24 * 8 * 2 * (2880 + 4096 + 2880 + 512)


def test_split_names_mean_the_fused_layers():
    phi = shape_from_config(LLAMA | {"model_type": "phi3"})
    assert phi.lora_parameters(4, ["q_proj", "k_proj", "v_proj"]) == 2 * 4 * (64 + 128)
    with pytest.raises(FastFTError, match=r"no 'wq'.*It has: .*qkv_proj"):
        phi.lora_targets(["wq"])


def test_micro_batches_need_more_the_larger_they_are_and_checkpointing_less():
    shape = known_shape("qwen3-0.6b")
    for device, kernels in (("cpu", "peft"), ("cpu", "fused"), ("cuda", "unsloth")):
        s = Situation(device=device, kernels=kernels, tokens=1024, longest=1024)
        sizes = [peak(shape, replace(s, tokens=t)) for t in (1024, 2048, 4096)]
        assert sizes == sorted(sizes)
        assert sizes[0] < sizes[2]
        assert peak(shape, replace(s, tokens=4096, checkpointing="recompute")) < sizes[2]
        if kernels != "peft":  # whose modules take what NF4 saves
            assert peak(shape, replace(s, quantization="nf4", multiplies_nf4=True)) < sizes[0]


def test_every_term_says_where_it_comes_from():
    result = plan(
        config("llama-3.1-8b", export__to=["merged", "gguf:q4_k_m", "gguf-lora"]), named_gpu("t4")
    )
    for phase in result.phases.values():
        terms = [*phase.vram_terms, *phase.ram_terms, *phase.disk_terms]
        assert all(term.name and term.formula and term.source for term in terms)
        for place in ("vram", "ram", "disk"):
            total = sum(term.bytes for term in getattr(phase, f"{place}_terms"))
            assert total == getattr(phase, f"{place}_bytes")


def test_an_adapted_head_is_saved_with_its_base_weight():
    """peft writes lm_head's own weight into the adapter where LoRA is on it."""
    shape = known_shape("llama-2-7b")
    s = Situation(
        device="cpu", kernels="fused", tokens=512, longest=512, target_modules=("q_proj", "lm_head")
    )
    without = replace(s, target_modules=("q_proj",))
    lora = 16 * (4096 + 32000) * 4
    assert adapter_bytes(shape, s) - adapter_bytes(shape, without) == lora + 32000 * 4096 * 2


def test_fused_qkv_gets_the_type_of_its_values():
    """llama.cpp gives phi3's attn_qkv q5_k in a q4_k_m file: one bit a weight more than q4_k."""
    phi = shape_from_config(
        LLAMA | {"model_type": "phi3", "hidden_size": 1024, "intermediate_size": 2816}
    )
    small, more = (gguf_bytes(phi, kind) for kind in ("q4_k_s", "q4_k_m"))
    qkv = sum(w.parameters for w in phi.weights if w.name == "qkv_proj")
    assert more - small >= qkv / 8


def test_gguf_sizes():
    """Published files: Llama-3.1-8B Q4_K_M is 4.92 GB and Q8_0 8.54 GB; f16 is two bytes a parameter."""
    shape = known_shape("llama-3.1-8b")
    assert gguf_bytes(shape, "q4_k_m") == pytest.approx(4.92e9, rel=0.02)
    assert gguf_bytes(shape, "q8_0") == pytest.approx(8.54e9, rel=0.02)
    assert gguf_bytes(shape, "f16") == pytest.approx(16.07e9, rel=0.02)
    with pytest.raises(FastFTError, match=r"did you mean 'q4_k_m'"):
        gguf_bytes(shape, "q4_km")
