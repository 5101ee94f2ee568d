"""The server on loopback, asked by the openai package and by clients that mean no good: answers are the engine's own, rows
come free, and whatever is wrong is an error in OpenAI's shape."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import json
import random
import socket
import threading
import time
import urllib.error
import urllib.request

import httpx
import hypothesis
import jsonschema
import openai
import pytest
import schemathesis
import uvicorn
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import trained_adapter, trained_scale
from model.inference import api
from model.inference.api import create_app
from model.inference.engine import Engine
from model.LMConfig import LMConfig
from model.lora import Adapter
from model.settings import SamplingParameters, ServerSettings
from model.tokenizer import encode_text, render_conversation, token_bytes

CONTEXT = 512
SHORT = 32  # the context of the server without a network
SHAPE = dict(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, max_seq_len=CONTEXT)
GREEDY = SamplingParameters(temperature=0.0, max_new_tokens=12)
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
QUESTION = {"messages": [{"role": "user", "content": "北京有什么好吃的？"}], "temperature": 0, "max_tokens": 12}
ENDLESS = {**QUESTION, "max_tokens": -1, "stream": True}  # as long as the context
JSON = {"Content-Type": "application/json"}


def chat_ids(tokenizer, text):
    return render_conversation(tokenizer, [{"role": "user", "content": text}], add_generation_prompt=True)[0]


@pytest.fixture(scope="module")
def model(small_tokenizer):
    """A model that never ends a greedy answer by itself: its </s> has the logit 0, and the largest of 400 is larger."""
    model = trained_scale(LMConfig(**SHAPE, vocab_size=len(small_tokenizer)))
    model.tok_embeddings.weight.data[model.config.eos_token_id] = 0
    return model


def until(condition, seconds=20):
    """Wait until `condition()` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never comes"
        time.sleep(0.005)


class Live:
    """A server on a free port of loopback, in a thread."""

    def __init__(self, model, tokenizer, engine_options=(), send_buffer=None, **given):
        engine = Engine(model, tokenizer, **{"max_batch": 8, **dict(engine_options)})
        self.engine, self.app = engine, create_app(engine, ServerSettings(**given))
        listener = socket.create_server(("127.0.0.1", 0))
        if send_buffer:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(self.app, log_level="critical", ws="none"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]})
        self.thread.start()
        until(lambda: self.server.started)

    def client(self, **options):
        return openai.OpenAI(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, **options})

    def post(self, path, body, **options):
        return httpx.post(self.url + path, json=body, timeout=30, **options)

    def metric(self, name, **labels):
        return self.app.state.service.metrics.registry.get_sample_value(f"minimind_{name}", labels) or 0

    def wait_until_idle(self, seconds=20):
        """Until no request is open and no row taken."""
        thread = self.app.state.service.thread
        until(lambda: not thread.open and not self.engine.has_work, seconds)

    def close(self):
        self.app.state.service.close(drain=False)
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()


@contextlib.contextmanager
def live(*arguments, **options):
    server = Live(*arguments, **options)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="module")
def server(model, small_tokenizer):
    with live(model, small_tokenizer, dict(prefix_rows=4)) as server:
        yield server


@pytest.fixture(autouse=True)
def no_row_leaks(request):
    yield
    if "server" in request.fixturenames:
        request.getfixturevalue("server").wait_until_idle()


def alone(model, tokenizer, ids, **given):
    """The Request of `ids`, answered by an engine of its own."""
    return Engine(model, tokenizer).generate([ids], dataclasses.replace(GREEDY, **given))[0]


def assert_error(response, status, *parts, param=None):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"] and error["type"]
    for part in parts:
        assert part in error["message"], error
    if param is not None:
        assert error["param"] == param


# ----------------------------------------------------------------------------------------------------- the openai package


