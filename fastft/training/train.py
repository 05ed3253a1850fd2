"""`fastft train`: from a config to a run folder with a trained adapter, through kills and restarts.

choose -> hold the run's lock -> tokenizer and data -> base model and LoRA -> before -> train ->
after -> final/

What is loaded and how a step is computed is `session.py`'s; here is the run around it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import socket
import time
import traceback
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastft.config import TRACKERS, RunConfig
from fastft.data.read import GIVEN
from fastft.engines import loading
from fastft.errors import CouldNotFinishError, FastFTError, InterruptedRunError, explained
from fastft.files import write_atomically
from fastft.hardware import Choice, Hardware, probe
from fastft.models import location
from fastft.planning import several
from fastft.progress import Reporter, silent
from fastft.runs import checkpoint
from fastft.runs.adapter import write_adapter
from fastft.runs.fingerprint import differences
from fastft.runs.folder import RunFolder, best_step, machine, now, out_of_patience, versions
from fastft.runs.mirror import FLUSH_SECONDS, INTERRUPTED_FLUSH_SECONDS, Mirror
from fastft.training import ranks
from fastft.training.kept import Kept
from fastft.training.session import (
    Loop,
    Opened,
    Prepared,
    Session,
    give_back_memory,
    overrides_forgotten,
)
from fastft.training.sharded import is_sharded

if TYPE_CHECKING:
    from fastft.data import Prepared as PreparedData

DATASET_KEYS = {
    "format", "rows_total", "rows_used", "dropped", "tokens", "trained_tokens", "truncated",
    "duplicates", "leakage", "sources",
}  # fmt: skip
"""What run.json keeps of the data's report."""


@dataclass(frozen=True)
class RunResult:
    """How a call of `train` ended."""

    run: str
    """The run's folder."""
    status: str
    """done, or paused (--stop-after, max_minutes): the same command goes on."""
    steps: int
    total_steps: int
    train_loss: float | None
    """Mean loss per trained token over the last tenth of the steps."""
    eval_loss_before: float | None
    eval_loss_after: float | None
    tokens_per_sec: float | None
    """Without padding, median over all of the run's steps."""
    seconds: float
    final: str | None
    """The adapter's folder, once the run is done."""
    trained: bool = True
    """False where the run was finished before, and this call did nothing."""


def train(
    config: RunConfig,
    *,
    data: Any = None,
    stop_after: int | None = None,
    reporter: Reporter | None = None,
    kept: Kept | None = None,
) -> RunResult:
    """Train as `config` says, or go on where an earlier call of the same run stopped; returns how
    it ended.

    `data` (a list of rows, or a `datasets.Dataset`) is trained on instead of the config's source; a
    later call with the same rows goes on. `stop_after` ends after so many more steps and leaves the
    schedule as it is. Raises FastFTError (input), CouldNotFinishError (out of memory, NaN, disk),
    InterruptedRunError (Ctrl-C, SIGTERM); state is saved. `kept` holds what earlier runs of this
    process have loaded (a sweep); all else is freed, on the GPU too, before this returns.
    """
    try:
        with overrides_forgotten():
            return _train_run(config, data, stop_after, reporter, kept)
    except Exception as error:
        # A notebook keeps the last traceback, and its frames would keep the model on the GPU.
        traceback.clear_frames(error.__traceback__)
        if not isinstance(error, FastFTError) and (told := explained(error)) is not None:
            raise told from error
        raise
    finally:
        give_back_memory()


def _train_run(
    config: RunConfig,
    data: Any,
    stop_after: int | None,
    reporter: Reporter | None,
    kept: Kept | None,
) -> RunResult:
    """Choose, open the run's folder, and start or go on."""
    started = time.monotonic()
    ranks.join(config.train.lost_after_minutes)
    report = (reporter or Reporter()) if ranks.first() else silent()
    if stop_after is not None and stop_after < 1:
        raise FastFTError(f"--stop-after is {stop_after}; it must be at least 1.")
    # Absolute, so that the run, its adapter and its certificates find their base from every folder.
    config = config.model_copy(
        update={"model": config.model.model_copy(update={"name": location(config.model.name)})}
    )
    if data is not None:
        source = config.data.model_copy(update={"source": GIVEN, "sources": []})
        config = config.model_copy(update={"data": source})
    _refuse_what_is_not_there(config)
    hardware = _part_of(probe(config.output_dir))
    share = several.share_of(config, ranks.world().size)
    choices = loading.choose_loading(share, hardware)
    _refuse_unlike_choices(choices)
    _note_other_cards(hardware, report)
    run = RunFolder(config.run_dir, writes=ranks.first())
    with contextlib.ExitStack() as stack:
        with ranks.first_before_the_others("opening the run's folder"):
            mirror = _open_folder(stack, config, run, report)
        newest, started_before = ranks.from_the_first(_look(run, report))
        session = Session(
            config,
            hardware,
            choices=choices,
            report=report,
            stop_after=stop_after,
            started=started,
            mirror=mirror,
            rows=data,
            kept=kept,
        )
        if not started_before:
            return _start(session)
        moved = checkpoint.refuse_differences(run.read_config().model_dump(), config)
        return _go_on(session, newest, moved)


