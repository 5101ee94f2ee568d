"""The engine's thread: what it hands over is what the engine alone says, rows come free, nothing ends it but close()."""

import asyncio
import contextlib
import dataclasses
import logging
import random

import pytest

from conftest import trained_scale
from model.errors import UserError
from model.inference.engine import Engine
from model.inference.engine_thread import Closed, EngineThread, QueueFull
from model.LMConfig import LMConfig
from model.settings import SamplingParameters

GREEDY = SamplingParameters(temperature=0.0, max_new_tokens=12, stop_token_ids=())
ENDLESS = dataclasses.replace(GREEDY, max_new_tokens=10**6)
MODEL = trained_scale(LMConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=200, max_seq_len=256))


def random_prompts(count):
    chance = random.Random(0)
    return [[chance.randrange(3, 200) for _ in range(chance.randint(1, 30))] for _ in range(count)]


@contextlib.contextmanager
def engine_thread(max_waiting=64, **options):
    thread = EngineThread(Engine(MODEL, **options), max_waiting)
    try:
        yield thread
    finally:
        thread.close(drain=False)
        thread.join(20)
        assert not thread.thread.is_alive() and not thread.open


async def tokens_of(answers):
    """The token ids of each request, as its Deltas bring them."""
    tokens = {request: [] for request in answers.requests}
    async for delta in answers:
        tokens[delta.request] += delta.token_ids
    assert [request.token_ids for request in answers.requests] == list(tokens.values())
    return list(tokens.values())


def run(coroutine):
    """asyncio.run, which ends also when the engine's thread has died."""
    return asyncio.run(asyncio.wait_for(coroutine, 60))


async def until(condition, seconds=10):
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.002)


def test_many_at_once_get_what_each_gets_alone():
    prompts = random_prompts(9)
    expected = [request.token_ids for request in Engine(MODEL).generate(prompts, GREEDY)]

    async def ask():
        singles = [tokens_of(thread.submit(prompt, GREEDY)) for prompt in prompts]
        together = tokens_of(thread.submit_all([(prompt, GREEDY) for prompt in prompts]))
        *alone, all_of_them = await asyncio.gather(*singles, together)
        assert [tokens for (tokens,) in alone] == all_of_them == expected

    with engine_thread(max_batch=4) as thread:
        run(ask())
        run(ask())  # from another event loop


def test_a_bad_prompt_is_refused_where_it_is_submitted():
    async def ask():
        for prompt in ([], [10**6], [5] * 256):
            with pytest.raises(UserError):
                thread.submit_all([([5], GREEDY), (prompt, GREEDY)])
        with pytest.raises(UserError, match="no adapter"):
            thread.submit([5], GREEDY, "nobody")
        assert not thread.open

    with engine_thread() as thread:
        run(ask())


def test_a_full_queue_takes_all_or_nothing_and_has_room_again():
    async def ask():
        first = thread.submit_all([([5], ENDLESS)] * 2)
        with pytest.raises(QueueFull, match="2 requests"):
            thread.submit_all([([5], GREEDY)] * 2)
        second = thread.submit([6], GREEDY)
        with pytest.raises(QueueFull):
            thread.submit([6], GREEDY)
        for refused in (lambda: thread.submit_all([([5], GREEDY)] * 4), lambda: thread.check_room(4)):
            with pytest.raises(UserError, match="4 answers at once, but this server holds 3"):
                refused()
        with pytest.raises(QueueFull):
            thread.check_room(1)
        first.cancel()
        assert len((await tokens_of(second))[0]) == 12
        await until(lambda: not thread.open)
        await tokens_of(thread.submit_all([([5], GREEDY)] * 3))

    with engine_thread(max_waiting=1, max_batch=2) as thread:
        run(ask())


def test_cancelling_frees_the_rows_of_running_and_waiting_and_ends_the_iterator():
    async def ask():
        answers = thread.submit_all([([5], ENDLESS)] * 5)
        await anext(answers)
        answers.cancel()
        async for _ in answers:
            pass
        await until(lambda: not thread.open)
        assert [request.finish_reason for request in answers.requests] == ["cancelled"] * 5
        assert not engine.rows and not engine.waiting
        at_once = thread.submit([5], ENDLESS)
        at_once.cancel()  # before the thread may have seen it
        assert [delta async for delta in at_once if delta.finish_reason] == []
        with_error = thread.submit([5], ENDLESS)
        with_error.cancel(TimeoutError("late"))
        with pytest.raises(TimeoutError, match="late"):
            async for _ in with_error:
                pass
        await until(lambda: not thread.open)
        done = thread.submit([5], GREEDY)
        await tokens_of(done)
        done.cancel(TimeoutError())
        assert [delta async for delta in done] == [] and done.requests[0].finish_reason == "length"

    with engine_thread(max_batch=2) as thread:
        engine = thread.engine
        run(ask())


