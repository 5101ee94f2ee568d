"""Generation: the cache changes nothing, sampling follows its definition, a request doesn't notice its neighbours."""

import contextlib
import copy
import dataclasses
import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import trained_adapter
from model.errors import UserError
from model.inference.chat import conversation_prompt, last_exchanges
from model.inference.engine import Engine, Request
from model.inference.kernels import PackedLinear
from model.inference.kv_cache import KVCache
from model.inference.sampling import Sampler, SamplingParameters
from model.LMConfig import LMConfig
from model.lora import Adapter, merge, target_matrices
from model.model import Transformer
from model.tokenizer import encode_text, encoded_turns, render_conversation, token_bytes

GREEDY = SamplingParameters(temperature=0.0, max_new_tokens=12, stop_token_ids=())


def tiny_model(**overrides):
    """Random weights, large enough that the next token depends on the whole context."""
    torch.manual_seed(0)
    config = LMConfig(
        **{**dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=200, max_seq_len=64), **overrides}
    )
    model = Transformer(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module", params=[dict(), dict(use_moe=True)], ids=["dense", "moe"])
def any_model(request):
    return tiny_model(**request.param)


@pytest.fixture(scope="module")
def text_model(tokenizer):
    return tiny_model(vocab_size=len(tokenizer), dim=16, n_heads=2, n_kv_heads=1, max_seq_len=96)


@torch.inference_mode()
def full_logits(model, ids):
    return model(torch.tensor([ids])).logits[0]


def greedy_without_cache(model, prompt, count):
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(full_logits(model, ids)[-1].argmax()))
    return ids[len(prompt) :]


def assert_greedy(model, prompt, answer):
    """Each token of the answer is the most probable one after those before it, or as good as equal to it: rounding decides
    between tokens that random prompts bring so close together."""
    logits = full_logits(model, prompt + answer)[len(prompt) - 1 : len(prompt) + len(answer) - 1]
    chosen = logits[torch.arange(len(answer)), torch.tensor(answer, dtype=torch.long)]
    assert ((logits.max(dim=-1).values - chosen) < 1e-4).all()


def random_prompts(count, seed=0, longest=30, vocab_size=200):
    rng = random.Random(seed)
    return [[rng.randrange(3, vocab_size) for _ in range(rng.randint(1, longest))] for _ in range(count)]


# ------------------------------------------------------------------------------------------------------------- cache


@torch.inference_mode()
@pytest.mark.parametrize("pieces", [[1] * 12, [12], [5, 1, 1, 4, 1], [1, 11]])
def test_cached_logits_are_the_full_logits(any_model, pieces):
    ids = random_prompts(1, seed=3, longest=40)[0][:12]
    ids = (ids * 12)[:12]
    cache, logits, start = KVCache(any_model.config, 1, 16), [], 0
    for length in pieces:
        logits.append(any_model(torch.tensor([ids[start : start + length]]), kv_cache=cache).logits[0])
        cache.advance(length)
        start += length
        assert cache.get_seq_length() == start
    torch.testing.assert_close(torch.cat(logits), full_logits(any_model, ids), atol=1e-4, rtol=0)


@torch.inference_mode()
def test_ragged_cache_gives_every_row_its_own_full_logits(any_model):
    """Rows of unequal length, several steps of several tokens each, padding in the first step on the right."""
    rows = [ids + [7, 8, 9, 10, 11] for ids in random_prompts(4, seed=1, longest=9)]
    lengths = [len(ids) - 5 for ids in rows]
    assert len(set(lengths)) > 1
    cache = KVCache(any_model.config, 4, 20)
    padded = torch.zeros(4, max(lengths), dtype=torch.long)
    for row, ids in enumerate(rows):
        padded[row, : lengths[row]] = torch.tensor(ids[: lengths[row]])
    first = any_model(padded, kv_cache=cache, padding_side="right").logits
    cache.advance(lengths)
    later = []
    for start, count in ((0, 1), (1, 3), (4, 1)):
        new = torch.tensor([ids[length + start :][:count] for ids, length in zip(rows, lengths)])
        later.append(any_model(new, kv_cache=cache).logits)
        cache.advance(count)
    for row, (ids, length) in enumerate(zip(rows, lengths)):
        cached = torch.cat([first[row, :length], *(logits[row] for logits in later)])
        torch.testing.assert_close(cached, full_logits(any_model, ids), atol=1e-4, rtol=0)


def test_rows_of_equal_length_take_the_slice_path_and_unequal_ones_do_not():
    config = LMConfig(dim=32, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=50)
    cache = KVCache(config, 3, 8)
    cache.advance(2)
    assert cache.get_seq_length() == 2
    cache.advance([1, 0, 3])
    assert cache.get_seq_length().tolist() == [3, 2, 5]
    assert cache.rows(1, 2).get_seq_length() == 2
    cache.move_row(2, 0)
    assert cache.lengths.tolist() == [5, 2, 5]


def test_two_caches_on_one_model_do_not_leak_into_each_other(model):
    first, second = random_prompts(2, seed=5)
    one, other = Engine(model).stream(first, GREEDY), Engine(model).stream(second, GREEDY)
    tokens = ([], [])
    for left, right in zip(one, other):
        tokens[0].extend(left.token_ids)
        tokens[1].extend(right.token_ids)
    assert tokens[0] == greedy_without_cache(model, first, 12)
    assert tokens[1] == greedy_without_cache(model, second, 12)


# ------------------------------------------------------------------------------------------------------------ engine


def test_greedy_equals_the_plain_loop_alone_and_in_a_ragged_batch(any_model):
    prompts = random_prompts(7)
    expected = [greedy_without_cache(any_model, prompt, 12) for prompt in prompts]
    assert len({tuple(tokens) for tokens in expected}) > 3, "the model says the same everywhere: the test shows nothing"
    for max_batch in (1, 3, 16):
        requests = Engine(any_model, max_batch=max_batch).generate(prompts, GREEDY)
        assert [request.token_ids for request in requests] == expected
        assert all(request.finish_reason == "length" for request in requests)


def test_long_prompts_are_prefilled_in_chunks(model, monkeypatch):
    prompts = random_prompts(5, seed=2, longest=40)
    prompts += [sum(prompts, [])[:length] for length in range(1, 10)]
    expected = [request.token_ids for request in Engine(model).generate(prompts, GREEDY)]
    monkeypatch.setattr(Engine, "PREFILL_CHUNK", 4)
    assert [request.token_ids for request in Engine(model).generate(prompts, GREEDY)] == expected


@settings(deadline=None, max_examples=15)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(1, 12), st.integers(0, 3)), min_size=1, max_size=8),
    st.integers(1, 4),
)
def test_joining_and_leaving_a_running_batch_changes_no_answer(plan, max_batch):
    """plan: for each request the steps to wait before it joins, its length, and the sampling it uses."""
    model = JOINING_MODEL
    styles = (dict(temperature=0.0), dict(temperature=1.0), dict(top_k=5), dict(top_p=0.7, repetition_penalty=1.3))
    prompts = random_prompts(len(plan), seed=len(plan), longest=12)
    parameters = [
        SamplingParameters(max_new_tokens=count, seed=index, stop_token_ids=(9,), **styles[style])
        for index, (_, count, style) in enumerate(plan)
    ]
    engine, requests, deltas = Engine(model, max_batch=max_batch), [], []
    for prompt, wanted, (wait, _, _) in zip(prompts, parameters, plan):
        requests.append(engine.add(prompt, wanted))
        for _ in range(wait):
            deltas += engine.step()
    while engine.has_work:
        deltas += engine.step()
    for request, prompt, wanted in zip(requests, prompts, parameters):
        alone = Engine(model).generate([prompt], wanted)[0]
        assert (request.token_ids, request.finish_reason) == (alone.token_ids, alone.finish_reason)
        own = [delta for delta in deltas if delta.request is request]
        assert [token for delta in own for token in delta.token_ids] == request.token_ids
        assert [delta.finish_reason for delta in own] == [None] * (len(own) - 1) + [request.finish_reason]


