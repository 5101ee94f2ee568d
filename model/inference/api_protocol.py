"""OpenAI's API as data: the requests that are understood, with their limits, and the shapes of replies and errors.

What a client sends is honoured, or refused by name where ignoring it would give another answer than the one it asked for
(UNSUPPORTED). Fields that change no answer (user, metadata, store, service_tier, ...) and those unknown here are ignored, as
clients expect.
"""

import abc
import dataclasses
import functools
import math
import time
import uuid
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator
from pydantic_core import PydanticCustomError

from model.tokenizer import StreamDecoder, encode_texts, render_conversation, token_bytes

# Fields of OpenAI's API that this server does not have: what they may be all the same, because it means nothing.
UNSUPPORTED = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "logit_bias": ({},),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "web_search_options": (),
    "suffix": ("",),
    "echo": (False,),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "moderation": (),
}
MOST_PROMPTS = 1000  # of a request; the server may hold fewer
MOST_MESSAGES = 1000  # of a conversation; a turn is a few tokens at least
LEAST_LOG_PROBABILITY = -9999.0  # JSON has no infinity; OpenAI's number for it


class ApiError(Exception):
    """A refusal in OpenAI's shape. status: HTTP's. param: the field that is wrong. code: for programs."""

    TYPES = {401: "authentication_error", 429: "rate_limit_error", 504: "timeout_error"}

    def __init__(self, status, message, param=None, code=None, headers=None):
        super().__init__(message)
        kind = self.TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.status, self.headers = status, headers
        self.body = {"error": {"message": printable(message), "type": kind, "param": param, "code": code}}


def printable(text):
    """`text` with lone surrogates, which no UTF-8 has, as "?"."""
    return text.encode("utf-8", "replace").decode("utf-8")


def validation_error(errors):
    """The ApiError of pydantic's list of `errors`: what is wrong with the first field that is. Of a field that may be one
    thing or another, the one that could be read furthest is what was meant."""
    errors = [error for error in errors if error["loc"][:2] == errors[0]["loc"][:2]]
    paths = [field_path(error["loc"]) for error in errors]
    furthest = max(paths, key=lambda path: (len(path), [part for part in path if isinstance(part, int)]))
    messages = dict.fromkeys(error["msg"] for error, path in zip(errors, paths) if path == furthest)
    place, message = ".".join(map(str, furthest)), "; or ".join(messages)
    param = errors[0].get("ctx", {}).get("param") or place or None
    return ApiError(400, f"{place}: {message}" if place else message, param)


def field_path(place):
    """["messages", 0, "content"] of an error's place, without "body" and what pydantic calls the branches of a union."""
    return [part for part in place[1:] if isinstance(part, int) or part in FIELDS]


def check_unicode(text):
    """Refuse lone surrogates, which JSON can spell and no text has."""
    if printable(text) != text:
        raise PydanticCustomError("unicode", "Input should be text without lone surrogates")
    return text


Text = Annotated[str, AfterValidator(check_unicode)]


class Strict(BaseModel):
    """No conversions: a number is a number, a text is a text."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class TextPart(Strict):
    """One of the parts a message may be made of."""

    type: Literal["text"]
    text: Text


class Message(Strict):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)]

    @property
    def text(self):
        """The whole content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(Strict):
    """How a stream ends: with a chunk that counts the tokens, or without."""

    include_usage: bool | None = None


StopString = Annotated[str, StringConstraints(min_length=1, max_length=1000), AfterValidator(check_unicode)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, fail_fast=True)]
TokenLimit = Annotated[int, Field(ge=-1, description="-1: as much as fits")]