def test_who_does_not_read_holds_nobody_up():
    async def ask():
        unread = thread.submit([5], GREEDY)
        await tokens_of(thread.submit([6], GREEDY))
        await until(lambda: not thread.open)
        assert len((await tokens_of(unread))[0]) == 12

    with engine_thread(max_batch=2) as thread:
        run(ask())


def test_the_deltas_of_a_step_wake_the_event_loop_once():
    async def ask():
        loop, calls = asyncio.get_running_loop(), []
        plain = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda function, *arguments: calls.append(arguments) or plain(function, *arguments)
        several = [thread.submit_all([([5 + place], GREEDY)] * 2) for place in range(4)]
        await asyncio.gather(*map(tokens_of, several))
        assert len(calls) < 20 and max(len(pairs) for (pairs,) in calls) == 8

    with engine_thread() as thread:
        run(ask())


@pytest.mark.parametrize("error, shown", [(RuntimeError("secret"), "internal error"), (MemoryError(), "out of memory")])
def test_an_exception_of_the_engine_ends_the_open_requests_and_not_the_thread(monkeypatch, caplog, error, shown):
    async def ask():
        answers = thread.submit_all([([5], ENDLESS)] * 3)
        await anext(answers)
        monkeypatch.setattr(thread.engine, "decode", broken)
        cancelled = thread.submit([7], ENDLESS)
        cancelled.cancel()
        last = [delta async for delta in answers if delta.finish_reason]
        assert [delta.request for delta in last] == answers.requests
        assert all(delta.finish_reason == "error" and shown in delta.request.error for delta in last)
        monkeypatch.undo()
        assert await tokens_of(thread.submit([5, 6], GREEDY)) == expected

    def broken(rows):
        raise error

    expected = [Engine(MODEL).generate([[5, 6]], GREEDY)[0].token_ids]
    with engine_thread(max_batch=2) as thread, caplog.at_level(logging.ERROR):
        run(ask())
    assert "the engine failed" in caplog.text and caplog.records[0].exc_info


def test_cancelled_in_the_very_step_that_fails(monkeypatch):
    async def ask():
        one, other = thread.submit([5], ENDLESS), thread.submit([6], ENDLESS)
        await anext(one), await anext(other)

        def cancel(request):
            raise RuntimeError("broken")

        monkeypatch.setattr(thread.engine, "cancel", cancel)
        one.cancel()
        assert [delta.finish_reason async for delta in other][-1] == "error"
        monkeypatch.undo()
        await tokens_of(thread.submit([5, 6], GREEDY))

    with engine_thread(max_batch=2) as thread:
        run(ask())


def test_close_drains_and_takes_no_more():
    async def ask():
        answers = thread.submit_all([(prompt, GREEDY) for prompt in random_prompts(5)])
        thread.close()
        for refused in (lambda: thread.submit([5], GREEDY), lambda: thread.check_room(1)):
            with pytest.raises(Closed):
                refused()
        assert [len(tokens) for tokens in await tokens_of(answers)] == [12] * 5

    with engine_thread(max_batch=2) as thread:
        run(ask())
        thread.join(10)
        assert not thread.thread.is_alive()


def test_close_at_once_ends_the_open_ones_with_an_error():
    async def ask():
        answers = thread.submit_all([([5], ENDLESS)] * 3)
        await anext(answers)
        thread.close()
        thread.close(drain=False)
        reasons = [delta.finish_reason async for delta in answers if delta.finish_reason]
        assert reasons == ["error"] * 3 and "shutting down" in answers.requests[0].error

    with engine_thread(max_batch=2) as thread:
        run(ask())


def test_a_reader_whose_event_loop_is_gone_leaves_no_row():
    async def ask():
        answers = thread.submit_all([([5], ENDLESS)] * 2)
        await anext(answers)
        return answers.requests

    with engine_thread() as thread:
        requests = run(ask())
        run(until(lambda: not thread.open))
        assert not thread.engine.rows and {request.finish_reason for request in requests} == {"cancelled"}