def _part_of(machine: Hardware) -> Hardware:
    """Return the machine with this process's part of its RAM, where several share it."""
    free = machine.ram_free_bytes // ranks.world().local_size
    return replace(machine, ram_free_bytes=free)


def _refuse_unlike_choices(choices: dict[str, Choice]) -> None:
    """Raise FastFTError where the processes would train unlike models.

    The token budget and gradient checkpointing may differ: they change no gradient.
    """
    names = ("engine", "quantization", "dtype", "optimizer")
    ranks.refuse_unlike(
        "what they chose by their hardware; set model.engine, model.quantization, model.dtype and "
        "train.optimizer to what all of them can do",
        {name: choices[name].value for name in names},
    )


def _note_other_cards(hardware: Hardware, report: Reporter) -> None:
    """Say that one process uses one GPU, where there are more."""
    if hardware.kind == "cuda" and hardware.gpu_count > 1 and ranks.world().size == 1:
        report.note(
            f"{hardware.gpu_count} GPUs are visible and one process trains on the first; "
            f"--processes {hardware.gpu_count} uses all"
        )


def _open_folder(
    stack: contextlib.ExitStack, config: RunConfig, run: RunFolder, report: Reporter
) -> Mirror | None:
    """Hold the run's lock and bring here what the mirror has newer; in the first process alone.

    Raises FastFTError in a process that does not see the folder that the first one made.
    """
    if run.writes:
        stack.enter_context(checkpoint.hold(run.path))
        return stack.enter_context(_mirrored(config, run, report))
    if not run.path.is_dir():
        here = ranks.world()
        raise FastFTError(
            f"process {here.rank} of {here.size}, on {socket.gethostname()}, does not see "
            f"{run.path}, which the first process made. Set output_dir to a disk that all "
            "machines share."
        )
    return None


def _look(run: RunFolder, report: Reporter) -> tuple[Path | None, bool] | None:
    """Return the newest whole checkpoint and whether the run was started before; in the first
    process alone.
    """
    if not run.writes:
        return None
    newest, warnings = checkpoint.newest_whole(run.checkpoints)
    for warning in [*warnings, *run.repair_state(newest)]:
        report.warn(warning)
    started = run.is_started()
    if not started:
        run.refuse_foreign()
    return newest, started


def _start(session: Session) -> RunResult:
    """A new run."""
    opened = session.open()
    data = session.read_data(opened)
    prepared = session.prepare(opened, data)
    run, config = session.run, session.config
    run.write_config(config)
    run.update_record(
        run_id=uuid.uuid4().hex,
        started=now(),
        base=opened.base,
        machine=_here(),
        versions=versions(),
        hardware=_plain(asdict(session.hardware)),
        seed=config.train.seed,
        choices={k: {"value": c.value, "reason": c.reason} for k, c in prepared.choices.items()},
        patches=prepared.engine.patches(),
        trainable_parameters=prepared.trainable,
        dataset={"fingerprint": data.fingerprint, **data.report.model_dump(include=DATASET_KEYS)},
        template={"name": data.template.name, "why": data.template.why},
        processes=ranks.everybodys(machine()),
        total_steps=session.total_steps(data),
    )
    _keep_samples(run, data)
    loop = session.loop(prepared)
    before = _judge_untrained(session, prepared, loop)
    if before is not None:
        session.report.note(f"held-out loss before training: {before:.4f}")
    return _train(session, prepared, loop, resume_from=None)


