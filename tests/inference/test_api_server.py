"""The end of the server: what has begun is finished, what has not arrived is refused, nobody holds it up, and it says nothing."""

import contextlib
import json
import signal
import socket
import threading
import time

import httpx
import pytest
from test_api import CHAT, ENDLESS, JSON, SHAPE, TEXT, until

from conftest import trained_scale
from model.inference import api_server
from model.inference.api import create_app
from model.inference.api_server import Server
from model.inference.engine import Engine
from model.LMConfig import LMConfig

HEAD = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "


@pytest.fixture(scope="module")
def model(small_tokenizer):
    """One that does not end its answers by itself."""
    model = trained_scale(LMConfig(**SHAPE, vocab_size=len(small_tokenizer)))
    model.tok_embeddings.weight.data[model.config.eos_token_id] = 0
    return model


class Running:
    """A Server on loopback, in a thread, where signals are calls of its handler."""

    def __init__(self, model, tokenizer):
        self.engine = Engine(model, tokenizer, max_batch=8)
        self.server = Server(create_app(self.engine))
        listener = socket.create_server(("127.0.0.1", 0))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        self.address = listener.getsockname()
        self.url = f"http://127.0.0.1:{self.address[1]}"
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]}, daemon=True)
        self.thread.start()
        until(lambda: self.server.started)

    def connect(self, words=b""):
        """A client that has sent `words`, and reads at most a little."""
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(20)
        client.connect(self.address)
        client.sendall(words)
        return client

    def signal(self):
        self.server.handle_exit(signal.SIGTERM, None)

    def wait_until_ended(self):
        """Long before a body's time or an answer's would be up."""
        self.thread.join(25)
        assert not self.thread.is_alive(), "it does not end"
        self.server.service.join()
        assert not self.engine.has_work and not self.server.service.thread.open


@pytest.fixture
def running(model, small_tokenizer, capfd):
    running = Running(model, small_tokenizer)
    yield running
    if running.thread.is_alive():
        running.signal(), running.signal()
        running.wait_until_ended()
    assert capfd.readouterr() == ("", "")


def slow_steps(monkeypatch, seconds):
    step = Engine.step
    monkeypatch.setattr(Engine, "step", lambda engine: time.sleep(seconds) or step(engine))


def unread_stream(running):
    """A client of four long streams who reads nothing, once they are too much for the buffers between."""
    wanted = {"prompt": "x", "max_tokens": 400, "n": 4, "stream": True, "temperature": 1, "logprobs": 5}
    body = json.dumps(wanted).encode()
    client = running.connect(f"{HEAD}{len(body)}\r\n\r\n".encode() + body)
    state = running.server.server_state
    until(lambda: any(connection.flow.write_paused for connection in state.connections))
    return client


@pytest.mark.parametrize("signals", [1, 2])
@pytest.mark.parametrize("words", [b"", b"POST /v1/ch", f"{HEAD}100\r\n\r\n{{".encode()], ids=["none", "head", "body"])
def test_who_has_not_sent_a_whole_request_is_not_waited_for(running, monkeypatch, words, signals):
    monkeypatch.setattr(api_server, "GRACE", 1000)
    with running.connect(words) as client:
        until(lambda: running.server.server_state.connections)
        until(lambda: running.server.service.arriving or b"Length" not in words)
        for _ in range(signals):
            running.signal()
        running.wait_until_ended()
        answer = b"".join(iter(lambda: client.recv(65536), b""))
    if b"Length" in words:
        head, _, body = answer.partition(b"\r\n\r\n")
        assert b" 503 " in head.partition(b"\r\n")[0] and json.loads(body)["error"]["code"] == "shutting_down"
    else:
        assert answer == b""


@pytest.mark.parametrize("attempt", range(3))
def test_the_second_signal_ends_it_whoever_does_not_read(running, monkeypatch, attempt):
    monkeypatch.setattr(api_server, "GRACE", 30)
    with unread_stream(running), running.connect(f"{HEAD}100\r\n\r\n{{".encode()):
        until(lambda: running.server.service.arriving)
        running.signal()
        time.sleep(0.1 * attempt)
        running.signal()
        running.wait_until_ended()


def test_who_does_not_read_holds_up_the_end_for_a_while_only(running, monkeypatch):
    monkeypatch.setattr(api_server, "GRACE", 0.5)
    with unread_stream(running):
        running.signal()
        running.wait_until_ended()


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_has_begun_is_finished_however_long_it_takes(running, monkeypatch, stream):
    monkeypatch.setattr(api_server, "GRACE", 0.2)
    slow_steps(monkeypatch, 0.02)
    body = {**ENDLESS, "max_tokens": 60, "stream": stream}
    replies = []
    asking = threading.Thread(target=lambda: replies.append(httpx.post(running.url + CHAT, json=body, timeout=30)))
    asking.start()
    until(lambda: running.engine.lane.running)
    running.signal()
    running.wait_until_ended()
    asking.join()
    if stream:
        assert replies[0].text.endswith("data: [DONE]\n\n") and "error" not in replies[0].text
    else:
        assert replies[0].json()["usage"]["completion_tokens"] == 60


@pytest.mark.parametrize("stream", [True, False])
def test_the_second_signal_cuts_off_answers_and_says_so(running, monkeypatch, stream):
    slow_steps(monkeypatch, 0.02)
    replies = []

    def ask():
        replies.append(httpx.post(running.url + CHAT, json={**ENDLESS, "stream": stream}, timeout=30))

    asking = threading.Thread(target=ask)
    asking.start()
    until(lambda: running.engine.lane.running)
    running.signal()
    time.sleep(0.3)
    assert running.thread.is_alive()
    running.signal()
    running.wait_until_ended()
    asking.join()
    if stream:
        error = json.loads(replies[0].text.split("\n\n")[-2].removeprefix("data: "))["error"]
    else:
        assert replies[0].status_code == 503
        error = replies[0].json()["error"]
    assert error["code"] == "shutting_down" and error["type"] == "server_error"


def test_after_the_signal_nobody_is_let_in(running, monkeypatch):
    slow_steps(monkeypatch, 0.02)
    with httpx.stream("POST", running.url + CHAT, json={**ENDLESS, "max_tokens": 60}, timeout=30) as response:
        lines = response.iter_lines()
        next(lines)
        running.signal()
        until(lambda: running.server.service.closing)
        with contextlib.suppress(httpx.ConnectError):
            assert httpx.post(running.url + CHAT, content=b"{}", headers=JSON).status_code == 503
        assert [line for line in lines if line][-1] == "data: [DONE]"