JOINING_MODEL = tiny_model()


def test_a_cancelled_request_frees_its_row_and_disturbs_nobody(model):
    prompts = random_prompts(3, seed=8)
    engine = Engine(model, max_batch=2)
    first, second, third = (engine.add(prompt, GREEDY) for prompt in prompts)
    engine.step()
    engine.cancel(first)
    while engine.has_work:
        engine.step()
    engine.cancel(second)  # done already: nothing happens
    assert first.finish_reason == "cancelled" and len(first.token_ids) == 1 and second.finish_reason == "length"
    assert [second.token_ids, third.token_ids] == [greedy_without_cache(model, prompt, 12) for prompt in prompts[1:]]


def test_what_an_abandoned_engine_answers_is_right(model):
    engine = Engine(model, max_batch=2, prefix_rows=2)
    engine.generate([[5] * 20], GREEDY)
    old = [engine.add(prompt, GREEDY) for prompt in random_prompts(3, seed=8)]
    engine.step()
    with torch.inference_mode():
        for tensor in (*engine.lane.cache.keys, *engine.lane.cache.values):
            tensor.fill_(float("nan"))
    engine.abandon()
    assert not engine.has_work and not engine.prefixes and [request.finish_reason for request in old] == [None] * 3
    prompts = [[5] * 20, [6] * 3]  # the shorter one's row has slots that nothing has been written to
    for request in engine.generate(prompts, GREEDY):
        assert request.token_ids == greedy_without_cache(model, request.prompt_ids, 12)


def test_closing_a_stream_frees_its_row(model):
    engine = Engine(model)
    stream = engine.stream([5, 6, 7], GREEDY)
    next(stream)
    stream.close()
    assert not engine.has_work


# --------------------------------------------------------------------------------------------------------- under load


def run_to_the_end(engine, most=300):
    """The Deltas of each step."""
    steps = []
    while engine.has_work:
        assert len(steps) < most, "it never ends"
        steps.append(engine.step())
    return steps


@contextlib.contextmanager
def tokens_computed(engine):
    """A list that grows by the number of rows times tokens of every forward pass."""
    counts, hook = [], lambda module, arguments, options: counts.append((options.get("input_ids", *arguments)).numel())
    handle = engine.model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield counts
    finally:
        handle.remove()


def test_a_long_prompt_holds_nobody_up(any_model, monkeypatch):
    """Those who are running get a token with every piece of it, and no pass is larger than a piece and a token each."""
    monkeypatch.setattr(Engine, "PREFILL_BETWEEN", 8)
    monkeypatch.setattr(Engine, "PREFILL_MULTIPLE", 4)
    short, long = random_prompts(2, seed=4, longest=5), random_prompts(1, seed=5, longest=1)[0] * 45
    engine = Engine(any_model)
    requests = [engine.add(prompt, GREEDY) for prompt in short]
    engine.step()
    last = engine.add(long, GREEDY)
    with tokens_computed(engine) as counts:
        steps = run_to_the_end(engine)
    first = next(place for place, deltas in enumerate(steps) if any(delta.request is last for delta in deltas))
    assert first == 5 and max(counts) <= 8  # 45 tokens, 8 at a time
    for deltas in steps[:first]:
        assert [delta.request for delta in deltas] == requests
    for request, prompt in zip([*requests, last], [*short, long]):
        assert request.token_ids == greedy_without_cache(any_model, prompt, 12)


def test_prompts_are_read_in_turn_the_first_that_came_and_the_shortest(model, monkeypatch):
    """A short one waits for no long ones, and a long one not for ever however many short ones come."""
    monkeypatch.setattr(Engine, "PREFILL_BETWEEN", 8)
    monkeypatch.setattr(Engine, "PREFILL_MULTIPLE", 1)
    engine, prompts = Engine(model), [[7], *([token] * 45 for token in (8, 9, 10)), [11, 12]]
    requests = [engine.add(prompts[0], dataclasses.replace(GREEDY, max_new_tokens=50))]
    engine.step()
    requests += [engine.add(prompt, GREEDY) for prompt in prompts[1:]]
    began = [delta.request for deltas in run_to_the_end(engine) for delta in deltas if len(delta.request.token_ids)]
    assert sorted(requests, key=began.index) == [requests[0], requests[4], *requests[1:4]]
    for request, prompt in zip(requests, prompts):
        assert request.token_ids == greedy_without_cache(model, prompt, request.limit)
    first = engine.add(prompts[0], dataclasses.replace(GREEDY, max_new_tokens=50))
    engine.step()
    long, steps, brief = engine.add(prompts[1], GREEDY), 0, dataclasses.replace(GREEDY, max_new_tokens=1)
    while not long.token_ids:
        engine.add([20 + steps, 21, 22, 23, 24], brief)
        engine.step()
        steps += 1
        assert steps <= 2 * 6 + 1
    run_to_the_end(engine)
    assert long.token_ids == greedy_without_cache(model, prompts[1], 12) and first.finish_reason == "length"


def test_a_prompt_of_which_most_is_kept_counts_as_a_short_one(model, monkeypatch):
    monkeypatch.setattr(Engine, "PREFILL_BETWEEN", 8)
    monkeypatch.setattr(Engine, "PREFILL_MULTIPLE", 1)
    engine, known = Engine(model, prefix_rows=2), [5] * 45
    engine.generate([known], GREEDY)
    engine.add([7], dataclasses.replace(GREEDY, max_new_tokens=50))
    engine.step()
    others, last = [engine.add([token] * 40, GREEDY) for token in (8, 9)], engine.add([*known, 6], GREEDY)
    for _ in range(2):
        engine.step()
    assert last.token_ids and not any(request.token_ids for request in others)
    run_to_the_end(engine)
    assert last.token_ids == greedy_without_cache(model, [*known, 6], 12)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 50, 63])
def test_pieces_are_padded_to_few_lengths_and_never_beyond_the_context(model, length):
    prompt, lengths = random_prompts(1, seed=length, longest=1)[0] * length, []
    engine = Engine(model)
    hook = engine.model.register_forward_pre_hook(lambda module, given: lengths.append(given[0].shape[1]))
    try:
        (request,) = engine.generate([prompt], GREEDY)
    finally:
        hook.remove()
    assert lengths[0] == (32 if length <= 32 else 64)
    assert request.token_ids == greedy_without_cache(model, prompt, min(12, 64 - length))
    engine.PREFILL_CHUNK = 40  # of 50 tokens 10 are left for a place of 24, of 63 23
    (request,) = engine.generate([prompt], GREEDY)
    assert request.token_ids == greedy_without_cache(model, prompt, min(12, 64 - length))


def test_what_prompts_have_in_common_is_computed_once(any_model, monkeypatch):
    """At the same time, later, after a turn more, and with a beginning that only one of them has."""
    monkeypatch.setattr(Engine, "PREFILL_MULTIPLE", 1)  # padding is not counted
    system, (one, two, three) = list(range(20, 50)), ([60, 61], [70, 71, 72], [80])
    engine, answers = Engine(any_model, prefix_rows=4), []

    def ask(*prompts):
        with tokens_computed(engine) as counts:
            requests = engine.generate(prompts, GREEDY)
        for request, prompt in zip(requests, prompts):
            assert request.token_ids == greedy_without_cache(any_model, prompt, 12)
        answers.append(requests[0].token_ids)
        return sum(counts) - sum(len(request.token_ids) - 1 for request in requests), [r.reused for r in requests]

    assert ask(system + one) == (32, [0])
    assert ask(system + two) == (3, [30])
    again = system + one + answers[0] + three
    assert ask(again) == (2, [43])  # the last token of the answer was never fed
    assert ask(again) == (1, [44])  # a prompt's last token is always computed, for the logits behind it
    assert ask(*[[99] * 25 + [index] for index in range(4)]) == (26 + 3, [0, 25, 25, 25])


