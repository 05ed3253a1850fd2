"""`fastft push`: the adapter, and what was exported of it, to a repository on the Hub, in one
commit.

final/ -> /                    adapter, tokenizer and model card; local paths become public names
export/*.gguf, Modelfile -> /  with certificate.json and certificate.md     export/merged -> merged/
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastft import hub
from fastft.errors import CouldNotFinishError, FastFTError, one_of
from fastft.exporting.certificate import (
    CERTIFICATE,
    WHAT_TO_DO_WITH_A_CHANGE,
    read_certificate,
)
from fastft.exporting.merged import belongs_to_merged
from fastft.files import sha256
from fastft.progress import Reporter, sized
from fastft.runs.adapter import belongs_to_adapter
from fastft.runs.card import model_card
from fastft.runs.target import Target, resolve

INCLUDES = ("merged", "gguf")
WAITS = (2.0, 8.0)  # seconds before the second and the third try of the whole upload
TEXT = {".json", ".md", ".jinja", ".txt", ""}  # what is read for local paths; "": Modelfile


@dataclass(frozen=True)
class Part:
    """One file of the commit: its path in the repository, and its content or where that lies."""

    path: str
    content: bytes | Path


def push(
    run: str | Path,
    *,
    repo: str,
    private: bool = False,
    base_id: str | None = None,
    include: list[str] | tuple[str, ...] = (),
    out: str | Path | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Upload `run` (a run or an adapter folder) to `repo` ("user/name"), which is made where it is
    not there yet.

    `include` adds exports, "merged" and "gguf", from `out` (default: the run's export/); each must
    be certified as it is. `base_id` is the public name of a base that was loaded from a local
    folder. Returns {"url", "commit", "files": [{path, bytes}]}. All of it is one commit: a broken
    upload leaves nothing half public, and the same call goes on with what the Hub already has.

    Raises FastFTError (no adapter, no public base, not certified, no token, no right),
    CouldNotFinishError (429, 5xx, network).
    """
    report = reporter or Reporter()
    check_repo_id(repo, "--repo")
    target = resolve(run)
    if target.adapter is None:
        raise FastFTError(f"{target.base} is a plain model; it has no adapter to push.")
    base = public_base(target, base_id)
    if not hub.token_is_known():
        raise FastFTError(f"pushing needs a Hugging Face token: {hub.SIGN_IN}.")
    parts = adapter_parts(target, base)
    if include:
        folder = Path(out).expanduser() if out is not None else target.default_out
        parts += export_parts(target, folder, include, base)
    report.note(f"pushing {len(parts)} files ({sized(sum(map(_size, parts)))}) to {repo}")
    with hub.hub_errors(f"base model {base!r}"):
        _api().model_info(base)  # the card must name something that others can load
    return _upload(repo, private, parts, _message(target), report)


def check_repo_id(repo: str, option: str) -> None:
    """Raise FastFTError unless `repo` looks like owner/name."""
    if (
        not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", repo)
        or ".." in repo
        or "--" in repo
    ):
        raise FastFTError(f"{option} {repo!r} is not a name on the Hub; write it as user/name.")


def public_base(target: Target, base_id: str | None) -> str:
    """Return the base's name on the Hub; raises FastFTError where it is a local path and `base_id`
    is not given.
    """
    if base_id is not None:
        check_repo_id(base_id, "--base-id")
        if Path(base_id).exists():
            raise FastFTError(
                f"--base-id {base_id} is a folder here; give the base model's name on the Hub."
            )
        return base_id
    local = Path(target.base).expanduser()
    if (
        local.exists()
        or local.is_absolute()
        or target.base.startswith((".", "~"))
        or target.base.count("/") != 1
    ):
        raise FastFTError(
            f"the base model is a local path ({target.base}), which nobody else has: the card "
            "would name no base. Give its "
            "name on the Hub with --base-id owner/name."
        )
    return target.base