def test_a_chat_is_what_the_engine_says_whole_and_streamed(server, model, small_tokenizer):
    client, expected = server.client(), alone(model, small_tokenizer, chat_ids(small_tokenizer, "北京有什么好吃的？"))
    whole = client.chat.completions.create(model="any", **QUESTION)
    assert whole.choices[0].message.content == expected.text and whole.choices[0].message.role == "assistant"
    assert whole.choices[0].finish_reason == "length" and whole.object == "chat.completion"
    assert whole.id.startswith("chatcmpl-") and whole.model == "minimind" and abs(whole.created - time.time()) < 60
    usage = whole.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(expected.prompt_ids), 12)
    assert usage.total_tokens == usage.prompt_tokens + 12

    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(model="any", stream=True, stream_options=options, **QUESTION))
    assert len({chunk.id for chunk in chunks}) == 1 and len({chunk.created for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant" and {chunk.object for chunk in chunks} == {
        "chat.completion.chunk"
    }
    *texts, last, counted = chunks
    assert "".join(chunk.choices[0].delta.content for chunk in texts) == expected.text
    assert [chunk.choices[0].finish_reason for chunk in texts] == [None] * len(texts) and len(texts) > 5
    assert last.choices[0].finish_reason == "length" and last.choices[0].delta.content is None
    assert counted.choices == [] and counted.usage.completion_tokens == 12
    assert counted.usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens - 1  # asked a moment ago
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_messages_of_all_roles_and_parts_are_the_conversation(server, model, small_tokenizer):
    messages = [
        {"role": "system", "content": "你好！"},
        {"role": "user", "content": [{"type": "text", "text": "北京"}, {"type": "text", "text": "的面条"}]},
        {"role": "assistant", "content": "很好吃。"},
        {"role": "user", "content": "<s>user\n</s>"},  # spelled, not meant
    ]
    plain = [{**message, "content": message["content"]} for message in messages]
    plain[1]["content"] = "北京的面条"
    ids = render_conversation(small_tokenizer, plain, add_generation_prompt=True)[0]
    assert sum(token == model.config.eos_token_id for token in ids) == 4
    reply = server.client().chat.completions.create(**{**QUESTION, "messages": messages}, model="any")
    assert reply.choices[0].message.content == alone(model, small_tokenizer, ids).text
    assert reply.usage.prompt_tokens == len(ids)


def test_n_answers_with_a_seed_are_different_and_the_same_again(server, model, small_tokenizer):
    given = {**QUESTION, "temperature": 1.5, "seed": 7, "n": 3}
    create = server.client().chat.completions.create
    first, second = (create(model="any", **given) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in second.choices] and len(set(texts)) == 3
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    ids = chat_ids(small_tokenizer, "北京有什么好吃的？")
    assert texts == [alone(model, small_tokenizer, ids, temperature=1.5, seed=seed).text for seed in (7, 8, 9)]
    assert first.usage.completion_tokens == sum(len(alone(model, small_tokenizer, ids, temperature=1.5, seed=seed).token_ids) for seed in (7, 8, 9))  # fmt: skip
    streamed = ["", "", ""]
    for chunk in create(model="any", stream=True, **given):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts
    unseeded = {create(model="any", **{**given, "seed": None, "n": 1}).choices[0].message.content for _ in range(3)}
    assert len(unseeded) == 3


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_the_answer(server, model, small_tokenizer, stream):
    text = alone(model, small_tokenizer, chat_ids(small_tokenizer, "北京有什么好吃的？")).text
    cut = next(place for place in range(2, len(text)) if text.index(text[place : place + 2]) == place)
    stop = text[cut : cut + 2]
    for stops in (stop, ["never said", stop]):
        reply = server.client().chat.completions.create(model="any", stop=stops, stream=stream, **QUESTION)
        if stream:
            choices = [chunk.choices[0] for chunk in reply]
            assert "".join(choice.delta.content or "" for choice in choices) == text[:cut]
            assert choices[-1].finish_reason == "stop"
        else:
            assert reply.choices[0].message.content == text[:cut] and reply.choices[0].finish_reason == "stop"


def test_the_end_token_is_a_stop(server, model, small_tokenizer, monkeypatch):
    """The model's own end of an answer, here the third token of it."""
    ids = chat_ids(small_tokenizer, "北京有什么好吃的？")
    tokens = alone(model, small_tokenizer, ids).token_ids
    monkeypatch.setattr(model.config, "eos_token_id", tokens[2])
    count = tokens.index(tokens[2])
    (choice,) = (reply := server.client().chat.completions.create(model="any", **QUESTION)).choices
    assert choice.finish_reason == "stop" and reply.usage.completion_tokens == count


def test_log_probabilities_are_the_engines(server, model, small_tokenizer):
    ids = chat_ids(small_tokenizer, "北京有什么好吃的？")
    deltas = list(Engine(model, small_tokenizer).stream(ids, dataclasses.replace(GREEDY, logprobs=2)))
    expected = [pair for delta in deltas for pair in delta.logprobs]
    create = server.client().chat.completions.create
    content = create(model="any", logprobs=True, top_logprobs=2, **QUESTION).choices[0].logprobs.content
    pieces = token_bytes(small_tokenizer)
    for entry, delta, (own, best) in zip(content, deltas, expected, strict=True):
        assert entry.logprob == pytest.approx(own, abs=1e-5) and bytes(entry.bytes) == pieces[delta.token_ids[0]]
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx([value for _, value in best], abs=1e-5)
        assert [bytes(top.bytes) for top in entry.top_logprobs] == [pieces[token] for token, _ in best]
    streamed = create(model="any", logprobs=True, stream=True, **QUESTION)
    entries = [entry for chunk in streamed for entry in (chunk.choices[0].logprobs or _NONE).content]
    assert [entry.logprob for entry in entries] == pytest.approx([entry.logprob for entry in content], abs=1e-5)
    assert all(entry.top_logprobs == [] for entry in entries)
    assert create(model="any", **QUESTION).choices[0].logprobs is None


class _NONE:
    content = ()


def test_texts_go_on_in_the_order_of_prompts_and_choices(server, model, small_tokenizer):
    bos, texts = small_tokenizer.bos_token_id, ["成都的", "", "拉萨"]
    prompts = [[bos, *encode_text(small_tokenizer, text)] for text in texts]
    expected = [alone(model, small_tokenizer, ids).text for ids in prompts]
    create = server.client().completions.create
    for prompt in (texts, prompts):
        reply = create(model="any", prompt=prompt, n=2, best_of=2, temperature=0, max_tokens=12)
        assert [choice.text for choice in reply.choices] == [text for text in expected for _ in range(2)]
        assert [choice.index for choice in reply.choices] == list(range(6)) and reply.object == "text_completion"
        assert reply.usage.prompt_tokens == sum(map(len, prompts)) and reply.usage.completion_tokens == 72
    for prompt in (texts[0], prompts[0]):
        assert create(model="any", prompt=prompt, temperature=0, max_tokens=12).choices[0].text == expected[0]
    chunks = list(create(model="any", prompt=texts, temperature=0, max_tokens=12, stream=True))
    streamed = ["", "", ""]
    for chunk in chunks:
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == expected and len({chunk.id for chunk in chunks}) == 1


def test_older_log_probabilities(server, small_tokenizer):
    reply = server.client().completions.create(model="any", prompt="成都", temperature=0, max_tokens=8, logprobs=2)
    text, found = reply.choices[0].text, reply.choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset) == 8
    for token, offset in zip(found.tokens, found.text_offset):
        assert token.startswith("bytes:") or text[offset:].startswith(token)
    for token, value, top in zip(found.tokens, found.token_logprobs, found.top_logprobs):
        assert len(top) == 2 and top[token] == value == max(top.values())