def test_a_prefix_is_only_for_the_same_adapter(monkeypatch):
    engine, models = engine_with_adapters(monkeypatch)
    engine.prefix_rows, prompt = 4, list(range(10, 40))
    for name in (None, "a", "b", "a", None):
        request = engine.add(prompt, GREEDY, name)
        run_to_the_end(engine)
        assert request.token_ids == greedy_without_cache(models[name], prompt, 12)
    assert request.reused == 29


def test_only_the_latest_prefixes_are_kept(model):
    engine, prompts = Engine(model, prefix_rows=2), [[token] * 20 for token in (5, 6, 7)]

    def reused(prompt):
        return engine.generate([prompt], GREEDY)[0].reused

    assert [reused(prompt) for prompt in (*prompts, prompts[1], prompts[0])] == [0, 0, 0, 19, 0]
    assert len(engine.prefixes) == 2
    none = Engine(model)
    assert [none.generate([prompts[0]], GREEDY)[0].reused for _ in range(2)] == [0, 0] and not none.prefixes


@settings(deadline=None, max_examples=25)
@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 30), st.integers(1, 20), st.integers(1, 8), st.booleans()),
        min_size=1, max_size=7,
    ),
    st.integers(1, 4), st.integers(4, 12), st.integers(0, 3),
)  # fmt: skip
def test_pieces_prefixes_and_cancelled_requests_change_no_answer(plan, max_batch, limit, prefix_rows):
    """plan: for each request the steps before it, how much of a common beginning it has, its own tokens, its answer's
    length, and whether it is cancelled two steps after it came."""
    engine, requests, common = (
        Engine(JOINING_MODEL, max_batch=max_batch, prefix_rows=prefix_rows),
        [],
        list(range(50, 80)),
    )
    engine.PREFILL_CHUNK = engine.PREFILL_BETWEEN = limit
    engine.PREFILL_MULTIPLE = 1 + limit % 4
    for index, (wait, shared, own, count, cancelled) in enumerate(plan):
        for _ in range(wait):
            engine.step()
        prompt = common[:shared] + [100 + index] * own
        requests.append(engine.add(prompt, dataclasses.replace(GREEDY, max_new_tokens=count)))
        if cancelled:
            engine.step(), engine.step()
            engine.cancel(requests[-1])
    run_to_the_end(engine)
    assert not engine.rows and len(engine.prefixes) <= prefix_rows
    for request in requests:
        assert_greedy(JOINING_MODEL, request.prompt_ids, request.token_ids)
        assert request.finish_reason == "cancelled" or len(request.token_ids) == request.limit


def test_same_seed_same_answer_other_seed_another(model):
    sampled = dataclasses.replace(GREEDY, temperature=1.0, seed=1)
    engine = Engine(model)

    def answer(parameters):
        return engine.generate([[5, 6, 7]], parameters)[0].token_ids

    assert answer(sampled) == answer(sampled)
    assert answer(sampled) != answer(dataclasses.replace(sampled, seed=2))
    unseeded = dataclasses.replace(sampled, seed=None)
    assert answer(unseeded) != answer(unseeded)


def test_max_new_tokens_counts_new_tokens_and_the_context_limits_both(model):
    long_prompt = random_prompts(1, longest=50)[0][:1] * 50
    request = Engine(model).generate([long_prompt], dataclasses.replace(GREEDY, max_new_tokens=3))[0]
    assert len(request.token_ids) == 3 and request.finish_reason == "length"
    request = Engine(model).generate([long_prompt], dataclasses.replace(GREEDY, max_new_tokens=100))[0]
    assert len(request.token_ids) == 64 - 50 and request.finish_reason == "length"
    beyond = Engine(model, max_length=90).generate([long_prompt], dataclasses.replace(GREEDY, max_new_tokens=100))[0]
    assert beyond.token_ids == greedy_without_cache(model, long_prompt, 40), "positions past max_seq_len go on"


def test_a_stop_token_ends_the_answer_and_is_not_part_of_it(model):
    free = Engine(model).generate([[5, 6, 7]], GREEDY)[0].token_ids
    stop = free[4]
    request = Engine(model).generate([[5, 6, 7]], dataclasses.replace(GREEDY, stop_token_ids=(stop,)))[0]
    assert request.token_ids == free[: free.index(stop)] and request.finish_reason == "stop"
    assert SamplingParameters().stop_token_ids is None, "the default is the model's end of turn"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "empty"), ([1] * 64, "64 tokens but the context only 64"), ([200], "vocabulary|0..199")],
)
def test_impossible_prompts_get_one_clear_line(model, prompt, message):
    engine = Engine(model)
    with pytest.raises(UserError, match=message) as caught:
        engine.generate([[5], prompt], GREEDY)
    assert "\n" not in str(caught.value)
    assert not engine.has_work


@pytest.mark.parametrize(
    "bad", [dict(temperature=-1), dict(top_k=-1), dict(top_p=0), dict(top_p=1.5), dict(repetition_penalty=0),
            dict(max_new_tokens=0), dict(temperature=float("nan")), dict(repetition_penalty=1e-40), dict(stop_strings=("",))]
)  # fmt: skip
def test_meaningless_sampling_parameters_are_refused(bad):
    with pytest.raises(UserError, match=next(iter(bad))) as caught:
        SamplingParameters(**bad)
    assert caught.value.exit_code == 2


def poisoned_model(*tokens):
    """tiny_model with an input embedding of NaN for each of `tokens`, and its own, clean output matrix."""
    broken = tiny_model()
    broken.output.weight = torch.nn.Parameter(broken.output.weight.detach().clone())
    broken.tok_embeddings.weight.data[list(tokens)] = float("nan")
    return broken


def test_a_row_that_is_not_finite_fails_alone_and_leaves_nothing_behind(model):
    prompts = random_prompts(5, seed=12)
    expected = [greedy_without_cache(model, prompt, 12) for prompt in prompts]
    later = next(
        token for token in expected[1][3:8] if not any(token in ids for ids in prompts + [*expected[:1], *expected[2:]])
    )
    broken = poisoned_model(later, 199)
    engine = Engine(broken, max_batch=4)
    failing = [5] * 40 + [199]
    requests = [engine.add(prompt, GREEDY) for prompt in [failing, *prompts]]
    deltas = []
    while engine.has_work:
        deltas += engine.step()
    first, healthy, second, *others = requests
    for request, generated in ((first, 0), (second, expected[1].index(later) + 1)):
        assert request.finish_reason == "error" and "not finite" in request.error
        assert len(request.token_ids) == generated
        assert [delta.finish_reason for delta in deltas if delta.request is request][-1] == "error"
    assert [request.token_ids for request in (healthy, *others)] == [expected[0], *expected[2:]]
    assert all(request.error is None for request in (healthy, *others))


OUT_OF_MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", ["model.inference.engine.KVCache.grow", "model.inference.engine.Engine.prefill"])
def test_without_memory_only_the_requests_being_admitted_fail(model, monkeypatch, error, where):
    prompts = random_prompts(4, seed=3)
    expected = [greedy_without_cache(model, prompt, 12) for prompt in prompts]
    engine = Engine(model)
    first = engine.add(prompts[0], GREEDY)
    for _ in range(4):
        engine.step()
    failing = [engine.add(prompt, GREEDY) for prompt in prompts[1:3]]

    def no_memory(*arguments, **options):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(where, no_memory)
        deltas = engine.step()
    assert [delta.finish_reason for delta in deltas] == ["error", "error", None]
    assert all("--max_seq_len" in request.error and "\n" not in request.error for request in failing)
    last = engine.add(prompts[3], GREEDY)
    while engine.has_work:
        engine.step()
    assert [first.token_ids, last.token_ids] == [expected[0], expected[3]]