def adapter_parts(target: Target, base: str) -> list[Part]:
    """Return the files of the adapter folder, with `base` wherever it named a local folder."""
    assert target.adapter is not None
    files = [path for path in sorted(target.adapter.iterdir()) if belongs_to_adapter(path)]
    _refuse_links(files)
    parts = [Part(path.name, _public(path, target, base)) for path in files]
    if target.run is None:
        return [_with_base_in_card(part, base) for part in parts]
    card = model_card(
        target.run.read_config(), target.run.read_record(), kind="adapter", base_id=base
    )
    return [part for part in parts if part.path != "README.md"] + [
        Part("README.md", _scrub(card, target, base).encode())
    ]


def export_parts(
    target: Target, folder: Path, include: list[str] | tuple[str, ...], base: str
) -> list[Part]:
    """Return the exported files of the kinds in `include`, with their certificate; raises
    FastFTError where one lacks it.
    """
    for kind in include:
        if kind not in INCLUDES:
            raise one_of("--include", kind, INCLUDES)
    exports = sorted(folder.glob("[!.]*.gguf")) if "gguf" in include else []
    exports += [folder / "merged"] if "merged" in include else []
    missing = [path for path in exports if not path.exists()]
    if missing or ("gguf" in include and not any(path.suffix == ".gguf" for path in exports)):
        wanted = ",".join({"gguf": "gguf:q4_k_m"}.get(kind, kind) for kind in include)
        raise FastFTError(
            f"{folder} does not hold what --include asks for. Write it with: fastft export "
            f"... --to {wanted}"
        )
    _refuse_uncertified(folder, exports)
    extra = [
        folder / name
        for name in (CERTIFICATE, "certificate.md", "Modelfile")
        if (folder / name).is_file()
    ]
    files = [(path, path.name) for path in [*exports, *extra] if path.is_file()]
    files += [
        (path, path.relative_to(folder).as_posix())
        for merged in exports
        if merged.is_dir()
        for path in sorted(merged.iterdir())
        if path.is_file() and belongs_to_merged(path.name)
    ]
    _refuse_links([path for path, _ in files])
    return [Part(name, _public(path, target, base)) for path, name in files]


def _refuse_links(files: list[Path]) -> None:
    """Raise FastFTError where a file is a link to somewhere else, whose content would be published.

    A snapshot in the Hub's cache consists of links into the blobs beside it, which is the same
    place.
    """
    for path in files:
        folder = path.parent.resolve()
        near = {
            folder,
            folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else folder,
        }
        if path.is_symlink() and path.resolve().parent not in near:
            raise FastFTError(
                f"not pushed: {path} is a link to {path.resolve()}, outside of its folder. Put the "
                "file itself there, or remove the link."
            )


def _refuse_uncertified(folder: Path, exports: list[Path]) -> None:
    """Raise one FastFTError naming every export that has no certificate as it is now, or whose
    certificate says fail.
    """
    entries = read_certificate(folder)["files"]
    problems = []
    for path in exports:
        entry = entries.get(path.name)
        if entry is None:
            problems.append(f"{path.name} has no certificate")
        elif entry["sha256"] != sha256(path) or "changed_from" in entry:
            problems.append(
                f"{path.name} was changed after it was certified. {WHAT_TO_DO_WITH_A_CHANGE}"
            )
        elif entry["verdict"] == "fail":
            problems.append(f"{path.name} is not the trained model (its certificate says fail)")
    if problems:
        raise FastFTError(f"not pushed: {'; '.join(problems)} Check with: fastft verify")


def _upload(
    repo: str, private: bool, parts: list[Part], message: str, report: Reporter
) -> dict[str, Any]:
    """Make the repository and the commit; what the network or the Hub spoils is tried again, a
    bounded number of times.
    """
    for wait in (*WAITS, None):
        try:
            with hub.bounded_waits():
                return _commit(repo, private, parts, message)
        except FastFTError:
            raise
        except Exception as error:
            # huggingface_hub wraps what happens in its upload threads in RuntimeError
            asked = hub.retry_after(error)
            too_long = asked is not None and asked > hub.LONGEST_WAIT
            if wait is None or too_long or not hub.worth_another_try(error):
                raise _explained(error, repo) from error
            pause = max(wait, asked or 0.0)
            report.warn(
                f"{hub.explain(error, repo)} Trying again in {pause:.0f} s; nothing is public yet."
            )
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def _commit(repo: str, private: bool, parts: list[Part], message: str) -> dict[str, Any]:
    from huggingface_hub import CommitOperationAdd

    api = _api()
    api.create_repo(repo, private=private or None, exist_ok=True)
    if private and not api.model_info(repo).private:
        raise FastFTError(
            f"{repo} is there already and is public, but --private was asked for. Choose "
            "another name."
        )
    # New operations for each try: huggingface_hub changes them. What the Hub has already is not
    # sent again.
    operations = [CommitOperationAdd(part.path, part.content) for part in parts]
    done = api.create_commit(repo, operations, commit_message=message)
    files = [{"path": part.path, "bytes": _size(part)} for part in parts]
    return {"url": f"{hub.shown_endpoint()}/{repo}", "commit": done.oid, "files": files}


