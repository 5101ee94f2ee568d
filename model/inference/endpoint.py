"""An OpenAI-compatible endpoint, asked through the openai package: its models, its answers as they come, and what is said
when it does not answer."""

import contextlib
import os
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import urlsplit

from model.errors import UserError
from model.inference.chat import split_system

WAIT = 600.0  # seconds without a word, within which a busy server's queue should have moved on
CONNECT = 10.0
NO_KEY = "none"  # what is sent to a server that wants none
TOO_LONG = ("context_length_exceeded", "exceed_context_size_error")  # code of OpenAI and MiniMind, type of llama.cpp


class Piece(NamedTuple):
    """What came next of an answer: its text, how many tokens are to be added to the count, where it ended by itself
    finish_reason "stop" or "length", and how many of the oldest messages did not fit the context."""

    text: str
    tokens: int
    finish_reason: str | None = None
    dropped: int = 0


def check_url(url, flag):
    """Raise UserError unless `url`, which `flag` gave, is an address alone, without a secret, that an HTTP client takes."""
    import openai

    if "@" in url or "?" in url:
        raise UserError(f"{flag}: only the address; the key comes from OPENAI_API_KEY", exit_code=2)
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and " " not in url
        openai.OpenAI(base_url=url, api_key=NO_KEY).close()
    except Exception:  # ValueError, or the InvalidURL of httpx or httpx2, whichever this openai package stands on
        valid = False
    if not valid:
        raise UserError(f"{flag} {url!r}: expected a URL such as http://127.0.0.1:8000/v1", exit_code=2)


def check_key(key=None, flag="OPENAI_API_KEY"):
    """The key given by `flag`, or that of the environment, or NO_KEY. Raises UserError for
    one that no HTTP header can hold."""
    key = (key or os.environ.get("OPENAI_API_KEY", "")).strip() or NO_KEY
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"{flag}: holds a character that no key has; copy the key again", exit_code=2)
    return key


@dataclass
class Endpoint:
    """The endpoint at `url` ("http://127.0.0.1:8000/v1"), which `flag` gave. key: None for the environment's
    OPENAI_API_KEY; key_flag: the flag for one, if there is any. way_out: what helps when a question alone is too long.
    Raises UserError for a URL or key that is none."""

    url: str
    key: str | None = None
    flag: str = "--base_url"
    key_flag: str | None = "--api_key"
    way_out: str = "ask a shorter question, or begin anew with /clear and a shorter /system"

    def __post_init__(self):
        import openai

        check_url(self.url, self.flag)
        self.key_source = self.key_flag if self.key else "OPENAI_API_KEY"
        self.key = check_key(self.key, self.key_source)
        timeout = openai.Timeout(WAIT, connect=CONNECT)
        self.client = openai.OpenAI(base_url=self.url, api_key=self.key, timeout=timeout, max_retries=1)

    def models(self):
        """Names of the models that it lists, [] where it has no list. Raises UserError when it does not answer or refuses
        the key."""
        import openai

        try:
            with self.explained():
                return [model.id for model in self.client.models.list(timeout=CONNECT).data or []]
        except UserError as error:
            if isinstance(error.__cause__, openai.NotFoundError):
                return []
            raise

    def stream(self, model, messages, temperature=None, top_p=None, max_tokens=None, top_k=None):
        """Yield the Pieces of the next turn after `messages`, without the oldest exchanges where all do not fit the
        context; what is None is left to the endpoint. Closing the iterator ends the request. Raises UserError when it
        cannot be reached, refuses, or stops in the middle."""
        fields = dict(temperature=temperature, top_p=top_p, max_tokens=max_tokens)
        fields = {name: value for name, value in fields.items() if value is not None}
        if top_k:  # no field of OpenAI's own API
            fields["extra_body"] = {"top_k": top_k}
        reason, counted = None, 0
        with self.explained(), self.begin(messages, model=model, **fields) as (chunks, dropped):
            yield Piece("", 0, dropped=dropped)
            for chunk in chunks:
                for choice in chunk.choices[:1]:  # the chunk with the usage has none
                    text, reason = choice.delta.content or "", choice.finish_reason or reason
                    counted += bool(text)
                    yield Piece(text, int(bool(text)), choice.finish_reason)
                if chunk.usage:  # a piece of text may have been several tokens
                    yield Piece("", chunk.usage.completion_tokens - counted)
            if reason is None:
                raise UserError(f"{self.place}: the answer broke off; is the server still running?")

    @contextlib.contextmanager
    def begin(self, messages, **fields):
        """(stream of chunks, how many messages were dropped): as often as the endpoint says that the prompt is too long, the
        oldest exchange is left out, never a system turn or the last question."""
        import openai

        (system, turns), dropped, chunks = split_system(messages), 0, None
        fields["stream_options"] = {"include_usage": True}
        while chunks is None:
            try:
                fields["messages"] = system + turns[dropped:]
                chunks = self.client.chat.completions.create(stream=True, **fields)
            except openai.APIStatusError as error:
                dropped += 2
                if not too_long(error) or dropped >= len(turns):
                    raise
        with chunks:
            yield chunks, dropped

    @property
    def place(self):
        return f"{self.flag} {self.url}"

    @property
    def hint(self):
        """What to think of when nothing is found at the address, nothing where it ends as most do."""
        return "" if self.url.rstrip("/").endswith("/v1") else " (is /v1 missing in the address?)"

    @contextlib.contextmanager
    def explained(self):
        """What goes wrong with a request, as a UserError of one line."""
        import openai

        try:
            yield
        except openai.APIStatusError as error:
            status = f"HTTP status {error.status_code}"
            raise UserError(f"{self.place}: {self.refusal(error)} ({status})") from error
        except openai.APITimeoutError as error:
            raise UserError(f"{self.place}: no answer in time; is the server busy?") from error
        except openai.APIConnectionError as error:
            problem = "cannot be reached, or the connection was lost"
            raise UserError(f"{self.place}: {problem}; is the server running, is the address right?") from error
        except openai.APIError as error:  # the server says so in the middle of an answer
            raise UserError(f"{self.place}: {self.message(error)}") from error
        except (openai.OpenAIError, AttributeError, LookupError, TypeError, ValueError) as error:
            problem = "replies, but not as an OpenAI-compatible endpoint does"
            raise UserError(f"{self.place}: {problem}{self.hint}") from error

    def refusal(self, error):
        """Why the server refuses, and what helps."""
        if error.status_code in (401, 403):
            ways = " or ".join(filter(None, (self.key_flag, "OPENAI_API_KEY")))
            return f"wants a key: {ways}" if self.key == NO_KEY else f"wants another key than that of {self.key_source}"
        if too_long(error):
            return f"{self.message(error)}; {self.way_out}"
        return self.message(error) + (self.hint if error.status_code in (404, 405) else "")

    def message(self, error):
        """What the server says of an error, in one line and without the key, which it may repeat."""
        body = error.body if isinstance(error.body, dict) else {}
        text = body["message"] if isinstance(body.get("message"), str) else "refuses"
        if self.key != NO_KEY:
            text = text.replace(self.key, "…")
        return " ".join(text.split())[:300]


def too_long(error):
    """Whether the server refused because the messages do not fit the context; vLLM says so in words only."""
    return error.code in TOO_LONG or error.type in TOO_LONG or "maximum context length" in error.message