def _go_on(session: Session, newest: Path | None, moved: list[str]) -> RunResult:
    """A run that exists: finished, to be resumed from `newest`, or killed before its first
    checkpoint. `moved` are its paths that are others than when it was started.
    """
    run, report = session.run, session.report
    record = ranks.from_the_first(run.read_record())
    opened = session.open()
    _refuse_another_base(session, opened, record, moved)
    data = session.read_data(opened)
    _refuse_other_data(session, data, record)
    run.write_config(session.config)  # with what may change, and the paths of this machine
    at = checkpoint.step_of(newest) if newest else 0
    session.history.extend(entry for entry in run.read_log() if entry["step"] <= at)
    stopped_early = bool(record.get("stopped_early")) or out_of_patience(
        session.history, session.config.train.early_stopping_patience
    )
    trained = newest is not None and (at >= session.total_steps(data) or stopped_early)
    if trained and record.get("status") == "done" and _final_is_whole(session, at):
        report.note(f"this run is finished ({at} steps); its adapter is in {run.final}")
        return replace(_result_of(run, "done"), trained=False)
    run.cut_log(at)
    prepared = session.prepare(opened, data)
    loop = session.loop(prepared)
    report.note(
        f"resuming after step {at}"
        if newest
        else "the run was stopped before its first checkpoint; starting over"
    )
    _note_differences(session, prepared, record, at, moved)
    if not run.samples.is_file():
        _keep_samples(run, data)
    if "samples_before" not in record:
        _judge_untrained(session, prepared, loop)
    if newest and ranks.from_the_first(_owes_an_evaluation(session, prepared, at)):
        report.note(f"the run was stopped before the evaluation of step {at}, which is made now")
        loop.trainer.take(newest)
        loop.trainer.state.global_step = at
        loop.trainer.evaluate()
        stopped_early = stopped_early or out_of_patience(
            session.history, session.config.train.early_stopping_patience
        )
        trained = trained or stopped_early
    if newest and trained:
        loop.trainer.take(newest)
        loop.trainer.state.global_step, loop.trainer.stopped_early = at, stopped_early
        _finish(session, prepared, loop)
        return _result_of(run, "done", time.monotonic() - session.started)
    return _train(session, prepared, loop, resume_from=newest)


def _owes_an_evaluation(session: Session, prepared: Prepared, at: int) -> bool:
    """Whether the run was ended between the checkpoint of step `at` and the evaluation that was
    due there, too: checkpoints come first.
    """
    done = any("eval_loss" in entry for entry in session.history if entry["step"] == at)
    due = at % session.config.train.eval_steps == 0 or at == session.total_steps(prepared.data)
    return prepared.data.eval is not None and due and not done


def _refuse_another_base(
    session: Session, opened: Opened, record: dict[str, Any], moved: list[str]
) -> None:
    """Raise FastFTError where the base is not the one that the run was started with."""
    name, was = session.config.model.name, record.get("base")
    if was is None and any(line.startswith("model.name") for line in moved):
        raise FastFTError(
            f"{'; '.join(moved)}, and this run was started by a version that did not "
            "record which base that was. "
            "Put the path back to go on."
        )
    found = differences(was, opened.base) if was is not None else []
    if found:
        raise FastFTError(
            f"the base model {name} is not the one that the run in {session.run.path} was "
            "started with:\n"
            + "\n".join(f"  - {line}" for line in found)
            + "\nPut the old one back to go on (for a Hub id: set model.revision to its "
            "commit), or start a new run with "
            "another project name."
        )


def _refuse_other_data(session: Session, data: PreparedData, record: dict[str, Any]) -> None:
    """Raise FastFTError where the data is not what the run was started with."""
    was = record.get("dataset", {}).get("fingerprint") or "unknown"
    if data.fingerprint != was:
        raise FastFTError(
            f"the data of the run in {session.run.path} has changed since it was started "
            f"(fingerprint {was[:12]}, now "
            f"{data.fingerprint[:12]}: content, tokenizer, template or data settings). Put "
            "data.source (or data.sources) and the other data settings back to go "
            "on, or start a new run beside it under another name: fastft train CONFIG "
            f"project={session.config.project}-2"
        )


def _final_is_whole(session: Session, at: int) -> bool:
    """Whether final/ holds the trained adapter; a warning says why not."""
    problem = checkpoint.what_is_wrong(session.run.final, required=("adapter_model.safetensors",))
    if problem is not None:
        session.report.warn(
            f"final/ is damaged ({problem}); it is written again from the checkpoint of step {at}"
        )
    return problem is None


