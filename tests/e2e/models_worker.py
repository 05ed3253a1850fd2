"""What works for one family with one engine, found out on a small random checkpoint. Prints JSON.

usage: python -m tests.e2e.models_worker ENGINE FAMILY FOLDER
"""

import json
import sys
from functools import partial
from pathlib import Path

from fastft.engines import get_engine

ENGINE = get_engine(sys.argv[1])  # before torch and transformers: Unsloth must come first

import numpy as np  # noqa: E402
import torch  # noqa: E402

from fastft.config import LoraConfig  # noqa: E402
from fastft.data.batches import Segment  # noqa: E402
from fastft.engines import loading  # noqa: E402
from fastft.kernels.fused import FusedLayers  # noqa: E402
from fastft.planning import load_shape  # noqa: E402
from fastft.training.exactness import check_rows, choose_rows  # noqa: E402
from fastft.training.step import Stepper, StepPolicy  # noqa: E402
from tests.families import SENTENCES, make_checkpoint, make_multimodal  # noqa: E402

EAGER = {"gemma2", "gpt-oss"}  # whose softcaps and sinks SDPA drops
# What llama.cpp can express: no window in mistral and phi3, a rotation left out of every fourth layer.
CONFIG = {
    "mistral": {"sliding_window": None},
    "phi3": {"sliding_window": None},
    "smollm3": {"no_rope_layers": None, "no_rope_layer_interval": 4},
    "gemma4": {"final_logit_softcapping": 30.0},  # as published
}
MULTIMODAL = {"gemma3-4b": "gemma3", "gemma4-e2b": "gemma4", "qwen3.5-4b": "qwen3.5"}
RANK = 4
FLOAT32 = partial(torch.autocast, "cpu", torch.bfloat16, enabled=False)


def make(family, folder):
    if family in MULTIMODAL:
        return make_multimodal(folder, MULTIMODAL[family])
    return make_checkpoint(family, folder, **CONFIG.get(family, {}))


def load(base, family):
    model, _ = ENGINE.from_pretrained(
        str(base),
        dtype=torch.float32,
        load_in_4bit=False,
        max_seq_length=128,
        attn_implementation="eager" if family in EAGER else None,
    )
    return model


def sequences(lengths=(60, 33, 90, 24, 100, 12)):
    generator, found = np.random.default_rng(0), []
    for length in lengths:
        ids = generator.integers(5, 250, length)
        labels = ids.copy()
        labels[0] = -100  # as in all of fastft's data: nothing stands before it
        found.append(Segment(ids, labels))
    return found


def examine(family, folder):
    base = make(family, folder / "base")
    model, trainable = loading.attach_lora(
        load(base, family),
        ENGINE,
        LoraConfig(r=RANK),
        seed=1,
        gradient_checkpointing=False,
        train_token_ids=[],
    )
    stepper = Stepper(model, ENGINE, StepPolicy(1000, "varlen", 0), device="cpu", on_note=str)
    rows, choice = choose_rows(
        "auto",
        model,
        ENGINE,
        lambda rows: check_rows(stepper, sequences(), FLOAT32),
        tested=True,
        longest=128,
    )
    losses = three_steps(model, stepper.with_policy(StepPolicy(1000, rows, 0)))
    fused = sorted(
        {type(module).__name__ for module, _ in FusedLayers(model, torch.float32).forwards}
    )
    ids = torch.tensor([[i % 240 for i in range(5, 400, 11)]])
    model.eval()
    with torch.no_grad():
        trained = model(input_ids=ids).logits
        model.save_pretrained(str(folder / "adapter"))
        from peft import PeftModel

        again = PeftModel.from_pretrained(load(base, family), str(folder / "adapter")).eval()
        reload = float((again(input_ids=ids).logits - trained).abs().max())
    found = {
        "trainable": trainable,
        "planned": load_shape(str(base)).lora_parameters(RANK),
        "rows": rows,
        "rows_why": choice.reason,
        "losses": losses,
        "reload": reload,
        "fused": fused,
    }
    if ENGINE.name == "stock":
        found |= exported(base, folder, family, ids, trained)
    return found


def three_steps(model, stepper):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        losses.append(stepper.gradient(model, sequences(), lambda loss: loss.backward(), FLOAT32))
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return losses


def exported(base, folder, family, ids, trained):
    """The merged folder's and the GGUF file's distance from the trained model."""
    from fastft.errors import FastFTError
    from fastft.exporting.gguf import export_gguf, upstream
    from fastft.exporting.merged import export_merged
    from tests.gguf.oracle import kl, llama_cpp_logits
    from tests.sdist import llama_cpp_sdist

    upstream.upstream_folder = lambda: llama_cpp_sdist() / "vendor" / "llama.cpp"
    adapter = folder / "adapter"
    export_merged(base, adapter, folder / "merged", dtype="float32")
    with torch.no_grad():
        merged = load(folder / "merged", family).eval()(input_ids=ids).logits
    found = {"merged": float((merged - trained).abs().max())}
    try:
        (record,) = export_gguf(base, folder / "gguf", ["f32"], adapter=adapter)
    except FastFTError as error:
        return found | {"gguf": "none", "gguf_why": str(error)}
    logits = llama_cpp_logits(Path(record["path"]), ids[0].tolist())
    found |= {"gguf": record["writer"], "kl": kl(trained[0], logits)}
    return found | certified(base, folder, record["path"])


def certified(base, folder, gguf):
    """The certificate's verdicts of adapter, merged folder and GGUF file, and an Ollama template."""
    from transformers import AutoTokenizer

    from fastft.exporting.ollama import write_modelfile
    from fastft.verification.verify import verify_files

    result = verify_files(
        [folder / "adapter", folder / "merged", gguf],
        base=base,
        adapter=folder / "adapter",
        samples=SENTENCES[:6],
        out=folder / "gguf",
    )
    tokenizer = AutoTokenizer.from_pretrained(base)
    modelfile = write_modelfile(folder / "gguf", Path(gguf), tokenizer).read_text(encoding="utf-8")
    troubles = [
        f"{check['name']}: {check['detail']}"
        for file in result["files"]
        for check in file["checks"]
        if check["verdict"] != "pass"
    ]
    return {
        "certificate": {file["kind"]: file["verdict"] for file in result["files"]},
        "troubles": [trouble.replace(str(folder), "") for trouble in troubles],
        "ollama": "\nTEMPLATE " in f"\n{modelfile}",
    }


if __name__ == "__main__":
    print(json.dumps(examine(sys.argv[2], Path(sys.argv[3]))))