def test_any_other_exception_is_raised_and_loses_no_running_request(model, monkeypatch):
    prompts = random_prompts(3, seed=3)
    engine = Engine(model)
    first = engine.add(prompts[0], GREEDY)
    for _ in range(4):
        engine.step()
    second = engine.add(prompts[1], GREEDY)

    def bug(*arguments):
        raise TypeError("a bug")

    for broken, reason in (("Engine.decode", None), ("Sampler.pick", None), ("Engine.prefill", "error")):
        with monkeypatch.context() as patch:
            patch.setattr(f"model.inference.engine.{broken}", bug)
            with pytest.raises(TypeError, match="a bug"):
                engine.step()
        assert (first.finish_reason, second.finish_reason) == (None, reason)
    third = engine.add(prompts[2], GREEDY)
    while engine.has_work:
        engine.step()
    for request, prompt in ((first, prompts[0]), (third, prompts[2])):
        assert request.token_ids == greedy_without_cache(model, prompt, 12)
    assert second.error == "TypeError: a bug"


def test_a_context_beyond_memory_is_one_line(model, monkeypatch):
    with pytest.raises(
        UserError, match="--max_seq_len 1000000000000: a request needs .* GB, more than is free"
    ) as caught:
        Engine(model, max_length=10**12)
    assert "\n" not in str(caught.value)
    one_row = 2 * 2 * (2 * 8) * 64 * 4  # keys and values, layers, heads of 8 numbers, positions, bytes
    memory = type("Memory", (), dict(available=one_row))
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    assert Engine(model).generate([[5]], GREEDY)[0].finish_reason == "length"
    engine = Engine(model)  # where there is room for one row, the others wait
    assert [request.finish_reason for request in engine.generate([[5], [6], [7]], GREEDY)] == ["length"] * 3
    assert engine.lane.cache.batch == 1
    memory.available = 3 * one_row
    engine = Engine(model)
    parameters = [dataclasses.replace(GREEDY, max_new_tokens=count) for count in (3, 4, 5, 6)]
    requests = engine.generate([[5], [6], [7], [8]], parameters)
    assert [len(request.token_ids) for request in requests] == [3, 4, 5, 6] and engine.lane.cache.batch == 3
    memory.available = one_row
    memory.available -= 1
    with pytest.raises(UserError, match="--max_seq_len 64"):
        Engine(model)


