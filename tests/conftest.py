"""What several test files share: the shipped tokenizer, tiny data files and a way to run the scripts."""

import csv
import json
import os
import random
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

# Before torch is imported, for the scripts that tests start too. Two test processes on two cores have one thread each.
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parent.parent
# A model whose step takes milliseconds, as flags and as LMConfig fields.
TINY = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=32)
TINY_FLAGS = [word for name, value in TINY.items() for word in (f"--{name}", str(value))]
CPU_FLAGS = ["--device", "cpu", "--dtype", "float32", "--batch_size", "4"]
PLACES = ("北京", "上海", "广州", "成都", "西安", "昆明", "拉萨", "武汉", "南京", "长沙")
THINGS = ("面条", "火锅", "米粉", "烤鸭", "点心", "酥油茶", "泡馍", "热干面")


@pytest.fixture(scope="session", autouse=True)
def few_threads():
    import torch

    torch.set_num_threads(min(THREADS, torch.get_num_threads()))


@pytest.fixture(scope="session")
def tokenizer():
    from model.tokenizer import load_tokenizer

    return load_tokenizer()


@pytest.fixture(scope="session")
def small_tokenizer_path(tmp_path_factory):
    """Folder of a tokenizer of 400 words, to fit the texts below: a tiny model's time goes into its vocabulary."""
    from tokenizers import Tokenizer, pre_tokenizers, trainers

    from model.tokenizer import DEFAULT_TOKENIZER_PATH, SPECIAL_TOKENS, save_tokenizer

    backend = Tokenizer.from_file(str(DEFAULT_TOKENIZER_PATH / "tokenizer.json"))
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [
        f"user\n{place}的{thing}很好吃。有什么好吃的？、你好！\nassistant\n" for place in PLACES for thing in THINGS
    ]
    backend.train_from_iterator(texts, trainer)
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(backend, path)
    return path


@pytest.fixture(scope="session")
def small_tokenizer(small_tokenizer_path):
    from model.tokenizer import load_tokenizer

    return load_tokenizer(small_tokenizer_path)


@pytest.fixture(scope="session")
def pretrain_csv(tmp_path_factory):
    """60 documents of one to six sentences, column text."""
    chance = random.Random(0)
    rows = []
    for _ in range(60):
        sentences = (f"{chance.choice(PLACES)}的{chance.choice(THINGS)}很好吃。" for _ in range(chance.randint(1, 6)))
        rows.append({"text": "".join(sentences)})
    return write_csv(tmp_path_factory.mktemp("data") / "pretrain.csv", rows)


@pytest.fixture(scope="session")
def sft_csv(tmp_path_factory):
    """40 conversations of one or two exchanges and of different lengths, columns history, q, a."""
    chance = random.Random(1)
    rows = []
    for index in range(40):
        history = [["你好", "你好！"]] if index % 3 == 0 else []
        answer = "、".join(chance.choice(THINGS) for _ in range(chance.randint(1, 4)))
        question = f"{chance.choice(PLACES)}有什么好吃的？"
        rows.append({"history": json.dumps(history, ensure_ascii=False), "q": question, "a": answer})
    return write_csv(tmp_path_factory.mktemp("data") / "sft.csv", rows)


def trained_scale(config, dtype=None, seed=0):
    """A model whose random weights are as large as trained ones: tiny initial weights hide errors."""
    import torch

    from model.model import Transformer

    torch.manual_seed(seed)
    model = Transformer(config).to(dtype or torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=1.0 if "tok_embeddings" in name else 1.3 / parameter.shape[1] ** 0.5)
            else:
                parameter.uniform_(0.5, 1.5)
    return model


