"""Typed results: attributes in Python, the command's JSON as a mapping, and nothing lost between the two."""

import json

import pytest

from fastft.verbs import Certificate, ExportedFile, Exports, Pushed, PushedFile

ENTRY = {
    "path": "a.gguf", "kind": "gguf", "sha256": "0" * 64, "verdict": "warn", "kl_mean": 0.01,
    "kl_p99": 0.2, "top1": 0.99, "ppl_ratio": 1.001,
    "checks": [{"name": "load", "verdict": "pass", "detail": "it loads"}],
}  # fmt: skip


@pytest.mark.parametrize("measured", [{}, {"positions": 512}])
def test_a_certificate_is_what_verify_found(measured):
    found = {"files": [ENTRY | measured], "verdict": "warn"}
    certificate = Certificate.of(found)
    assert certificate.files[0].checks[0].name == "load"
    assert certificate["verdict"] == certificate.verdict == "warn"
    assert json.loads(json.dumps(certificate.to_dict())) == found


def test_exports_print_as_the_command_does():
    files = (ExportedFile("runs/a/merged", "merged", 10),)
    plain = {"files": [{"path": "runs/a/merged", "kind": "merged", "bytes": 10}]}
    assert Exports(files).to_dict() == plain
    assert Exports(files).paths == ["runs/a/merged"]
    certificate = Certificate.of({"files": [ENTRY], "verdict": "warn"})
    assert Exports(files, certificate).to_dict() == plain | {"certificate": certificate.to_dict()}


def test_a_push_prints_its_commit():
    done = Pushed("https://hub/user/name", "abc", (PushedFile("README.md", 3),))
    assert done.to_dict() == {
        "url": "https://hub/user/name", "commit": "abc", "files": ({"path": "README.md", "bytes": 3},),
    }  # fmt: skip
    assert json.loads(json.dumps(done.to_dict()))["files"] == [{"path": "README.md", "bytes": 3}]


def test_no_value_of_another_name_is_there():
    with pytest.raises(KeyError):
        Exports(())["nothing"]
