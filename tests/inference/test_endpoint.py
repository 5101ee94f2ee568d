"""An OpenAI-compatible endpoint: its models, its answer's pieces, and the one line for each thing that goes wrong."""

import threading

import pytest

from fake_endpoint import KEY
from model.errors import UserError
from model.inference import endpoint as module
from model.inference.endpoint import Endpoint, Piece

ASK = [{"role": "user", "content": "你好"}]


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def refused(call):
    """The one line of the UserError that `call` raises, and its exit code."""
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value), caught.value.exit_code


def test_models_and_an_endpoint_without_a_list(fake):
    assert Endpoint(fake.url).models() == ["minimind", "minimind-lora"]
    fake.listing = 404, {"detail": "Not Found"}
    assert Endpoint(fake.url).models() == []
    fake.listing = 500, {"error": {"message": "no\nmemory"}}
    assert refused(Endpoint(fake.url).models) == (f"--base_url {fake.url}: no memory (HTTP status 500)", 1)


@pytest.mark.parametrize("reply", [["x"], "<html>", {"data": 5}])
def test_what_is_no_such_endpoint_is_told(fake, reply):
    fake.listing = 200, reply
    line, _ = refused(Endpoint(fake.url, flag="--api").models)
    assert line == f"--api {fake.url}: replies, but not as an OpenAI-compatible endpoint does; /v1 missing?"


def test_pieces_add_up_to_what_the_endpoint_counted(fake):
    fake.answer, fake.finish_reason = ["你", "", "好"], "length"
    pieces = list(Endpoint(fake.url).stream("minimind", ASK, temperature=0, top_k=0))
    assert "".join(piece.text for piece in pieces) == "你好"
    assert [piece.tokens for piece in pieces] == [1, 0, 1, 0, 0, 6 - 2], "6 by the usage at the end"
    assert [piece.finish_reason for piece in pieces] == [None, None, None, "length", None, None]
    assert pieces[0] == Piece("你", 1)
    asked = fake.requests[0]
    assert asked["temperature"] == 0 and not {"top_k", "top_p", "max_tokens"} & asked.keys()


def test_an_answer_that_does_not_go_on(fake, monkeypatch):
    monkeypatch.setattr(module, "WAIT", 0.2)
    leave = threading.Event()
    fake.answer = ["半", leave]
    pieces = Endpoint(fake.url).stream("minimind", ASK)
    assert next(pieces).text == "半"
    line, _ = refused(lambda: next(pieces))
    leave.set()
    assert line == f"--base_url {fake.url}: no answer in time; is the server busy?"


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8000", "ftp://a/v1", "http://", "http://a:x/v1", "http://a:0/v1", "http://a b/v1", "http://a/\x07",
        "http://me:secret@a/v1", "http://a/v1?key=secret",
    ],
)  # fmt: skip
def test_what_is_no_address_is_wrong_usage(url):
    line, code = refused(lambda: Endpoint(url, flag="--api"))
    assert code == 2 and line.startswith("--api") and "secret" not in line


def test_where_the_key_comes_from(fake, monkeypatch):
    fake.key = KEY
    assert Endpoint(fake.url, f" {KEY}\n").models()
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")
    assert Endpoint(fake.url).models()
    line, _ = refused(Endpoint(fake.url, "sk-other").models)
    assert "wants another key than that of --api_key (HTTP status 401)" in line and "sk-other" not in line
    for key in ("密钥", "a\x07b"):
        line, code = refused(lambda: Endpoint(fake.url, key))  # noqa: B023
        assert code == 2 and line.startswith("--api_key: holds a character") and key not in line