class SamplingRequest(Strict):
    """What chats and texts have in common. None: the server's default."""

    SAMPLING: ClassVar = ("temperature", "top_p", "presence_penalty", "frequency_penalty", "repetition_penalty")

    model: Text | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=10**6, description="0 and -1: all tokens")] | None = None
    max_tokens: TokenLimit | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=16, fail_fast=True)] | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def refuse_unsupported(cls, data):
        """A field of OpenAI's API that cannot be honoured is not ignored either."""
        for name, harmless in UNSUPPORTED.items() if isinstance(data, dict) else ():
            if data.get(name) is not None and data[name] not in harmless:
                raise refusal(name, f"{name} is not supported by this server")
        return data

    @field_validator("max_tokens", "max_completion_tokens", check_fields=False)
    @classmethod
    def refuse_zero(cls, value):
        """An answer of no tokens is none."""
        if value == 0:
            raise PydanticCustomError("zero", "Input should be at least 1, or -1 for as much as fits")
        return value

    @model_validator(mode="after")
    def check_stream_options(self):
        """As OpenAI does."""
        if self.stream_options is not None and not self.stream:
            raise refusal("stream_options", "stream_options is only for stream = true")
        return self

    @property
    def choices(self):
        """How many answers to each prompt."""
        return self.n or 1

    @property
    def wants_usage(self):
        """Whether a stream ends with the number of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def token_limit(self):
        """Most tokens of an answer; None: as much as fits."""
        return self.max_tokens

    @property
    @abc.abstractmethod
    def prompt_count(self):
        """How many prompts there are."""

    @property
    @abc.abstractmethod
    def texts(self):
        """What is to be encoded, a text for each prompt; none where they are token ids already."""

    def least_tokens(self, tokenizer):
        """How many tokens the longest prompt has at least, as is known before it is encoded, which takes long."""
        sizes = [len(text.encode()) for text in self.texts]
        return math.ceil(max(sizes, default=0) / longest_token(tokenizer))

    @property
    @abc.abstractmethod
    def wanted_logprobs(self):
        """How many tokens' log-probabilities beside the own one; None: no log-probabilities."""

    def parameters(self, defaults, choice=0):
        """SamplingParameters of the answer `choice` to a prompt; `defaults` are the server's. With a seed each choice has
        its own, for all would be the same."""
        given = {name: getattr(self, name) for name in self.SAMPLING if getattr(self, name) is not None}
        if self.top_k is not None:
            given["top_k"] = max(self.top_k, 0)
        if self.top_p == 0:
            given["top_p"] = 1e-9  # the most probable token alone
        if self.seed is not None:
            given["seed"] = (self.seed + choice) % 2**64
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        limit = self.token_limit
        given["max_new_tokens"] = 2**31 if limit in (None, -1) else min(limit, 2**31)  # what fits, the engine knows
        return dataclasses.replace(defaults, **given, stop_strings=tuple(stop), logprobs=self.wanted_logprobs)


def refusal(name, message):
    """The exception for a field that cannot be told by pydantic's place of it."""
    return PydanticCustomError("unsupported", "{message}", {"message": message, "param": name})


class ChatRequest(SamplingRequest):
    """Body of POST /v1/chat/completions."""

    prompt_field: ClassVar = "messages"

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)]
    max_completion_tokens: TokenLimit | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def check_messages(self):
        """The model answers a question; it does not go on with an answer."""
        if self.messages[-1].role != "user":
            raise refusal("messages", "messages: the last one must be the user's, which the assistant answers")
        if self.top_logprobs and not self.logprobs:
            raise refusal("top_logprobs", "top_logprobs is only for logprobs = true")
        return self

    @property
    def token_limit(self):
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def wanted_logprobs(self):
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def prompt_count(self):
        return 1

    @property
    def texts(self):
        return ["".join(message.text for message in self.messages)]

    def prompts(self, tokenizer):
        """[token ids of the conversation], up to where the assistant writes."""
        messages = [{"role": message.role, "content": message.text} for message in self.messages]
        return [render_conversation(tokenizer, messages, add_generation_prompt=True)[0]]


class CompletionRequest(SamplingRequest):
    """Body of POST /v1/completions."""

    prompt_field: ClassVar = "prompt"

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)]
    )
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: Annotated[int, Field(description="only as n is")] | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def refuse_too_many(cls, value):
        """Before they are looked at one by one, which takes long."""
        if isinstance(value, list) and len(value) > MOST_PROMPTS and not isinstance(value[0], int):
            limits = {"most": MOST_PROMPTS, "count": len(value)}
            raise PydanticCustomError("too_many", "at most {most} at once, got {count}", limits)
        return value

    @model_validator(mode="after")
    def check_best_of(self):
        """To choose among more answers than asked for is not supported."""
        if self.best_of not in (None, self.choices):
            raise refusal("best_of", "best_of is not supported by this server, except when it equals n")
        return self

    @property
    def wanted_logprobs(self):
        return self.logprobs

    @property
    def several(self):
        """The prompts, all of them texts or all of them token ids."""
        return [self.prompt] if isinstance(self.prompt, str) or isinstance(self.prompt[0], int) else self.prompt

    @property
    def prompt_count(self):
        return len(self.several)

    @property
    def texts(self):
        return self.several if isinstance(self.several[0], str) else []

    def prompts(self, tokenizer):
        """Token ids of each prompt. A text begins with <s>, as documents did in training; ids are taken as they are."""
        if not self.texts:
            return self.several
        return [[tokenizer.bos_token_id, *ids] for ids in encode_texts(tokenizer, self.texts)]


FIELDS = {
    name for model in (ChatRequest, CompletionRequest, Message, TextPart, StreamOptions) for name in model.model_fields
}


