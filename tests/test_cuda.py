"""What only a GPU can show; all of it is skipped without one."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from test_dpo_train import PAIR

from conftest import TINY, TINY_FLAGS, run_script, save_chat
from model.checkpoint import load_model
from model.inference.engine import Engine
from model.LMConfig import LMConfig
from model.model import MOEFeedForward, Transformer
from model.settings import SamplingParameters, TrainingSettings
from model.training.batch_size import largest_that_fits
from model.training.cpu_kernels import ChunkedCrossEntropy
from model.training.strategy import DataParallel

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def words(tmp_path, small_tokenizer_path, pretrain_csv):
    flags = ["--tokenizer_path", small_tokenizer_path, "--out_dir", tmp_path / "out", "--data_path", pretrain_csv]
    flags += ["--device", "cuda", "--batch_size", 4, "--learning_rate", "1e-3", "--max_steps", 6, "--log_interval", 1]
    return ["1-pretrain.py", *TINY_FLAGS, *flags]


@pytest.mark.parametrize("extra", [[], ["--dtype", "float16"], ["--num_workers", 1], ["--use_moe"], ["--compile"]])
def test_training_lowers_the_loss_and_resumes(words, tmp_path, extra):
    """float16 goes through the gradient scaler, workers through pinned memory."""
    for more in (["--stop_after", 3], ["--resume"]):
        process = run_script(*words, *extra, *more, timeout=400)
        assert process.returncode == 0, process.stderr
    name = "pretrain_32_moe" if "--use_moe" in extra else "pretrain_32"
    assert load_model(tmp_path / "out" / f"{name}.pth")[1]["step"] == 6


@pytest.mark.parametrize("extra", [[], ["--use_moe"], ["--dtype", "bfloat16"], ["--dtype", "float16"], ["--compile"]])
def test_preferences_give_the_losses_of_a_cpu(tmp_path, small_tokenizer, small_tokenizer_path, extra):
    """On a GPU trl takes log-probabilities by another path, of the answers' places alone."""
    chat = save_chat(tmp_path / "chat.pth", small_tokenizer, use_moe="--use_moe" in extra)
    data = tmp_path / "pairs.json"
    data.write_text(json.dumps([{**PAIR, "chosen": "烤鸭、" * (row % 4) + "面条"} for row in range(20)]))
    words = ["5-dpo_train.py", "--init_from", chat, "--data_path", data, "--tokenizer_path", small_tokenizer_path]
    words += ["--max_steps", 4, "--batch_size", 4, "--log_interval", 1, "--sft_weight", 0.2]
    losses = []
    for device, more in (("cpu", ["--dtype", "float32"]), ("cuda", ["--dtype", "float32", *extra])):
        out = tmp_path / device
        process = run_script(*words, "--out_dir", out, "--device", device, *more, timeout=400)
        assert process.returncode == 0 and "first step: 0.6931" in process.stdout, process.stderr
        log = [json.loads(line) for line in next((out / "logs").glob("*.jsonl")).read_text().splitlines()]
        losses.append([record["loss"] for record in log if "loss" in record])
    assert losses[1] == pytest.approx(losses[0], rel=5e-2 if "--dtype" in extra else 1e-3)


