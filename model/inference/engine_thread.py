"""An engine in a thread of its own: coroutines submit prompts to it and read the answers while they are being written."""

import asyncio
import logging
import threading

from model.errors import UserError, is_out_of_memory
from model.settings import SamplingParameters

log = logging.getLogger(__name__)


class QueueFull(Exception):
    """As many requests as the queue holds are waiting already: come back later."""


class Closed(Exception):
    """close() was called: no more requests are taken."""


class Answers:
    """The answers to the prompts of one submission: an asynchronous iterator of the Deltas of all of them as they come, until
    each has ended. delta.request says whose a Delta is; .requests has them in the order of the prompts."""

    def __init__(self, owner, requests):
        self.owner, self.requests, self.unfinished = owner, requests, len(requests)
        self.loop, self.deltas = asyncio.get_running_loop(), asyncio.Queue()

    def __aiter__(self):
        return self

    async def __anext__(self):
        if not self.unfinished:
            raise StopAsyncIteration
        item = await self.deltas.get()
        if isinstance(item, BaseException):
            self.unfinished = 0
            raise item
        self.unfinished -= item.finish_reason is not None
        return item

    def cancel(self, error=None):
        """Free the rows of those that have not ended, at the engine's next step. Whoever reads gets the Deltas that are there
        already, and then the exception `error`, or the end."""
        if self.unfinished:
            self.deltas.put_nowait(error or StopAsyncIteration())
            self.owner.cancel(self.requests)


class EngineThread:
    """Owns an Engine, and is the only one to touch it: starts a thread that steps it whenever there is work.

    max_waiting: how many requests may wait beside the engine.max_batch that run. An exception of the engine ends all open
    requests with an "error" and is logged; the thread goes on with the next ones.
    """

    def __init__(self, engine, max_waiting=64):
        self.engine, self.max_open = engine, engine.max_batch + max_waiting
        self.open = {}  # Request: its Answers, from submit until it ends
        self.submitted, self.cancelled = [], []  # what the thread has not seen yet
        self.closing = self.at_once = False
        self.changed = threading.Condition()  # of all that is above; reentrant, so a signal handler may call close
        self.thread = threading.Thread(target=self.run, name="engine", daemon=True)
        self.thread.start()

    def submit(self, prompt_ids, parameters=SamplingParameters(), adapter=None):
        """submit_all of a single prompt."""
        return self.submit_all([(prompt_ids, parameters)], adapter)

    def submit_all(self, prompts, adapter=None):
        """The Answers to `prompts`, [(token ids, SamplingParameters), ...], with the adapter of that name; to be called where
        an event loop runs. All are taken or none.

        Raises what check_room and Engine.add do.
        """
        requests = [self.engine.new_request(ids, parameters, adapter) for ids, parameters in prompts]
        answers = Answers(self, requests)
        with self.changed:
            self.check_room(len(requests))
            self.open.update(dict.fromkeys(requests, answers))
            self.submitted += requests
            self.changed.notify()
        return answers

    def check_room(self, count):
        """Raise QueueFull or Closed where `count` more prompts would not be taken now, and UserError where they never are."""
        with self.changed:
            if count > self.max_open:
                raise UserError(f"{count} answers at once, but this server holds {self.max_open} requests: ask fewer")
            if self.closing:
                raise Closed("shutting down")
            if len(self.open) + count > self.max_open:
                raise QueueFull(f"{len(self.open)} requests are running or waiting already")

    def cancel(self, requests):
        """Let the thread cancel those of `requests` that have not ended."""
        with self.changed:
            self.cancelled += requests
            self.changed.notify()

    def close(self, drain=True):
        """Take no more requests and end the thread: after those that are open, or, without drain, after the present step;
        then they end with an "error"."""
        with self.changed:
            self.closing, self.at_once = True, self.at_once or not drain
            self.changed.notify()

    def join(self, timeout=None):
        """Wait until the thread has ended, at most `timeout` seconds."""
        self.thread.join(timeout)

    def run(self):
        """The thread: one step of the engine after the other, and sleep while nothing is to do."""
        while True:
            with self.changed:
                self.changed.wait_for(self.has_work)
                if self.at_once or (self.closing and not self.open):
                    break
                submitted, self.submitted = self.submitted, []
                cancelled, self.cancelled = self.cancelled, []
            try:
                for request in submitted:
                    self.engine.enqueue(request)
                for request in cancelled:
                    self.engine.cancel(request)
                deltas = self.engine.step() if self.engine.has_work else []
            except Exception as error:
                log.exception("the engine failed; all open requests end with an error")
                no_memory = is_out_of_memory(error)
                deltas = self.fail_all("out of memory" if no_memory else "internal error of the engine", no_memory)
            self.deliver(deltas, cancelled)
        self.deliver(self.fail_all("the server is shutting down"))

    def has_work(self):
        """Whether the thread has anything to do."""
        return self.submitted or self.cancelled or self.closing or self.engine.has_work

    def fail_all(self, reason, out_of_memory=False):
        """End all open requests; returns their Deltas."""
        self.engine.abandon()
        with self.changed:
            self.submitted = []
            return [request.fail(reason, out_of_memory) for request in self.open]

    def deliver(self, deltas, cancelled=()):
        """Hand `deltas` to those who read them, all of a step at once: waking an event loop costs more than a token."""
        by_loop = {}
        with self.changed:
            for request in cancelled:
                self.open.pop(request, None)
            for delta in deltas:
                answers = self.open.get(delta.request)
                if answers is None:  # cancelled in the step that failed
                    continue
                if delta.finish_reason:
                    del self.open[delta.request]
                by_loop.setdefault(answers.loop, []).append((answers.deltas, delta))
            for loop, pairs in by_loop.items():
                try:
                    loop.call_soon_threadsafe(put_all, pairs)
                except RuntimeError:  # the loop is closed: nobody reads any more
                    self.cancelled += [delta.request for _, delta in pairs]


def put_all(pairs):
    """Put each of [(queue, item), ...] where it belongs."""
    for queue, item in pairs:
        queue.put_nowait(item)