class Reply(abc.ABC):
    """The replies to one request, whole or in chunks, all with the same id.

    model: the name it is answered under. requests: the engine's, one for each choice, in OpenAI's order of them: all of the
    first prompt, then all of the second. choices: how many of them a prompt has.
    """

    prefix, whole, part = "", "", ""

    def __init__(self, model, requests, choices, tokenizer, wants_usage=False):
        self.requests, self.choices, self.tokenizer, self.wants_usage = requests, choices, tokenizer, wants_usage
        self.head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def complete(self, deltas):
        """The whole reply. deltas: for each choice all its Deltas."""
        choices = []
        for index, (request, own) in enumerate(zip(self.requests, deltas)):
            pairs = [pair for delta in own for pair in zip(delta.token_ids, delta.logprobs or ())]
            logprobs = None if request.parameters.logprobs is None else self.logprobs(index, pairs)
            choice = {"index": index, **self.content(request.text), "logprobs": logprobs}
            choices.append({**choice, "finish_reason": request.finish_reason})
        return {**self.head, "object": self.whole, "choices": choices, "usage": self.usage()}

    def first_chunks(self):
        """The chunks before any token."""
        return []

    def chunks(self, index, delta):
        """The chunks that a Delta of the choice `index` causes: none while a character is incomplete."""
        logprobs = None
        if delta.logprobs:
            logprobs = self.logprobs(index, list(zip(delta.token_ids, delta.logprobs)))
        if delta.text or logprobs:
            yield self.chunk(index, self.piece(delta.text), logprobs)
        if delta.finish_reason:
            yield self.chunk(index, self.piece(None), None, delta.finish_reason)

    def chunk(self, index, piece, logprobs=None, finish_reason=None):
        """A chunk with one choice."""
        choice = {"index": index, **piece, "logprobs": logprobs, "finish_reason": finish_reason}
        chunk = {**self.head, "object": self.part, "choices": [choice]}
        return {**chunk, "usage": None} if self.wants_usage else chunk

    def last_chunks(self):
        """The chunks after all choices have ended."""
        return [{**self.head, "object": self.part, "choices": [], "usage": self.usage()}] if self.wants_usage else []

    def usage(self):
        """Tokens read, and how many of them needed no computing, and written; a prompt counts once however many choices."""
        prompts = self.requests[:: self.choices]
        read = sum(len(request.prompt_ids) for request in prompts)
        written = sum(len(request.token_ids) for request in self.requests)
        counts = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
        return {**counts, "prompt_tokens_details": {"cached_tokens": sum(request.reused for request in prompts)}}

    @abc.abstractmethod
    def content(self, text):
        """What a choice of a whole reply says."""

    @abc.abstractmethod
    def piece(self, text):
        """What a choice of a chunk says; None: nothing more."""

    @abc.abstractmethod
    def logprobs(self, index, pairs):
        """The log-probabilities of [(token id, (its own, [(token id, log-probability), ...])), ...], the next tokens of the
        choice `index`."""


class ChatReply(Reply):
    """Replies of POST /v1/chat/completions."""

    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def first_chunks(self):
        """Who speaks."""
        delta = {"delta": {"role": "assistant", "content": ""}}
        return [self.chunk(index, delta) for index in range(len(self.requests))]

    def content(self, text):
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def piece(self, text):
        return {"delta": {} if text is None else {"content": text}}

    def logprobs(self, index, pairs):
        def entry(token, value):
            piece = bytes_of(self.tokenizer, token)
            return {"token": piece.decode("utf-8", "replace"), "logprob": finite(value), "bytes": list(piece)}

        content = [
            {**entry(token, own), "top_logprobs": [entry(*other) for other in best]} for token, (own, best) in pairs
        ]
        return {"content": content, "refusal": None}


class CompletionReply(Reply):
    """Replies of POST /v1/completions."""

    prefix, whole, part = "cmpl", "text_completion", "text_completion"

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.decoders = [StreamDecoder(self.tokenizer) for _ in self.requests]
        self.lengths = [0] * len(self.requests)  # characters so far

    def content(self, text):
        return {"text": text}

    def piece(self, text):
        return {"text": text or ""}

    def logprobs(self, index, pairs):
        """As OpenAI's older API has them. text_offset: where in the answer each token's first character is."""
        names = functools.partial(legacy_name, self.tokenizer)
        offsets, tops = [], []
        for token, (own, best) in pairs:
            offsets.append(self.lengths[index])
            self.lengths[index] += len(self.decoders[index].push(token))
            tops.append({names(other): finite(value) for other, value in [*best, (token, own)]})
        return {
            "tokens": [names(token) for token, _ in pairs],
            "token_logprobs": [finite(own) for _, (own, _) in pairs],
            "top_logprobs": tops if pairs and self.requests[index].parameters.logprobs else None,
            "text_offset": offsets,
        }


@functools.lru_cache(maxsize=4)
def longest_token(tokenizer):
    """How many bytes of text a token is at most."""
    return max(map(len, token_bytes(tokenizer)))


def bytes_of(tokenizer, token):
    """The bytes of a token; of a control token those of its name."""
    return token_bytes(tokenizer)[token] or tokenizer.convert_ids_to_tokens(token).encode()


def legacy_name(tokenizer, token):
    """A token as text; one that is only a part of a character by its bytes, for others would have the same name."""
    piece = bytes_of(tokenizer, token)
    try:
        return piece.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def finite(log_probability):
    return max(log_probability, LEAST_LOG_PROBABILITY)


def model_list(names, created):
    """Body of GET /v1/models."""
    return {"object": "list", "data": [model_entry(name, created) for name in names]}


def model_entry(name, created):
    """Body of GET /v1/models/NAME."""
    return {"id": name, "object": "model", "created": created, "owned_by": "minimind"}
