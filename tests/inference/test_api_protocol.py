"""OpenAI's API as data: limits, refusals by name, what a request means for the engine, and replies that agree with their streams."""

import inspect
import json
import math

import openai
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from model.inference.api_protocol import (
    UNSUPPORTED,
    ApiError,
    ChatReply,
    ChatRequest,
    CompletionReply,
    CompletionRequest,
    finite,
    legacy_name,
    model_list,
    validation_error,
)
from model.inference.engine import Request
from model.settings import SamplingParameters
from model.tokenizer import encode_text, render_conversation, token_bytes

USER = {"role": "user", "content": "你好"}
DEFAULTS = SamplingParameters()


def chat(**fields):
    return ChatRequest(**{"messages": [USER], **fields})


def text(**fields):
    return CompletionRequest(**{"prompt": "你好", **fields})


def refused(make, **fields):
    """The error in OpenAI's shape that `fields` cause."""
    with pytest.raises(ValidationError) as caught:
        make(**fields)
    error = validation_error([{**error, "loc": ("body", *error["loc"])} for error in caught.value.errors()])
    assert isinstance(error, ApiError) and error.status == 400
    orjson.dumps(error.body)  # it can be sent
    return error.body["error"]


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_cannot_be_honoured_is_refused_by_name(name):
    for make in (chat, text):
        for value in (True, "x", ["x"], {"x": 1}, 3):
            error = refused(make, **{name: value})
            assert error["param"] == name and error["message"] == f"{name} is not supported by this server"
        for value in (None, *UNSUPPORTED[name]):
            make(**{name: value})


# What the openai package sends, and it changes no answer: accounts, caches, other machines of OpenAI's.
HARMLESS = {
    "metadata": {"a": "b"}, "parallel_tool_calls": False, "prompt_cache_key": "k", "prompt_cache_options": {"ttl": "1h"},
    "prompt_cache_retention": "24h", "safety_identifier": "me", "service_tier": "auto", "store": True, "user": "me",
}  # fmt: skip
HOW_IT_IS_SENT = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}


@pytest.mark.parametrize(
    "make, kind, create",
    [
        (chat, ChatRequest, openai.resources.chat.Completions.create),
        (text, CompletionRequest, openai.resources.Completions.create),
    ],
)
def test_every_field_that_the_openai_package_sends_is_honoured_refused_or_harmless(make, kind, create):
    fields = inspect.signature(create).parameters.keys() - HOW_IT_IS_SENT
    assert len(fields) > 15
    for name in fields:
        assert (name in kind.model_fields) + (name in UNSUPPORTED) + (name in HARMLESS) == 1, name
    assert make(**HARMLESS, something_new=[1]) == make()


@pytest.mark.parametrize(
    "fields",
    [dict(reasoning_effort="high"), dict(reasoning_effort="minimal"), dict(verbosity="low"), dict(moderation={})],
)
def test_what_would_ask_for_another_answer_is_refused(fields):
    assert refused(chat, **fields)["param"] in fields


