"""What the tests of the plan share: configs, tiny checkpoints, published numbers."""

import json
from pathlib import Path

import yaml

from fastft.config import make_config
from fastft.planning import (
    shape_from_config,
)
from fastft.planning.memory import train_terms

ROOT = Path(__file__).parents[1]


PUBLISHED = yaml.safe_load(
    (ROOT / "benchmarks" / "published_memory.yaml").read_text(encoding="utf-8")
)


LLAMA = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 500, "tie_word_embeddings": False,
}  # fmt: skip


def config(name, length=2048, **more):
    values = {
        "model": {"name": name, "max_seq_length": length},
        "data": {"source": "x.jsonl"},
        "output_dir": ".",
    }
    for key, value in more.items():
        section, _, leaf = key.partition("__")
        values.setdefault(section, {})[leaf] = value
    return make_config(values)


def peak(shape, s):
    return sum(term.bytes for term in train_terms(shape, s))


def write_model(folder, values=LLAMA, tensors=True):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    if tensors:
        import numpy as np
        from safetensors.numpy import save_file

        shape = shape_from_config(values)
        arrays = {}
        for weight in shape.weights:
            for number in range(weight.count):
                prefix = f"model.layers.{number}." if weight.count > 1 else "model."
                name = "lm_head" if weight.name == "lm_head" else prefix + weight.name
                arrays[f"{name}.weight"] = np.zeros(weight.shape, np.float16)
        save_file(arrays, folder / "model.safetensors")
    return folder
