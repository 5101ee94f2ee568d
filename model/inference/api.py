"""The OpenAI-compatible server as an ASGI application: create_app(engine). Imports nothing heavy, so that it listens, and
says that it is loading, before there is an engine."""

import asyncio
import contextlib
import hmac
import time

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from model.errors import UserError
from model.inference.api_protocol import (
    ApiError,
    ChatReply,
    ChatRequest,
    CompletionReply,
    CompletionRequest,
    model_entry,
    model_list,
    validation_error,
)
from model.inference.engine_thread import Closed, EngineThread, QueueFull
from model.settings import SamplingParameters, ServerSettings

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics")
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx would hold a stream back
GRACE = 5.0  # seconds a reader who has stopped reading has for the end of its stream, be it an error
ARRIVAL = 30.0  # seconds a whole request has to arrive
# Bytes of a body that are read although it is refused: a client that still writes reads no answer.
DISCARDED, DISCARDED_WITHOUT_KEY = 64 * 2**20, 32 * 2**20
ERRORS = {"content": {"application/json": {}}, "description": "an error in OpenAI's shape"}
ANSWERS = {
    200: {"content": {"application/json": {}, "text/event-stream": {}}, "description": "the answer, or a stream of it"},
    "4XX": ERRORS,
    "5XX": ERRORS,
}


class Disconnected(Exception):
    """The client has gone before it had its answer."""


def create_app(engine=None, settings=ServerSettings(), defaults=SamplingParameters()):
    """The server of an Engine, which from now on belongs to it, as a FastAPI application. Without an engine it says that it
    is loading until app.state.service.start(engine) is called. defaults: the sampling of requests that name none.

    GET /v1/models, /health, /metrics; POST /v1/chat/completions, /v1/completions.
    """
    service = Service(settings, defaults)

    @contextlib.asynccontextmanager
    async def lifespan(app):
        yield
        service.close()
        await asyncio.to_thread(service.join)

    app = FastAPI(title="MiniMind", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.service = service
    for kind, handler in (
        (ApiError, lambda request, error: error_response(error)),
        (RequestValidationError, on_invalid),
        (HTTPException, on_http_error),
        (Exception, lambda request, error: error_response(ApiError(500, "internal error of the server"))),
    ):
        app.add_exception_handler(kind, handler)
    add_endpoints(app, service)
    app.add_middleware(Gate, service=service)
    if settings.cors:  # outside of the gate, so that a page can read why it was refused
        origins = [origin.strip() for origin in settings.cors.split(",")]
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"])
    if engine is not None:
        service.start(engine)
    return app


def add_endpoints(app, service):
    """What the server answers to."""

    @app.get("/health", responses={503: ERRORS})
    async def health():
        service.engine_thread()
        return json_response({"status": "ok"})

    @app.get("/metrics")
    async def metrics():
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models", responses={"4XX": ERRORS, "5XX": ERRORS})
    async def models():
        return json_response(model_list(service.model_names(), service.created))

    @app.get("/v1/models/{name:path}", responses={"4XX": ERRORS, "5XX": ERRORS})
    async def model(name: str):
        if name not in service.model_names():
            raise unknown_model(name)
        return json_response(model_entry(name, service.created))

    @app.post("/v1/chat/completions", responses=ANSWERS)
    async def chat_completions(body: ChatRequest, request: Request):
        return await service.answer(body, ChatReply, request)

    @app.post("/v1/completions", responses=ANSWERS)
    async def completions(body: CompletionRequest, request: Request):
        return await service.answer(body, CompletionReply, request)


def on_invalid(request, error):
    """A body that is no JSON, or not what an endpoint takes."""
    errors = error.errors()
    if errors[0]["type"] == "json_invalid":
        return error_response(ApiError(400, f"the body is not valid JSON: {errors[0]['ctx']['error']}"))
    if errors[0]["loc"] == ("body",) and errors[0]["type"] != "unsupported":
        return error_response(ApiError(400, "the body must be a JSON object, with Content-Type: application/json"))
    return error_response(validation_error(errors))


def on_http_error(request, error):
    """An address that is none, a wrong method, a body that cannot be read."""
    message = {
        400: f"the body cannot be read as JSON in UTF-8: {why_unreadable(error.__cause__)}",
        404: f"{request.url.path}: no such address",
        405: f"{request.method} is not for {request.url.path}",
    }
    return error_response(
        ApiError(error.status_code, message.get(error.status_code, str(error.detail)), headers=error.headers)
    )


def why_unreadable(error):
    """What is wrong with a body that makes Python's JSON raise `error`."""
    if isinstance(error, UnicodeDecodeError):
        return f"{error.reason} at byte {error.start}"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return "a number has too many digits"


def unknown_model(name):
    return ApiError(
        404, f"the model {name!r} does not exist; GET /v1/models lists those that do", "model", "model_not_found"
    )


def check_length(body, count, limit, more=""):
    """Refuse a prompt of `count` tokens that fills the whole context."""
    if count >= limit:
        problem = f"the prompt has {more}{count} tokens, but prompt and answer together have at most {limit}"
        raise ApiError(400, f"{problem}: shorten it", body.prompt_field, "context_length_exceeded")


def shutting_down():
    return ApiError(503, "the server is shutting down", code="shutting_down")


@contextlib.contextmanager
def refusals():
    """Whatever the EngineThread refuses is an ApiError."""
    try:
        yield
    except QueueFull as error:
        raise ApiError(429, f"{error}; try again soon", code="queue_full", headers={"Retry-After": "1"})
    except Closed:
        raise shutting_down()
    except UserError as error:
        raise ApiError(400, str(error))


def json_response(content, status=200, headers=None):
    return Response(orjson.dumps(content), status, headers, "application/json")


def error_response(error):
    """The reply that an ApiError is."""
    return json_response(error.body, error.status, error.headers)


def event(content):
    """One server-sent event."""
    return b"data: " + orjson.dumps(content) + b"\n\n"


class Metrics:
    """What GET /metrics shows, in a registry of its own."""

    def __init__(self):
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "minimind_requests", "HTTP requests by how they ended", ("endpoint", "outcome"), registry=registry
        )
        self.prompt_tokens = Counter("minimind_prompt_tokens", "tokens of prompts taken", registry=registry)
        self.generated_tokens = Counter("minimind_generated_tokens", "tokens of answers", registry=registry)
        self.running = Gauge("minimind_running_requests", "answers being read or written", registry=registry)
        self.waiting = Gauge("minimind_waiting_requests", "answers waiting for a row", registry=registry)
        self.first_token = Histogram(
            "minimind_time_to_first_token_seconds",
            "from the whole request to an answer's first token",
            buckets=(0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60),
            registry=registry,
        )
        self.per_token = Histogram(
            "minimind_time_per_token_seconds",
            "between an answer's tokens, its mean",
            buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1),
            registry=registry,
        )

    def watch(self, engine):
        """Let the gauges show the Engine's rows and queue."""
        self.running.set_function(lambda: len(engine.rows))
        self.waiting.set_function(lambda: len(engine.waiting))


