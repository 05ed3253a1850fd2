"""The families table against transformers itself: names, defaults and layers are what it says."""

import inspect
import re

import pytest

from fastft.families import FAMILIES, family_of, gguf_arch, taken_for_experts

pytest.importorskip("transformers")


def modelling(row):
    """The module that defines the family's CausalLM class."""
    import transformers

    return inspect.getmodule(getattr(transformers, f"{row.classes}ForCausalLM"))


@pytest.mark.parametrize("row", FAMILIES.values(), ids=FAMILIES)
def test_a_row_says_what_transformers_does(row):
    from transformers import AutoConfig

    config = AutoConfig.for_model(row.model_type)
    module = modelling(row)
    assert config.tie_word_embeddings is row.tied
    if hasattr(config, "attention_bias"):
        assert config.attention_bias is row.attention_bias
    needed = {"norm": "RMSNorm", "attention": "Attention", "mlp": "MLP"}
    for part in row.fused - {"head"}:
        assert hasattr(module, f"{row.classes}{needed[part]}"), part
    norm = inspect.getsource(getattr(module, f"{row.classes}RMSNorm"))
    assert ("1.0 + self.weight" in norm) is (row.norms == "plus_one")
    layers = row.layer_classes or row.classes
    layer = inspect.getsource(getattr(module, f"{layers}DecoderLayer").__init__)
    assert len(re.findall(r"\n {8}self\.\w+ = \w+RMSNorm\(", layer)) == row.norms_a_layer
    attention = inspect.getsource(getattr(module, f"{layers}Attention").__init__)
    assert ("q_norm" in attention) is (row.qk_norms != "none")
    assert ("qkv_proj" in attention) is row.joined_projections
    if row.head_divisor:
        assert hasattr(config, row.head_divisor)


def test_a_family_without_a_row_is_promised_nothing():
    unknown = family_of("starcoder2")
    assert (unknown.rows, unknown.fused, unknown.gguf) == ("check", frozenset(), None)
    assert gguf_arch("starcoder2") == "starcoder2"
    assert gguf_arch("gemma3_text") == "gemma3"


def test_the_names_that_peft_takes_for_experts_are_pefts():
    from peft.utils import transformers_weight_conversion as peft_conversion
    from transformers import conversion_mapping

    patterns = conversion_mapping._MODEL_TO_CONVERSION_PATTERN  # not qwen2_moe itself
    names = peft_conversion._MOE_TARGET_MODULE_MAPPING["qwen2_moe"]
    for model_type, pattern in patterns.items():
        expected = frozenset(names) if pattern == "qwen2_moe" else frozenset()
        assert taken_for_experts(model_type) == expected, model_type
