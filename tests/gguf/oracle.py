"""What the GGUF tests compare with: the upstream converter, transformers' logits, llama.cpp's own quantiser."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import torch

from tests.sdist import llama_cpp_sdist

# Runs the upstream converter on many folders in one process. It knows a splitting rule by a hash of real vocabularies,
# which these tiny ones are not, so the rule's name is handed over.
RUNNER = """
import json, runpy, sys
folder = sys.argv[1]
sys.path[:0] = [folder, folder + "/gguf-py"]
from conversion.base import TextModel
for model, out, kind, pre in json.load(sys.stdin):
    TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
    sys.argv = ["convert_hf_to_gguf.py", model, "--outfile", out, "--outtype", kind]
    runpy.run_path(folder + "/convert_hf_to_gguf.py", run_name="__main__")
"""


def convert_upstream(jobs: list[tuple[Path, Path, str, str]]) -> None:
    """Convert (model folder, output file, outtype, splitting rule) with the converter out of the sdist."""
    folder = llama_cpp_sdist() / "vendor" / "llama.cpp"
    subprocess.run(
        [sys.executable, "-c", RUNNER, str(folder)],
        input=json.dumps([[str(m), str(o), kind, pre] for m, o, kind, pre in jobs]),
        text=True,
        check=True,
        capture_output=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )


def tensors(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Return every tensor of a GGUF file: type, shape in numpy's order, bytes."""
    reader = gguf.GGUFReader(path)
    return {
        t.name: (
            t.tensor_type.name.lower(),
            tuple(int(n) for n in reversed(t.shape)),
            t.data.tobytes(),
        )
        for t in reader.tensors
    }


def metadata(path: Path) -> dict[str, object]:
    """Return every key of a GGUF file with its value."""
    reader = gguf.GGUFReader(path)
    return {
        key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")
    }


def kl(expected: torch.Tensor, got: torch.Tensor) -> float:
    """Return the mean over positions of KL(expected || got) of two (T, V) logits, in float64."""
    p, q = (x.double().log_softmax(-1) for x in (expected, got))
    return float((p.exp() * (p - q)).sum(-1).mean())


def hf_logits(model, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def llama_cpp_logits(path: Path, ids: list[int], lora: Path | None = None) -> torch.Tensor:
    """Return llama.cpp's logits (T, V) with a float32 KV cache."""
    from fastft.inference.llamacpp import open_gguf

    with open_gguf(path, n_ctx=128, exact=True, loras=[lora] if lora else [], threads=2) as model:
        if lora:
            model.use_lora(model.loras[0])
        return torch.from_numpy(np.concatenate([chunk.copy() for chunk in model.logits(ids)]))
