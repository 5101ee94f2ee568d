"""One engine for several threads, and an answer that is written in a thread of its own: what a page needs that many people
look at."""

import contextlib
import threading
import time
import traceback

from model.errors import UserError, describe
from model.inference.chat import conversation_prompt
from model.inference.endpoint import Piece
from model.lora import check_base, read_adapter


class SharedEngine:
    """An Engine for several threads at once. Each one that waits for an answer takes the lock for a step, and a step is one
    for all: whoever asks meanwhile joins the batch, and nobody waits for another's end.

    checkpoint: the file that the engine's weights come from.
    """

    def __init__(self, engine, checkpoint):
        self.engine, self.checkpoint = engine, checkpoint
        self.lock, self.next = threading.Lock(), threading.Lock()

    @contextlib.contextmanager
    def turn(self):
        """The engine, for this thread alone. Who waits for it first goes in next: with the lock alone the thread that
        steps would take it again before any other has woken up."""
        with self.next:
            self.lock.acquire()
        try:
            yield self.engine
        finally:
            self.lock.release()

    def add_adapter(self, path):
        """The name under which the engine has the adapter in the file `path`, read unless it has been; what the file held
        before is dropped, once no request asks for it. Raises UserError where it does not fit."""
        name = f"{path}@{path.stat().st_mtime_ns}"
        with self.turn() as engine:
            if name not in engine.adapters:
                adapter = read_adapter(path)
                check_base(adapter, self.checkpoint)
                engine.add_adapter(name, adapter)
            for other in [other for other in engine.adapters if other and other.rpartition("@")[0] == str(path)]:
                if other != name:
                    with contextlib.suppress(UserError):  # it is still asked for: the next call tries again
                        engine.remove_adapter(other)
        return name

    def stream(self, messages, parameters, adapter=None):
        """Yield the Pieces of the assistant's next turn after `messages`, as SamplingParameters say; closing the iterator
        ends the request. Raises UserError as Engine.add does, and when the engine fails."""
        with self.turn() as engine:  # the tokenizer is not made for two threads either
            room = engine.max_length, parameters.max_new_tokens
            ids, dropped = conversation_prompt(engine.tokenizer, messages, *room)
            request = engine.add(ids, parameters, adapter)
        text = tokens = 0  # how much has been handed on
        try:
            yield Piece("", 0, dropped=dropped)
            while request.finish_reason is None:
                with self.turn():
                    if request.finish_reason is None:  # the step of another thread may have ended it
                        engine.step()
                    piece = Piece(request.text[text:], len(request.token_ids) - tokens, request.finish_reason)
                text, tokens = text + len(piece.text), tokens + piece.tokens
                if request.finish_reason == "error":
                    raise UserError(request.error)
                yield piece
        finally:
            with self.turn():
                engine.cancel(request)


class Answer:
    """An answer that a thread of its own writes, so that a page may be drawn anew while it comes.

    pieces: a generator of Pieces, which is closed at the end. Growing: .text, .tokens, .dropped (messages that did not
    fit), .first_seconds until the first token. When .done: .finish_reason ("stop", "length", "stopped", "error"), .error (one
    line when that is "error"), .seconds.
    """

    ABANDONED = 30.0  # seconds: when nobody has looked for so long, the page has been closed

    def __init__(self, pieces):
        self.text, self.tokens, self.dropped, self.first_seconds = "", 0, 0, None
        self.finish_reason = self.error = self.seconds = None
        self.started = self.looked = time.monotonic()
        self.lock, self.ended = threading.Lock(), threading.Event()
        threading.Thread(target=self.write, args=(pieces,), daemon=True).start()

    def write(self, pieces):
        reason = None
        try:
            with contextlib.closing(pieces):
                for piece in pieces:
                    if time.monotonic() - self.looked > self.ABANDONED:
                        return self.stop()
                    with self.lock:
                        if self.done:
                            return
                        self.text += piece.text
                        self.tokens += piece.tokens
                        self.dropped += piece.dropped
                        if piece.text and self.first_seconds is None:
                            self.first_seconds = time.monotonic() - self.started
                        reason = piece.finish_reason or reason
            self.finish(reason or "stop")
        except Exception as error:  # it would end this thread only, and the page would wait for ever
            line, _ = describe(error)
            if line is None:
                traceback.print_exc()
            self.finish("error", line or f"{type(error).__name__}: {error}")

    @property
    def done(self):
        return self.ended.is_set()

    def wait(self, seconds):
        """Wait until it is done, but no longer than `seconds`; says that somebody still looks."""
        self.looked = time.monotonic()
        return self.ended.wait(seconds)

    def stop(self):
        """End it here; what has come stays."""
        self.finish("stopped")

    def finish(self, reason, error=None):
        """The first one to say how it ended is right."""
        with self.lock:
            if not self.done:
                self.finish_reason, self.error, self.seconds = reason, error, time.monotonic() - self.started
                self.ended.set()

    @property
    def tokens_per_second(self):
        """Tokens in the time from the question to the end, reading the prompt counted."""
        return self.tokens / self.seconds if self.seconds else 0.0


def as_messages(turns, system="", count=None):
    """Messages of the last `count` of [(question, Answer), ...], None: all, after the system prompt; a question that got no
    word of an answer is left out, as if it had not been asked."""
    kept = [(question, answer.text) for question, answer in turns if answer.text]
    kept = kept if count is None else kept[max(len(kept) - count, 0) :]
    pairs = [{"role": role, "content": content} for pair in kept for role, content in zip(("user", "assistant"), pair)]
    return ([{"role": "system", "content": system.strip()}] if system.strip() else []) + pairs