def test_penalties_and_the_rest_reach_the_engine(server, model, small_tokenizer):
    ids = chat_ids(small_tokenizer, "北京有什么好吃的？")
    create = server.client().chat.completions.create
    for fields, meaning in (
        (dict(presence_penalty=2.0, frequency_penalty=2.0), dict(presence_penalty=2.0, frequency_penalty=2.0)),
        (dict(extra_body=dict(repetition_penalty=5.0)), dict(repetition_penalty=5.0)),
        (dict(temperature=2.0, seed=1, extra_body=dict(top_k=2)), dict(temperature=2.0, seed=1, top_k=2)),
        (dict(temperature=2.0, seed=1, top_p=0.3), dict(temperature=2.0, seed=1, top_p=0.3)),
        (dict(temperature=2.0, top_p=0.0), {}),
        (dict(max_completion_tokens=3), dict(max_new_tokens=3)),
    ):
        text = create(model="any", **{**QUESTION, **fields}).choices[0].message.content
        assert text == alone(model, small_tokenizer, ids, **meaning).text


def test_as_much_as_fits():
    for limit in (-1, None, 10**9):
        reply = CLIENT["client"].post(TEXT, json={"prompt": [5, 6], "temperature": 0, "max_tokens": limit}).json()
        assert reply["usage"]["completion_tokens"] == SHORT - 2 and reply["choices"][0]["finish_reason"] == "length"


def test_models_and_errors_as_the_openai_package_sees_them(server):
    client = server.client()
    assert [entry.id for entry in client.models.list()] == ["minimind"]
    assert client.models.retrieve("minimind").owned_by == "minimind"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("gpt")
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="any", messages=[], temperature=3)
    assert caught.value.type == "invalid_request_error" and caught.value.param in ("messages", "temperature")
    with pytest.raises(openai.BadRequestError, match="tools is not supported") as caught:
        tool = {"type": "function", "function": {"name": "f"}}
        client.chat.completions.create(model="any", tools=[tool], **QUESTION)
    assert caught.value.param == "tools"


def test_the_servers_own_defaults_and_models(model, small_tokenizer):
    """--temperature 0, --strict_model, --model_name, an adapter."""
    fresh = trained_scale(LMConfig(**SHAPE, vocab_size=len(small_tokenizer)))
    engine, ids = Engine(fresh, small_tokenizer), chat_ids(small_tokenizer, "x")
    weights = trained_adapter(fresh, ["layers.0.feed_forward.w3", "layers.0.attention.wv"])
    engine.add_adapter("law", Adapter(None, weights, {"lora": {"alpha": 8.0}}))
    expected = [engine.generate([ids], dataclasses.replace(GREEDY), adapter=name)[0].text for name in (None, "law")]
    assert expected[0] != expected[1]
    given = ServerSettings(strict_model=True, model_name="mini")
    app = create_app(engine, given, SamplingParameters(temperature=0.0))
    with TestClient(app) as client:
        assert [entry["id"] for entry in client.get("/v1/models").json()["data"]] == ["mini", "law"]
        for name, text in zip(("mini", "law", "mini"), (*expected, expected[0])):
            body = {"model": name, "messages": [{"role": "user", "content": "x"}], "max_tokens": 12}
            reply = client.post(CHAT, json=body).json()
            assert reply["choices"][0]["message"]["content"] == text and reply["model"] == name
        for name in ("minimind", None, "laws", ""):
            assert_error(client.post(CHAT, json={**QUESTION, "model": name}), 404, "does not exist", param="model")
    with TestClient(app) as client:  # closed by now
        assert_error(client.post(CHAT, json=QUESTION), 503, "shutting down")
        assert_error(client.get("/health"), 503, "shutting down")


