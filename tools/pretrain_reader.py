"""Make a base that reads what stands before it: ``python tools/pretrain_reader.py --out DIR``.

The quickstart's base knows its towns by heart and copies nothing: it never met a fact twice in one
text, so nothing in its training pays for looking back. Here it goes on training, with all of its
weights, on documents about towns that exist nowhere else. Each tells the four facts of one town
twice, in other words and another order, and what nobody can know can only be copied. It never
reads a question. Judged by towns of no training: the facts that it completes after a text that
tells them.

`examples/rag.py` on such a base is in docs/serve.md.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain_quickstart import cloze_recall

from fastft.quickstart import base_path, world
from fastft.quickstart.tables import ATTRIBUTES, CODAS, LANGUAGES, SYLLABLES, Word

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

DOCUMENTS = 24
"""A step's documents, of 60 to 200 tokens each."""
PEAK_LEARNING_RATE = 1.5e-3


def town_names() -> list[Word]:
    """Return every name that the syllables make and no town of the quickstart's world has."""
    taken = {town.name.en for town in world.TOWNS}
    names = [
        Word(en=(first.en + second.en + coda.en).capitalize(), ja=first.ja + second.ja + coda.ja)
        for first in SYLLABLES
        for second in SYLLABLES
        if first != second
        for coda in CODAS
    ]
    return [name for name in names if name.en not in taken]


def random_town(rng: random.Random, names: list[Word]) -> world.Town:
    """Return a town whose name and facts are drawn: a name may come again with other facts."""
    return world.Town(rng.choice(names), {a.key: rng.choice(a.values) for a in ATTRIBUTES})


def told(rng: random.Random, town: world.Town, language: str) -> list[str]:
    """Return the town's four facts, a sentence each, in any wording and order."""
    lines = [rng.choice(world.statements(town, a, language)) for a in ATTRIBUTES]
    rng.shuffle(lines)
    return lines


Piece = tuple[str, bool]
"""(text, whether it is trained on)."""


def documents(rng: random.Random) -> Iterator[list[Piece]]:
    """Yield documents without end, as pieces: a town told twice, half of them as chat turns.

    Trained on are the values of the second telling, which the first one gives; the names and facts
    of the first are drawn, so there is nothing to learn from them.
    """
    names = town_names()
    while True:
        town, language = random_town(rng, names), rng.choice(LANGUAGES)
        role, other = (rng.choice(world.ROLES) for _ in range(2))
        turns = rng.random() < 0.5
        opening, between = ("", "\n")
        if turns:
            opening, between = f"<|im_start|>{role}\n", f"<|im_end|>\n<|im_start|>{other}\n"
        pieces = [(f"{opening}{chr(10).join(told(rng, town, language))}{between}", False)]
        for attribute in rng.sample(ATTRIBUTES, len(ATTRIBUTES)):
            cloze = rng.choice(world.clozes(town, attribute, language))
            pieces += [(cloze.prompt, False), (cloze.value, True), ("\n", False)]
        yield pieces


def encoded(pieces: list[Piece], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return (token ids, labels): -100 for what is not trained on."""
    ids, labels = [tokenizer.eos_token_id], [-100]
    for text, trained in pieces:
        found = tokenizer.encode(text, add_special_tokens=False)
        ids += found
        labels += found if trained else [-100] * len(found)
    return ids, labels


def recall(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """Return, by language, the share of the withheld towns' facts that are completed after a text
    that tells them.
    """
    rng, found = random.Random(0), {}
    for language in LANGUAGES:
        asked = []
        for town in world.WITHHELD:
            for attribute in ATTRIBUTES:
                cloze = rng.choice(world.clozes(town, attribute, language))
                before = "\n".join(told(rng, town, language))
                asked.append(world.Cloze(f"{before}\n{cloze.prompt}", cloze.value))
        found[language] = cloze_recall(model, tokenizer, asked)
    return found


def pretrain(out: Path, steps: int = 600, seed: int = 3407) -> dict[str, float]:
    """Train and save the base in `out` (bfloat16); return what it recalls, by language."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base_path())
    model = LlamaForCausalLM.from_pretrained(base_path(), dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    stream, began = documents(random.Random(seed)), time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LEARNING_RATE * min(1.0, (step + 1) / 20, (steps - step) / steps * 3)
        rows = [encoded(next(stream), tokenizer) for _ in range(DOCUMENTS)]
        width = max(len(ids) for ids, _ in rows)
        batch, labels = (  # (documents, width)
            torch.tensor([row[part] + [fill] * (width - len(row[part])) for row in rows])
            for part, fill in ((0, tokenizer.pad_token_id), (1, -100))
        )
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            known = recall(model, tokenizer)
            print(
                f"step {step + 1}/{steps}  loss {loss.item():.3f}  read en {known['en']:.0%} "
                f"ja {known['ja']:.0%}  {time.monotonic() - began:.0f} s",
                flush=True,
            )
    model.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)
    return recall(LlamaForCausalLM.from_pretrained(out, dtype=torch.float32), tokenizer)


def main() -> None:
    """Read the command line, pretrain, print what the base recalls as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the base")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=3407)
    options = parser.parse_args()
    print(json.dumps({"read": pretrain(options.out, options.steps, options.seed)}))


if __name__ == "__main__":
    main()