@pytest.mark.parametrize(
    "make, fields, param",
    [
        (chat, dict(temperature=-0.1), "temperature"),
        (chat, dict(temperature=2.1), "temperature"),
        (chat, dict(temperature=math.nan), "temperature"),
        (chat, dict(temperature="1"), "temperature"),
        (chat, dict(temperature=True), "temperature"),
        (chat, dict(temperature=10**400), "temperature"),
        (chat, dict(top_p=1.1), "top_p"),
        (chat, dict(top_k=-2), "top_k"),
        (chat, dict(top_k=1.0), "top_k"),
        (chat, dict(max_tokens=0), "max_tokens"),
        (chat, dict(max_tokens=-2), "max_tokens"),
        (chat, dict(max_tokens=5.0), "max_tokens"),
        (chat, dict(max_completion_tokens=0), "max_completion_tokens"),
        (chat, dict(n=0), "n"),
        (chat, dict(n=17), "n"),
        (chat, dict(n=10**9), "n"),
        (chat, dict(n=True), "n"),
        (chat, dict(seed=2**63), "seed"),
        (chat, dict(seed=0.5), "seed"),
        (chat, dict(presence_penalty=-2.1), "presence_penalty"),
        (chat, dict(frequency_penalty=2.1), "frequency_penalty"),
        (chat, dict(repetition_penalty=0), "repetition_penalty"),
        (chat, dict(stop=""), "stop"),
        (chat, dict(stop=["a", ""]), "stop.1"),
        (chat, dict(stop=["a"] * 17), "stop"),
        (chat, dict(stop="a" * 1001), "stop"),
        (chat, dict(stop=3), "stop"),
        (chat, dict(logprobs=1), "logprobs"),
        (chat, dict(logprobs=True, top_logprobs=21), "top_logprobs"),
        (chat, dict(top_logprobs=2), "top_logprobs"),
        (chat, dict(stream="yes"), "stream"),
        (chat, dict(stream_options={"include_usage": True}), "stream_options"),
        (chat, dict(stream=True, stream_options={"include_usage": 1}), "stream_options.include_usage"),
        (chat, dict(model=3), "model"),
        (chat, dict(model="\ud800"), "model"),
        (chat, dict(messages=None), "messages"),
        (chat, dict(messages=[]), "messages"),
        (chat, dict(messages={}), "messages"),
        (chat, dict(messages=[USER] * 1001), "messages"),
        (chat, dict(messages=["hello"]), "messages.0"),
        (chat, dict(messages=[{"content": "x"}]), "messages.0.role"),
        (chat, dict(messages=[{"role": "user"}]), "messages.0.content"),
        (chat, dict(messages=[{"role": "tool", "content": "x"}]), "messages.0.role"),
        (chat, dict(messages=[USER, {"role": "user", "content": None}]), "messages.1.content"),
        (chat, dict(messages=[{"role": "user", "content": []}]), "messages.0.content"),
        (chat, dict(messages=[{"role": "user", "content": "\udfff"}]), "messages.0.content"),
        (
            chat,
            dict(messages=[{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]),
            "messages.0.content.1.type",
        ),
        (chat, dict(messages=[USER, {"role": "assistant", "content": "我"}]), "messages"),
        (chat, dict(messages=[{"role": "system", "content": "x"}]), "messages"),
        (text, dict(prompt=None), "prompt"),
        (text, dict(prompt=[]), "prompt"),
        (text, dict(prompt=[[]]), "prompt.0"),
        (text, dict(prompt=[""] * 1001), "prompt"),
        (text, dict(prompt=[[5]] * 1001), "prompt"),
        (text, dict(prompt=[1, "a"]), "prompt.1"),
        (text, dict(prompt=[1, -1]), "prompt.1"),
        (text, dict(prompt=[[1], [2, True]]), "prompt.1.1"),
        (text, dict(prompt=["a", "\ud800"]), "prompt.1"),
        (text, dict(logprobs=6), "logprobs"),
        (text, dict(logprobs=True), "logprobs"),
        (text, dict(best_of=2), "best_of"),
        (text, dict(n=2, best_of=1), "best_of"),
    ],
)
def test_limits(make, fields, param):
    error = refused(make, **fields)
    assert error["param"] == param and error["type"] == "invalid_request_error" and error["message"]


def test_what_is_not_finite_is_called_so():
    for value in (math.nan, math.inf, -math.inf):
        assert refused(chat, temperature=value)["message"] == "temperature: Input should be a finite number"


def test_of_a_field_of_several_kinds_the_one_that_was_meant_is_explained():
    content = [{"type": "text", "text": "a"}, {"type": "image_url"}]
    error = refused(chat, messages=[{"role": "user", "content": content}])
    assert error["message"] == "messages.0.content.1.type: Input should be 'text'"
    error = refused(chat, messages=[{"role": "user", "content": 3}])
    assert error["message"] == "messages.0.content: Input should be a valid string; or Input should be a valid list"


ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(st.characters(codec=None), max_size=4)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=6,
)
KNOWN = sorted({*ChatRequest.model_fields, *CompletionRequest.model_fields, *UNSUPPORTED})


@settings(max_examples=200, deadline=None)
@given(st.one_of(ANYTHING, st.dictionaries(st.sampled_from(KNOWN), ANYTHING, max_size=6)))
def test_whatever_comes_is_a_request_with_a_meaning_or_an_error_that_can_be_sent(body):
    for kind in (ChatRequest, CompletionRequest):
        try:
            request = kind.model_validate(body)
        except ValidationError as caught:
            error = validation_error([{**error, "loc": ("body", *error["loc"])} for error in caught.errors()])
            json.loads(orjson.dumps(error.body))
            assert error.body["error"]["message"]
        else:
            request.parameters(DEFAULTS, request.choices - 1)