def _note_differences(
    session: Session, prepared: Prepared, record: dict[str, Any], at: int, moved: list[str]
) -> None:
    """Write down in run.json what is another machine's: it can move the last digits, never the
    order of the data.
    """
    if record.get("versions") != versions():
        session.report.warn(
            "the run was started with other versions "
            f"({_changed(record.get('versions', {}), versions())}); losses may differ"
        )
        session.run.update_record(versions_on_resume=versions())
    resumed = record.get("resumed", [])
    here = _here()
    last = [record.get("machine") or {}, *(entry["machine"] for entry in resumed)][-1]
    last = {"processes": 1} | last
    processes = ranks.everybodys(machine())
    chosen = {k: f"{v['value']} -> {c.value}" for k, v in record.get("choices", {}).items()
              if (c := prepared.choices.get(k)) is not None and c.value != v["value"]}  # fmt: skip
    if here == last and not moved and not chosen:
        return
    entry = {"after_step": at, "at": now(), "machine": here, "paths": moved, "choices": chosen,
             "processes": processes}  # fmt: skip
    session.run.update_record(resumed=[*resumed, entry])
    changed = [
        f"{key} {last.get(key)} -> {here[key]}" for key in here if here[key] != last.get(key)
    ]
    changed += [*moved, *(f"{key} {change}" for key, change in chosen.items())]
    session.report.note(
        f"going on elsewhere: {'; '.join(changed)}; the order of the data is the same"
    )


def _judge_untrained(session: Session, prepared: Prepared, loop: Loop) -> float | None:
    """Record the held-out loss and the answers of the untrained adapter; returns the loss."""
    trainer = loop.trainer
    before = trainer.mean_loss(trainer.held_out) if trainer.held_out is not None else None
    if ranks.first():
        session.run.update_record(eval_loss_before=before, samples_before=_sample_answers(prepared))
    return before


def _train(session: Session, prepared: Prepared, loop: Loop, resume_from: Path | None) -> RunResult:
    """The loop itself, then final/ and the report; or a clean stop."""
    run, trainer, total = session.run, loop.trainer, session.total_steps(prepared.data)
    run.update_record(status="started")  # "done" would be that of an earlier, shorter run
    try:
        with session.report.training(total):
            loop.run(resume_from)
    finally:
        run.plot_loss()
        session.live.show(session.history, now=True)
    run.update_record(
        seconds_training=run.read_record().get("seconds_training", 0)
        + time.monotonic()
        - trainer.progress.started,
        seconds_saving=trainer.progress.saving_seconds,
        micro_batch_tokens_used=trainer.policy.micro_batch_tokens,
    )
    step = trainer.state.global_step
    if trainer.stopped_by_signal:
        raise InterruptedRunError(
            f"stopped after step {step} of {total}; state saved. The same command goes on."
        )
    if loop.memory.advice or (step < total and not trainer.stopped_early):
        run.update_record(status="paused", steps=step, total_steps=total)
        if loop.memory.advice:
            raise CouldNotFinishError(
                f"stopped after step {step} of {total} (state saved): {loop.memory.advice}."
            )
        session.report.note(f"paused after step {step} of {total}; the same command goes on")
        return _result_of(run, "paused", time.monotonic() - session.started)
    _finish(session, prepared, loop)
    return _result_of(run, "done", time.monotonic() - session.started)


def _finish(session: Session, prepared: Prepared, loop: Loop) -> None:
    """Take the best checkpoint, judge it, write final/, the plot and the report; the first process
    does.
    """
    from fastft.runs.report import write_report

    if not ranks.first():
        return
    run, trainer = session.run, loop.trainer
    last = trainer.state.global_step
    best = _best_whole_step(session, last)
    if best is not None and best != last:
        session.report.note(
            f"the held-out {_judged_by(session)} at step {best}; that checkpoint becomes final/"
        )
        loop.trainer.take(run.checkpoints / f"checkpoint-{best}")
    after = next(
        (r["eval_loss"] for r in session.history if r["step"] == best and "eval_loss" in r), None
    )
    run.update_record(
        eval_loss_after=after, best_step=best, stopped_early=trainer.stopped_early, steps=last,
        total_steps=session.total_steps(prepared.data), samples_after=_sample_answers(prepared),
    )  # fmt: skip
    write_adapter(
        prepared.model,
        prepared.tokenizer,
        run.final,
        config=session.config,
        record=run.read_record(),
        end_token_ids=list(prepared.data.template.end_token_ids),
        initial=prepared.initial,
    )
    run.update_record(status="done", finished=now())
    write_report(run)
    session.report.samples(run.read_record())


def _judged_by(session: Session) -> str:
    by = session.config.train.best_by
    return "loss was lowest" if by == "loss" else f"{by.replace('_', ' ')} was highest"


def _best_whole_step(session: Session, last: int) -> int | None:
    """The step with the best evaluation of those whose checkpoint is whole (or is the model as it
    is now).
    """
    history = list(session.history)
    while (best := best_step(history)) is not None and best != last:
        problem = checkpoint.what_is_wrong(session.run.checkpoints / f"checkpoint-{best}")
        if problem is None:
            break
        session.report.warn(
            f"checkpoint-{best} had the best evaluation, but {problem}; the next best is taken"
        )
        history = [record for record in history if record["step"] != best]
    return best


