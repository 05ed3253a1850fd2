"""One engine, all families, in one process: load, attach, compare gradients, train, save, reload. Prints JSON.

usage: python -m tests.e2e.family_worker ENGINE FOLDER
"""

import contextlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

from fastft.engines import get_engine

ENGINE = get_engine(sys.argv[1])  # before torch and transformers: Unsloth must come first

import numpy as np  # noqa: E402
import torch  # noqa: E402

from fastft.data.batches import micro_batches, segments_of, supervised_tokens  # noqa: E402
from fastft.kernels.fused import FusedLayers  # noqa: E402
from fastft.kernels.varlen import is_known_family, padding_free  # noqa: E402
from tests.families import FAMILIES, make_checkpoint  # noqa: E402

EAGER = {"gemma2", "gpt-oss"}  # whose softcaps and sinks SDPA drops: the reference must be eager


def load(folder, family):
    model, _ = ENGINE.from_pretrained(
        str(folder),
        dtype=torch.float32,
        load_in_4bit=False,
        max_seq_length=128,
        attn_implementation="eager" if family in EAGER else None,
    )
    return model


def attach(model):
    return ENGINE.get_peft_model(
        model, r=4, target_modules="all-linear", use_gradient_checkpointing=False, random_state=1
    )


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def accumulate(model, segments, budget, padded, fused=None):
    """Return (loss, gradient) of one step."""
    model.zero_grad()
    total, supervised = 0.0, supervised_tokens(segments)
    with contextlib.ExitStack() as stack:
        stack.enter_context(ENGINE.loss_mode(model))
        if not padded:
            stack.enter_context(padding_free(model))
        if fused is not None:
            stack.enter_context(fused.active())
        for batch in micro_batches(
            segments, budget, rows="padded" if padded else "varlen", pad_token_id=0, device="cpu"
        ):
            loss = model(**batch.inputs, num_items_in_batch=supervised, use_cache=False).loss
            loss.backward()
            total += loss.item()
    return total, torch.cat([p.grad.flatten() for p in trainable(model)])


def samples(vocab_size, lengths=(3, 40, 17, 29, 64, 5)):
    rng = np.random.default_rng(0)
    rows = []
    for length in lengths:
        ids = rng.integers(0, vocab_size, length)
        labels = ids.copy()
        labels[: rng.integers(0, length - 1)] = -100
        rows.append(SimpleNamespace(input_ids=ids, labels=labels, segments=[length]))
    return rows


def examine(family, folder):
    base = make_checkpoint(family, folder / family)
    model = attach(load(base, family)).train()
    segments = segments_of(samples(model.config.get_text_config().vocab_size))
    with torch.no_grad():  # B starts at zero: without this no error in it could show
        generator = torch.Generator().manual_seed(0)
        for parameter in trainable(model):
            parameter.normal_(0, 0.05, generator=generator)
    reference_loss, reference = accumulate(model, segments, 10**6, padded=True)
    fused = FusedLayers(model, torch.float32)

    def difference(budget, padded, fused):
        loss, gradient = accumulate(model, segments, budget, padded, fused)
        return max(
            float((gradient - reference).norm() / reference.norm()), abs(loss - reference_loss)
        )

    worst = max(difference(budget, False, None) for budget in (30, 70, 1000))
    worst_fused = max(difference(budget, False, fused) for budget in (30, 70, 1000))
    padded_fused = difference(10**6, True, fused)  # the fused layers under padded batches
    start = [p.detach().clone() for p in trainable(model)]
    traces = {}
    for name, (budget, padded, layers) in {
        "padded": (10**6, True, None),
        "fused": (70, False, fused),
    }.items():
        with torch.no_grad():
            for parameter, value in zip(trainable(model), start, strict=True):
                parameter.copy_(value)
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)
        traces[name] = []
        for _ in range(30):
            traces[name].append(accumulate(model, segments, budget, padded, layers)[0])
            optimizer.step()
    losses = traces["fused"]
    model.eval()
    ids = torch.from_numpy(segments[1].input_ids)[None]
    with torch.no_grad():
        trained = model(input_ids=ids).logits
        model.save_pretrained(str(folder / "adapter" / family))
        from peft import PeftModel

        again = PeftModel.from_pretrained(
            load(base, family), str(folder / "adapter" / family)
        ).eval()
        reloaded = again(input_ids=ids).logits
    return {
        "known": is_known_family(model),
        "gradient_norm": float(reference.norm()),
        "exactness": worst,
        "exactness_fused": worst_fused,
        "exactness_fused_padded": padded_fused,
        "trace_difference": max(
            abs(a - b) for a, b in zip(traces["padded"], traces["fused"], strict=True)
        ),
        "fused": sorted({type(module).__name__ for module, _ in fused.forwards}),
        "losses": losses,
        "reload_difference": float((trained - reloaded).abs().max()),
        "attention_after": model.get_base_model().config._attn_implementation,
    }


if __name__ == "__main__":
    print(json.dumps({family: examine(family, Path(sys.argv[2])) for family in FAMILIES}))