@pytest.mark.parametrize(
    "request_, meaning",
    [
        (chat(), {}),
        (chat(temperature=0, top_k=5, top_p=0.5), dict(temperature=0, top_k=5, top_p=0.5)),
        (chat(top_k=-1, top_p=0), dict(top_k=0, top_p=1e-9)),
        (chat(max_tokens=5), dict(max_new_tokens=5)),
        (chat(max_tokens=-1), dict(max_new_tokens=2**31)),
        (chat(max_tokens=10**400), dict(max_new_tokens=2**31)),
        (chat(max_tokens=5, max_completion_tokens=6), dict(max_new_tokens=6)),
        (chat(max_tokens=5, max_completion_tokens=-1), dict(max_new_tokens=2**31)),
        (chat(seed=4), dict(seed=4)),
        (chat(seed=-1), dict(seed=2**64 - 1)),
        (chat(stop="x"), dict(stop_strings=("x",))),
        (chat(stop=["x", "yy"]), dict(stop_strings=("x", "yy"))),
        (chat(stop=[]), {}),
        (chat(presence_penalty=1, frequency_penalty=-1), dict(presence_penalty=1, frequency_penalty=-1)),
        (chat(repetition_penalty=1.5), dict(repetition_penalty=1.5)),
        (chat(logprobs=True), dict(logprobs=0)),
        (chat(logprobs=True, top_logprobs=7), dict(logprobs=7)),
        (chat(logprobs=False, top_logprobs=0), {}),
        (text(logprobs=3), dict(logprobs=3)),
        (text(logprobs=0), dict(logprobs=0)),
    ],
)
def test_what_a_request_means_for_the_engine(request_, meaning):
    assert request_.parameters(DEFAULTS) == SamplingParameters(**{"max_new_tokens": 2**31, **meaning})


def test_the_servers_defaults_hold_for_what_is_not_said_and_seeds_differ_by_choice():
    defaults = SamplingParameters(temperature=0.7, top_k=8)
    found = chat(top_k=0, seed=2**63 - 1).parameters(defaults, choice=3)
    assert found == SamplingParameters(temperature=0.7, top_k=0, seed=2**63 + 2, max_new_tokens=2**31)
    assert chat().parameters(defaults, choice=3).seed is None


@pytest.mark.parametrize("item", ["x", "\ud800", [5], [-1], {}, None, 0.5])
def test_too_many_prompts_are_refused_before_any_is_looked_at(item):
    assert refused(text, prompt=[item] * 1001)["message"] == "prompt: at most 1000 at once, got 1001"
    assert text(prompt=[5] * 1001).prompt_count == 1


def test_too_many_messages_are_refused_before_those_behind_are_looked_at():
    class Unseen(dict):
        def __getitem__(self, name):
            raise AssertionError("looked at")

    assert "at most 1000" in refused(chat, messages=[USER] * 1001 + [Unseen()])["message"]
    assert len(chat(messages=[USER] * 1000).messages) == 1000


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.sampled_from("你好的面条很好吃ab \n龘"), max_size=30), min_size=1, max_size=3))
def test_how_many_tokens_a_prompt_has_at_least(texts):
    tokenizer = OBJECTS["tokenizer"]
    longest = max(len(piece) for piece in token_bytes(tokenizer))
    several, joined = text(prompt=texts), chat(messages=[{"role": "user", "content": word} for word in texts])
    for request, size in (
        (several, max(len(word.encode()) for word in texts)),
        (joined, len("".join(texts).encode())),
    ):
        prompts = request.prompts(tokenizer)
        assert math.ceil(size / longest) == request.least_tokens(tokenizer) <= max(map(len, prompts))
        assert request.prompt_count == len(prompts)
    assert text(prompt=[[5] * 9, [6]]).least_tokens(tokenizer) == 0


def test_prompts(small_tokenizer):
    bos = small_tokenizer.bos_token_id
    parts = [{"type": "text", "text": "你"}, {"type": "text", "text": "好</s>"}]
    whole = [{"role": "user", "content": "你好</s>"}]
    expected = render_conversation(small_tokenizer, whole, add_generation_prompt=True)[0]
    assert chat(messages=[{"role": "user", "content": parts}]).prompts(small_tokenizer) == [expected]
    ids = [[bos, *encode_text(small_tokenizer, word)] for word in ("你好</s>", "")]
    assert text(prompt="你好</s>").prompts(small_tokenizer) == ids[:1]
    assert text(prompt=["你好</s>", ""]).prompts(small_tokenizer) == ids
    assert text(prompt=[7, 8]).prompts(small_tokenizer) == [[7, 8]]
    assert text(prompt=[[7, 8], [9]]).prompts(small_tokenizer) == [[7, 8], [9]]


# --------------------------------------------------------------------------------------------------------------- replies