def test_ddp_on_one_gpu_equals_no_ddp(monkeypatch):
    """A group of one rank, taken for two where the strategy is made, so that the model is wrapped."""
    settings, device = TrainingSettings(batch_size=2).resolved(torch.device("cuda", 0), 1), torch.device("cuda", 0)
    input_ids, gradients = torch.randint(0, 300, (2, 20), device=device), []
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        for size in (1, 2):
            torch.manual_seed(0)
            model = Transformer(LMConfig(**TINY, vocab_size=300)).to(device)
            with monkeypatch.context() as patch:
                patch.setattr("model.training.ranks.world_size", lambda size=size: size)
                strategy = DataParallel(model, settings, device, torch.float32)
            assert isinstance(strategy.runner, torch.nn.parallel.DistributedDataParallel) == (size == 2)
            strategy.runner(input_ids, labels=input_ids, return_logits=False).loss.backward()
            gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
            strategy.close()
    finally:
        torch.distributed.destroy_process_group()
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("extra", [[], ["--dtype", "float16"], ["--gradient_checkpointing"]])
def test_auto_batch_size_is_a_divisor_of_the_step_and_the_run_is_that_of_the_number(words, tmp_path, extra):
    position = words.index("--batch_size")
    words = [*words[:position], *words[position + 2 :], "--max_seq_len", 512, "--dim", 512, "--n_heads", 8, *extra]
    process = run_script(*words, "--batch_size", "auto", "--out_dir", tmp_path / "auto", timeout=400)
    assert process.returncode == 0, process.stderr
    rows, accumulation = map(int, re.search(r"auto: (\d+) rows .*--accumulation_steps (\d+);", process.stdout).groups())
    assert rows * accumulation == 64 and re.search(r"at most [\d.]+ GB at once of [\d.]+ GB", process.stdout)
    numbers = ["--batch_size", rows, "--accumulation_steps", accumulation]
    assert run_script(*words, *numbers, "--out_dir", tmp_path / "given", timeout=400).returncode == 0
    logs = [(tmp_path / name / "logs/pretrain_512.jsonl").read_text().splitlines() for name in ("auto", "given")]
    losses = [[record["loss"] for record in map(json.loads, log) if "loss" in record] for log in logs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_search_meets_the_end_of_the_memory_and_gives_all_of_it_back():
    """Rows of a hundredth of what is free: 100 cannot fit, half of them do."""
    device = torch.device("cuda", 0)
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(device)[0]

    def try_rows(rows):
        torch.cuda.empty_cache()
        return [torch.empty(free // 100, dtype=torch.uint8, device=device) for _ in range(rows)][0].nbytes

    assert 50 <= largest_that_fits(try_rows, 128) < 100
    torch.cuda.empty_cache()
    assert torch.cuda.mem_get_info(device)[0] > 0.95 * free


def test_the_two_ways_of_the_experts_agree():
    torch.manual_seed(0)
    layer = MOEFeedForward(LMConfig(**TINY, vocab_size=300, use_moe=True)).to("cuda", torch.bfloat16)
    copies = torch.randn(12, TINY["dim"], device="cuda", dtype=torch.bfloat16)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ends = torch.tensor([3, 3, 9, 12], dtype=torch.int32, device="cuda")
    assert layer.can_group(copies)
    grouped, one_by_one = layer.grouped(copies, ends), layer.one_by_one(copies, ends)
    assert (grouped - one_by_one).norm() < 2e-2 * one_by_one.norm()


def test_the_chunked_loss_is_the_plain_one():
    x, weight = torch.randn(5000, 32, device="cuda"), torch.randn(400, 32, device="cuda")
    targets = torch.randint(0, 400, (5000,), device="cuda")
    inputs = [x.requires_grad_(), weight.requires_grad_()]
    results = []
    for loss in (ChunkedCrossEntropy.apply(*inputs, targets), F.cross_entropy(x @ weight.T, targets, reduction="sum")):
        results.append((loss, *torch.autograd.grad(loss, inputs)))
    for ours, plain in zip(*results):
        assert torch.allclose(ours, plain, rtol=1e-3, atol=1e-3 * plain.abs().max().item())


@pytest.mark.parametrize("compile", [False, True])
def test_decoding_on_the_gpu_gives_the_tokens_of_the_cpu(compile):
    """Compiled, every step is a CUDA graph."""
    torch.manual_seed(0)
    model = Transformer(LMConfig(**TINY, vocab_size=300)).eval()
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    parameters = SamplingParameters(temperature=0.0, max_new_tokens=12, stop_token_ids=())
    expected = [request.token_ids for request in Engine(model).generate(prompts, parameters)]
    engine = Engine(model.to("cuda"), compile=compile)
    assert [request.token_ids for request in engine.generate(prompts, parameters)] == expected
