"""my_openai_api.py as a process: it listens at once, loads, answers the original's curl, drains and ends; what goes wrong; its
client in the terminal and the chat page."""

import contextlib
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import psutil
import pytest

from conftest import ROOT, assert_one_line_error, save_chat, trained_adapter
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
    """A server that has just been started; yields (process, its URL)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "my_openai_api.py"), "--port", str(port), *map(str, words)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    with subprocess.Popen(command, env={**os.environ, **dict(environment)}, **pipes) as process:
        try:
            yield process, f"http://127.0.0.1:{port}"
        finally:
            if process.poll() is None:
                process.kill()


@pytest.fixture(scope="module")
def running(flags):
    """URL of a server that has loaded a model and its adapter; each answer is asked for only once the one before is there."""
    with server(*flags, "--lora", f"law={flags[1] / 'lora_law_32.pth'}") as (process, url):
        assert "full_sft" in process.stdout.readline(), process.stderr.read()
        yield f"{url}/v1"


def complete(url, *contents, **fields):
    """(text, number of its tokens) of the greedy answer to a conversation of alternating contents, asked with httpx alone; a
    `system` prompt among the fields is put before it."""
    system = fields.pop("system", None)
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    body = {"messages": messages, "temperature": 0, **fields}
    reply = httpx.post(f"{url}/chat/completions", json=body, timeout=60).json()
    return reply["choices"][0]["message"]["content"], reply["usage"]["completion_tokens"]


def ended(process, timeout=60):
    """(exit code, stderr) of a process that is told to end."""
    _, errors = process.communicate(timeout=timeout)
    return process.returncode, errors


def assert_many_lists_are_refused_quickly(process, client):
    """200,000 lists in a body cost the server little more than they cost here, where nobody looks for garbage among them."""
    body = '{"prompt": [' + "[1]," * 200_000 + "[1]]}"
    gc.disable()
    started = time.process_time()
    kept = json.loads(body)
    alone = time.process_time() - started
    gc.enable()
    assert len(kept["prompt"]) == 200_001

    def seconds():
        before = psutil.Process(process.pid).cpu_times()
        assert (
            client.post("/completions", content=body, headers={"Content-Type": "application/json"}).status_code == 400
        )
        after = psutil.Process(process.pid).cpu_times()
        return after.user + after.system - before.user - before.system

    assert min(seconds() for _ in range(3)) < 10 * alone


def test_it_listens_at_once_serves_the_newest_chat_model_and_its_adapters_and_drains(flags):
    words = (*flags, "--lora", f"law={flags[1] / 'lora_law_32.pth'}", "--strict_model", "--host", "0.0.0.0")
    with server(*words, environment={"MINIMIND_API_KEY": "secret-key"}) as (process, url):
        statuses = []
        while 200 not in statuses:
            with contextlib.suppress(httpx.ConnectError):
                statuses.append(httpx.get(f"{url}/health", timeout=60).status_code)
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        assert set(statuses) == {503, 200}
        assert "multi_chat/full_sft_32.pth: " in (line := process.stdout.readline())
        assert "float32 on cpu, context 4096 tokens" in line
        address = url.replace("127.0.0.1", "0.0.0.0")
        assert process.stdout.readline() == f"full_sft_32, adapters law at {address}/v1, Ctrl-C ends it\n"

        assert httpx.get(f"{url}/v1/models").status_code == 401
        client = httpx.Client(base_url=f"{url}/v1", headers={"Authorization": "Bearer secret-key"}, timeout=60)
        assert [entry["id"] for entry in client.get("/models").json()["data"]] == ["full_sft_32", "law"]

        def answer(name):
            return client.post("/chat/completions", json={**QUESTION, "model": name, "max_tokens": 8}).json()

        assert answer("law")["model"] == "law" and answer("law")["choices"] != answer("full_sft_32")["choices"]
        assert answer("other")["error"]["code"] == "model_not_found"
        assert_many_lists_are_refused_quickly(process, client)
        body = {**QUESTION, "model": "law", "stream": True, "max_tokens": 200, "temperature": 1}
        with client.stream("POST", "/chat/completions", json=body) as response:
            events = response.iter_lines()
            next(events)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in events if line]
        assert rest[-1] == "data: [DONE]" and '"finish_reason":"' in rest[-2]
        assert ended(process) == (0, "")


def test_the_originals_curl_a_second_ctrl_c_and_a_warning(flags):
    body = (
        '{"model": "model-identifier", "messages": [{"role": "user", "content": "世界上最高的山是什么？"}], '
        '"temperature": 0.7, "max_tokens": -1, "stream": true}'
    )
    with server(*flags, "--host", "0.0.0.0", "--temperature", "0", "--max_seq_len", "200000") as (process, url):
        assert "full_sft" in process.stdout.readline(), process.stderr.read()
        command = ["curl", "-sN", f"{url}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", body]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as curl:
            first = json.loads(curl.stdout.readline().removeprefix("data: "))
            assert first["choices"][0]["delta"]["role"] == "assistant"
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)
            process.send_signal(signal.SIGINT)
            code, errors = ended(process)
            lines = [line for line in curl.stdout.read().splitlines() if line]
        assert "shutting down" in lines[-1] or lines[-1] == "data: [DONE]"
    assert code == 0 and errors.startswith("warning: --host 0.0.0.0 without --api_key"), errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_at_once_while_it_loads(flags, tmp_path, number):
    """A model that takes for ever to load: its description is a pipe into which nobody writes."""
    checkpoint = tmp_path / "full_sft_32.pth"
    checkpoint.write_bytes((flags[1] / "multi_chat/full_sft_32.pth").read_bytes())
    os.mkfifo(checkpoint.with_suffix(".json"))
    with server(*flags, "--checkpoint", checkpoint) as (process, url):
        status = None
        while status is None:
            with contextlib.suppress(httpx.ConnectError):
                status = httpx.get(f"{url}/health", timeout=60).status_code
        assert status == 503
        process.send_signal(number)
        output, errors = process.communicate(timeout=30)
        assert (process.returncode, output, errors) == (0, "", "")


def test_signals_of_which_none_prints_anything(flags):
    """One, and then more and more while it ends, with half a request open."""
    with server(*flags) as (process, url):
        assert "full_sft" in process.stdout.readline(), process.stderr.read()
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as half:
            half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            time.sleep(0.2)
            while process.poll() is None:
                process.send_signal(signal.SIGTERM)
                time.sleep(0.02)
        assert ended(process) == (0, "")


def test_what_cannot_be_loaded_ends_it_with_one_line(run, flags, tmp_path):
    missing = tmp_path / "none.pth"
    process = run("my_openai_api.py", "--port", "0", "--checkpoint", missing, *flags)
    assert_one_line_error(process, f"{missing}: no such checkpoint")
    process = run("my_openai_api.py", "--port", "0", "--max_cache_gb", "0.001", *flags)
    assert_one_line_error(
        process, "--max_seq_len 4096: a request needs 0.001 GB, more than the 0.001 GB of --max_cache_gb"
    )
    adapter = flags[1] / "lora_law_32.pth"
    process = run("my_openai_api.py", "--port", "0", "--lora", f"full_sft_32={adapter}", *flags)
    assert_one_line_error(process, "--lora full_sft_32: is the model's own name", code=2)


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


def test_its_client_in_the_terminal(running):
    short = {"max_tokens": 12}
    first, _ = complete(running, "你好", **short)
    second, _ = complete(running, "你好", first, "再见", **short)
    asked, _ = complete(running, "你好", first, "再见", second, "你好", system="简短。", **short)
    alone, _ = complete(running, "你好", system="简短。", **short)
    assert len({first, second, asked, alone}) == 4

    lines = "你好\n再见\n/system 简短。\n你好\n/clear\n你好\n/system\n/clear\n你好\n".encode()
    words = ["--base_url", running, "--temperature", "0", "--max_tokens", "12"]
    process = subprocess.run(
        [sys.executable, "chat_openai_api.py", *words], cwd=ROOT, input=lines, capture_output=True, timeout=60
    )
    assert process.returncode == 0 and not process.stderr, process.stderr.decode()
    head, *answers = process.stdout.decode().split("\nA: ")
    assert head.startswith(f"{running}: full_sft_32 (--model also knows law)\n")
    assert len(answers) == 5
    for answer, expected in zip(answers, (first, second, asked, alone, first)):
        assert answer.startswith(expected), (answer, expected)


def test_the_chat_page_on_it(running, monkeypatch):
    testing = pytest.importorskip("streamlit.testing.v1")
    monkeypatch.setattr(sys, "argv", ["fast_inference.py", "--api", running])
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    page = testing.AppTest.from_file(str(ROOT / "fast_inference.py"), default_timeout=60).run()
    assert page.selectbox(key="model").options == ["full_sft_32", "law"]
    page.slider(key="temperature").set_value(0.0)
    page.slider(key="max_new_tokens").set_value(16)
    first, tokens = complete(running, "你好", max_tokens=16)
    second, _ = complete(running, "你好", first, "再见", max_tokens=16, model="law")
    page.chat_input[0].set_value("你好").run()
    page.selectbox(key="model").select("law").run()
    page.chat_input[0].set_value("再见").run()
    assert not page.exception and not page.error
    assert [turn.text[0].value for turn in page.chat_message] == ["你好", first, "再见", second]
    captions = [caption.value for caption in page.caption]
    assert any(f"full_sft_32 · {tokens} " in caption for caption in captions), captions
