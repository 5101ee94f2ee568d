"""my_openai_api.py as a process: it listens at once, loads, answers the original's curl, drains and ends; what goes wrong."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest

from conftest import ROOT, assert_one_line_error, run_script, save_chat, trained_adapter
from model.checkpoint import file_sha256, load_model, save_checkpoint

QUESTION = {"messages": [{"role": "user", "content": "你好"}], "temperature": 0}


@pytest.fixture(scope="module")
def flags(tmp_path_factory, small_tokenizer, small_tokenizer_path):
    """Flags of a server of a tiny chat model, and an adapter of it beside it."""
    out = tmp_path_factory.mktemp("out")
    path = save_chat(out / "multi_chat/full_sft_32.pth", small_tokenizer, max_seq_len=4096)
    model = load_model(path)[0]
    weights = trained_adapter(model, ["layers.1.feed_forward.w3", "layers.0.attention.wq"])
    parent = {"file": str(path), "sha256": file_sha256(path)}
    metadata = {"stage": "lora_law", "lora": {"alpha": 6.0}, "parent": parent}
    save_checkpoint(out / "lora_law_32.pth", model, metadata, weights=weights)
    return ["--out_dir", out, "--tokenizer_path", small_tokenizer_path, "--device", "cpu", "--dtype", "float32"]


@contextlib.contextmanager
def server(*words, environment=()):
    """A running server, from the moment it is ready; yields (process, its first two lines, URL)."""
    command = [sys.executable, str(ROOT / "my_openai_api.py"), "--port", "0", *map(str, words)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    with subprocess.Popen(command, env={**os.environ, **dict(environment)}, **pipes) as process:
        try:
            lines = [process.stdout.readline(), process.stdout.readline()]
            assert lines[1], process.stderr.read()
            yield process, lines, re.search(r"http://\S+(?=/v1)", lines[1])[0]
        finally:
            if process.poll() is None:
                process.kill()


def ended(process, timeout=20):
    """(exit code, stderr) of a process that is told to end."""
    _, errors = process.communicate(timeout=timeout)
    return process.returncode, errors


def test_it_serves_the_newest_chat_model_and_its_adapters_and_drains(flags):
    adapter = f"law={flags[1] / 'lora_law_32.pth'}"
    with server(*flags, "--lora", adapter, "--strict_model") as (process, lines, url):
        assert "multi_chat/full_sft_32.pth: " in lines[0] and "float32 on cpu, context 4096 tokens" in lines[0]
        assert lines[1] == f"full_sft_32, adapters law at {url}/v1, Ctrl-C ends it\n"
        assert [entry["id"] for entry in httpx.get(f"{url}/v1/models").json()["data"]] == ["full_sft_32", "law"]

        def answer(name):
            body = {**QUESTION, "model": name, "max_tokens": 8}
            return httpx.post(f"{url}/v1/chat/completions", json=body).json()

        assert answer("law")["model"] == "law" and answer("law")["choices"] != answer("full_sft_32")["choices"]
        assert answer("other")["error"]["code"] == "model_not_found"
        body = {**QUESTION, "model": "law", "stream": True, "max_tokens": 300, "temperature": 1}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=30) as response:
            events = response.iter_lines()
            next(events)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in events if line]
        assert rest[-1] == "data: [DONE]" and '"finish_reason":"' in rest[-2]
        assert ended(process) == (0, "")


def test_the_originals_curl_and_a_second_ctrl_c(flags):
    with server(*flags) as (process, _, url):
        body = (
            '{"model": "model-identifier", "messages": [{"role": "user", "content": "世界上最高的山是什么？"}], '
            '"temperature": 0.7, "max_tokens": -1, "stream": true}'
        )
        command = ["curl", "-sN", f"{url}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", body]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as curl:
            first = json.loads(curl.stdout.readline().removeprefix("data: "))
            assert first["choices"][0]["delta"]["role"] == "assistant"
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)
            process.send_signal(signal.SIGINT)
            begun = time.monotonic()
            assert ended(process) == (0, "") and time.monotonic() - begun < 5
            lines = [line for line in curl.stdout.read().splitlines() if line]
        assert "shutting down" in lines[-1] or lines[-1] == "data: [DONE]"


def test_it_listens_while_it_loads_and_wants_the_key_of_the_environment(flags):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "my_openai_api.py", *map(str, flags), "--port", str(port), "--host", "0.0.0.0"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    environment = {**os.environ, "MINIMIND_API_KEY": "secret-key"}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        statuses, url = [], f"http://127.0.0.1:{port}"
        while 200 not in statuses:
            with contextlib.suppress(httpx.TransportError):
                statuses.append(httpx.get(f"{url}/health", timeout=20).status_code)
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        assert set(statuses) == {503, 200}
        assert httpx.get(f"{url}/v1/models").status_code == 401
        authorized = httpx.get(f"{url}/v1/models", headers={"Authorization": "Bearer secret-key"})
        assert authorized.status_code == 200
        assert "full_sft_32.pth" in process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert ended(process) == (0, "")


def test_listening_to_all_without_a_key_is_warned_of(flags):
    with server(*flags, "--host", "0.0.0.0") as (process, _, _):
        process.send_signal(signal.SIGTERM)
        code, errors = ended(process)
    assert code == 0 and errors.startswith("warning: --host 0.0.0.0 without --api_key") and errors.count("\n") == 1


def test_what_cannot_be_loaded_ends_it_with_one_line(flags, tmp_path):
    missing = tmp_path / "none.pth"
    process = run_script("my_openai_api.py", "--port", "0", "--checkpoint", missing, *flags)
    assert_one_line_error(process, f"{missing}: no such checkpoint")


@pytest.mark.parametrize(
    "words, parts, code",
    [
        (["--port", "70000"], ["--port", "at most 65535"], 2),
        (["--host", "no.such.host.invalid"], ["--host no.such.host.invalid --port 8000: "], 1),
        (["--host", "a" * 300], ["--host aaa"], 1),
        (["--lora", "law"], ["--lora", "expected NAME=FILE, got law"], 2),
        (["--lora", "a=x", "--lora", "a=y"], ["--lora", "one adapter only"], 2),
        (["--api_key", ""], ["--api_key", "must be ASCII"], 2),
        (["--api_key", "geheim ß"], ["--api_key", "must be ASCII"], 2),
        (["--cors", "http://a,"], ["--cors: expected origins"], 2),
        (["--max_batch", "0"], ["--max_batch", "at least 1"], 2),
        (["--top_p", "0"], ["--top_p"], 2),
    ],
)
def test_wrong_usage(run, words, parts, code):
    process = run("my_openai_api.py", *words)
    assert_one_line_error(process, *parts, code=code)
    assert "geheim" not in process.stderr


def test_a_port_in_use(run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert_one_line_error(run("my_openai_api.py", "--port", port), f"--port {port}: Address already in use")


def test_what_listens_first_needs_no_torch():
    code = "import sys, model.inference.api; assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