def _keep_samples(run: RunFolder, data: PreparedData, count: int = 64) -> None:
    """Write samples.jsonl: held-out sequences (else trained ones) that the certificates are
    measured on.
    """
    if not run.writes:
        return
    dataset = data.eval if data.eval is not None else data.train
    rows = (dataset[i] for i in range(min(count, len(dataset))))
    lines = [
        json.dumps(
            {"input_ids": [int(t) for t in r.input_ids], "labels": [int(t) for t in r.labels]}
        )
        for r in rows
    ]
    write_atomically(run.samples, "\n".join(lines) + "\n")


def _sample_answers(prepared: Prepared, count: int = 3) -> list[dict[str, Any]]:
    """Greedy answers to held-out prompts, as the model is now."""
    from fastft.inference.generate import answer

    if is_sharded(prepared.model):
        return []  # an answer needs every process in every token
    data, samples = prepared.data, []
    for conversation in data.eval_conversations(count):
        text = answer(
            prepared.model, prepared.engine, prepared.tokenizer, data.template, conversation.prompt,
            max_new_tokens=96, tools=conversation.tools,
        )  # fmt: skip
        samples.append(
            {"prompt": conversation.prompt, "reference": conversation.reference, "answer": text}
        )
    return samples


def _refuse_what_is_not_there(config: RunConfig) -> None:
    """Raise FastFTError for settings that would silently do nothing here."""
    if config.mirror is not None:
        mirror = Path(config.mirror).expanduser().absolute() / config.project
        if mirror == config.run_dir.absolute():
            raise FastFTError(
                f"mirror and output_dir are the same folder, {config.mirror}. A copy belongs "
                "elsewhere."
            )
    needed = [TRACKERS[name] for name in config.train.report_to]
    missing = [name for name in needed if name and importlib.util.find_spec(name) is None]
    if missing:
        raise FastFTError(
            f"train.report_to: {', '.join(missing)} is not installed. pip install "
            f"{' '.join(missing)}, or remove it."
        )


@contextlib.contextmanager
def _mirrored(config: RunConfig, run: RunFolder, report: Reporter) -> Iterator[Mirror | None]:
    """Bring here what the mirror has newer, and leave it up to date, also where the run was
    interrupted or stopped.
    """
    if config.mirror is None:
        yield None
        return
    mirror = Mirror(
        run,
        Path(config.mirror).expanduser().absolute() / config.project,
        note=report.note,
        warn=report.warn,
    )
    mirror.restore()
    seconds = INTERRUPTED_FLUSH_SECONDS
    try:
        yield mirror
        seconds = FLUSH_SECONDS
    except FastFTError as error:
        if error.exit_code == FastFTError.exit_code:  # the input is wrong: nothing was done
            seconds = 0.0
        raise
    except KeyboardInterrupt:  # asked twice: stop at once
        seconds = 0.0
        raise
    finally:
        if seconds and run.has_record():
            mirror.close(seconds)
            run.update_record(mirror=mirror.facts())


def _result_of(run: RunFolder, status: str, seconds: float = 0.0) -> RunResult:
    record, log = run.read_record(), run.read_log()
    losses = [entry["loss"] for entry in log if "loss" in entry]
    speeds = sorted(entry["tokens_per_sec"] for entry in log if "tokens_per_sec" in entry)
    tail = losses[-max(1, len(losses) // 10) :]
    return RunResult(
        run=str(run.path),
        status=status,
        steps=record.get("steps", len(losses)),
        total_steps=record.get("total_steps", len(losses)),
        train_loss=sum(tail) / len(tail) if tail else None,
        eval_loss_before=record.get("eval_loss_before"),
        eval_loss_after=record.get("eval_loss_after"),
        tokens_per_sec=speeds[len(speeds) // 2] if speeds else None,
        seconds=round(seconds, 1),
        final=str(run.final) if status == "done" else None,
    )


def _here() -> dict[str, Any]:
    """What of this machine, and of the number of processes, can move the last digits of a loss."""
    return machine() | {"processes": ranks.world().size}


def _changed(before: dict[str, str], after: dict[str, str]) -> str:
    names = sorted(n for n in {*before, *after} if before.get(n) != after.get(n))
    return ", ".join(f"{n} {before.get(n, 'absent')} -> {after.get(n, 'absent')}" for n in names)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in values.items()
    }