def trained_adapter(model, matrices, rank=4, seed=0):
    """A LoRA adapter of `matrices` as its file holds it, {name: tensor}, and as large as a trained one: B is not zero."""
    import torch

    generator, state = torch.Generator().manual_seed(seed), {}
    for matrix in matrices:
        rows, columns = model.get_submodule(matrix).weight.shape
        state[f"{matrix}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) / columns**0.5
        state[f"{matrix}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) / rank**0.5
    return state


def save_chat(path, tokenizer, seed=0, **fields):
    """A chat model of stage 3, TINY but for `fields`, as the checkpoint `path`, which is returned."""
    from model.checkpoint import save_checkpoint
    from model.LMConfig import LMConfig
    from model.tokenizer import tokenizer_hash

    config = LMConfig(**{**TINY, "max_seq_len": 64, "vocab_size": len(tokenizer), **fields})
    description = dict(stage="single_chat/full_sft", tokenizer_hash=tokenizer_hash(tokenizer))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, trained_scale(config, seed=seed), description)
    return path


@pytest.fixture
def out(tmp_path, small_tokenizer):
    """A folder in which there is a chat model of stage 3."""
    return save_chat(tmp_path / "out/single_chat/full_sft_32.pth", small_tokenizer).parent.parent


@pytest.fixture
def chat_flags(out, small_tokenizer_path):
    """Flags of a stage that starts from the model in `out`."""
    shape = TINY_FLAGS[: TINY_FLAGS.index("--max_seq_len")]
    return [*shape, "--tokenizer_path", str(small_tokenizer_path), "--out_dir", str(out), *CPU_FLAGS]


@pytest.fixture
def fake():
    """A FakeEndpoint that serves."""
    from fake_endpoint import FakeEndpoint

    endpoint = FakeEndpoint()
    endpoint.start()
    yield endpoint
    endpoint.stop()


def files(folder):
    """Names of all files in `folder` and below."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def run_script(*words, timeout=120, **options):
    """Run a script of the repository with its arguments; returns the finished process, its output as text."""
    command = [sys.executable, str(ROOT / words[0]), *map(str, words[1:])]
    options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": timeout, **options}
    return subprocess.run(command, **options)


def run_without(modules, *words, **options):
    """run_script, where it ends well and has imported none of `modules` (a set of names)."""
    program = (
        f"import runpy, sys; sys.argv = {list(map(str, words))}\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        f"assert not {modules} & sys.modules.keys(), {modules} & sys.modules.keys()\n"
    )
    options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 120, **options}
    process = subprocess.run([sys.executable, "-c", program], **options)
    assert process.returncode == 0, process.stderr
    return process


def run_two_ranks(*words, timeout=200):
    """run_script in two processes that train together, each with one thread."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    options = dict(cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    return subprocess.run([*launcher, *map(str, words)], timeout=timeout, **options)


@pytest.fixture
def run_in_process(monkeypatch, capsys):
    """Run a script in this process, which is much quicker than starting Python; returns (exit code, stdout, stderr)."""

    def call(script, *words):
        monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        captured = capsys.readouterr()
        return caught.value.code, captured.out, captured.err

    return call


@pytest.fixture
def run(run_in_process):
    """run_in_process, giving what run_script gives."""

    def run(*words):
        code, out, errors = run_in_process(*words)
        return subprocess.CompletedProcess(words, code or 0, out, errors)

    return run


@pytest.fixture
def traced_only(monkeypatch):
    """torch.compile with a backend that runs the traced graphs as they are: the real one needs half a minute of C++."""
    import torch

    compile_function = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: compile_function(model, backend="eager", **options))
    torch._dynamo.reset()


def good(process):
    """The output of a script that ended well."""
    assert process.returncode == 0, process.stderr
    return process.stdout


def assert_one_line_error(process, *parts, code=1):
    """The script failed as it should: exit code, no traceback, one `error:` line that names every part."""
    assert process.returncode == code, process.stderr
    assert "Traceback" not in process.stderr
    errors = [line for line in process.stderr.splitlines() if "error: " in line]
    assert len(errors) == 1, process.stderr
    for part in parts:
        assert str(part) in errors[0], errors[0]