class Service:
    """What the endpoints share: the engine's thread once there is one, settings, metrics."""

    def __init__(self, settings, defaults):
        self.settings, self.defaults, self.metrics = settings, defaults, Metrics()
        self.thread, self.name, self.closing, self.created = None, settings.model_name, False, int(time.time())
        self.arriving = set()  # the asyncio.Timeouts of requests that are not there yet

    def start(self, engine, name="minimind"):
        """Answer with `engine`, an Engine, under `name` unless the settings have one, and with its adapters under theirs.
        Raises UserError for an adapter with the model's name."""
        self.name = self.name or name
        if self.name in engine.adapters:
            raise UserError(
                f"--lora {self.name}: is the model's own name; choose another, or --model_name", exit_code=2
            )
        self.metrics.watch(engine)
        self.thread = EngineThread(engine, self.settings.max_waiting)
        if self.closing:
            self.thread.close()

    def close(self, drain=True):
        """Take no more requests; without drain, end those that are open. A signal handler may call it."""
        self.closing = True
        if self.thread is not None:
            self.thread.close(drain)

    def refuse_arriving(self):
        """After close(), where the event loop runs: wait no longer for requests that are not there yet."""
        for limit in self.arriving:
            if not limit.expired():
                limit.reschedule(0)

    def join(self):
        """After close(): wait until the open requests have ended."""
        if self.thread is not None:
            self.thread.join()

    def engine_thread(self):
        """The EngineThread; ApiError 503 while there is none, or no more."""
        if self.closing:
            raise shutting_down()
        if self.thread is None:
            raise ApiError(
                503, "the model is still loading, try again soon", code="loading", headers={"Retry-After": "1"}
            )
        return self.thread

    def model_names(self):
        """Names of the model and of each adapter on it."""
        return [self.name, *(name for name in self.engine_thread().engine.adapters if name is not None)]

    async def answer(self, body, kind, request):
        """The response to a ChatRequest or CompletionRequest; kind: the Reply that goes with it."""
        started, thread = time.perf_counter(), self.engine_thread()
        name = body.model if body.model in self.model_names() else self.name
        if self.settings.strict_model and body.model != name:
            raise unknown_model(body.model)
        with refusals():
            thread.check_room(body.prompt_count * body.choices)  # again below, but encoding a long text takes a while
        prompts = await self.encode(body, thread.engine)
        parameters = [body.parameters(self.defaults, choice) for choice in range(body.choices)]
        wanted = [(ids, each) for ids in prompts for each in parameters]
        with refusals():
            answers = thread.submit_all(wanted, name if name != self.name else None)
        self.metrics.prompt_tokens.inc(sum(map(len, prompts)))
        reply = kind(name, answers.requests, body.choices, thread.engine.tokenizer, body.wants_usage)
        exchange = Exchange(self, answers, reply, request, started)
        return exchange if body.stream else await exchange.whole()

    async def encode(self, body, engine):
        """The token ids of each prompt of a request. Raises ApiError 400 for one that is too long or not the model's."""
        check_length(body, body.least_tokens(engine.tokenizer), engine.max_length, "at least ")
        prompts = await asyncio.to_thread(body.prompts, engine.tokenizer)
        check_length(body, max(map(len, prompts)), engine.max_length)
        largest, vocab_size = max(map(max, prompts)), engine.model.config.vocab_size
        if largest >= vocab_size:
            problem = f"the model's token ids are 0 to {vocab_size - 1}, got {largest}"
            raise ApiError(400, f"{body.prompt_field}: {problem}", body.prompt_field)
        return prompts

    def engine_error(self, request):
        """The ApiError of the engine's request that ended with an "error"."""
        if request.out_of_memory:
            text = "the server has no memory left for this request; try again soon"
            return ApiError(503, text, code="out_of_memory", headers={"Retry-After": "1"})
        return shutting_down() if self.closing else ApiError(500, request.error)