# ------------------------------------------------------------------------------------------------------------ many clients


def test_many_clients_at_once_get_what_each_gets_alone(server, model, small_tokenizer):
    questions = [f"{place}的面条" for place in "北京上海广州成都西安昆明"]
    expected = [alone(model, small_tokenizer, chat_ids(small_tokenizer, question)).text for question in questions]

    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            create = client.chat.completions.create

            async def one(question, stream):
                messages = [{"role": "user", "content": question}]
                reply = await create(model="any", **{**QUESTION, "messages": messages}, stream=stream)
                if not stream:
                    return reply.choices[0].message.content
                return "".join([chunk.choices[0].delta.content or "" async for chunk in reply])

            return await asyncio.gather(*(one(question, stream) for stream in (False, True) for question in questions))

    assert asyncio.run(ask()) == expected * 2


def test_a_flood_of_clients_of_which_a_third_leaves_midway(model, small_tokenizer):
    """200 requests by 32 clients: every other one is complete and right, and no row leaks."""
    questions = ["北京的面条", "上海的火锅很好吃", "你好", "有什么好吃的？" * 5]
    expected = {
        question: alone(model, small_tokenizer, chat_ids(small_tokenizer, question)).text for question in questions
    }
    outcomes = []

    async def client_of(server, number, count):
        chance = random.Random(number)
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            for turn in range(count):
                question, stream, leaves = chance.choice(questions), chance.random() < 0.5, (number + turn) % 3 == 0
                body = {**QUESTION, "messages": [{"role": "user", "content": question}], "stream": stream}
                if leaves:
                    body["max_tokens"] = -1
                    outcomes.append(await leave(client, {**body, "stream": stream}, chance.random() * 0.05))
                elif stream:
                    text, lines = "", (await client.post(CHAT, json=body)).text.split("\n\n")
                    for line in lines[:-2]:
                        text += json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content", "")
                    outcomes.append(text == expected[question] and lines[-2:] == ["data: [DONE]", ""])
                else:
                    reply = (await client.post(CHAT, json=body)).json()
                    outcomes.append(reply["choices"][0]["message"]["content"] == expected[question])

    async def leave(client, body, seconds):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                if body["stream"]:
                    async with client.stream("POST", CHAT, json=body) as response:
                        await anext(response.aiter_lines())
                        await asyncio.sleep(seconds)
                else:
                    await client.post(CHAT, json=body)
        return "left"

    async def flood():
        await asyncio.gather(*(client_of(server, number, 7 if number < 8 else 6) for number in range(32)))

    with live(model, small_tokenizer, dict(prefix_rows=4)) as server:
        asyncio.run(flood())
        server.wait_until_idle()
        assert (
            len(outcomes) == 200
            and 60 < outcomes.count("left") < 75
            and outcomes.count(True) == 200 - outcomes.count("left")
        )
        assert server.metric("requests_total", endpoint=CHAT, outcome="200") >= outcomes.count(True)
        assert server.metric("requests_total", endpoint=CHAT, outcome="disconnected") > 5
        assert server.metric("running_requests") == server.metric("waiting_requests") == 0


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_frees_the_row_at_once(server, stream):
    counted = server.metric("generated_tokens_total")
    with contextlib.suppress(httpx.ReadTimeout):
        if stream:
            with httpx.stream("POST", server.url + CHAT, json=ENDLESS) as response:
                next(response.iter_lines())
        else:
            httpx.post(server.url + CHAT, json={**ENDLESS, "stream": False}, timeout=0.1)
    server.wait_until_idle(5)
    assert server.metric("generated_tokens_total") - counted < CONTEXT - 100


@contextlib.contextmanager
def lazy_client(server):
    """A client that asks for an endless stream and reads nothing of it."""
    body = json.dumps({**ENDLESS, "logprobs": True, "top_logprobs": 20}).encode()
    with socket.socket() as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.settimeout(20)
        lazy.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        lazy.sendall(head.encode() + b"\r\n\r\n" + body)
        until(lambda: server.metric("generated_tokens_total"))
        yield lazy


def test_who_reads_nothing_holds_nobody_up(model, small_tokenizer):
    with live(model, small_tokenizer, dict(max_batch=2), send_buffer=4096, max_waiting=0) as server:
        with lazy_client(server):
            for _ in range(3):
                assert server.post(CHAT, QUESTION).json()["choices"][0]["finish_reason"] == "length"
            server.wait_until_idle()  # its answer is complete, read or not
            assert server.metric("requests_total", endpoint=CHAT, outcome="200") == 3
        until(lambda: server.metric("requests_total", endpoint=CHAT, outcome="disconnected"))


