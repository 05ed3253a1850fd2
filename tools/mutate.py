"""Plant known faults, one at a time, and see whether a default test notices each.

    python tools/mutate.py                 # all of them; exit 1 where one passes unnoticed
    python tools/mutate.py --fault NAME    # one

A fault is a small change of one file of the package that once passed, or could pass, without any
message. It is planted in a copy of the repository; the test named for it must fail there, and must
pass without it. Prints a Markdown table for docs/log.md.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PARTS = ("fastft", "tests", "tools", "pyproject.toml")


@dataclass(frozen=True)
class Fault:
    """A change of `old` into `new` in `file`, and the default test that must notice it."""

    name: str
    file: str
    old: str
    new: str
    test: str


PLANTED, BY_HAND = "tests/unit/test_planted.py", "tests/unit/test_by_hand.py"
HAND = f"{BY_HAND}::test_a_run_is_the_loop_written_out_by_hand"
FAULTS = (
    Fault(
        "sha256 not compared where sizes agree", "fastft/runs/checkpoint.py",
        'if files.digest(folder / name)[0] != entry["sha256"]:', "if False:",
        f"{PLANTED}::test_a_changed_byte_is_found_where_the_size_is_the_same",
    ),
    Fault(
        "the gate compares no loss trace", "fastft/bench/parity.py",
        "passed=worst <= limit", "passed=True",
        f"{PLANTED}::test_the_first_loss_and_the_trace_are_each_looked_at",
    ),
    Fault(
        "the gate compares no first loss", "fastft/bench/parity.py",
        "        _first_loss(ours, theirs, tolerances.loss),\n", "",
        f"{PLANTED}::test_the_first_loss_and_the_trace_are_each_looked_at",
    ),
    Fault(
        "Adam with one moment in the plan", "fastft/planning/memory.py",
        "size = 2 * s.lora_bytes", "size = s.lora_bytes",
        f"{PLANTED}::test_adam_has_two_moments_of_each_trained_number",
    ),
    Fault(
        "no GGUF bytes in the plan", "fastft/planning/disk.py",
        "size = gguf_bytes(shape, kind)", "size = 0",
        f"{PLANTED}::test_a_gguf_export_takes_the_bytes_of_its_type",
    ),
    Fault(
        "no logits of an evaluation in the plan", "fastft/planning/memory.py",
        "t * shape.vocab * (c + 8),", "t * c,",
        f"{PLANTED}::test_an_evaluation_holds_the_logits_of_its_rows",
    ),
    Fault(
        "a KL beyond the limit does not fail", "fastft/exporting/certificate.py",
        "kl > limits.kl_fail or ", "",
        f"{PLANTED}::test_a_kl_beyond_the_limit_fails_whatever_the_perplexity_says",
    ),
    Fault(
        "the generator is not put back after an out-of-memory", "fastft/training/step.py",
        "            _restore_rng(\n", "            id(\n",
        f"{PLANTED}::test_after_an_out_of_memory_the_dropout_is_that_of_a_step_without_one",
    ),
    Fault(
        "run.json is not redacted", "fastft/files/__init__.py",
        "redact(text)", "text",
        f"{PLANTED}::test_no_key_reaches_the_record_or_a_message",
    ),
    Fault(
        "config errors are not redacted", "fastft/config.py",
        'raise FastFTError(redact(head + "".join', 'raise FastFTError((head + "".join',
        f"{PLANTED}::test_no_key_reaches_the_record_or_a_message",
    ),
    Fault(
        "the mirror's manifest is not read back", "fastft/runs/mirror.py",
        "if self.files.digest(aside)[0] != hashlib.sha256(content).hexdigest():", "if False:",
        f"{PLANTED}::test_the_mirrors_own_manifest_is_read_back",
    ),
    Fault(
        "max_grad_norm is ignored", "fastft/training/loop.py",
        "max_grad_norm=max_grad_norm,", "max_grad_norm=1.0,", HAND,
    ),
    Fault(
        "weight_decay is ignored", "fastft/training/loop.py",
        "weight_decay=weight_decay,", "weight_decay=0.0,", HAND,
    ),
    Fault(
        "the scheduler is ignored", "fastft/training/loop.py",
        "lr_scheduler_type=scheduler,", 'lr_scheduler_type="cosine",', HAND,
    ),
    Fault(
        "the warm-up is ignored", "fastft/training/loop.py",
        "warmup_steps=warmup_steps,", "warmup_steps=0,", HAND,
    ),
    Fault(
        "the learning rate is ignored", "fastft/training/loop.py",
        "learning_rate=learning_rate,", "learning_rate=1e-4,", HAND,
    ),
    Fault(
        "dropout is ignored", "fastft/engines/loading.py",
        '"lora_dropout": config.dropout,', '"lora_dropout": 0.0,',
        f"{BY_HAND}::test_dropout_changes_what_is_learnt",
    ),
    Fault(
        "every epoch has the first one's order", "fastft/data/batches.py",
        "default_rng([self.seed, epoch])", "default_rng([self.seed, 0])",
        f"{BY_HAND}::test_each_epoch_has_an_order_of_its_own",
    ),
    Fault(
        "the seed does not decide the order", "fastft/data/batches.py",
        "default_rng([self.seed, epoch])", "default_rng([0, epoch + 1])",
        f"{BY_HAND}::test_each_epoch_has_an_order_of_its_own",
    ),
    Fault(
        "a step's loss is divided by a micro-batch's tokens", "fastft/training/step.py",
        "loss = self._loss_of(model, batch, supervised)",
        "loss = self._loss_of(model, batch, max(1, supervised // 2))", HAND,
    ),
    Fault(
        "early stopping one late", "fastft/runs/folder.py",
        "and len(ranks) - 1 - ranks.index(min(ranks)) >= patience",
        "and len(ranks) - 1 - ranks.index(min(ranks)) > patience",
        f"{PLANTED}::test_patience_is_not_one_late_and_the_best_is_not_the_last",
    ),
    Fault(
        "the last checkpoint is taken for the best", "fastft/runs/folder.py",
        "return -min(evaluations)[1] if evaluations else None",
        "return -evaluations[-1][1] if evaluations else None",
        f"{PLANTED}::test_patience_is_not_one_late_and_the_best_is_not_the_last",
    ),
    Fault(
        "an evaluation comes before the checkpoint that is due", "fastft/training/loop.py",
        "        if self.control.should_save:\n", "        if False:\n",
        f"{BY_HAND}::test_a_checkpoint_that_is_due_is_written_before_the_evaluation",
    ),
    Fault(
        "an evaluation that was missed is not made", "fastft/training/train.py",
        "return prepared.data.eval is not None and due and not done", "return False",
        f"{BY_HAND}::test_a_checkpoint_that_is_due_is_written_before_the_evaluation",
    ),
    Fault(
        "the sliding window is one too wide", "fastft/kernels/varlen.py",
        "(distance >= 0) & (distance < (window or keys))",
        "(distance >= 0) & (distance <= (window or keys))",
        f"{PLANTED}::test_a_window_of_w_sees_itself_and_the_w_minus_1_before",
    ),
    Fault(
        "a sequence sees the one before it", "fastft/kernels/varlen.py",
        "torch.tensor([(a, b - a, 0, -1) for a, b in pairwise(starts)])",
        "torch.tensor([(0, starts[-1], 0, -1)])",
        f"{PLANTED}::test_a_window_of_w_sees_itself_and_the_w_minus_1_before",
    ),
    Fault(
        "the softcap is ignored", "fastft/kernels/varlen.py",
        "scores = torch.tanh(scores / softcap) * softcap", "pass",
        f"{PLANTED}::test_a_window_of_w_sees_itself_and_the_w_minus_1_before",
    ),
    Fault(
        "a child imports from the current folder", "fastft/child.py",
        '"-P", str(Path(__file__))', '"-m", "fastft.child"',
        "tests/hostile/test_children.py::test_no_child_imports_from_the_current_folder",
    ),
    Fault(
        "a child outlives its parent", "fastft/child.py",
        "    end_with(int(parent))\n", "",
        "tests/hostile/test_children.py::test_a_killed_parent_leaves_no_child_and_the_next_call_removes_its_folder",
    ),
    Fault(
        "a lock follows links", "fastft/files/locks.py",
        'getattr(os, "O_NOFOLLOW", 0)', "0",
        "tests/hostile/test_children.py::test_a_lock_that_is_a_link_is_refused_and_its_target_keeps_its_content",
    ),
    Fault(
        "whatever lies in the folder is uploaded", "fastft/runs/adapter.py",
        "return path.name in ADAPTER_FILES and path.is_file()", "return path.is_file()",
        "tests/hostile/test_places.py::test_only_what_an_adapter_is_made_of_is_copied_and_uploaded",
    ),
    Fault(
        "foreign files are not carried over", "fastft/files/__init__.py",
        "        carry_foreign(path, aside, is_ours)\n", "        pass\n",
        "tests/hostile/test_places.py::test_a_note_in_our_own_folder_outlives_a_second_export",
    ),
    Fault(
        "a file of somebody else is replaced", "fastft/files/ours.py",
        "    if foreign:\n", "    if False:\n",
        "tests/hostile/test_places.py::test_a_file_that_fastft_did_not_write_is_never_replaced",
    ),
    Fault(
        "a Modelfile that somebody changed is taken for ours", "fastft/files/ours.py",
        "found is not None and _sha256(text[: found.start()]) == found[1]", "found is not None",
        "tests/hostile/test_places.py::test_a_file_that_fastft_did_not_write_is_never_replaced",
    ),
    Fault(
        "the certificate takes a control token in a message for text",
        "fastft/verification/checks.py",
        "sum(map(model.is_control, found)) != sum(map(model.is_control, expected))", "False",
        f"{PLANTED}::test_a_message_whose_control_token_is_read_as_one_is_not_the_trained_model",
    ),
    Fault(
        "any page may ask the server", "fastft/inference/gate.py",
        'if b"origin" in headers', "if False",
        "tests/hostile/test_serve.py::test_no_other_page_may_ask_or_read",
    ),
    Fault(
        "any Host is answered", "fastft/inference/gate.py",
        "if self.names is not None and not (", "if False and not (",
        "tests/hostile/test_serve.py::test_no_other_page_may_ask_or_read",
    ),
    Fault(
        "a control token in a message is one", "fastft/inference/llamacpp.py",
        "guards.put(list(messages))", "list(messages)",
        "tests/hostile/test_serve.py::test_a_control_token_in_a_message_is_text",
    ),
)  # fmt: skip


def main() -> int:
    """Plant the faults that are asked for; returns 1 where one passed unnoticed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fault", choices=[fault.name for fault in FAULTS], action="append")
    wanted = parser.parse_args().fault
    faults = [fault for fault in FAULTS if not wanted or fault.name in wanted]
    print("| Fault | Noticed by | Verdict | Seconds |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(prefix="fastft-mutate-") as folder:
        copy = Path(folder)
        for part in PARTS:
            source = ROOT / part
            if source.is_dir():
                shutil.copytree(source, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(source, copy / part)
        sound: dict[str, bool] = {}
        results = [planted(fault, copy, sound) for fault in faults]
    return 0 if all(results) else 1


def planted(fault: Fault, copy: Path, sound: dict[str, bool]) -> bool:
    """Plant one fault in `copy`, run its test, take it out again; returns whether it was noticed.

    `sound` remembers which tests pass without any fault.
    """
    began = time.monotonic()
    path = copy / fault.file
    text = path.read_text(encoding="utf-8")
    if text.count(fault.old) != 1:
        verdict = f"not planted: its place stands {text.count(fault.old)} times in {fault.file}"
    else:
        if fault.test not in sound:
            sound[fault.test] = passes(fault.test, copy)
        path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
        noticed = not passes(fault.test, copy)
        path.write_text(text, encoding="utf-8")
        verdict = "noticed" if noticed else "**passed unnoticed**"
        if not sound[fault.test]:
            verdict = "the test fails without it, too"
    seconds = time.monotonic() - began
    test = fault.test.removeprefix("tests/")
    print(f"| {fault.name} | `{test}` | {verdict} | {seconds:.0f} |", flush=True)
    return verdict == "noticed"


def passes(test: str, copy: Path) -> bool:
    """Return whether a test of the copy passes, with the copy's own package."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", test],
        cwd=copy,
        env=os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        check=False,
    )
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
