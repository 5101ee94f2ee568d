"""Two ranks compute what one process computes: gradients (which AdamW's steps would not show), sums, loss, seeds."""

import os
import socket
import subprocess
import sys
import time

import pytest
import torch

from conftest import ROOT
from model.errors import UserError
from model.training import ranks

# Each rank takes its half of every micro-batch; rank 0 writes what it has afterwards.
PROGRAM = """
import sys
sys.path[:0] = [".", "tests", "tests/training"]
import torch
from test_loop import make_trainer, measure
from model.tokenizer import load_tokenizer
from model.training import ranks

data, folder, tokenizer, gate, *words = sys.argv[1:]
run = make_trainer(data, folder, "--batch_size", 2, *words, tokenizer=load_tokenizer(tokenizer), sft=True)
if gate == "ties":  # the first two experts of four win them all, the others get no token on any rank
    for layer in run.model.layers:
        torch.nn.init.zeros_(layer.feed_forward.gate.weight)
rank, size = ranks.rank(), ranks.world_size()
rows = [[0, 1, 2, 3], [4, 5, 6, 7]]
batches = [run.train_loader.dataset[part[rank * 4 // size : (rank + 1) * 4 // size]] for part in rows]
counts = [measure(batch, run.byte_lengths) for batch in batches]
items, total_rows = ranks.sum_over_ranks([sum(c[0] for c in counts), sum(c[1] for c in counts)])
run.accumulate(batches, [0.0] * len(batches), items)  # DDP must be ready for a second step
run.model.zero_grad()
loss = run.accumulate(batches, [count[1] / total_rows for count in counts], items)
norm = run.strategy.gradient_norm()
(loss,) = ranks.sum_over_ranks([float(loss)])
gradients = {name: parameter.grad for name, parameter in run.model.named_parameters() if parameter.grad is not None}
with run.strategy.micro_batch(last=False):
    synchronised = getattr(run.strategy.runner, "require_backward_grad_sync", False)
random = ranks.gather(float(torch.rand(())))
run.validate()
if ranks.is_main():
    torch.save(dict(loss=loss, norm=norm, gradients=gradients, items=items, random=random,
                    validation=run.state.validation_loss, synchronised=synchronised), folder + "/result.pt")
run.close()
"""


def result(folder, ranks, *words):
    folder.mkdir()
    program = folder / "program.py"
    program.write_text(PROGRAM)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [sys.executable, *launcher, program, words[0], folder, *words[1:]]
    process = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr[-3000:]
    return torch.load(folder / "result.pt", weights_only=True)


@pytest.mark.parametrize("words", [["plain"], ["plain", "--use_moe"], ["ties", "--use_moe"]])
def test_gradients_loss_and_validation_are_those_of_one_process(tmp_path, sft_csv, small_tokenizer_path, words):
    one, two = (result(tmp_path / str(ranks), ranks, sft_csv, small_tokenizer_path, *words) for ranks in (1, 2))
    assert one["items"] == two["items"] and one["loss"] == pytest.approx(two["loss"], rel=1e-5)
    assert one["norm"].item() == pytest.approx(two["norm"].item(), rel=1e-4)
    assert one["gradients"].keys() <= two["gradients"].keys()  # DDP gives zeros to an expert that no token chose
    for name, gradient in one["gradients"].items():
        torch.testing.assert_close(two["gradients"][name], gradient, rtol=1e-3, atol=1e-6), name
    assert one["validation"] == pytest.approx(two["validation"], rel=1e-5)
    assert not two["synchronised"]  # gradients travel once a step
    assert len(set(two["random"])) == 2  # each rank draws its own dropout


def test_sums_are_exact_beyond_float32():
    assert ranks.sum_over_ranks([2**24 + 1, 0.5]) == [2**24 + 1, 0.5]


def test_only_the_first_rank_prints(monkeypatch, capsys):
    for rank in (1, 0):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        ranks.print_once(f"rank {rank}")
    assert capsys.readouterr().out == "rank 0\n"


# ---- meeting at the start


@pytest.fixture
def meet(monkeypatch):
    """A function that meets as a rank that a launcher other than torchrun has started."""
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)

    def call(rank, port, size=2, timeout=1.0):
        for name, value in dict(RANK=rank, WORLD_SIZE=size, MASTER_ADDR="127.0.0.1", MASTER_PORT=port).items():
            monkeypatch.setenv(name, str(value))
        return ranks.meet(timeout)

    return call


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.parametrize("rank, problem", [(0, "not all 2 processes came to"), (1, "no process of rank 0 at")])
def test_who_never_comes_costs_the_limit_and_one_line_that_names_it(meet, rank, problem):
    port, began = free_port(), time.monotonic()
    with pytest.raises(UserError, match=rf"{problem} 127.0.0.1:{port} within 1 s \(--rendezvous_timeout\)"):
        meet(rank, port)
    assert 1 <= time.monotonic() - began < 15


def test_a_port_in_use_is_named(meet):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"MASTER_PORT {port} is in use on this machine"):
            meet(0, port)


def test_a_rank_without_a_meeting_place_is_one_line(meet, monkeypatch):
    with pytest.raises(UserError, match="WORLD_SIZE is 2, and MASTER_ADDR, MASTER_PORT or RANK .*torchrun"):
        meet(0, "x")
    monkeypatch.delenv("MASTER_PORT")
    with pytest.raises(UserError, match="MASTER_PORT"):
        ranks.meet(1.0)


def test_ranks_that_have_met_wait_longer_for_each_other(meet, monkeypatch):
    """What the store is asked for later, NCCL's first message for one, may come after minutes of tokenising."""
    program = (
        "import os, sys; sys.path.insert(0, '.'); from model.training import ranks\n"
        "store, rank, size = ranks.meet(20.0); store.get('end')"
    )
    port = free_port()
    place = dict(RANK="1", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    other = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env={**os.environ, **place})
    store, rank, size = meet(0, port, timeout=60)
    assert (rank, size) == (0, 2) and store.timeout == ranks.LONGEST_WAIT
    store.set("end", "")
    assert other.wait(timeout=60) == 0


def test_torchruns_own_store_is_there_before_the_others_come(meet, monkeypatch):
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    for rank in (0, 1):
        other = f"arrived/{1 - rank}"
        with pytest.raises(UserError, match="not all 2 processes came to"):
            meet(rank, store.port)
        assert not store.check([other])
        store.delete_key(f"arrived/{rank}")