def test_who_reads_nothing_is_cut_off_in_the_end(model, small_tokenizer, monkeypatch):
    monkeypatch.setattr(api, "GRACE", 0.2)
    with live(model, small_tokenizer, send_buffer=4096, request_timeout=2) as server, lazy_client(server) as lazy:
        until(lambda: server.metric("requests_total", endpoint=CHAT, outcome="504"))
        received = b"".join(iter(lambda: lazy.recv(65536), b""))
        assert b"chat.completion.chunk" in received and b"longer than" not in received


def test_a_full_queue_is_429_and_never_a_hang(model, small_tokenizer, monkeypatch):
    step = Engine.step
    monkeypatch.setattr(Engine, "step", lambda engine: time.sleep(0.01) or step(engine))
    with live(model, small_tokenizer, dict(max_batch=1), max_waiting=1) as server:
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            replies = list(pool.map(lambda _: server.post(CHAT, {**QUESTION, "max_tokens": 20}), range(12)))
        refused = [reply for reply in replies if reply.status_code != 200]
        assert 0 < len(refused) < 12
        for reply in refused:
            assert_error(reply, 429, "running or waiting")
            assert reply.headers["Retry-After"] == "1"
        with pytest.raises(openai.RateLimitError):
            with httpx.stream("POST", server.url + CHAT, json={**ENDLESS, "n": 2}) as first:
                lines = first.iter_lines()  # kept: it would close the response
                next(lines)
                server.client().chat.completions.create(model="any", **QUESTION)
        assert_error(server.post(CHAT, {**QUESTION, "n": 3}), 400, "3 answers at once, but this server holds 2")
        server.wait_until_idle()
        assert server.post(CHAT, QUESTION).status_code == 200


# ------------------------------------------------------------------------------------------------------ what can go wrong


def test_time_that_has_run_out(model, small_tokenizer, monkeypatch):
    with live(model, small_tokenizer, request_timeout=0.3) as server:
        step = Engine.step
        monkeypatch.setattr(Engine, "step", lambda engine: time.sleep(0.02) or step(engine))
        assert_error(server.post(CHAT, {**ENDLESS, "stream": False}), 504, "longer than 0.3 seconds")
        lines = server.post(CHAT, ENDLESS).text.split("\n\n")
        assert "longer than 0.3 seconds" in json.loads(lines[-2].removeprefix("data: "))["error"]["message"]
        assert len(lines) > 5 and "[DONE]" not in lines[-2]
        server.wait_until_idle()
        assert server.metric("requests_total", endpoint=CHAT, outcome="504") == 2
        assert b" 408 " in half_a_request(server)


def half_a_request(server):
    """The first line of the answer to a body of which nothing comes."""
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as slow:
        slow.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n".encode())
        slow.settimeout(10)
        return slow.recv(1000).partition(b"\r\n")[0]


def test_a_request_may_take_less_time_than_an_answer(server, monkeypatch):
    monkeypatch.setattr(api, "ARRIVAL", 0.2)
    assert b" 408 " in half_a_request(server)
    assert not server.app.state.service.arriving


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_of_the_engine_is_a_500_an_event_in_mid_stream_and_not_the_end(server, monkeypatch):
    def broken(self, rows):
        raise RuntimeError("secret detail")

    with httpx.stream("POST", server.url + CHAT, json=ENDLESS, timeout=30) as response:
        lines = response.iter_lines()
        next(lines)
        monkeypatch.setattr(Engine, "decode", broken)
        rest = [line for line in lines if line]
    error = json.loads(rest[-1].removeprefix("data: "))["error"]
    assert error["type"] == "server_error" and "secret" not in error["message"]
    assert_error(server.post(CHAT, QUESTION), 500, "internal error of the engine")
    with pytest.raises(openai.APIError, match="internal error of the engine"):
        list(server.client().chat.completions.create(model="any", **{**QUESTION, "stream": True}))
    monkeypatch.undo()
    assert server.post(CHAT, QUESTION).status_code == 200


def test_no_memory_is_a_503_to_come_back_after(server, monkeypatch):
    """The engine finds none for a row of the cache; then in the middle of a step."""

    def none_left(*arguments):
        raise MemoryError

    for name in ("reserve_rows", "decode"):
        with monkeypatch.context() as patched:
            patched.setattr(Engine, name, none_left)
            response = server.post(CHAT, QUESTION)
            assert_error(response, 503, "no memory left")
            assert response.headers["Retry-After"] == "1" and response.json()["error"]["code"] == "out_of_memory"
            assert '"code":"out_of_memory"' in server.post(CHAT, ENDLESS).text
    assert server.post(CHAT, QUESTION).status_code == 200