def test_keys_and_values_stay_within_their_cap(model, monkeypatch):
    limited_steps(monkeypatch, most=200)
    row = 2 * 2 * (2 * 8) * 64 * 4  # as above
    prompts = [[token] * 30 for token in range(5, 12)]
    engine = Engine(model, max_cache_bytes=3 * row + 45 * row // 64, prefix_rows=16)
    finished = []
    engine.generate([[4] * 45], GREEDY)  # 56 of 64 places are kept of it, until the cache grows
    assert len(engine.prefixes) == 1
    peaks = []
    new_zeros = torch.Tensor.new_zeros

    def watched(tensor, *shape, **options):
        held = [part for part in (*engine.lane.cache.keys, *engine.lane.cache.values)]
        held += [part for saved in engine.prefixes.values() for part in saved]
        new = new_zeros(tensor, *shape, **options)
        if len(shape) == 4:  # of the cache
            peaks.append(sum(part.nbytes for part in held) + new.nbytes)
        return new

    monkeypatch.setattr(torch.Tensor, "new_zeros", watched)
    requests = [engine.add(prompt, GREEDY) for prompt in prompts]
    while engine.has_work:
        finished += [delta.request for delta in engine.step() if delta.finish_reason]
        kept = sum(part.nbytes for saved in engine.prefixes.values() for part in saved)
        assert len(engine.rows) <= 3 and engine.lane.cache.batch * row + kept <= engine.max_cache_bytes
    assert finished == requests, "first come, first served"
    old = row // 4  # keys of one layer, of the one row that there was
    assert peaks and max(peaks) <= engine.max_cache_bytes + old, "while it grows, too, but for what is being copied"
    for request, prompt in zip(requests, prompts):
        assert request.token_ids == greedy_without_cache(model, prompt, 12)
    assert list(engine.prefixes) == [(None, tuple(prompts[-1] + requests[-1].token_ids[:-1]))], "it takes 41 of the 45"
    for prompt in ([21] * 9, [22] * 9, [23] * 9):  # 20 of the 45 each: the longest ago is forgotten, however long it is
        engine.generate([prompt], GREEDY)
    assert [ids[0] for _, ids in engine.prefixes] == [22, 23]
    with pytest.raises(UserError, match=r"--max_seq_len 64: .* more than the 0\.000 GB of --max_cache_gb"):
        Engine(model, max_cache_bytes=row - 1)


def test_8_bit_weights_answer_alike_alone_and_together():
    """The rows of a few requests and of many go through other kernels; the weights are the same up to rounding."""
    model = tiny_model(dim=64, n_heads=4, n_kv_heads=2).bfloat16()
    engine, prompts = Engine(model, int8=True), random_prompts(9)
    plain = [full_logits(copy.deepcopy(tiny_model(dim=64)), prompt)[-1] for prompt in prompts]
    assert "int8 on cpu" in engine.description
    with torch.inference_mode():
        for prompt, expected in zip(prompts, plain):
            found = model(torch.tensor([prompt])).logits[0, -1].float()
            assert torch.nn.functional.cosine_similarity(found, expected, dim=0) > 0.995
        together = model(torch.tensor([prompts[0]] * 9)).logits[:, -1].float()
    torch.testing.assert_close(together, together[:1].expand_as(together))
    requests = engine.generate(prompts, GREEDY)
    assert [len(request.token_ids) for request in requests] == [12] * 9


def test_a_cache_that_cannot_grow_stays_as_it_was(monkeypatch):
    config = LMConfig(dim=32, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=10)
    cache, new_zeros = KVCache(config, 2, 5), torch.Tensor.new_zeros
    for number, storage in enumerate((*cache.keys, *cache.values)):
        storage.fill_(number + 1)
    cache.lengths[:] = torch.tensor([4, 2])

    def failing_at(call, calls):
        def zeros(tensor, *shape, **options):
            if next(calls) == call:
                raise MemoryError
            return new_zeros(tensor, *shape, **options)

        return zeros

    for call in range(6):
        with monkeypatch.context() as patch, pytest.raises(MemoryError):
            patch.setattr(torch.Tensor, "new_zeros", failing_at(call, itertools.count()))
            cache.grow(4)
        assert cache.batch == 2 and cache.lengths.tolist() == [4, 2]
    cache.grow(3)
    assert cache.lengths.tolist() == [4, 2, 0]
    for number, storage in enumerate((*cache.keys, *cache.values)):
        assert storage.shape == (3, 2, 5, 8) and (storage[:2] == number + 1).all() and not storage[2].any()
    cache.keys[0][0, 0, 0] = 7.0
    cache.lengths[2] = 1
    cache.swap_rows(0, 2)
    assert (
        cache.lengths.tolist() == [1, 2, 4]
        and (cache.keys[0][2, 0, 0] == 7).all()
        and (cache.keys[1][2, :, :4] == 2).all()
    )


def limited_steps(monkeypatch, most=50):
    """From here on an engine that makes more than `most` steps is one that never ends."""
    step, left = Engine.step, iter(range(most))

    def counted(self):
        assert next(left, None) is not None, "the engine goes round and round"
        return step(self)

    monkeypatch.setattr(Engine, "step", counted)


def test_cancelling_during_stream_and_generate_ends_them(model, monkeypatch):
    limited_steps(monkeypatch)
    engine = Engine(model, max_batch=2)
    stream = engine.stream([5, 6, 7], GREEDY)
    request = next(stream).request
    engine.cancel(request)
    assert list(stream) == [] and request.finish_reason == "cancelled" and not engine.has_work
    prompts, ended = random_prompts(4, seed=8), []

    def cancel_the_others(request):
        ended.append(request)
        for other in [*engine.lane.running, *engine.waiting]:
            if other is not request:
                engine.cancel(other)

    wanted = [dataclasses.replace(GREEDY, max_new_tokens=count) for count in (9, 3, 9, 9)]
    requests = engine.generate(sorted(prompts, key=len), wanted, on_finish=cancel_the_others)
    assert [request.finish_reason for request in requests] == ["cancelled", "length", "cancelled", "cancelled"]
    assert ended == [requests[1]] and not engine.has_work


def test_one_impossible_prompt_stops_generate_before_the_others_are_worked_on(model, monkeypatch):
    engine = Engine(model)
    monkeypatch.setattr(engine, "prefill", None)
    with pytest.raises(UserError, match="empty"):
        engine.generate([[5], [6], []], GREEDY)
    assert not engine.has_work


def test_a_model_that_was_left_in_training_mode_answers_without_dropout(model):
    training = tiny_model(dropout=0.5).train()
    prompts = random_prompts(3)
    requests = Engine(training).generate(prompts, GREEDY)
    assert [request.token_ids for request in requests] == [
        greedy_without_cache(model, prompt, 12) for prompt in prompts
    ]


def compiled_engine(monkeypatch, model, **arguments):
    """An Engine that takes every path of a compiled one, the model's included, without a compiler."""
    monkeypatch.setattr("model.inference.engine.check_compiler", lambda device: None)
    monkeypatch.setattr(torch, "compile", lambda model, mode, dynamic: model)
    engine = Engine(model, compile=True, **arguments)
    decode = engine.decode

    def decode_as_compiled(rows):
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            return decode(rows)

    engine.decode = decode_as_compiled
    return engine


@pytest.mark.parametrize("uses_graphs", [False, True])
@pytest.mark.parametrize("max_batch", [1, 3, 16])
def test_fixed_shapes_for_compiled_code_change_no_answer(any_model, monkeypatch, max_batch, uses_graphs):
    """uses_graphs: as on CUDA, all rows of the cache go through the compiled step, else single rows only."""
    prompts, batches = random_prompts(7), set()
    expected = [greedy_without_cache(any_model, prompt, 12) for prompt in prompts]
    engine = compiled_engine(monkeypatch, any_model, max_batch=max_batch)
    engine.uses_graphs, compiled = uses_graphs, engine.compiled

    def counted(last, kv_cache):
        batches.add(len(last))
        assert kv_cache.key_count(1) == 64, "the whole capacity"
        return compiled(last, kv_cache=kv_cache)

    engine.compiled = counted
    wanted = [dataclasses.replace(GREEDY, max_new_tokens=12 if index == 3 else 6) for index in range(7)]
    requests = engine.generate(prompts, wanted)
    for index, request in enumerate(requests):
        assert request.token_ids == expected[index][: wanted[index].max_new_tokens]
    assert batches == ({engine.lane.cache.batch} if uses_graphs else {1})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_step_is_one_graph(monkeypatch, dtype):
    """A break in it would compile each layer by itself and come out slower than eager."""
    torch._dynamo.reset()
    compile_function, compiled = torch.compile, []

    def whole(model, mode, dynamic):
        compiled.append(compile_function(model, backend="eager", fullgraph=True, dynamic=dynamic))
        return compiled[-1]

    monkeypatch.setattr(torch, "compile", whole)
    monkeypatch.setattr("model.inference.engine.check_compiler", lambda device: None)
    engine = Engine(tiny_model().to(dtype), compile=True)
    parameters = SamplingParameters(temperature=0.0, max_new_tokens=6, stop_token_ids=())
    (request,) = engine.generate([[5, 6, 7]], parameters)
    assert len(request.token_ids) == 6 and compiled


def test_compile_without_a_compiler_says_so(model, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError, match="--compile: needs a C"):
        Engine(model, compile=True)


# ---------------------------------------------------------------------------------------------------------- adapters


def make_adapter(model, targets, seed=0):
    state = trained_adapter(model, target_matrices(model, targets), seed=seed)
    return Adapter(f"lora_{seed}.pth", state, {"lora": {"alpha": 6.0}})


def merged_with(model, adapter):
    merged = copy.deepcopy(model)
    merge(merged, adapter)
    return merged


def engine_with_adapters(monkeypatch, max_batch=16, **fields):
    """(Engine with adapters "a" and "b", which share some matrices; {name: model with the adapter merged, None: without})."""
    limited_steps(monkeypatch, most=100)
    base = tiny_model(**fields)
    engine, models = Engine(tiny_model(**fields), max_batch=max_batch), {None: base}
    for seed, (name, targets) in enumerate((("a", "attention,layers.0"), ("b", "layers.1"))):
        adapter = make_adapter(base, targets, seed)
        engine.add_adapter(name, adapter)
        models[name] = merged_with(base, adapter)
    return engine, models


def finish(engine):
    while engine.has_work:
        engine.step()


@pytest.mark.parametrize("fields", [{}, dict(use_moe=True)], ids=["dense", "moe"])
def test_each_adapter_answers_as_the_model_merged_with_it_and_leaves_the_base_as_it_was(fields, monkeypatch):
    engine, models = engine_with_adapters(monkeypatch, **fields)
    prompts = random_prompts(3, seed=6)
    expected = {name: [greedy_without_cache(models[name], ids, 12) for ids in prompts] for name in models}
    assert len({tuple(answer) for answers in expected.values() for answer in answers}) == 9
    for name in (None, "a", "b", "a", None, "b", None):
        requests = engine.generate(prompts, GREEDY, adapter=name)
        assert [request.token_ids for request in requests] == expected[name], name
    base = models[None].state_dict()
    assert all(torch.equal(tensor, base[name]) for name, tensor in engine.model.state_dict().items())


@pytest.mark.parametrize("max_batch", [1, 2, 4, 16])
def test_requests_of_different_adapters_take_turns_and_rows_in_the_order_they_came(max_batch, monkeypatch):
    engine, models = engine_with_adapters(monkeypatch, max_batch)
    names = ["a", "a", "b", None, "b", "b", "b", "a", None, None]
    prompts = random_prompts(len(names), seed=7)
    lengths = [5, 12, 3, 4, 9, 2, 6, 3, 8, 2]
    wanted = [dataclasses.replace(GREEDY, max_new_tokens=length) for length in lengths]
    requests, open_before = [engine.add(*each) for each in zip(prompts, wanted, names)], []
    while engine.has_work:
        answered = [delta.request for delta in engine.step()]
        assert len({request.adapter for request in answered}) <= 1 and len(engine.rows) <= max_batch
        waiting = [requests.index(request) for request in engine.waiting]
        assert waiting == sorted(waiting) and not set(engine.waiting) & set(engine.rows)
        started = [number for number in range(10) if number not in waiting]
        assert len([number for number in started if number > min(waiting, default=10)]) < max_batch, (
            "in the order they came"
        )
        open_before.append(len(engine.rows))
    for request, prompt, name, length in zip(requests, prompts, names, lengths):
        assert request.token_ids == greedy_without_cache(models[name], prompt, length)


def test_nobody_waits_for_the_end_of_an_answer_with_another_adapter(monkeypatch):
    """Three in use at once: each gets every third step, and a weight that is in use again is not packed again."""
    engine, models = engine_with_adapters(monkeypatch)
    monkeypatch.setattr(Engine, "PREFILL_MULTIPLE", 1)
    prompts, names = random_prompts(3, seed=8), (None, "a", "b")
    parameters = dataclasses.replace(GREEDY, max_new_tokens=20)
    requests = [engine.add(*each) for each in zip(prompts, [parameters] * 3, names)]
    answered = [[delta.request for delta in engine.step()] for _ in range(30)]
    assert answered == [[request] for request in requests] * 10
    packed = []
    monkeypatch.setattr(PackedLinear, "pack", lambda self, weight: packed.append(self))
    answered = [[delta.request for delta in engine.step()] for _ in range(12)]
    assert answered == [[request] for request in requests] * 4 and not packed
    engine.cancel(requests[1])
    assert [[delta.request for delta in engine.step()] for _ in range(4)] == [[requests[0]], [requests[2]]] * 2
    assert set(engine.lanes) == {None, "b"}, "nothing is kept for the adapter that nobody uses"
    finish(engine)
    for request, prompt, name in zip(requests, prompts, names):
        assert request.token_ids == greedy_without_cache(models[name], prompt, 20)[: len(request.token_ids)]


def test_lanes_share_the_rows_and_the_memory(monkeypatch):
    row = 2 * 2 * (2 * 8) * 64 * 4
    engine, models = engine_with_adapters(monkeypatch, max_batch=3)
    engine.max_cache_bytes = 3 * row
    prompts, names = random_prompts(9, seed=11), ("a", "b", None, "b", "b", "a", None, "a", None)
    requests = [engine.add(prompt, GREEDY, name) for prompt, name in zip(prompts, names)]
    while engine.has_work:
        engine.step()
        caches = [lane.cache for lane in engine.lanes.values() if lane.cache is not None]
        assert sum(cache.batch for cache in caches) <= 3 and len(engine.rows) <= 3
    for request, prompt, name in zip(requests, prompts, names):
        assert request.token_ids == greedy_without_cache(models[name], prompt, 12)


def test_an_adapter_is_removed_when_its_requests_are_done(monkeypatch):
    engine, models = engine_with_adapters(monkeypatch)
    engine.prefix_rows = 4
    request = engine.add([5, 6, 7], GREEDY, "a")
    for _ in range(2):  # waiting, then running
        with pytest.raises(UserError, match="'a' cannot be removed now"):
            engine.remove_adapter("a")
        engine.step()
    finish(engine)
    engine.remove_adapter("a")
    engine.remove_adapter("never there")
    with pytest.raises(UserError, match="no adapter is called 'a'; there is: b"):
        engine.add([5], GREEDY, "a")
    assert request.token_ids == greedy_without_cache(models["a"], [5, 6, 7], 12)
    assert "a" not in {key[0] for key in (*engine.packed, *engine.prefixes)}
    assert engine.generate([[5, 6, 7]], GREEDY)[0].token_ids == greedy_without_cache(models[None], [5, 6, 7], 12)


def test_an_unknown_adapter_is_one_line(model, monkeypatch):
    engine = Engine(model)
    with pytest.raises(UserError, match="^no adapter is called 'a'; there is: none$"):
        engine.add([5], GREEDY, "a")
    engine, _ = engine_with_adapters(monkeypatch)
    ways = (
        lambda: engine.add([5], GREEDY, "c"),
        lambda: next(engine.stream([5], GREEDY, adapter="c")),
        lambda: engine.generate([[5]], GREEDY, adapter="c"),
    )
    for way in ways:
        with pytest.raises(UserError, match="^no adapter is called 'c'; there is: a, b$"):
            way()
    assert not engine.has_work


def test_an_adapter_that_comes_meanwhile_disturbs_nobody(monkeypatch):
    """Neither one that is taken nor one that is refused, as it is for another model."""
    engine, models = engine_with_adapters(monkeypatch)
    prompts = random_prompts(3, seed=9)
    running = engine.add(prompts[0], GREEDY, "a")
    for _ in range(3):
        engine.step()
    new = make_adapter(models[None], "all", seed=2)
    engine.add_adapter("c", new)
    with pytest.raises(UserError, match="lora_3.pth: changes layers.2.attention.wq, which the model does not have"):
        engine.add_adapter("d", make_adapter(tiny_model(n_layers=3), "layers.2", seed=3))
    models["c"] = merged_with(models[None], new)
    later = [engine.add(ids, GREEDY, name) for ids, name in zip(prompts[1:], ("c", None))]
    finish(engine)
    for request, ids in zip((running, *later), prompts):
        assert request.token_ids == greedy_without_cache(models[request.adapter], ids, 12)


def test_a_name_goes_to_another_adapter_only_when_its_requests_are_done(monkeypatch):
    engine, models = engine_with_adapters(monkeypatch)
    others = [make_adapter(models[None], "layers.1.attention", seed) for seed in (4, 5)]
    request = engine.add([5, 6, 7], GREEDY, "a")
    for _ in range(3):  # waiting, then running
        for name in ("a", None):
            with pytest.raises(UserError, match=f"cannot be called {name!r} now"):
                engine.add_adapter(name, others[0])
        engine.step()
    finish(engine)
    assert request.token_ids == greedy_without_cache(models["a"], [5, 6, 7], 12)
    for other in others:
        engine.add_adapter("a", other)
    (request,) = engine.generate([[5, 6, 7]], GREEDY, adapter="a")
    assert request.token_ids == greedy_without_cache(merged_with(models[None], others[1]), [5, 6, 7], 12)
    (request,) = engine.generate([[5, 6, 7]], GREEDY, adapter="b")
    assert request.token_ids == greedy_without_cache(models["b"], [5, 6, 7], 12)


# ---------------------------------------------------------------------------------------------------------- sampling


def reference_distribution(logits, parameters, history):
    """The definition, one row, in float64 with plain Python sets: penalty, temperature, top-k, nucleus."""
    logits = logits.double().clone()
    for token in set(history):
        logits[token] = (
            logits[token] / parameters.repetition_penalty
            if logits[token] > 0
            else logits[token] * parameters.repetition_penalty
        )
    logits = logits / parameters.temperature
    ranked = sorted(range(len(logits)), key=lambda token: -float(logits[token]))
    kept = ranked[: parameters.top_k or len(ranked)]
    probabilities = dict(zip(kept, torch.softmax(logits[kept], dim=0).tolist()))
    nucleus, mass = [], 0.0
    for token in kept:
        if mass >= parameters.top_p < 1:
            break
        nucleus.append(token)
        mass += probabilities[token]
    shares = [probabilities[token] / mass if token in nucleus else 0.0 for token in range(len(logits))]
    return torch.tensor(shares, dtype=torch.float64)


sampling_parameters = st.builds(
    SamplingParameters,
    temperature=st.floats(0.2, 3.0),
    top_k=st.sampled_from([0, 1, 2, 5, 19, 20, 1000]),
    top_p=st.sampled_from([1e-6, 0.3, 0.6, 0.95, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.2, 0.8]),
)


@settings(deadline=None, max_examples=60)
@given(st.lists(sampling_parameters, min_size=1, max_size=4), st.integers(0, 2**32 - 1))
def test_distribution_matches_the_definition_row_by_row(parameters, seed):
    logits = torch.randn(len(parameters), 20, generator=torch.Generator().manual_seed(seed)) * 3
    histories = [random.Random(seed + row).choices(range(20), k=6) for row in range(len(parameters))]
    sampler = Sampler(parameters, histories, 20, logits.device)
    found = sampler.distribution(sampler.penalise(logits))
    found = found / found.sum(dim=-1, keepdim=True)
    for row, wanted in enumerate(parameters):
        torch.testing.assert_close(
            found[row], reference_distribution(logits[row], wanted, histories[row]).float(), atol=1e-5, rtol=0
        )


@settings(deadline=None, max_examples=60)
@given(
    st.lists(sampling_parameters, min_size=1, max_size=3),
    st.integers(0, 2**32 - 1),
    st.one_of(st.sampled_from([1.0, 1.0 - 2.0**-53, 2.0**-53, 1e-300]), st.floats(1e-300, 1.0)),
    st.booleans(),
)
def test_no_number_ever_picks_an_excluded_token(parameters, seed, uniform, with_equals):
    logits = torch.randn(len(parameters), 20, generator=torch.Generator().manual_seed(seed)) * 8
    if with_equals:  # as bfloat16 rounds them: many tokens share the k-th place
        logits = (logits / 4).round() * 4
    logits[:, :3] = -1e9  # probability zero, and first in the vocabulary
    tokens = Sampler(parameters, [[4]] * len(parameters), 20, logits.device).pick(logits, [uniform] * len(parameters))
    for row, (token, wanted) in enumerate(zip(tokens, parameters)):
        penalised = Sampler([wanted], [[4]], 20, logits.device).penalise(logits[row : row + 1])[0]
        plain = dataclasses.replace(wanted, repetition_penalty=1.0)
        assert reference_distribution(penalised, plain, [])[token] > 0


def test_a_sum_that_does_not_grow_from_token_to_token_picks_no_excluded_token(monkeypatch):
    """What a GPU's parallel sum does, exaggerated: every other partial sum is too small, the next one too large."""
    exact = torch.Tensor.cumsum

    def rough(self, dim, dtype=None):
        partial = exact(self, dim, dtype=dtype)
        sign = torch.arange(partial.shape[dim]) % 2 * 2 - 1
        return partial + 0.02 * sign if partial.is_floating_point() else partial

    monkeypatch.setattr(torch.Tensor, "cumsum", rough)
    logits = torch.zeros(1, 12)
    logits[0, [2, 5, 9]] = torch.tensor([3.0, 3.5, 3.2])
    sampler = Sampler([SamplingParameters(top_k=3)], [[]], 12, logits.device)
    uniforms = [number / 200 for number in range(1, 201)]
    assert {sampler.pick(logits, [uniform])[0] for uniform in uniforms} == {2, 5, 9}


def test_of_equally_probable_tokens_top_k_and_greedy_keep_the_first_whoever_shares_the_batch():
    row = torch.tensor([1.0, 5.0, 5.0, 5.0, 2.0, 5.0]).repeat(50)  # long enough for a sort that keeps no order
    for others in ([], [SamplingParameters(top_k=30)], [SamplingParameters(top_p=0.5)], [SamplingParameters()]):
        for k in (1, 3):
            sampler = Sampler([SamplingParameters(top_k=k), *others], [[]] * 2, 300, row.device)
            logits = torch.stack([row, *[row.flip(0)] * len(others)])
            kept = sampler.distribution(logits)[0].nonzero().flatten().tolist()
            assert kept == [1, 2, 3][:k]
    for temperature in (0.0, 1e-39, 1e-320):
        sampler = Sampler([SamplingParameters(temperature=temperature)], [[]], 300, row.device)
        assert sampler.pick(row[None], [1.0]) == [1]


def test_only_the_row_whose_logits_are_not_finite_is_marked():
    logits = torch.randn(4, 20, generator=torch.Generator().manual_seed(0))
    parameters = [SamplingParameters(temperature=temperature, top_p=0.9) for temperature in (0.0, 1.0, 0.0, 1.0)]
    clean = Sampler(parameters, [[]] * 4, 20, logits.device).pick(logits, [0.5] * 4)
    for value in ("nan", "inf"):
        broken = logits.clone()
        broken[2:, 7] = float(value)
        assert Sampler(parameters, [[]] * 4, 20, logits.device).pick(broken, [0.5] * 4) == [*clean[:2], -1, -1]


def test_frequencies_are_the_probabilities():
    parameters = SamplingParameters(temperature=1.5, top_k=6, top_p=0.9)
    logits = torch.randn(20, generator=torch.Generator().manual_seed(4)) * 2
    count, rng = 20000, random.Random(0)
    sampler = Sampler([parameters] * count, [[]] * count, 20, logits.device)
    tokens = sampler.pick(logits.expand(count, -1), [1.0 - rng.random() for _ in range(count)])
    frequencies = torch.bincount(torch.tensor(tokens), minlength=20) / count
    expected = reference_distribution(logits, parameters, [])
    assert (frequencies - expected).abs().max() < 4 * (0.25 / count) ** 0.5
    assert (frequencies[expected == 0] == 0).all()


def test_repetition_penalty_lowers_negative_and_positive_logits_of_seen_tokens():
    logits = torch.tensor([[2.0, -2.0, 1.0, -1.0]])
    sampler = Sampler([SamplingParameters(repetition_penalty=2.0)], [[0, 1]], 4, logits.device)
    assert sampler.penalise(logits).tolist() == [[1.0, -4.0, 1.0, -1.0]]
    greedy = Sampler([SamplingParameters(temperature=0.0, repetition_penalty=10.0)], [[]], 4, logits.device)
    assert [greedy.pick(logits, [0.5])[0] for _ in range(3)] == [0, 2, 0], "what was picked counts as seen"


def test_presence_and_frequency_penalties_by_hand(model):
    """OpenAI's formula, on the answer's tokens alone; a neighbour without penalties keeps its logits bit for bit."""
    logits = torch.randn(3, 6)
    parameters = [SamplingParameters(presence_penalty=0.5, frequency_penalty=-0.25), SamplingParameters(), GREEDY]
    sampler = Sampler(parameters, [[5, 1, 1, 2], [1, 1], []], 6, logits.device, [[1, 1, 2], [1], []])
    expected = logits.clone()
    expected[0, 1] -= 0.5 - 2 * 0.25
    expected[0, 2] -= 0.5 - 0.25
    assert torch.allclose(sampler.penalise(logits), expected) and torch.equal(sampler.penalise(logits)[1:], logits[1:])
    prompt, penalty = [5, 6, 7], dataclasses.replace(GREEDY, frequency_penalty=2.0, presence_penalty=1.0)
    ids = list(prompt)
    for _ in range(12):
        row = full_logits(model, ids)[-1]
        counts = torch.bincount(torch.tensor(ids[3:], dtype=torch.long), minlength=200)
        ids.append(int((row - 2.0 * counts - 1.0 * (counts > 0)).argmax()))
    neighbour, request = Engine(model).generate([[9], prompt], [GREEDY, penalty])
    assert request.token_ids == ids[3:] and neighbour.token_ids == greedy_without_cache(model, [9], 12)


def test_log_probabilities_are_the_models_own(any_model):
    """Before penalties and temperature; only for those who ask, each as many as it asks for."""
    prompts = random_prompts(3, seed=6)
    wanted = [dict(logprobs=3, temperature=0.5, seed=1, presence_penalty=2.0), dict(logprobs=0), dict()]
    engine = Engine(any_model)
    requests = [engine.add(ids, dataclasses.replace(GREEDY, **more)) for ids, more in zip(prompts, wanted)]
    deltas = [delta for step in run_to_the_end(engine) for delta in step]
    for request, more in zip(requests, wanted):
        own = [delta for delta in deltas if delta.request is request]
        if "logprobs" not in more:
            assert all(delta.logprobs is None for delta in own)
            continue
        rows = full_logits(any_model, request.prompt_ids + request.token_ids).log_softmax(-1)[
            len(request.prompt_ids) - 1 :
        ]
        for delta, row, token in zip(own, rows, request.token_ids):
            ((value, best),) = delta.logprobs
            assert value == pytest.approx(float(row[token]), abs=1e-4)
            ids = [index for index, _ in best]
            assert len(ids) == more["logprobs"] and ids == row.topk(3).indices.tolist()[: len(ids)]
            assert [number for _, number in best] == pytest.approx(row[ids].tolist(), abs=1e-4)


# -------------------------------------------------------------------------------------------------------------- text


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), data=st.data())
def test_stop_strings_cut_exactly_there_whatever_the_token_borders(seed, data):
    tokenizer, model = TEXT["tokenizer"], TEXT["model"]
    parameters = SamplingParameters(max_new_tokens=12, seed=seed, stop_token_ids=())
    engine = Engine(model, tokenizer)
    text = engine.generate([[1, 50]], parameters)[0].text
    start = data.draw(st.integers(0, max(len(text) - 1, 0)))
    stop = text[start : start + data.draw(st.integers(1, 6))]
    if not stop:
        return
    stops = (stop, "never said")
    deltas = list(engine.stream([1, 50], dataclasses.replace(parameters, stop_strings=stops)))
    assert "".join(delta.text for delta in deltas) == text[: text.index(stop)]
    assert deltas[-1].finish_reason == "stop" and deltas[-1].request.text == text[: text.index(stop)]


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), stops=st.lists(st.text("的一是\ufffd。ab", min_size=1, max_size=3), max_size=3))
def test_streamed_pieces_join_to_the_text_and_hold_no_half_character(seed, stops):
    tokenizer, model = TEXT["tokenizer"], TEXT["model"]
    parameters = SamplingParameters(max_new_tokens=16, seed=seed, stop_strings=tuple(stops))
    deltas = list(Engine(model, tokenizer).stream([1, 50], parameters))
    request = deltas[-1].request
    whole = tokenizer.decode(request.token_ids, skip_special_tokens=True)
    assert "".join(delta.text for delta in deltas) == request.text
    cut = min((place for place in map(whole.find, stops) if place >= 0), default=len(whole))
    assert request.text == whole[:cut]


