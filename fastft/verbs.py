"""The verbs in Python: what the commands do, as functions with typed results.

A verb of one stage is that stage's own function (`fastft.plan`, `fastft.evaluate` ...). Here are
those that go through several: `train` exports what the config asks for, `export` certifies what it
wrote. A result has attributes, and reads like the command's JSON as well: `result["files"]`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastft.config import RunConfig
    from fastft.inference.generate import Answer
    from fastft.inference.sampling import Sampling
    from fastft.progress import Reporter
    from fastft.training.sweep import Sweep
    from fastft.training.train import RunResult

MAX_KL = 0.01
"""Budget of `quant="auto"`: mean KL divergence to the trained model, nats a token."""


class Result:
    """What a verb returns."""

    def to_dict(self) -> dict[str, Any]:
        """Return what the command prints with --json."""
        return asdict(self)  # type: ignore[call-overload]

    def __getitem__(self, key: str) -> Any:
        """Return a value by its name in the command's JSON."""
        return self.to_dict()[key]


@dataclass(frozen=True)
class ExportedFile:
    """One file or folder that was written."""

    path: str
    kind: str
    """adapter, merged, gguf:TYPE, gguf-lora or ollama."""
    bytes: int


@dataclass(frozen=True)
class Refused:
    """A target that could not be written, while others were."""

    target: str
    why: str


@dataclass(frozen=True)
class Check:
    """One question that was asked of a file."""

    name: str
    verdict: str
    detail: str


@dataclass(frozen=True)
class CheckedFile:
    """What is known of one file: whether it is the model that was trained."""

    path: str
    kind: str
    sha256: str
    verdict: str
    """pass, warn or fail."""
    kl_mean: float | None
    """Mean KL divergence to the trained model, nats a token; None where it was not measured."""
    kl_p99: float | None
    top1: float | None
    """Share of positions whose most likely token is the trained model's."""
    ppl_ratio: float | None
    checks: tuple[Check, ...]
    positions: int | None = None
    """Tokens that the figures are means of."""
    changed_from: str | None = None
    """The sha256 that was certified, where something else than fastft changed the file since."""


@dataclass(frozen=True)
class Certificate(Result):
    """The findings on every file, as certificate.json beside them holds them."""

    files: tuple[CheckedFile, ...]
    verdict: str
    """The worst of all files."""

    @classmethod
    def of(cls, found: dict[str, Any]) -> Certificate:
        """Return what `fastft.verification.verify.verify` found, typed."""
        checked = [
            CheckedFile(**(entry | {"checks": tuple(Check(**check) for check in entry["checks"])}))
            for entry in found["files"]
        ]
        return cls(tuple(checked), found["verdict"])

    def to_dict(self) -> dict[str, Any]:
        """Return what `fastft verify --json` prints."""
        found = asdict(self)
        for file in found["files"]:
            for name in ("positions", "changed_from"):
                if file[name] is None:
                    del file[name]
        return found