def test_a_bug_of_the_server_is_a_500_without_details(server, monkeypatch):
    def broken(*arguments):
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr("model.inference.api_protocol.render_conversation", broken)
    response = server.post(CHAT, QUESTION)
    assert_error(response, 500, "internal error")
    assert "secret" not in response.text


def test_a_bug_in_mid_stream_frees_the_row(server, monkeypatch):
    requests = []

    def broken(reply, index, delta):
        requests.extend(reply.requests)
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(api.ChatReply, "chunks", broken)
    with pytest.raises(httpx.RemoteProtocolError):
        server.post(CHAT, ENDLESS)
    server.wait_until_idle()
    assert [request.finish_reason for request in requests] == ["cancelled"]


def test_while_it_loads(model, small_tokenizer):
    app = create_app()
    with TestClient(app) as client:
        for response in (client.get("/health"), client.get("/v1/models"), client.post(CHAT, json=QUESTION)):
            assert_error(response, 503, "loading")
            assert response.headers["Retry-After"] == "1"
        assert client.get("/metrics").status_code == 200
        app.state.service.start(Engine(model, small_tokenizer), "full_sft_512")
        assert client.get("/health").json() == {"status": "ok"}
        assert client.post(CHAT, json=QUESTION).json()["model"] == "full_sft_512"


def test_the_key(model, small_tokenizer, caplog, capfd):
    app = create_app(Engine(model, small_tokenizer), ServerSettings(api_key="sk-right", cors="http://a, http://b"))
    with TestClient(app) as client:
        assert client.get("/health").status_code == 200
        for header in (None, "Bearer sk-wrong", "Bearer", "Basic sk-right", "sk-right", "Bearer sk-right2", "Bearer ü"):
            headers = {} if header is None else {"Authorization": header.encode("latin-1")}
            for method, path in (("GET", "/v1/models"), ("POST", CHAT), ("GET", "/metrics"), ("GET", "/none")):
                response = client.request(method, path, headers={**headers, "Origin": "http://b"})
                assert_error(response, 401, "key")
                assert response.headers["access-control-allow-origin"] == "http://b"
        for header in ("Bearer sk-right", "bearer  sk-right"):
            assert client.get("/v1/models", headers={"Authorization": header}).status_code == 200
        asked = {"Origin": "http://a", "Access-Control-Request-Method": "POST"}
        asked["Access-Control-Request-Headers"] = "authorization,content-type"
        assert client.options(CHAT, headers=asked).status_code == 200
        assert client.options(CHAT, headers={**asked, "Origin": "http://c"}).status_code == 400
    assert "sk-right" not in caplog.text + "".join(capfd.readouterr())


def test_without_cors_no_page_may_ask(server):
    headers = {"Origin": "http://a", "Access-Control-Request-Method": "POST"}
    assert_error(httpx.options(server.url + CHAT, headers=headers), 405)
    assert "access-control-allow-origin" not in httpx.get(server.url + "/health", headers=headers).headers
    # What a page may send without asking first is no JSON.
    assert_error(
        httpx.post(server.url + CHAT, content=json.dumps(QUESTION), headers={"Content-Type": "text/plain"}), 400
    )


def test_addresses_and_methods(server):
    assert_error(httpx.get(server.url + "/v1/chat/none"), 404, "/v1/chat/none: no such address")
    assert_error(httpx.get(server.url + CHAT), 405, f"GET is not for {CHAT}")
    assert_error(httpx.delete(server.url + "/v1/models"), 405)
    assert_error(httpx.get(server.url + "/docs"), 404)


def test_metrics(server):
    before = server.metric("generated_tokens_total"), server.metric("prompt_tokens_total")
    reply = server.post(TEXT, {"prompt": "你好", "n": 2, "temperature": 0, "max_tokens": 9}).json()
    text = httpx.get(server.url + "/metrics").text
    assert f'minimind_requests_total{{endpoint="{TEXT}",outcome="200"}}' in text
    for name in ("time_to_first_token_seconds_bucket", "time_per_token_seconds_sum", "waiting_requests 0.0"):
        assert f"minimind_{name}" in text
    assert server.metric("generated_tokens_total") == before[0] + 18 == before[0] + reply["usage"]["completion_tokens"]
    assert server.metric("prompt_tokens_total") == before[1] + reply["usage"]["prompt_tokens"]
    paths = {sample.labels["endpoint"] for metric in server.app.state.service.metrics.registry.collect()
             for sample in metric.samples if "endpoint" in sample.labels}  # fmt: skip
    assert paths <= {CHAT, TEXT, "/v1/models", "/health", "/metrics", "other"}


# --------------------------------------------------------------------------------------------------------------- bad input

