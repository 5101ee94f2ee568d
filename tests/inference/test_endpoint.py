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
    problem = "replies, but not as an OpenAI-compatible endpoint does"
    assert refused(Endpoint(fake.url, flag="--api").models) == (f"--api {fake.url}: {problem}", 1)


def test_an_address_without_v1_is_noticed(fake):
    root = fake.url.removesuffix("v1")
    endpoint = Endpoint(root)
    assert endpoint.models() == [] and endpoint.hint == " (is /v1 missing in the address?)"
    line, _ = refused(lambda: list(endpoint.stream("minimind", ASK)))
    assert line == f"--base_url {root}: /chat/completions: no such address{endpoint.hint} (HTTP status 404)"
    assert Endpoint(fake.url + "/").hint == Endpoint(fake.url).hint == ""
    fake.refusal = 404, "no such model"
    assert refused(lambda: list(Endpoint(fake.url).stream("x", ASK)))[0].endswith(": no such model (HTTP status 404)")


def test_pieces_add_up_to_what_the_endpoint_counted(fake):
    fake.answer, fake.finish_reason = ["你", "", "好"], "length"
    pieces = list(Endpoint(fake.url).stream("minimind", ASK, temperature=0, top_k=0))
    assert "".join(piece.text for piece in pieces) == "你好"
    assert [piece.tokens for piece in pieces] == [0, 1, 0, 1, 0, 0, 6 - 2], "6 by the usage at the end"
    assert [piece.finish_reason for piece in pieces] == [None, None, None, None, "length", None, None]
    assert pieces[:2] == [Piece("", 0), Piece("你", 1)]
    asked = fake.requests[0]
    assert asked["temperature"] == 0 and not {"top_k", "top_p", "max_tokens"} & asked.keys()


CONVERSATION = [
    {"role": role, "content": content}
    for role, content in [
        ("system", "简短。"), ("user", "一"), ("assistant", "甲"), ("user", "二"), ("assistant", "乙"), ("user", "三三")
    ]
]  # fmt: skip


@pytest.mark.parametrize(
    "overflow",
    [
        {"code": "context_length_exceeded"},
        {"code": 400, "type": "exceed_context_size_error"},
        {"code": 400, "message": "This model's maximum context length is 7 tokens."},
    ],
)
def test_the_oldest_exchanges_go_until_the_rest_fits(fake, overflow):
    """7 characters: the system prompt's 3, the last question's 2, and those of one exchange."""
    fake.context, fake.overflow = 7, overflow
    endpoint, dropped = Endpoint(fake.url), []
    for context in (9, 7, 6):
        fake.context = context
        dropped.append(sum(piece.dropped for piece in endpoint.stream("minimind", CONVERSATION)))
    assert dropped == [0, 2, 4]
    sent = [[message["content"] for message in request["messages"]] for request in fake.requests]
    whole = ["简短。", "一", "甲", "二", "乙", "三三"]
    one, none = [whole[0], *whole[3:]], [whole[0], whole[5]]
    assert sent == [whole, whole, one, whole, one, none]


def test_a_question_that_is_too_long_alone_and_other_refusals_are_told(fake):
    fake.context = 4
    line, code = refused(lambda: list(Endpoint(fake.url).stream("minimind", CONVERSATION)))
    assert line.startswith(f"--base_url {fake.url}: 5 characters are too many; ask a shorter question, or ")
    assert "/clear" in line and code == 1 and len(fake.requests) == 3
    fake.context, fake.refusal = None, (400, "no such field")
    assert "shorter" not in refused(lambda: list(Endpoint(fake.url).stream("minimind", CONVERSATION)))[0]
    assert len(fake.requests) == 4, "it is not asked again"


def test_an_answer_that_does_not_go_on(fake, monkeypatch):
    monkeypatch.setattr(module, "WAIT", 0.2)
    leave = threading.Event()
    fake.answer = ["半", leave]
    pieces = Endpoint(fake.url).stream("minimind", ASK)
    assert next(pieces).text + next(pieces).text == "半"
    line, _ = refused(lambda: next(pieces))
    leave.set()
    assert line == f"--base_url {fake.url}: no answer in time; is the server busy?"


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8000", "ftp://a/v1", "http://", "http://a:x/v1", "http://a:0/v1", "http://a b/v1", "http://a/\x07",
        "http://😀/v1", "http://me:secret@a/v1", "http://a/v1?key=secret",
    ],
)  # fmt: skip
def test_what_is_no_address_is_wrong_usage(url):
    line, code = refused(lambda: Endpoint(url, flag="--api"))
    assert code == 2 and line.startswith("--api") and "secret" not in line


def test_where_the_key_comes_from(fake, monkeypatch):
    fake.key = KEY
    assert "wants a key: --api_key or OPENAI_API_KEY (HTTP status 401)" in refused(Endpoint(fake.url).models)[0]
    assert "wants a key: OPENAI_API_KEY (HTTP" in refused(Endpoint(fake.url, key_flag=None).models)[0]
    assert Endpoint(fake.url, f" {KEY}\n").models()
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")
    assert Endpoint(fake.url).models()
    line, _ = refused(Endpoint(fake.url, "sk-other").models)
    assert "wants another key than that of --api_key (HTTP status 401)" in line and "sk-other" not in line
    monkeypatch.setenv("OPENAI_API_KEY", "sk-other")
    assert "wants another key than that of OPENAI_API_KEY" in refused(Endpoint(fake.url).models)[0]
    for key in ("密钥", "a\x07b"):
        line, code = refused(lambda: Endpoint(fake.url, key))  # noqa: B023
        assert code == 2 and line.startswith("--api_key: holds a character") and key not in line