def _explained(error: BaseException, repo: str) -> FastFTError:
    """Return the message for a failed push; an error that is not the Hub's or the network's is
    ours and stays one.
    """
    from huggingface_hub.errors import HfHubHTTPError

    root = hub.root(error)
    if not isinstance(root, HfHubHTTPError | hub.http().HTTPError | OSError):
        raise error
    explained = hub.explain(error, f"repository {repo!r}")
    if isinstance(explained, CouldNotFinishError):
        return CouldNotFinishError(
            f"{explained} Nothing half is public; the same command goes on with what was sent."
        )
    return explained


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi(endpoint=hub.endpoint(), library_name="fastft")


def _message(target: Target) -> str:
    name = re.sub(r"[^\w. -]", "_", target.name)
    return f"{name}: trained and pushed with fastft"


def _size(part: Part) -> int:
    return len(part.content) if isinstance(part.content, bytes) else part.content.stat().st_size


# --- what must not leave this machine


WORDS = {"tokenizer.json", "vocab.json", "vocab.txt", "merges.txt"}
"""Files whose texts are tokens, of which none may be taken for a path."""


def _public(path: Path, target: Target, base: str) -> bytes | Path:
    """Return the path of a binary file, or the content of a text without this machine's folders."""
    if path.suffix not in TEXT or path.name in WORDS:
        return path
    return _scrub(path.read_text(encoding="utf-8"), target, base).encode()


def _scrub(text: str, target: Target, base: str) -> str:
    """Replace the local base by its public name, and the run's and the data's folders by
    nothing.
    """
    folders = (
        {str(Path(target.base).expanduser()): base, target.base: base}
        if target.base != base
        else {}
    )
    run = target.run.path if target.run is not None else target.adapter
    sources = []
    if target.run is not None:
        data = target.run.read_config().data
        sources = [source for source in data.all_sources if Path(source).expanduser().exists()]
    for source in sources:
        folders[source] = Path(source).name
        folders[str(Path(source).expanduser().resolve())] = Path(source).name
    for old in sorted(folders, key=len, reverse=True):
        for written in {json.dumps(old)[1:-1], old}:
            text = _replaced(text, written, folders[old])
    assert run is not None
    # A relative name is a folder only where it has a slash: "." and "Qwen" stand in texts.
    named = {str(run.resolve()), *([str(run)] if "/" in str(run) else [])}
    for folder in sorted(named, key=len, reverse=True):
        text = _replaced(text, f"{folder}/", "")
    return CACHED_ON_THE_HUB.sub(r"\1/\2", text)


CACHED_ON_THE_HUB = re.compile(
    r"[^\s\"'`]*/models--([^/\s]+?)--([^/\s]+)/snapshots/[0-9a-f]+", re.ASCII
)
"""A base in the Hub's cache, as a certificate names it: the folder is this machine's business."""


def _replaced(text: str, old: str, new: str) -> str:
    """Return `text` with the path `old` replaced where it stands whole, not as a part of a name."""
    end = "" if old.endswith("/") else r"(?![\w.-])"
    return re.sub(rf"(?<![\w./-]){re.escape(old)}{end}", lambda _: new, text)


def _with_base_in_card(part: Part, base: str) -> Part:
    """Return the card of an adapter of another tool with its base in the header, where it has a
    header without one.
    """
    if (
        part.path != "README.md"
        or not isinstance(part.content, bytes)
        or b"base_model:" in part.content
    ):
        return part
    return Part(
        part.path, re.sub(rb"\A---\n", b"---\nbase_model: " + base.encode() + b"\n", part.content)
    )
