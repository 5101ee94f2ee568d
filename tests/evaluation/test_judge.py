"""The judge against a stand-in endpoint on this machine: what it is asked, what is read from its replies, what goes wrong."""

import contextlib
import http.server
import json
import socket
import threading

import pytest

from model.errors import UserError
from model.evaluation.judge import Judge, read_rating

KEY = "sk-secret-of-this-test"


@contextlib.contextmanager
def endpoint(respond, models=None):
    """A stand-in endpoint, which lists `models` if there are any; yields (its URL, the requests it got as (path, headers, body)). respond(body) gives the text
    of its reply, or (status, content type, bytes)."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((self.path, self.headers, body))
            reply = respond(body)
            if isinstance(reply, str):
                message = {"role": "assistant", "content": reply}
                choice = {"index": 0, "message": message, "finish_reason": "stop"}
                completion = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
                reply = 200, "application/json", json.dumps(completion).encode()
            status, kind, content = reply
            with contextlib.suppress(OSError):  # the client has given up
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        def do_GET(self):
            content = json.dumps({"object": "list", "data": [{"id": name, "object": "model"} for name in models or ()]})
            self.send_response(200 if models and self.path == "/v1/models" else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content.encode())

        def log_message(self, *words):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def rate(url, timeout=60.0):
    return Judge(url, "referee", timeout).rate({"q": "一星期有多少天？"}, [], "七天。")


def test_what_the_judge_is_asked(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    history = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}]
    with endpoint(lambda body: '{"reason": "对", "score": 9}') as (url, requests):
        judge = Judge(url, "referee")
        rating = judge.rate({"q": "一年有几天？", "answer": ["365", "天"], "task": "t"}, history, "“365天”\n")
        judge.rate({"q": "你是谁？"}, [], "")
    assert (rating.score, rating.reason) == (9, "对")
    path, headers, body = requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert body["model"] == "referee" and body["temperature"] == 0
    system, user = body["messages"]
    assert system["role"] == "system" and "1 到 10" in system["content"]
    for aspect in ("正确", "流畅", "完整", "JSON"):
        assert aspect in system["content"]
    assert user["role"] == "user" and json.loads(user["content"]) == {
        "对话": history,
        "问题": "一年有几天？",
        "参考答案": ["365", "天"],
        "回答": "“365天”\n",
    }
    assert json.loads(requests[1][2]["messages"][1]["content"]) == {"问题": "你是谁？", "回答": ""}


@pytest.mark.parametrize("key, sent", [(f" {KEY}\r\n", KEY), (" ", "none")])
def test_white_space_round_the_key_goes(monkeypatch, key, sent):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with endpoint(lambda body: '{"score": 5}') as (url, requests):
        assert rate(url).score == 5
    assert requests[0][1]["Authorization"] == f"Bearer {sent}"


@pytest.mark.parametrize("key", [f"{KEY}…", f"{KEY}\n{KEY}", f"{KEY}\x07", f"{KEY}\udcff"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_repeated(monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError, match="^OPENAI_API_KEY: ") as caught:
        Judge("http://127.0.0.1:9/v1", "m")
    assert caught.value.exit_code == 2 and KEY not in str(caught.value)


def reply_with(content):
    """A completion whose message holds `content`, whatever that is."""
    return 200, "application/json", json.dumps({"choices": [{"message": {"content": content}}]}).encode()


@pytest.mark.parametrize(
    "content, score",
    [
        ([{"type": "text", "text": '{"reason": "对", "sc'}, {"type": "text", "text": 'ore": 9}'}], 9),
        ([], None),
        (None, None),
    ],
)
def test_text_may_come_in_parts_or_be_missing(content, score):
    with endpoint(lambda body: reply_with(content)) as (url, _):
        assert rate(url).score == score


@pytest.mark.parametrize("models, asked", [(["first", "second"], "first"), (None, "default")])
def test_without_a_name_the_first_model_of_the_endpoint_judges(models, asked):
    with endpoint(lambda body: '{"score": 5}', models) as (url, requests):
        assert Judge(url).rate({"q": "一星期有多少天？"}, [], "七天。").score == 5
    assert requests[0][2]["model"] == asked


@pytest.mark.parametrize(
    "reply, score, reason",
    [
        ('{"reason": "对", "score": 9}', 9, "对"),
        ('{"score": 7.5}', 7.5, ""),
        ('好的：\n```json\n{"score": 1, "reason": "错{}"}\n```\n完', 1, "错{}"),
        ('<think>也许 {"score": 3}，不对</think>{"score": 10, "reason": " 好 "}', 10, "好"),
        ('{乱} {"score": 4, "reason": null}', 4, ""),
        ("", None, ""),
        ("我给 8 分", None, "我给 8 分"),
        ('{"reason": "好"}', None, '{"reason": "好"}'),
        ('{"score": "8"}', None, '{"score": "8"}'),
        ('{"score": true}', None, '{"score": true}'),
        ('{"score": null}', None, '{"score": null}'),
        ('{"score": NaN}', None, '{"score": NaN}'),
        ('{"score": 0}', None, '{"score": 0}'),
        ('{"score": 11}', None, '{"score": 11}'),
        ('{"score": 10.5}', None, '{"score": 10.5}'),
        ('{"score": [8]}', None, '{"score": [8]}'),
        ('{"score": 8} 或者 {"score": 3}', None, '{"score": 8} 或者 {"score": 3}'),
        ('{"a": {"score": 8}}', None, '{"a": {"score": 8}}'),
        ('[8] "score": 8', None, '[8] "score": 8'),
        ('{"score": 8', None, '{"score": 8'),
    ],
)
def test_ratings_are_read_from_any_wrapping_but_never_guessed(reply, score, reason):
    rating = read_rating(reply)
    assert (rating.score, rating.reason) == (score, reason)


def test_a_reply_nested_without_end_is_no_score():
    assert read_rating('{"score": ' + "[" * 5000).score is None


@pytest.mark.parametrize(
    "reply, message",
    [
        (
            (401, "application/json", json.dumps({"error": {"message": f"bad {KEY}"}}).encode()),
            "401; check OPENAI_API_",
        ),
        ((404, "text/plain", b"nothing here"), "404; check the URL and --judge_model"),
        ((500, "text/html", KEY.encode()), "HTTP status 500"),
        ((200, "text/html", b"<html>hello</html>"), "not as an OpenAI-compatible endpoint"),
        ((200, "application/json", b"{"), "not as an OpenAI-compatible endpoint"),
        ((200, "application/json", b"[1]"), "not as an OpenAI-compatible endpoint"),
        ((200, "application/json", b'{"choices": []}'), "not as an OpenAI-compatible endpoint"),
        ((200, "application/json", b'{"choices": [{"message": 3}]}'), "not as an OpenAI-compatible endpoint"),
        *(
            (reply_with(content), "not as an OpenAI-compatible endpoint")
            for content in (7, 0, False, {"text": "9"}, {}, ["9"], [{"type": "image"}], [{"text": 9}])
        ),
    ],
)
def test_an_endpoint_that_fails_is_named_in_one_line_without_the_key(monkeypatch, reply, message):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with endpoint(lambda body: reply) as (url, _), pytest.raises(UserError) as caught:
        rate(url)
    text = str(caught.value)
    assert text.startswith(f"--judge {url}: ") and message in text and "\n" not in text and KEY not in text


def test_a_passing_failure_is_asked_again():
    replies = [(500, "text/plain", b""), '{"score": 6}']
    with endpoint(lambda body: replies.pop(0)) as (url, requests):
        assert rate(url).score == 6 and len(requests) == 2


def test_an_endpoint_that_is_down_or_silent(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        with pytest.raises(UserError, match="cannot be reached; is the server running"):
            rate(url)
    done = threading.Event()
    with endpoint(lambda body: done.wait(20) and "") as (url, _):
        with pytest.raises(UserError, match=r"no reply within 0\.2 seconds"):
            rate(url, timeout=0.2)
        done.set()


@pytest.mark.parametrize(
    "url",
    ["", "localhost:8000", "ftp://a/v1", "http://", "http://a:x/v1", "http://a:99999/v1", "http://a:0/v1", "http://[a"]
    + ["http://x.\x01/v1", "http://x/v1\n", "http://a b/v1", " http://a/v1", "http://ab\u2026.c/v1"],
)
def test_an_address_that_is_none(url):
    with pytest.raises(UserError, match="expected a URL such as") as caught:
        Judge(url, "m")
    assert caught.value.exit_code == 2 and str(caught.value).isprintable()


@pytest.mark.parametrize("url", [f"http://me:{KEY}@a/v1", f"http://me:{KEY}@a:x/v1", f"http://a/v1?key={KEY}"])
def test_an_address_with_a_secret_is_refused_and_not_repeated(url):
    with pytest.raises(UserError, match="OPENAI_API_KEY") as caught:
        Judge(url, "m")
    assert KEY not in str(caught.value) and caught.value.exit_code == 2
