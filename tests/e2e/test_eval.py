"""`fastft eval` on the quickstart's base: against a direct computation, and against lm-eval itself."""

import json
import math
from pathlib import Path

import pytest
import yaml

from fastft.quickstart import base_path, exact_match, world, write_task
from fastft.verification.evaluation import evaluate
from tests.e2e.conftest import fastft, losses


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def choices(tmp_path_factory):
    """60 questions with four choices each: the right value, and those of three other towns."""
    rows = []
    for i, town in enumerate(world.HELD_OUT[:15]):
        for attribute in world.ATTRIBUTES:
            asked, answer = world.question(town, attribute, "en")["messages"]
            others = [t.facts[attribute.key].en for t in world.HELD_OUT]
            wrong = [v for v in dict.fromkeys(others[i:] + others) if v != answer["content"]][:3]
            at = len(rows) % 4
            options = [*wrong[:at], answer["content"], *wrong[at:]]
            rows.append({"question": asked["content"], "choices": options, "answer": at})
    return write_rows(tmp_path_factory.mktemp("mc") / "choices.jsonl", rows)


@pytest.mark.long
def test_choices_agree_with_lm_eval(choices, tmp_path):
    pytest.importorskip("lm_eval")
    from fastft.verification.harness import run_tasks

    task = {
        "task": "towns",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(choices)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    (tmp_path / "towns.yaml").write_text(yaml.safe_dump(task))
    theirs = run_tasks(base_path(), ["towns"], folder=tmp_path, dtype="float32")
    ours = evaluate(base_path(), data=choices, out=tmp_path / "out", dtype="float32")
    (their,), (our,) = theirs["models"], ours["models"]
    assert their["scores"]["towns acc"]["value"] == our["scores"]["choice"]["value"]
    assert their["scores"]["towns acc_norm"]["value"] == our["scores"]["choice_norm"]["value"]
    assert 0.25 < our["scores"]["choice"]["value"] < 1  # it knows some, so agreement says something
    assert theirs["rows"] == ours["rows"] == 60


def test_answers_and_likelihoods_agree_with_a_direct_computation(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fastft.data.encode import generation_prompt
    from fastft.data.template import choose_template

    files = write_task(tmp_path)
    rows = [json.loads(line) for line in files.heldout.read_text().splitlines()][:12]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    metrics = ["exact_match", "perplexity", "bits_per_byte"]
    found = evaluate(base_path(), data=data, metric=metrics, out=tmp_path / "out", dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(base_path())
    model = AutoModelForCausalLM.from_pretrained(base_path(), dtype=torch.float32).eval()
    template = choose_template(tokenizer, None)
    said, nats, tokens, size = [], 0.0, 0, 0
    for row in rows:
        asked, answer = row["messages"][:-1], row["messages"][-1]["content"]
        prompt = torch.tensor([generation_prompt(tokenizer, template, asked)])
        out = model.generate(
            prompt, max_new_tokens=32, do_sample=False, eos_token_id=list(template.end_token_ids)
        )
        said.append(tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True))
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        logits = model(torch.cat([prompt, torch.tensor([ids])], dim=1)).logits[0].log_softmax(-1)
        nats -= sum(float(logits[prompt.shape[1] - 1 + i, t]) for i, t in enumerate(ids))
        tokens, size = tokens + len(ids), size + len(answer.encode())
    scores = found["models"][0]["scores"]
    answers = [row["messages"][-1]["content"] for row in rows]
    assert scores["exact_match"]["value"] == exact_match(said, answers)
    assert scores["perplexity"]["value"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert scores["bits_per_byte"]["value"] == pytest.approx(nats / math.log(2) / size, rel=1e-4)


def test_a_planted_worse_adapter_is_told_apart(tmp_path):
    """An adapter that is noise, beside the base it stands on."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base_path()),
        LoraConfig(r=4, target_modules="all-linear"),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(tmp_path / "noise")
    AutoTokenizer.from_pretrained(base_path()).save_pretrained(tmp_path / "noise")
    rows = [{"text": text} for town in world.HELD_OUT[:30] for text in
            ("\n".join(world.statements(town, a, "en")[0] for a in world.ATTRIBUTES),)]  # fmt: skip
    data = write_rows(tmp_path / "texts.jsonl", rows)
    found = evaluate(tmp_path / "noise", data=data, base=str(base_path()), out=tmp_path / "out")
    verdicts = {entry["metric"]: entry["verdict"] for entry in found["comparisons"]}
    assert verdicts == {"bits_per_byte": "worse", "perplexity": "worse"}
    assert (tmp_path / "out/index.html").read_text().count("worse") >= 2


@pytest.mark.long
def test_metrics_during_training_leave_the_losses_as_they_are(checkpoint_of, write_config):
    """With dropout: answering draws no random number. The values go to the trackers too."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    runs = {}
    for name, train in (("plain", {}), ("judged", {"eval_metrics": ["contains"]})):
        steps = {"max_steps": 6, "eval_steps": 3, "report_to": ["tensorboard"]}
        config = write_config(checkpoint_of("llama"), project=name, train=steps | train)
        done = fastft("train", config, "--json")
        assert done.code == 0, done.err
        runs[name] = Path(done.json["run"])
    assert losses(runs["judged"]) == losses(runs["plain"])
    lines = [json.loads(line) for line in (runs["judged"] / "log.jsonl").read_text().splitlines()]
    judged = [line for line in lines if "contains" in line]
    assert [line["step"] for line in judged] == [3, 6]
    assert all(0 <= line["contains"] <= 1 and len(line["samples"]) == 3 for line in judged)
    events = EventAccumulator(str(runs["judged"] / "tensorboard")).Reload()
    assert {"eval/loss", "eval/contains", "train/tokens_per_sec", "train/peak_memory_gib"} <= set(
        events.Tags()["scalars"]
    )