@pytest.fixture(scope="module", autouse=True)
def text_objects(tokenizer, text_model):
    TEXT.update(tokenizer=tokenizer, model=text_model)


TEXT = {}  # hypothesis runs its examples outside of fixtures


def test_an_answer_cut_in_a_character_ends_with_the_replacement_character(tokenizer):
    first_bytes, *_ = encode_text(tokenizer, "龘")
    request = Request([1], SamplingParameters(), set(), 1, tokenizer)
    assert "龘".encode().startswith(token_bytes(tokenizer)[first_bytes]) and tokenizer.decode([first_bytes]) == "\ufffd"
    assert request.accept(first_bytes).text == request.text == "\ufffd" and request.finish_reason == "length"


@pytest.mark.parametrize(
    ("stops", "pieces", "expected", "reason"),
    [
        (("好",), ["好"], "", "stop"),
        (("好的",), ["好的"], "", "stop"),
        (("好的",), ["好", "的"], "", "stop"),
        (("d", "b"), ["abcde"], "a", "stop"),
        (("b", "d"), ["abcde"], "a", "stop"),
        (("bx", "c"), ["ab", "cd"], "ab", "stop"),
        (("bc",), ["ab", "bc"], "ab", "stop"),
        (("bb",), ["ab"], "ab", "length"),
    ],
)
def test_stop_strings_by_hand(stops, pieces, expected, reason):
    """At their full length alone in a piece, two of them in one piece, over pieces, and only begun at the end."""
    decoder = type("Pieces", (), dict(push=lambda self, token: pieces[token], flush=lambda self: ""))()
    request = Request([1], SamplingParameters(stop_strings=stops), set(), len(pieces), None)
    request.decoder, texts = decoder, []
    while request.finish_reason is None:
        texts.append(request.accept(len(texts)).text)
    assert ("".join(texts), request.text, request.finish_reason) == (expected, expected, reason)