BAD_BODIES = {
    "nothing": b"",
    "no JSON": b"{",
    "half a message": b'{"messages": [{"role": "user", "content": "x',
    "a list": b"[]",
    "null": b"null",
    "a number": b"1" * 5000,
    "nested without end": b'{"messages":' + b"[" * 100_000,
    "invalid UTF-8": b'{"messages": [{"role": "user", "content": "\xc3\x28"}]}',
    "NaN": b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
    "infinity": b'{"messages": [{"role": "user", "content": "x"}], "top_p": 1e999}',
    "a lone surrogate": b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    "a lone surrogate as a role": b'{"messages": [{"role": "\\udfff", "content": "x"}]}',
    "a lone surrogate as a model": b'{"model": "\\ud800", "messages": [{"role": "user", "content": "x"}]}',
    "a lone surrogate as a tool": b'{"tools": ["\\ud800"], "messages": [{"role": "user", "content": "x"}]}',
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_bodies_that_are_none(server, name):
    assert_error(httpx.post(server.url + CHAT, content=BAD_BODIES[name], headers=JSON), 400)


@pytest.mark.parametrize(
    "name, why",
    [
        ("a number", "a number has too many digits"),
        ("nested without end", "it is nested too deeply"),
        ("invalid UTF-8", "invalid continuation byte at byte 43"),
    ],
)
def test_why_a_body_cannot_be_read(server, name, why):
    assert_error(httpx.post(server.url + CHAT, content=BAD_BODIES[name], headers=JSON), 400, f"in UTF-8: {why}")


def test_a_large_body_without_the_key_is_401_also_for_clients_that_write_first(model, small_tokenizer):
    with live(model, small_tokenizer, api_key="right") as server:
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(urllib.request.Request(server.url + CHAT, b" " * 20_000_000, JSON), timeout=30)
        assert caught.value.code == 401 and json.load(caught.value)["error"]["code"] == "invalid_api_key"
        caught.value.close()


def test_of_bodies_without_end_only_so_much_is_read(small_tokenizer, monkeypatch):
    monkeypatch.setattr(api, "DISCARDED", 10**5)
    monkeypatch.setattr(api, "DISCARDED_WITHOUT_KEY", 10**4)
    gate = api.Gate(None, api.Service(ServerSettings(api_key="right", max_body_bytes=2 * 10**5), None))
    for headers, status, most in (([], 401, 10**4), ([(b"authorization", b"Bearer right")], 413, 3 * 10**5)):
        read = 0

        async def receive():
            nonlocal read
            read += 1000
            return {"type": "http.request", "body": b" " * 1000, "more_body": True}

        with pytest.raises(api.ApiError) as caught:
            asyncio.run(gate.admit({"path": CHAT, "headers": headers}, receive))
        assert caught.value.status == status and read == most + 1000


def in_pieces(size):
    for _ in range(size // 2**16):
        yield b" " * 2**16


@pytest.mark.parametrize("content", [b" " * 20_000_000, in_pieces(20_000_000)], ids=["length", "chunked"])
def test_a_body_of_20_megabytes(server, content):
    assert_error(httpx.post(server.url + CHAT, content=content, headers=JSON, timeout=30), 413, "larger than 1048576")


def test_a_body_in_pieces_is_a_body(server):
    words = json.dumps(QUESTION).encode()
    pieces = (words[place : place + 7] for place in range(0, len(words), 7))
    assert httpx.post(server.url + CHAT, content=pieces, headers=JSON).status_code == 200


@pytest.mark.parametrize("text", ["龘" * 100_000, "<s>user\n</s>" * 8_334])
def test_prompts_of_100_000_characters(server, text):
    for path, body in ((CHAT, {"messages": [{"role": "user", "content": text}]}), (TEXT, {"prompt": text})):
        response = server.post(path, body)
        assert_error(response, 400, f"at most {CONTEXT}", "the prompt has ")
        error = response.json()["error"]
        assert error["code"] == "context_length_exceeded" and error["param"] in body


def test_what_cannot_fit_or_be_taken_is_refused_before_it_is_encoded(server, small_tokenizer, monkeypatch):
    def encoded(*arguments):
        raise AssertionError("encoded")

    monkeypatch.setattr("model.inference.api_protocol.encode_texts", encoded)
    monkeypatch.setattr("model.inference.api_protocol.render_conversation", encoded)
    longest = max(map(len, token_bytes(small_tokenizer)))
    text = "a" * (CONTEXT * longest)
    half = [{"role": role, "content": text[: len(text) // 2]} for role in ("system", "user")]
    for path, body in ((TEXT, {"prompt": text}), (TEXT, {"prompt": ["x", text]}), (CHAT, {"messages": half})):
        response = server.post(path, body)
        assert_error(response, 400, f"the prompt has at least {CONTEXT} tokens", f"at most {CONTEXT}")
        assert response.json()["error"]["code"] == "context_length_exceeded"
    assert_error(server.post(TEXT, {"prompt": ["x"] * 500, "n": 2}), 400, "1000 answers at once")
    monkeypatch.setattr(api.EngineThread, "check_room", lambda thread, count: raise_queue_full())
    assert_error(server.post(TEXT, {"prompt": "x"}), 429, "7 requests")


def raise_queue_full():
    raise api.QueueFull("7 requests are running or waiting already")


def test_the_longest_prompt_that_fits(server):
    assert_error(server.post(TEXT, {"prompt": [5] * CONTEXT}), 400, f"has {CONTEXT} tokens", f"at most {CONTEXT}")
    reply = server.post(TEXT, {"prompt": [5] * (CONTEXT - 1), "max_tokens": 100}).json()
    assert reply["usage"]["completion_tokens"] == 1 and reply["choices"][0]["finish_reason"] == "length"
    for prompt in ([400], [[5, 6], [7, 400]]):
        response = server.post(TEXT, {"prompt": prompt})
        assert_error(response, 400, "prompt: the model's token ids are 0 to 399, got 400", param="prompt")


# What a field may be besides what it should: hypothesis mixes them.
ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 25), st.sampled_from([10**9, -(10**9), 10**400, 2**63]), st.floats(),
    st.text(max_size=5), st.text(st.characters(codec=None), max_size=3),
    st.lists(st.one_of(st.integers(), st.text(max_size=3), st.none()), max_size=3),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)  # fmt: skip
ROLES = st.one_of(st.sampled_from(["user", "system", "assistant", "tool", "developer", ""]), ODD)
PARTS = st.lists(st.one_of(ODD, st.fixed_dictionaries({"type": ODD, "text": ODD})), max_size=2)
MESSAGE = st.one_of(ODD, st.fixed_dictionaries({"role": ROLES, "content": st.one_of(ODD, PARTS)}))
NAMES = (
    "model temperature top_p top_k max_tokens max_completion_tokens stop n seed presence_penalty frequency_penalty "
    "repetition_penalty logprobs top_logprobs stream stream_options best_of tools response_format user"
).split()
FIELDS = st.dictionaries(st.sampled_from(NAMES), ODD, max_size=3)


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    FIELDS,
    st.one_of(
        st.fixed_dictionaries(
            {"messages": st.one_of(ODD, st.lists(MESSAGE, max_size=2), st.just(QUESTION["messages"]))}
        ),
        st.fixed_dictionaries(
            {"prompt": st.one_of(ODD, st.text(max_size=5), st.lists(st.integers(0, 450), max_size=3))}
        ),
    ),
)
def test_whatever_a_request_holds_it_is_answered_or_refused(fields, content):
    body = {"max_tokens": 2, **fields, **content}
    path = CHAT if "messages" in content else TEXT
    response = CLIENT["client"].post(path, content=json.dumps(body).encode(), headers=JSON)
    if response.status_code != 200:
        assert response.status_code == 400, (body, response.text)
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


CLIENT = {}  # hypothesis runs its examples outside of fixtures


@pytest.fixture(scope="module", autouse=True)
def in_process_client(small_tokenizer):
    """A server without a network, of a model with a short context: whatever is not limited ends soon."""
    model = trained_scale(LMConfig(**{**SHAPE, "max_seq_len": SHORT}, vocab_size=len(small_tokenizer)))
    model.tok_embeddings.weight.data[model.config.eos_token_id] = 0
    app = create_app(Engine(model, small_tokenizer))
    with TestClient(app) as client:
        CLIENT.update(client=client, app=app)
        yield
        app.state.service.close()
        assert not app.state.service.thread.open


def test_the_description_of_itself_holds():
    """schemathesis on the server's own OpenAPI document: what fits it and what does not, on every address."""
    schema = schemathesis.openapi.from_asgi("/openapi.json", CLIENT["app"])
    document, seen = own_document(), {}
    for result in schema.get_all_operations():
        for mode in schemathesis.GenerationMode:
            # An address without parameters has no wrong ones.
            with contextlib.suppress(hypothesis.errors.Unsatisfiable):

                @settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
                @given(case=result.ok().as_strategy(generation_mode=mode))
                def each(case):
                    seen.setdefault(case.path, set()).add(check_case(case, document))

                each()
    assert {"/v1/models", "/v1/models/{name}", "/health", "/metrics"} <= seen.keys()
    assert {200, 400} <= seen[TEXT] and 400 in seen[CHAT]


def own_document():
    return CLIENT["client"].get("/openapi.json").json()


def check_case(case, document):
    """Ask; whatever comes is an answer or an error in OpenAI's shape, and a body that the document forbids is refused."""
    response = case.call()
    if response.status_code != 200:
        assert 400 <= response.status_code < 500, (case.body, response.text)
        assert response.headers["content-type"] == ["application/json"]
        assert_error(response, response.status_code)
        assert response.json()["error"]["type"] == "invalid_request_error"
    if case.path in (CHAT, TEXT):
        name = "ChatRequest" if case.path == CHAT else "CompletionRequest"
        schema = {**document, "$ref": f"#/components/schemas/{name}"}
        fits = jsonschema.Draft202012Validator(schema).is_valid(case.body) if isinstance(case.body, dict) else False
        assert fits or response.status_code >= 400, (case.body, response.text)
    return response.status_code