class Exchange(Response):
    """One request whose answers are being written: `await whole()` is the response when it wants them whole; else it is
    itself the response, a stream of events. Either way a client that leaves, and time that has run out, cancel them."""

    def __init__(self, service, answers, reply, request, started):
        super().__init__(headers=STREAM_HEADERS, media_type="text/event-stream")
        del self.headers["content-length"]
        self.service, self.answers, self.reply, self.request = service, answers, reply, request
        self.started = started  # of time.perf_counter
        self.index = {request: index for index, request in enumerate(answers.requests)}
        self.first = [None] * len(self.index)  # when each answer's first token came

    @contextlib.contextmanager
    def watched(self):
        """While the answers are read: cancel them when the client leaves or time runs out, and at the end in any case."""
        limit = self.service.settings.request_timeout
        timer = asyncio.get_running_loop().call_later(limit, self.answers.cancel, TimeoutError())
        watcher = asyncio.create_task(self.wait_for_disconnect())
        try:
            yield
        finally:
            timer.cancel()
            watcher.cancel()
            self.answers.cancel()

    async def wait_for_disconnect(self):
        """Cancel the answers when the client leaves."""
        while (await self.request.receive())["type"] != "http.disconnect":
            pass
        self.request.scope["outcome"] = "disconnected"
        self.answers.cancel(Disconnected())

    async def deltas(self):
        """(index of the choice, Delta) of all answers as they come. Raises Disconnected, and ApiError when time runs out or
        the engine fails."""
        metrics = self.service.metrics
        try:
            async for delta in self.answers:
                index = self.index[delta.request]
                if delta.finish_reason == "error":
                    raise self.service.engine_error(delta.request)
                metrics.generated_tokens.inc(len(delta.token_ids))
                self.measure(index, delta)
                yield index, delta
        except TimeoutError:
            limit = self.service.settings.request_timeout
            raise ApiError(504, f"the answer took longer than {limit:g} seconds", code="timeout")

    def measure(self, index, delta):
        """Let the metrics see the time until the first token, and at the end how long each one took."""
        metrics, now = self.service.metrics, time.perf_counter()
        if self.first[index] is None:
            self.first[index] = now
            metrics.first_token.observe(now - self.started)
        elif delta.finish_reason and len(delta.request.token_ids) > 1:
            metrics.per_token.observe((now - self.first[index]) / (len(delta.request.token_ids) - 1))

    async def whole(self):
        """The response when all answers are complete."""
        deltas = [[] for _ in self.index]
        with self.watched():
            try:
                async for index, delta in self.deltas():
                    deltas[index].append(delta)
            except Disconnected:
                return Response(status_code=499)  # nobody reads it
        return json_response(self.reply.complete(deltas))

    async def __call__(self, scope, receive, send):
        """Send the stream of events."""
        with self.watched():
            try:
                async with asyncio.timeout(self.service.settings.request_timeout + GRACE):
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    async for content in self.events():
                        await send({"type": "http.response.body", "body": content, "more_body": True})
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
            except TimeoutError:  # who reads nothing sees no error event either: the connection ends
                self.request.scope["outcome"] = "504"

    async def events(self):
        """The stream's server-sent events; an error ends it with an event that says so."""
        try:
            yield b"".join(map(event, self.reply.first_chunks()))
            async for index, delta in self.deltas():
                if content := b"".join(map(event, self.reply.chunks(index, delta))):
                    yield content
            yield b"".join(map(event, self.reply.last_chunks())) + b"data: [DONE]\n\n"
        except Disconnected:
            return
        except ApiError as error:
            self.request.scope["outcome"] = str(error.status)
            yield event(error.body)