def test_stop_strings_without_a_tokenizer_are_refused(model):
    with pytest.raises(ValueError, match="tokenizer"):
        Engine(model).add([5], SamplingParameters(stop_strings=("x",)))


def test_conversations_lose_their_oldest_exchanges_first(tokenizer):
    messages = [{"role": "system", "content": "简短"}]
    for number in range(6):
        messages += [{"role": "user", "content": f"问题{number}"}, {"role": "assistant", "content": f"回答{number}"}]
    messages.append({"role": "user", "content": "最后"})
    whole, dropped = conversation_prompt(tokenizer, messages, 1000, 10)
    assert dropped == 0
    ids, dropped = conversation_prompt(tokenizer, messages, len(whole) + 9, 10)
    text = tokenizer.decode(ids)
    assert dropped == 2 and len(ids) + 10 <= len(whole) + 9
    assert "简短" in text and "问题0" not in text and "回答0" not in text and "问题1" in text
    assert text.endswith("<s>user\n最后</s>\n<s>assistant\n")
    ids, dropped = conversation_prompt(tokenizer, messages, 4, 10)
    assert dropped == 12 and "最后" in tokenizer.decode(ids), "the last question is never dropped"


def random_conversation(chance):
    """A system turn or none, then questions and answers in no strict order, a question last; some spell control tokens."""
    words = ("你好", "<s>user", "</s>", "一二三四五", "a b\n", "", "\n\n")
    messages = [{"role": "system", "content": "简短"}] * chance.randint(0, 1)
    for _ in range(chance.randint(0, 12)):
        role = chance.choice(("user", "user", "assistant", "assistant", "system"))
        messages.append({"role": role, "content": "".join(chance.choices(words, k=3))})
    return [*messages, {"role": chance.choice(("user", "assistant")), "content": "最后"}]


