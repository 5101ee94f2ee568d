"""Training of adapters alone in the one loop: what moves, what a checkpoint holds, going on exactly where a run ended."""

import pytest
import torch
from test_loop import arguments, make_trainer, records

from conftest import TINY, trained_scale
from model.cli import training_settings
from model.data.dataset import open_sft_data
from model.errors import UserError
from model.LMConfig import LMConfig
from model.lora import add_adapter, merge, read_adapter
from model.settings import LoraSettings
from model.training.loop import Trainer, language_model_loss, start
from model.training.strategy import LowRankAdapters

MOE = dict(use_moe=True, n_routed_experts=3, num_experts_per_tok=2, n_shared_experts=1)


@pytest.fixture
def tokenizer(small_tokenizer):
    return small_tokenizer


def make_base(tokenizer, fields=None):
    return trained_scale(LMConfig(**{**TINY, "vocab_size": len(tokenizer), **(fields or {})}))


def make_run(data_path, out_dir, *words, tokenizer, fields=None, **lora):
    """A Trainer as 4-lora_sft.py makes it, on random weights at trained scale."""
    settings = training_settings(arguments("--out_dir", out_dir, "--weight_decay", 0, *words))
    start(settings)
    model, adapter = make_base(tokenizer, fields), LoraSettings(**{"lora_rank": 4, "lora_alpha": 6.0, **lora})
    matrices = add_adapter(model, adapter)
    options = dict(seed=settings.seed, validation_share=0.1)
    train, validation = open_sft_data(data_path, tokenizer, model.config.max_seq_len, **options)
    names = dict(stage="lora_test", loss_function=language_model_loss, strategy=LowRankAdapters)
    names |= dict(parent={"file": "base.pth", "sha256": "0"}, metadata={"lora": dict(alpha=6.0, targets=matrices)})
    return Trainer(model, tokenizer, train, validation, settings, **names)


@pytest.mark.parametrize(
    "fields, targets, optimizer, dtype",
    [(None, "all", "adamw", "bfloat16"), (None, "all", "muon", "float32"), (MOE, "experts,wq", "adamw", "float32")],
)
def test_adapters_learn_and_the_base_stays(sft_csv, tmp_path, tokenizer, fields, targets, optimizer, dtype):
    words = ("--max_steps", 8, "--learning_rate", 3e-3, "--optimizer", optimizer, "--dtype", dtype)
    run = make_run(sft_csv, tmp_path, *words, tokenizer=tokenizer, fields=fields, lora_targets=targets)
    learned = {name: p.clone() for name, p in run.model.named_parameters() if "lora_" in name}
    trained = [p for optimizer in run.strategy.optimizers for group in optimizer.param_groups for p in group["params"]]
    own = [parameter for name, parameter in run.model.named_parameters() if name in learned]
    assert {id(parameter) for parameter in trained} == {id(parameter) for parameter in own} and len(trained) == len(own)
    run.train()
    losses = [line["validation_loss"] for line in records(run) if "validation_loss" in line]
    assert losses[-1] < losses[0] - 0.1

    base, after = make_base(tokenizer, fields), dict(run.model.named_parameters())
    for name, parameter in base.named_parameters():
        matrix, _, kind = name.rpartition(".")
        assert torch.equal(after.get(name, after.get(f"{matrix}.base_layer.{kind}")), parameter), name
    assert not any(torch.equal(after[name], tensor) for name, tensor in learned.items())

    # The file alone, on the base alone, is the model that was trained.
    state = torch.load(run.path)
    assert {name.replace(".weight", ".default.weight") for name in state} == learned.keys()
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    merge(base, read_adapter(run.path))
    ids = run.train_loader.dataset[[0, 1, 2]]["input_ids"]
    with torch.no_grad():
        ours, theirs = base(ids).logits, run.model.eval()(ids).logits
    assert (ours - theirs).abs().max() < 1e-4 * ours.std()


def test_k_steps_a_stop_and_the_rest_give_the_bits_of_one_run(sft_csv, tmp_path, tokenizer):
    words = ("--max_steps", 6)
    straight = make_run(sft_csv, tmp_path / "straight", *words, tokenizer=tokenizer, lora_dropout=0.2)
    assert straight.train()
    first = make_run(sft_csv, tmp_path / "cut", *words, "--stop_after", 2, tokenizer=tokenizer, lora_dropout=0.2)
    assert not first.train()
    rest = make_run(sft_csv, tmp_path / "cut", *words, tokenizer=tokenizer, lora_dropout=0.2)
    for parameter in rest.model.parameters():
        parameter.data.mul_(2 if parameter.requires_grad else 1)  # another A, which the saved one must replace
    rest.resume()
    assert rest.train()
    assert rest.path.read_bytes() == straight.path.read_bytes()


def test_another_adapters_state_is_one_line(sft_csv, tmp_path, tokenizer):
    make_run(sft_csv, tmp_path, "--max_steps", 2, "--stop_after", 1, tokenizer=tokenizer).train()
    for other, problem in (
        (dict(lora_rank=3), "is \\(4, 32\\) in the file"),
        (dict(lora_targets="wq"), "but missing in"),
    ):
        with pytest.raises(UserError, match=f"lora_test_32.resume.pth: layers.0.attention.*{problem}"):
            make_run(sft_csv, tmp_path, "--max_steps", 2, tokenizer=tokenizer, **other).resume()


@pytest.mark.parametrize("stage", ["pretrain", "moe", "bfloat16", "adapter"])
def test_checkpointed_layers_are_computed_again_and_learn_the_same(sft_csv, tmp_path, tokenizer, stage):
    """With dropout, whose random numbers must come again too."""
    words = {"moe": ["--use_moe"], "bfloat16": ["--dtype", "bfloat16"]}.get(stage, [])
    calls, weights = [], []
    for more in ([], ["--gradient_checkpointing"]):
        out, counted = tmp_path / str(len(more)), []
        flags = [*words, "--max_steps", 2, "--accumulation_steps", 2, "--eval_interval", 9, *more]
        if stage == "adapter":
            run = make_run(sft_csv, out, *flags, tokenizer=tokenizer, lora_dropout=0.1)
        else:
            run = make_trainer(sft_csv, out, *flags, "--dropout", 0.1, tokenizer=tokenizer, sft=True)
        norm = run.model.layers[1].attention_norm
        norm.register_forward_hook(lambda *_, counted=counted: counted.append(torch.is_grad_enabled()))
        run.train()
        calls.append(sum(counted))
        weights.append(run.strategy.weights())
    assert calls == [4, 8] and weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_checkpointed_layers_can_be_compiled(sft_csv, tmp_path, tokenizer, traced_only):
    losses = []
    for more in ([], ["--gradient_checkpointing", "--compile"]):
        words = ["--max_steps", 2, "--log_interval", 1, "--eval_interval", 9, *more]
        run = make_trainer(sft_csv, tmp_path / str(len(more)), *words, tokenizer=tokenizer, sft=True)
        run.train()
        losses += [record["loss"] for record in records(run) if "loss" in record]
    assert losses[:2] == pytest.approx(losses[2:], rel=1e-6)