class Gate:
    """ASGI middleware before all else: counts requests, checks the key, reads the body up to its limit."""

    def __init__(self, app, service):
        self.app, self.service = app, service
        key = service.settings.api_key
        self.authorization = None if key is None else key.encode()

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        outcome = "500"

        async def counted(message):
            nonlocal outcome
            if message["type"] == "http.response.start":
                outcome = str(message["status"])
            await send(message)

        try:
            body = await self.admit(scope, receive)
            if body is not None:
                await self.app(scope, replay(body, receive), counted)
        except ApiError as error:
            await error_response(error)(scope, receive, counted)
        finally:
            path = scope["path"] if scope["path"] in ENDPOINTS else "other"
            self.service.metrics.requests.labels(path, scope.get("outcome") or outcome).inc()

    async def admit(self, scope, receive):
        """The whole body of a request that has the key; None when the client leaves. Raises ApiError 401, 408, 413 and 503."""
        limit = asyncio.timeout(min(ARRIVAL, self.service.settings.request_timeout))
        self.service.arriving.add(limit)
        try:
            async with limit:
                return await self.read_body(scope, receive)
        except TimeoutError:
            late = ApiError(408, "the request did not arrive in time")
            refused = shutting_down() if self.service.closing else late
            refused.headers = {"Connection": "close"}
            raise refused
        finally:
            self.service.arriving.discard(limit)

    async def read_body(self, scope, receive):
        """The body; None when the client leaves. Raises ApiError 401 and 413, once it has read what the client writes."""
        headers, limit = dict(scope["headers"]), self.service.settings.max_body_bytes
        known = scope["path"] == "/health" or self.has_key(headers.get(b"authorization", b""))
        most = limit + DISCARDED if known else DISCARDED_WITHOUT_KEY
        parts, size, more = [], 0, True
        while more and size <= most:
            message = await receive()
            if message["type"] == "http.disconnect":
                scope["outcome"] = "disconnected"
                return None
            part, more = message.get("body", b""), message.get("more_body", False)
            size += len(part)
            if known and size <= limit:
                parts.append(part)
        if not known:
            problem = "wrong or missing key: send Authorization: Bearer KEY"
            headers = {"WWW-Authenticate": "Bearer", "Connection": "close"}
            raise ApiError(401, problem, code="invalid_api_key", headers=headers)
        if size > limit:
            raise ApiError(413, f"the body is larger than {limit} bytes", headers={"Connection": "close"})
        return b"".join(parts)

    def has_key(self, header):
        """Whether the Authorization header holds the key, in a time that says nothing about it."""
        scheme, _, key = header.partition(b" ")
        right = self.authorization is None or hmac.compare_digest(key.strip(), self.authorization)
        return right and (self.authorization is None or scheme.lower() == b"bearer")


def replay(body, receive):
    """An ASGI receive that gives `body` first and then what `receive` does: that the client leaves, for one."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again():
        return messages.pop() if messages else await receive()

    return receive_again