def test_long_conversations_are_encoded_once_and_cut_as_if_encoded_for_each_exchange(tokenizer, monkeypatch):
    from model.inference import chat

    encoded = []

    def encode(*arguments):
        encoded.append(1)
        return encoded_turns(*arguments)

    monkeypatch.setattr(chat, "encoded_turns", encode)
    for seed in range(150):
        chance = random.Random(seed)
        messages = random_conversation(chance)
        context, wanted = chance.randint(4, 250), chance.randint(1, 100)
        system = messages[: messages[0]["role"] == "system"]
        rest = messages[len(system) :]
        for dropped in range(len(rest)):
            if dropped and rest[dropped]["role"] != "user" and dropped < len(rest) - 1:
                continue
            ids = render_conversation(tokenizer, system + rest[dropped:], add_generation_prompt=True)[0]
            if len(ids) + min(wanted, context // 4) <= context:
                break
        encoded.clear()
        assert conversation_prompt(tokenizer, messages, context, wanted) == (ids, dropped)
        assert encoded == [1]


def test_only_the_last_exchanges_are_remembered_and_the_system_turn():
    system, *turns = messages = [{"role": role, "content": role} for role in ("system", *("user", "assistant") * 3)]
    for count, kept in ((None, turns), (0, []), (1, turns[4:]), (2, turns[2:]), (9, turns)):
        assert last_exchanges(messages, count) == [system, *kept] and last_exchanges(turns, count) == kept
    assert last_exchanges([], 2) == []


def test_text_prompts_round_trip_through_the_engine(tokenizer, text_model):
    request = Engine(text_model, tokenizer).generate(
        [encode_text(tokenizer, "长江</s>")], dataclasses.replace(GREEDY, max_new_tokens=5)
    )[0]
    assert request.text == tokenizer.decode(request.token_ids, skip_special_tokens=True) and len(request.token_ids) == 5
