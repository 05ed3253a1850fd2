"""Limits, verdicts, and the files that carry them: certificate.json and certificate.md.

A verdict is pass, warn or fail. The limits for the distance to the trained model depend on the
type of the weights; docs/gguf.md says how they were calibrated.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastft.errors import FastFTError
from fastft.files import read_json, sha256, write_atomically

CERTIFICATE = "certificate.json"
PAGE = "certificate.md"
TITLE = "# Certificate\n"
VERDICTS = ("pass", "warn", "fail")


@dataclass(frozen=True)
class Limits:
    """How far the answers of a file of one type may be from the trained model's."""

    kl_pass: float
    """mean KL divergence (nats a token) up to which it passes"""
    kl_fail: float
    """mean KL divergence above which it fails; between the two: warn"""


LIMITS: dict[str, Limits] = {
    "f32": Limits(1e-5, 1e-3),
    "f16": Limits(1e-3, 1e-2),
    "bf16": Limits(2e-3, 2e-2),
    "q8_0": Limits(5e-3, 5e-2),
    "q6_k": Limits(0.02, 0.1),
    "q5_k_m": Limits(0.04, 0.2),
    "q5_k_s": Limits(0.06, 0.25),
    "q5_0": Limits(0.08, 0.3),
    "q4_k_m": Limits(0.12, 0.5),
    "q4_k_s": Limits(0.15, 0.6),
    "q4_0": Limits(0.25, 0.8),
    "iq4_xs": Limits(0.15, 0.6),
    "q3_k_m": Limits(0.35, 1.0),
    "iq3_xxs": Limits(0.6, 1.5),
    "q2_k": Limits(1.2, 2.5),
    "iq2_xxs": Limits(2.0, 4.0),
    "iq1_s": Limits(4.0, 8.0),
}
"""Distance limits for each type of file."""

WEIGHT_LIMITS: dict[str, float] = {
    "f32": 1e-5, "f16": 1e-3, "bf16": 8e-3, "q8_0": 0.02, "q6_k": 0.05, "q5_1": 0.09, "q5_k": 0.09,
    "q5_0": 0.09, "q4_k": 0.18, "q4_1": 0.18, "q4_0": 0.18, "iq4_xs": 0.18, "iq4_nl": 0.18,
    "q3_k": 0.35, "iq3": 0.45, "q2_k": 0.6, "iq2": 0.75, "iq1": 0.95,
}  # fmt: skip
"""Largest relative root-mean-square error of one weight, for each type of tensor."""


def limits_for(file_type: str) -> Limits:
    """Return the limits for files of `file_type` ("q4_k_m"); unknown types use the loosest limits
    among types with the same bit width: "q4_1" is judged like "iq4_xs".
    """
    if file_type in LIMITS:
        return LIMITS[file_type]
    alike = [
        limits
        for name, limits in LIMITS.items()
        if name.lstrip("i")[:2] == file_type.lstrip("i")[:2]
    ]
    return max(alike, key=lambda limits: limits.kl_fail, default=LIMITS["q8_0"])


def weight_limit(tensor_type: str) -> float:
    """Return the largest relative error of a weight stored as `tensor_type` ("q4_k"; "iq2_xs"
    counts as "iq2").
    """
    return WEIGHT_LIMITS.get(tensor_type, WEIGHT_LIMITS.get(tensor_type[:3], WEIGHT_LIMITS["f32"]))


@dataclass(frozen=True)
class Check:
    """The outcome of one check of one file."""

    name: str
    verdict: str
    detail: str


def worst(verdicts: Iterable[str]) -> str:
    """Return the worst of the verdicts; "pass" where there are none."""
    return max(verdicts, key=VERDICTS.index, default="pass")


def judge_distance(measured: dict[str, float], file_type: str) -> Check:
    """Return the verdict on the KL divergence and perplexity that were `measured` for a file of
    `file_type`.

    The mean log-probability of the text may move by the KL limit plus three standard errors: for a
    small KL the log ratio of two distributions has a variance of about twice the KL (Gaussian
    approximation), over `positions` tokens.
    """
    limits = limits_for(file_type)
    kl, shift, n = (
        measured["kl_mean"],
        abs(math.log(measured["ppl_ratio"])),
        max(1, measured["positions"]),
    )

    def allowed(limit: float) -> float:
        return limit + 3 * math.sqrt(2 * limit / n)

    if not math.isfinite(kl) or kl > limits.kl_fail or shift > allowed(limits.kl_fail):
        verdict = "fail"
    elif kl > limits.kl_pass or shift > allowed(limits.kl_pass):
        verdict = "warn"
    else:
        verdict = "pass"
    detail = (
        f"{file_type}: KL mean {kl:.3g} (pass up to {limits.kl_pass:g}, fail above "
        f"{limits.kl_fail:g}), "
        f"p99 {measured['kl_p99']:.3g}, top-1 agreement {measured['top1']:.2%}, "
        f"perplexity x{measured['ppl_ratio']:.4f} over {n} positions (pass within "
        f"x{math.exp(allowed(limits.kl_pass)):.4f})"
    )
    return Check("distance", verdict, detail)


def read_certificate(out: Path) -> dict[str, Any]:
    """Return the certificate in the folder `out` ({"files": {}} where there is none)."""
    path = Path(out) / CERTIFICATE
    if not path.is_file():
        return {"files": {}}
    found = read_json(path, "Delete it and call fastft verify again.")
    entries = found.get("files")
    if not isinstance(entries, dict) or not all(map(_is_entry, entries.values())):
        raise FastFTError(f"{path} is no certificate. Delete it and call fastft verify again.")
    return found