def written(tokenizer, tokens, stop=(), logprobs=None, limit=100):
    """A Request whose answer is `tokens`, then </s>, and its Deltas; the log-probabilities are made up."""
    request = Request([5, 6, 7], SamplingParameters(stop_strings=stop, logprobs=logprobs), {2}, limit, tokenizer)
    deltas = []
    for place, token in enumerate([*tokens, 2]):
        deltas.append(request.accept(token, (-0.5 * place, [(token, -0.5 * place), (9, -math.inf)])))
        if request.finish_reason:
            break
    return request, deltas


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(3, 399), max_size=12), min_size=1, max_size=3),
    st.lists(st.sampled_from(["吃", "的", "\ufffd", "a"]), max_size=2),
    st.sampled_from([None, 0, 2]),
    st.integers(1, 12),
)
def test_the_chunks_of_a_stream_join_to_the_whole_reply(answers, stop, logprobs, limit):
    tokenizer = OBJECTS["tokenizer"]
    for kind in (ChatReply, CompletionReply):
        pairs = [written(tokenizer, tokens, tuple(stop), logprobs, limit) for tokens in answers]
        requests = [request for request, _ in pairs]
        reply, streamed = (kind("m", requests, 1, tokenizer, wants_usage=True) for _ in range(2))
        whole = reply.complete([deltas for _, deltas in pairs])
        chunks = streamed.first_chunks()
        for index, (_, deltas) in enumerate(pairs):
            chunks += [chunk for delta in deltas for chunk in streamed.chunks(index, delta)]
        *chunks, usage = [*chunks, *streamed.last_chunks()]
        assert usage["usage"] == whole["usage"] and usage["choices"] == []
        assert {chunk["id"] for chunk in (*chunks, usage)} == {streamed.head["id"]} != {whole["id"]}
        for choice, request in zip(whole["choices"], requests):
            own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == choice["index"]]
            if kind is ChatReply:
                assert own[0]["delta"] == {"role": "assistant", "content": ""}
                joined, expected = (item["delta"].get("content", "") for item in own), choice["message"]["content"]
            else:
                joined, expected = (item["text"] for item in own), choice["text"]
            assert "".join(joined) == expected == request.text
            assert [item["finish_reason"] for item in own] == [None] * (len(own) - 1) + [choice["finish_reason"]]
            assert choice["finish_reason"] == request.finish_reason
            found = [item["logprobs"] for item in own if item["logprobs"]]
            if logprobs is None:
                assert not found and choice["logprobs"] is None
                continue
            names = ("content",) if kind is ChatReply else ("tokens", "token_logprobs", "text_offset")
            for name in names:
                assert [value for part in found for value in part[name]] == choice["logprobs"][name]
                assert len(choice["logprobs"][name]) == len(request.token_ids)
        orjson.dumps([whole, *chunks])


OBJECTS = {}  # hypothesis runs its examples outside of fixtures


@pytest.fixture(scope="module", autouse=True)
def objects(small_tokenizer):
    OBJECTS["tokenizer"] = small_tokenizer


def test_a_prompt_counts_once_however_many_choices(small_tokenizer):
    pairs = [written(small_tokenizer, [50] * count) for count in (1, 2, 3, 4)]
    requests = [request for request, _ in pairs]
    for request, reused in zip(requests, (2, 99, 1, 99)):
        request.reused = reused  # the second choice copies the first one's prompt; that is not what is counted
    usage = ChatReply("m", requests, 2, small_tokenizer).usage()
    assert usage == {
        "prompt_tokens": 6,
        "completion_tokens": 10,
        "total_tokens": 16,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


def test_log_probabilities_of_half_characters_and_control_tokens(small_tokenizer):
    pieces = token_bytes(small_tokenizer)
    half = next(token for token, piece in enumerate(pieces) if piece == "龘".encode()[:1])
    whole = encode_text(small_tokenizer, "吃")
    assert len(whole) == 1
    request, deltas = written(small_tokenizer, [*whole, half], logprobs=2)
    (choice,) = CompletionReply("m", [request], 1, small_tokenizer).complete([deltas])["choices"]
    assert choice["logprobs"] == {
        "tokens": ["吃", "bytes:\\xe9"],
        "token_logprobs": [0, -0.5],
        "top_logprobs": [{"吃": 0, legacy_name(small_tokenizer, 9): -9999}, {"bytes:\\xe9": -0.5, legacy_name(small_tokenizer, 9): -9999}],
        "text_offset": [0, 1],
    }  # fmt: skip
    (choice,) = ChatReply("m", [request], 1, small_tokenizer).complete([deltas])["choices"]
    first, second = choice["logprobs"]["content"]
    assert (second["token"], second["bytes"], second["logprob"]) == ("\ufffd", [0xE9], -0.5)
    assert first["bytes"] == list("吃".encode()) and first["top_logprobs"][1]["logprob"] == -9999.0
    assert legacy_name(small_tokenizer, 2) == "</s>" and finite(-math.inf) == -9999.0


def test_errors_and_models_have_openais_shape():
    kinds = {
        400: "invalid_request_error",
        401: "authentication_error",
        404: "invalid_request_error",
        429: "rate_limit_error",
    }
    for status, kind in {**kinds, 500: "server_error", 503: "server_error", 504: "timeout_error"}.items():
        error = ApiError(status, "a\ud800b", "field", "code")
        assert error.body == {"error": {"message": "a?b", "type": kind, "param": "field", "code": "code"}}
    assert model_list(["a", "b"], 7) == {
        "object": "list",
        "data": [{"id": name, "object": "model", "created": 7, "owned_by": "minimind"} for name in ("a", "b")],
    }
