"""The config is strict, collects its problems, and is the one place where a default stands."""

import json

import pytest
import yaml

from fastft.config import RunConfig, dump_config, load_config, make_config
from fastft.errors import FastFTError
from fastft.planning.init import commented_config
from fastft.secrets import redact

MINIMAL = {"model": {"name": "m"}, "data": {"source": "d.jsonl"}}


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_minimal_config_has_the_documented_defaults():
    config = make_config(MINIMAL)
    assert (config.lora.r, config.train.learning_rate, config.train.effective_batch_size) == (
        16,
        2e-4,
        8,
    )
    assert (config.train.seed, config.data.eval_fraction, config.model.max_seq_length) == (
        3407,
        0.05,
        2048,
    )
    assert config.export.to == ["adapter"]


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(FastFTError, match=r"lora\.rr.*did you mean 'r'"):
        make_config(MINIMAL | {"lora": {"rr": 3}})


def test_a_key_in_the_wrong_section_names_the_right_one():
    with pytest.raises(FastFTError, match=r"did you mean 'train\.learning_rate'"):
        make_config(MINIMAL | {"learning_rate": 1e-4})


def test_all_problems_are_reported_together():
    bad = {
        "model": {"name": "m", "quantization": "nf5"},
        "data": {},
        "train": {"epochs": "many"},
        "lorra": {},
    }
    with pytest.raises(FastFTError) as caught:
        make_config(bad)
    message = str(caught.value)
    assert "4 problems" in message
    for part in (
        "model.quantization",
        "data.source is missing",
        "train.epochs",
        "did you mean 'lora'",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"model": {"name": "m", "dtype": "float32", "quantization": "nf4"}},
            "quantised weights compute in 16 bit",
        ),
        (
            {"model": {"name": "m", "quantization": "nf4"}, "lora": {"init": "pissa"}},
            "changes the base weights",
        ),
        ({"lora": {"init": "orthogonal", "r": 7}}, "even rank"),
        ({"lora": {"dropout": 0.1}, "train": {"share_prefixes": True}}, "would share its mask"),
        (
            {"train": {"padding_free": False, "share_prefixes": True}},
            "padded batches share nothing",
        ),
        (
            {"data": {"source": "d", "eval_fraction": 0}, "train": {"early_stopping_patience": 2}},
            "held-out data",
        ),
        ({"train": {"max_steps": 0}}, "max_steps is 0"),
        ({"train": {"learning_rate": 2}}, "less than 1"),
        ({"export": {"to": ["gguf_q4"]}}, "unknown export target"),
        ({"project": "a/b"}, "not a folder name"),
        ({"project": "a\x1b[31mb"}, "control characters"),
        ({"project": "a\nb"}, "control characters"),
    ],
)
def test_impossible_combinations(change, says):
    with pytest.raises(FastFTError, match=says):
        make_config(MINIMAL | change)


def test_overrides(tmp_path):
    path = write(tmp_path, yaml.safe_dump(MINIMAL))
    config = load_config(
        path,
        ["lora.r=32", "train.learning_rate=1e-4", "train.max_steps=null", "export.to=[merged]"],
    )
    assert (config.lora.r, config.train.learning_rate, config.train.max_steps) == (32, 1e-4, None)
    assert config.export.to == ["merged"]


@pytest.mark.parametrize("override", ["lora.r", "=3", "lora.r.x=3", "lora.q=3"])
def test_bad_overrides(tmp_path, override):
    path = write(tmp_path, yaml.safe_dump(MINIMAL | {"lora": {"r": 8}}))
    with pytest.raises(FastFTError):
        load_config(path, [override])


def test_resolved_config_reads_back_and_holds_no_secret():
    secret = "hf_" + "a" * 34
    config = make_config(MINIMAL | {"data": {"source": f"https://x/{secret}"}})
    text = dump_config(config)
    assert secret not in text
    assert make_config(yaml.safe_load(text)).lora == config.lora


def test_redaction_keeps_ordinary_text():
    assert redact("hf_" + "x" * 20 + " and half_hearted sk-ip") == "*** and half_hearted sk-ip"


@pytest.mark.parametrize("gpu", ["t4", "l4", "a100", "h200", None])
def test_init_writes_every_setting_with_its_default(gpu):
    values = yaml.safe_load(commented_config(gpu=gpu))
    config = make_config(values)
    for section in ("lora", "train", "export"):
        assert getattr(config, section) == getattr(make_config(MINIMAL), section)
    assert set(values) == set(RunConfig.model_fields)


def test_schema_is_json_schema_with_descriptions():
    schema = json.loads(json.dumps(RunConfig.model_json_schema()))
    assert schema["properties"]["model"]
    assert schema["$defs"]["LoraConfig"]["properties"]["r"]["description"]
    assert schema["$defs"]["LoraConfig"]["additionalProperties"] is False
