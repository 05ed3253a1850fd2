"""The examples of docs/python.md run as they stand, one after the other, in one process."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "python.md"


@pytest.mark.long
def test_the_examples_of_the_page_run(checkpoint_of, tmp_path):
    (tmp_path / "base").symlink_to(checkpoint_of("llama"))
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 7
    after = """
assert result.status == "done" and result.steps == 3, result
assert exports.certificate.verdict == "pass", exports.to_dict()
assert exports["files"][0]["path"] == exports.files[0].path
assert found["verdict"] in {"pass", "warn"}, found
again = fastft.train(config, data=list(rows))
assert again.status == "done" and again.final == result.final
try:
    fastft.train(config, data=rows[:-1])
except fastft.FastFTError as error:
    assert "has changed since it was started" in str(error), error
else:
    raise AssertionError("other rows were trained on in the same run")
gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
assert gradient.isfinite().all() and gradient.norm() > 0
"""
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([*blocks, after])],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