@dataclass(frozen=True)
class Exports(Result):
    """What `export` wrote, and its certificate where one was asked for."""

    files: tuple[ExportedFile, ...]
    certificate: Certificate | None = None
    refused: tuple[Refused, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return what `fastft export --json` prints."""
        found: dict[str, Any] = {"files": [asdict(file) for file in self.files]}
        if self.refused:
            found["refused"] = [asdict(one) for one in self.refused]
        if self.certificate is not None:
            found["certificate"] = self.certificate.to_dict()
        return found

    @property
    def paths(self) -> list[str]:
        """Return where the files are."""
        return [file.path for file in self.files]


@dataclass(frozen=True)
class PushedFile:
    """One file in the repository."""

    path: str
    bytes: int


@dataclass(frozen=True)
class Pushed(Result):
    """One commit on the Hub."""

    url: str
    commit: str
    files: tuple[PushedFile, ...]


def train(
    config: RunConfig,
    *,
    data: Any = None,
    stop_after: int | None = None,
    reporter: Reporter | None = None,
) -> RunResult:
    """Train as `config` says (see `fastft.training.train.train`), then write what `export.to`
    names.

    `data`: a list of rows, or a `datasets.Dataset`, instead of the config's source. A run that was
    finished before keeps what was exported of it.
    """
    from fastft.exporting import is_exported
    from fastft.training import ranks
    from fastft.training.train import train as train_run

    if "torch" not in sys.modules:
        # Threads that spin while they wait slow a shared machine down; read when torch is loaded.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    result = train_run(config, data=data, stop_after=stop_after, reporter=reporter)
    to = [] if config.export.to == ["adapter"] else config.export.to
    if not result.trained:
        to = [target for target in to if not is_exported(Path(result.run), target)]
    if result.status == "done" and to and ranks.first():
        export(result.run, to, reporter=reporter)
    return result


def sweep(
    config: str | Path,
    overrides: Sequence[str] = (),
    *,
    vary: Sequence[str],
    trials: int | None = None,
    keep_all: bool = False,
    on_ray: bool = False,
    reporter: Reporter | None = None,
) -> Sweep:
    """Train the combinations of `vary` (see `fastft.training.sweep.sweep`), then write what
    `export.to` names from the best one.
    """
    from fastft import exporting
    from fastft.config import load_config
    from fastft.training import ranks
    from fastft.training.sweep import sweep as train_all

    found = train_all(
        config, overrides, vary=vary, trials=trials, keep_all=keep_all, on_ray=on_ray,
        reporter=reporter,
    )  # fmt: skip
    targets = load_config(config, list(overrides)).export.to
    if found.best is not None and targets != ["adapter"] and ranks.first():
        exporting.export(found.best.run.path, targets, reporter=reporter)
    return found


def export(
    run: str | Path,
    to: str | Sequence[str] | None = None,
    *,
    out: str | Path | None = None,
    base: str | None = None,
    dtype: str = "auto",
    imatrix: str | None = None,
    quant: str | None = None,
    max_kl: float = MAX_KL,
    verify: bool = True,
    reporter: Reporter | None = None,
) -> Exports:
    """Write the targets `to` of `run` (a run, adapter or model folder) and certify them.

    `to`: adapter, merged, gguf:TYPE, gguf-lora, ollama, as a list or as the command's text with
    commas; by default merged, or nothing but the file that `quant` chooses. `quant="auto"` adds the
    smallest GGUF whose mean KL to the trained model is at most `max_kl` nats a token. `dtype` is
    that of merged, `imatrix` "auto" or a file. A file that is not the trained model raises nothing:
    ask `result.certificate.verdict`. Raises FastFTError for unknown targets, AnswerIsNoError where
    no type is within `max_kl`.
    """
    from fastft import exporting

    if isinstance(to, str):
        to = [part.strip() for part in to.split(",") if part.strip()]
    targets = list(to) if to is not None else [] if quant else ["merged"]
    files: list[dict[str, Any]] = []
    refused: list[dict[str, str]] = []
    if targets or quant is None:
        written = exporting.export(
            run, targets, out=out, base=base, dtype=dtype, imatrix=imatrix, reporter=reporter
        )
        files, refused = written["files"], written["refused"]
    if quant is not None:
        from fastft.verification.choose import choose_for_run

        files.append(
            choose_for_run(
                run, quant, max_kl=max_kl, out=out, base=base, imatrix=imatrix, reporter=reporter
            )
        )
    certificate = None
    if verify:
        from fastft.verification.verify import verify as verify_run

        paths = [file["path"] for file in files]
        found = verify_run(run, out=out, base=base, files=paths, reporter=reporter)
        certificate = Certificate.of(found)
    return Exports(
        tuple(ExportedFile(**file) for file in files),
        certificate,
        tuple(Refused(**one) for one in refused),
    )


def verify(
    run: str | Path,
    *,
    out: str | Path | None = None,
    base: str | None = None,
    files: Sequence[Path | str] | None = None,
    accept_changed: bool = False,
    reporter: Reporter | None = None,
) -> Certificate:
    """Check exported files against the trained model (see `fastft.verification.verify.verify`)."""
    from fastft.verification.verify import verify as verify_run

    found = verify_run(
        run, out=out, base=base, files=files, accept_changed=accept_changed, reporter=reporter
    )
    return Certificate.of(found)


def push(run: str | Path, *, repo: str, **options: Any) -> Pushed:
    """Upload a run or an adapter folder to the Hub in one commit.

    `options` are those of `fastft.exporting.push.push`: private, base_id, include, out, reporter.
    """
    from fastft.exporting.push import push as push_run

    done = push_run(run, repo=repo, **options)
    files = tuple(PushedFile(**file) for file in done["files"])
    return Pushed(done["url"], done["commit"], files)


class Chat:
    """A model that is loaded once and asked many times.

    `target` and `options` are those of `fastft.inference.generate.open_chat`: a run, an adapter or
    model folder, or a .gguf file; base, dtype, with_adapter, loras, gpu_layers, n_ctx.
    """

    def __init__(
        self,
        target: str | Path,
        *,
        system: str | None = None,
        sampling: Sampling | None = None,
        **options: Any,
    ) -> None:
        from fastft.inference.generate import open_chat
        from fastft.inference.sampling import Sampling

        self.system, self.sampling = system, sampling or Sampling()
        self.model = open_chat(target, **options)

    def ask(
        self,
        prompt: str | list[dict[str, Any]],
        *,
        sampling: Sampling | None = None,
        on_piece: Callable[[str], None] = lambda piece: None,
    ) -> Answer:
        """Return the answer to one question, or to a conversation as a list of messages.

        Questions know nothing of each other. `on_piece` sees the text as it comes.
        """
        from fastft.inference.generate import ask, messages_of

        messages = messages_of(prompt, self.system) if isinstance(prompt, str) else prompt
        return ask(self.model, messages, sampling or self.sampling, on_piece)
