"""One engine for several threads, and answers that are written in threads of their own."""

import threading
import time

import pytest
import torch

from conftest import TINY, save_chat, trained_adapter, trained_scale
from model.checkpoint import file_sha256, load_model, save_checkpoint
from model.data.conversations import message
from model.errors import UserError
from model.inference.endpoint import Piece
from model.inference.engine import Engine
from model.inference.shared import Answer, SharedEngine, as_messages
from model.LMConfig import LMConfig
from model.settings import SamplingParameters

GREEDY = SamplingParameters(temperature=0, max_new_tokens=40, stop_token_ids=())


@pytest.fixture
def shared(small_tokenizer):
    config = LMConfig(**{**TINY, "max_seq_len": 512, "vocab_size": len(small_tokenizer)})
    return SharedEngine(Engine(trained_scale(config), small_tokenizer, prefix_rows=2), "model.pth")


def question(text):
    return [message("user", text)]


def written(answer):
    """The answer's text when it is done."""
    assert answer.wait(30) and answer.error is None, answer.error
    return answer.text


def test_many_threads_get_what_each_would_get_alone(shared):
    texts = [f"{place}有什么好吃的？" for place in ("北京", "上海", "广州", "成都", "西安", "昆明")]
    alone = ["".join(piece.text for piece in shared.stream(question(text), GREEDY)) for text in texts]
    together = [Answer(shared.stream(question(text), GREEDY)) for text in texts]
    assert [written(answer) for answer in together] == alone
    assert [(answer.tokens, answer.finish_reason) for answer in together] == [(40, "length")] * len(texts)
    assert not shared.engine.has_work and len(set(alone)) > 1


class LateLock:
    """A lock for which whoever waits wakes up late, as on a busy machine."""

    def __init__(self):
        self.lock = threading.Lock()
        self.release = self.lock.release

    def acquire(self):
        for _ in range(100):
            if self.lock.acquire(blocking=False):
                return
            time.sleep(0.02)
        raise TimeoutError("others always come first")


def test_who_comes_later_does_not_wait_for_the_end_of_others(shared):
    """A thread that only steps would have the lock again before the one that asks has woken up."""
    turns, leave, shared.lock = [], threading.Event(), LateLock()

    def step_on():
        while not leave.is_set():
            with shared.turn():
                turns.append(None)
                time.sleep(0.002)

    stepping = threading.Thread(target=step_on)
    stepping.start()
    waited = []
    try:
        for _ in range(10):
            time.sleep(0.003)
            before = len(turns)
            with shared.turn():
                waited.append(len(turns) - before)
    finally:
        leave.set()
        stepping.join()
    assert sorted(waited)[5] <= 1, waited


def test_a_stop_frees_the_row_and_keeps_what_has_come(shared):
    answer = Answer(shared.stream(question("你好"), SamplingParameters(max_new_tokens=400, stop_token_ids=())))
    while not answer.text:
        time.sleep(0.001)
    answer.stop()
    text, seconds = answer.text, answer.seconds
    deadline = time.monotonic() + 10
    while shared.engine.has_work and time.monotonic() < deadline:
        time.sleep(0.001)
    assert not shared.engine.has_work and answer.finish_reason == "stopped" and text
    assert (answer.text, answer.seconds) == (text, seconds) and answer.tokens_per_second > 0


def test_what_the_engine_refuses_is_the_answers_error(shared, monkeypatch):
    answer = Answer(shared.stream(question("字" * 600), GREEDY))
    assert answer.wait(30) and answer.finish_reason == "error" and "context only 512" in answer.error
    with torch.no_grad():
        shared.engine.model.tok_embeddings.weight.fill_(float("nan"))
    answer = Answer(shared.stream(question("你好"), GREEDY))
    assert answer.wait(30) and "not finite" in answer.error and not shared.engine.has_work


def test_messages_that_did_not_fit_are_counted(shared):
    history = [message(role, "很好吃" * 60) for _ in range(4) for role in ("user", "assistant")]
    answer = Answer(shared.stream([*history, message("user", "你好")], GREEDY))
    written(answer)
    assert answer.dropped > 0 and answer.dropped % 2 == 0