def refuse_foreign(out: Path) -> None:
    """Raise FastFTError where certificate.json or certificate.md in `out` is none of fastft's."""
    read_certificate(out)
    page = Path(out) / PAGE
    if page.is_symlink() or (page.exists() and not _begins_like_ours(page)):
        raise FastFTError(f"{page} was not written by fastft. Move it away and try again.")


def _begins_like_ours(page: Path) -> bool:
    if not page.is_file():
        return False
    with page.open("rb") as file:
        return file.read(len(TITLE)) == TITLE.encode()


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and all(
        isinstance(entry.get(key), str) for key in ("path", "sha256", "verdict")
    )


def certified(path: Path, out: Path | None = None) -> dict[str, Any] | None:
    """Return the certificate entry of the file `path` as it is now; None where it has none or was
    changed since.

    `out`: the folder with the certificate; default: the file's own folder.
    """
    path = Path(path)
    entry = read_certificate(out or path.parent)["files"].get(path.name)
    return entry if entry and path.exists() and entry["sha256"] == sha256(path) else None


def changed_since(path: Path, out: Path) -> str | None:
    """Return the sha256 that the file `path` was certified with, where its bytes are others now.

    A change stays one, however often the file is verified, until it is exported again
    (`forget`) or put back.
    """
    entry = read_certificate(out)["files"].get(path.name)
    was = entry and (entry.get("changed_from") or entry["sha256"])
    return was if was and path.exists() and sha256(path) != was else None


def forget(out: Path, names: Iterable[str]) -> None:
    """Drop what the certificate in `out` says of files that were just written anew."""
    certificate = read_certificate(out)
    gone = set(names) & certificate["files"].keys()
    if gone:
        certificate["files"] = {n: e for n, e in certificate["files"].items() if n not in gone}
        text = json.dumps(certificate, indent=2, ensure_ascii=False) + "\n"
        write_atomically(Path(out) / CERTIFICATE, text)
        write_atomically(Path(out) / PAGE, as_markdown(certificate))


def unchanged_check(path: Path, was: str, now: str) -> dict[str, str]:
    """Return the failed check of a file whose bytes are not those that were certified."""
    return {
        "name": "unchanged",
        "verdict": "fail",
        "detail": f"{path.name} was changed after it was certified (sha256 {was[:12]}, now "
        f"{now[:12]}). {WHAT_TO_DO_WITH_A_CHANGE}",
    }


WHAT_TO_DO_WITH_A_CHANGE = (
    "Export it again; or, where the change is meant, judge it as a new file with: "
    "fastft verify RUN --accept-changed."
)


def write_certificate(out: Path, entries: list[dict[str, Any]], about: dict[str, Any]) -> Path:
    """Write certificate.json and certificate.md into `out` and return the JSON's path.

    Entries of files that were not checked now stay; one of a file that was changed since fails.
    """
    out = Path(out)
    kept = {}
    for name, entry in read_certificate(out)["files"].items():
        path = out / name
        if certified(path, out):
            kept[name] = entry
        elif was := changed_since(path, out):
            now = sha256(path)
            kept[name] = entry | {
                "sha256": now,
                "verdict": "fail",
                "changed_from": was,
                "checks": [unchanged_check(path, was, now)],
            }
    files = kept | {Path(entry["path"]).name: entry for entry in entries}
    certificate = about | {
        "limits": {name: asdict(limits) for name, limits in LIMITS.items()},
        "files": files,
    }
    write_atomically(
        out / CERTIFICATE, json.dumps(certificate, indent=2, ensure_ascii=False) + "\n"
    )
    write_atomically(out / PAGE, as_markdown(certificate))
    return out / CERTIFICATE


def as_markdown(certificate: dict[str, Any]) -> str:
    """Return the certificate as a person reads it."""
    lines = [TITLE.rstrip(), "", "Is each file the model that was trained?", ""]
    lines += [
        "| File | Verdict | KL mean | KL p99 | Top-1 | Perplexity |",
        "|---|---|---|---|---|---|",
    ]
    for name, entry in certificate["files"].items():
        if entry.get("kl_mean") is None:
            lines.append(f"| {name} | **{entry['verdict']}** | | | | |")
        else:
            lines.append(
                f"| {name} | **{entry['verdict']}** | {entry['kl_mean']:.3g} | "
                f"{entry['kl_p99']:.3g} "
                f"| {entry['top1']:.2%} | x{entry['ppl_ratio']:.4f} |"
            )
    for name, entry in certificate["files"].items():
        lines += ["", f"## {name}", "", f"sha256 `{entry['sha256']}`", ""]
        lines += [
            f"- **{check['verdict']}** {check['name']}: {check['detail']}"
            for check in entry["checks"]
        ]
    reference = certificate.get("reference", {})
    lines += ["", "## How", "", f"Compared with {reference.get('model', 'the trained model')}"]
    lines[-1] += (
        f" ({reference.get('compute', 'float32')}) on {reference.get('samples', 'samples')}."
    )
    lines += [
        f"Versions: {', '.join(f'{k} {v}' for k, v in certificate.get('versions', {}).items())}.",
        "",
    ]
    return "\n".join(lines)