def test_an_adapter_is_read_once_and_again_when_its_file_is_new(tmp_path, small_tokenizer):
    base = save_chat(tmp_path / "full_sft_32.pth", small_tokenizer)
    model, _ = load_model(base)
    shared, path = SharedEngine(Engine(model, small_tokenizer), base), tmp_path / "lora_law_32.pth"
    parent = {"file": str(base), "sha256": file_sha256(base)}

    def save(seed, parent=parent):
        weights = trained_adapter(model, ["layers.0.attention.wq"], seed=seed)
        metadata = {"stage": "lora_law", "lora": {"alpha": 6.0}, "parent": parent}
        save_checkpoint(path, model, metadata, weights=weights)
        return shared.add_adapter(path)

    first = save(0)
    read = shared.engine.adapters[first]
    assert shared.add_adapter(path) == first and shared.engine.adapters[first] is read

    def pieces(name):
        return shared.stream(question("你好"), GREEDY, name)

    def text(pieces):
        return "".join(piece.text for piece in pieces)

    running = pieces(first)
    next(running)
    second = save(1)
    assert first in shared.engine.adapters, "a request asks for it"
    assert len({text(pieces(None)), text(running), text(pieces(second))}) == 3
    assert shared.add_adapter(path) == second and shared.engine.adapters.keys() == {None, second}
    with pytest.raises(UserError, match="was trained on"):
        save(2, {**parent, "sha256": "0" * 64})


def test_the_first_second_is_that_of_the_first_text():
    gate = threading.Event()

    def pieces():
        yield Piece("", 0, dropped=2)
        yield Piece("", 1)  # half a character
        gate.wait(10)
        yield Piece("好", 1)

    answer = Answer(pieces())
    while not answer.tokens:
        time.sleep(0.001)
    assert answer.first_seconds is None and answer.dropped == 2
    gate.set()
    assert written(answer) == "好" and 0 < answer.first_seconds <= answer.seconds and answer.tokens == 2
    answer.stop()
    assert answer.finish_reason == "stop", "it had ended"


def endless(gate, closed):
    try:
        yield Piece("半", 1)
        while True:
            gate.wait(10)
            yield Piece("句", 1)
    finally:
        closed.set()


def test_a_stop_does_not_wait_for_the_next_piece():
    gate, closed = threading.Event(), threading.Event()
    answer = Answer(endless(gate, closed))
    while not answer.text:
        time.sleep(0.001)
    answer.stop()
    assert answer.done and not closed.is_set()
    gate.set()
    assert closed.wait(5) and answer.text == "半", "the source is closed at the next piece, which is not taken"


def test_nobody_writes_for_a_page_that_is_closed():
    gate, closed = threading.Event(), threading.Event()
    answer = Answer(endless(gate, closed))
    while not answer.text:
        time.sleep(0.001)
    answer.looked -= Answer.ABANDONED + 1
    assert not answer.wait(0.001), "somebody looks"
    answer.looked -= Answer.ABANDONED + 1
    gate.set()
    assert closed.wait(5) and answer.finish_reason == "stopped"


def test_a_bug_is_told_and_not_waited_for(capsys):
    def broken():
        yield Piece("半", 1)
        raise KeyError("x")

    answer = Answer(broken())
    assert answer.wait(5) and (answer.text, answer.error) == ("半", "KeyError: 'x'")
    assert "Traceback" in capsys.readouterr().err

    def refused():
        raise UserError("no such model")
        yield

    answer = Answer(refused())
    assert answer.wait(5) and answer.error == "no such model" and "Traceback" not in capsys.readouterr().err


def test_the_messages_of_a_conversation():
    def answered(text):
        answer = Answer(iter_pieces(text))
        answer.wait(5)
        return answer

    turns = [("一", answered("甲")), ("二", answered("")), ("三", answered("丙"))]
    assert as_messages(turns) == [
        message("user", "一"), message("assistant", "甲"), message("user", "三"), message("assistant", "丙")
    ]  # fmt: skip
    assert as_messages(turns, "  简短。 ", 1) == [
        message("system", "简短。"), message("user", "三"), message("assistant", "丙")
    ]  # fmt: skip
    assert as_messages(turns, " ", 0) == []


def iter_pieces(text):
    yield Piece(text, 1, "stop")
