"""DPO against a hand-written one on the project's own Transformer: losses, gradients, numbers, reference, resume, ranks."""

import copy
import json
import math
import random
import subprocess
import sys

import pytest
import torch
from test_loop import arguments, records, weights

from conftest import PLACES, ROOT, THINGS, TINY, trained_scale
from model.cli import training_settings
from model.convert import load_stock_weights, stock_model, weights_of_stock_model
from model.data.dataset import open_preference_data
from model.errors import UserError
from model.LMConfig import LMConfig
from model.model import Transformer
from model.settings import PreferenceSettings
from model.training import ranks
from model.training.dpo import Policy, PreferenceLoss, PreferenceTrainer, StockModel
from model.training.loop import start

MOE = dict(use_moe=True, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1)


def write_pairs(path, count, seed=0):
    """`count` pairs that can be learned: a meal is better than not knowing one. The answers have all lengths."""
    chance, rows = random.Random(seed), []
    for _ in range(count):
        meals = "、".join(chance.choice(THINGS) for _ in range(chance.randint(1, 3)))
        unknown = "不知道" + "。" * chance.randint(1, 6)
        prompt = f"{chance.choice(PLACES)}有什么好吃的？" * chance.randint(1, 2)
        rows.append({"prompt": prompt, "chosen": meals, "rejected": unknown})
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def pairs_json(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.json", 30)


@pytest.fixture
def tokenizer(small_tokenizer):
    return small_tokenizer


def make_run(pairs, out_dir, *words, tokenizer, fields=None, **preferences):
    """A PreferenceTrainer as 5-dpo_train.py makes it, on random weights at trained scale."""
    settings = training_settings(arguments("--out_dir", out_dir, "--weight_decay", 0, *words))
    device = start(settings)
    model = trained_scale(LMConfig(**{**TINY, "max_seq_len": 64, "vocab_size": len(tokenizer), **(fields or {})}))
    options = dict(seed=settings.seed, validation_share=0.2)
    train, validation = open_preference_data(pairs, tokenizer, model.config.max_seq_len, **options)
    policy, preferences = Policy(model).to(device), PreferenceSettings(**preferences)
    loss_function = PreferenceLoss(policy, tokenizer, preferences, out_dir, settings.seed)
    names = dict(stage="dpo", loss_function=loss_function, strategy=StockModel, identity={"--beta": preferences.beta})
    return PreferenceTrainer(policy, tokenizer, train, validation, settings, **names)


def transformer_of(stock, config, dtype=torch.float32):
    model = Transformer(config)
    model.load_state_dict(weights_of_stock_model(stock, config))
    return model.to(dtype)


def move(run, seed=5, scale=0.1):
    """Give the policy other weights than the reference, as after some training."""
    torch.manual_seed(seed)
    policy, config = run.model, run.model.config
    state = weights_of_stock_model(policy.stock, config)
    state = {name: tensor + scale * tensor.std() * torch.randn_like(tensor) for name, tensor in state.items()}
    state["output.weight"] = state["tok_embeddings.weight"]
    load_stock_weights(policy.stock, state, config)


def answers_by_hand(model, batch):
    """ln p of the learned tokens [2 P, T - 1], 0 elsewhere, the distributions there, and which they are."""
    output = model(batch["input_ids"], attention_mask=batch.get("attention_mask"))
    distributions, targets = output.logits[:, :-1].log_softmax(-1), batch["labels"][:, 1:]
    learned = targets != -100
    chosen = distributions.gather(2, targets.clamp(min=0)[..., None])[..., 0]
    return torch.where(learned, chosen, 0.0), distributions, learned, output.aux_loss


def by_hand(policy, reference, batch, beta, loss_type="sigmoid", sft_weight=0.0):
    """(loss of each pair, {name in the log: sum over pairs, or over tokens}) of Rafailov et al., written out."""
    ours, distributions, learned, _ = answers_by_hand(policy, batch)
    with torch.no_grad():
        theirs, other_distributions, _, _ = answers_by_hand(reference, batch)
    ratio, count = (ours - theirs).sum(1), len(ours) // 2
    lengths = learned.sum(1)
    if loss_type == "sigmoid":
        loss = -torch.log(1 / (1 + torch.exp(-beta * (ratio[:count] - ratio[count:]))))
    else:
        mean = ratio / lengths
        loss = (mean[:count] - mean[count:] - 1 / (2 * beta)) ** 2
    loss = loss - sft_weight * ours[:count].sum(1) / lengths[:count]
    rewards = beta * ratio.detach()
    divergence = (distributions.exp() * (distributions - other_distributions)).sum(-1)[learned]
    sums = dict(
        reward_chosen=rewards[:count],
        reward_rejected=rewards[count:],
        reward_margin=rewards[:count] - rewards[count:],
        reward_accuracy=(rewards[:count] > rewards[count:]).double(),
        log_probability_chosen=ours[:count].sum(1),
        log_probability_rejected=ours[count:].sum(1),
        chosen_more_probable=(ours[:count].sum(1) > ours[count:].sum(1)).double(),
        kl=divergence,
    )
    return loss, {name: values.detach() for name, values in sums.items()}


# ---- the loss


@pytest.mark.parametrize("fields", [None, MOE])
@pytest.mark.parametrize("loss_type, beta, expected", [("sigmoid", 0.1, 0.693147), ("ipo", 0.1, 25), ("ipo", 0.5, 1)])
def test_the_loss_before_the_first_step_is_known(pairs_json, tmp_path, tokenizer, fields, loss_type, beta, expected):
    options = dict(loss_type=loss_type, beta=beta, sft_weight=0.5)  # whose term is no part of it
    run = make_run(pairs_json, tmp_path, tokenizer=tokenizer, fields=fields, **options)
    assert run.loss_at_start() == pytest.approx((expected, expected), rel=1e-5)
    assert not any(run.loss_function.sums.values())  # it leaves no trace in the log
    move(run)
    with pytest.raises(UserError, match="the loss before the first step is .*policy and reference differ"):
        run.loss_at_start()


@pytest.mark.parametrize(
    "loss_type, sft_weight, beta",
    [("sigmoid", 0.0, 0.1), ("ipo", 0.0, 0.1), ("sigmoid", 0.7, 0.3), ("ipo", 0.7, 0.5)],
)
def test_loss_and_every_gradient_are_those_of_a_hand_written_dpo(
    pairs_json, tmp_path, tokenizer, loss_type, sft_weight, beta
):
    options = dict(loss_type=loss_type, sft_weight=sft_weight, beta=beta)
    run = make_run(pairs_json, tmp_path, tokenizer=tokenizer, **options)
    move(run, scale=0.03)
    assert_gradients(run, options, [list(range(5))])


def assert_gradients(run, options, parts):
    """Of one step over micro-batches of these rows, against plain autograd on a Transformer in float64."""
    policy, config, data = run.model, run.model.config, run.train_loader.dataset
    models = transformer_of(policy.stock, config), transformer_of(run.loss_function.reference.stock, config)
    batch = data[sum(parts, [])]
    ours, reference = (model.double().eval() for model in models)
    expected = by_hand(ours, reference, batch, **options)[0].mean()
    if config.use_moe:
        expected = expected + answers_by_hand(ours, batch)[3]
    expected.backward()

    for model in (policy, run.loss_function.reference):
        model.double().stock.config._experts_implementation = "eager"  # grouped products are not for float64
    batches = [data[part] for part in parts]
    loss = run.accumulate(batches, [len(part) / len(batch["labels"]) * 2 for part in parts], len(sum(parts, [])))
    preference = expected.item() - (answers_by_hand(ours, batch)[3].item() if config.use_moe else 0)
    assert float(loss) == pytest.approx(preference, rel=1e-5)
    gradients = stock_model(ours)
    for copied, parameter in zip(gradients.parameters(), policy.stock.parameters()):
        copied.data = parameter.grad
    gradients = weights_of_stock_model(gradients, config)
    for name, parameter in ours.named_parameters():
        largest = parameter.grad.abs().max().item()
        assert largest > 0, name
        # RMSNorm and rotary tables of a stock class are in float32 whatever else is in float64.
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=2e-4 * largest, msg=name)


@pytest.mark.parametrize("parts", [[[0, 1, 2], [3, 4]], [[0], [1, 2, 3, 4]]])
def test_gradients_do_not_depend_on_the_split_into_micro_batches(pairs_json, tmp_path, tokenizer, parts):
    """Also of the next-token loss, which trl itself divides by the tokens of a micro-batch; with experts."""
    options = dict(sft_weight=0.7, beta=0.2)
    run = make_run(pairs_json, tmp_path, tokenizer=tokenizer, fields=MOE, **options)
    move(run, scale=0.02)
    assert_gradients(run, options, parts)


# ---- policy and reference


@pytest.mark.parametrize("fields", [None, MOE])
def test_training_moves_the_policy_and_never_the_reference(pairs_json, tmp_path, tokenizer, fields):
    words = ("--max_steps", 3, "--optimizer", "muon")
    run = make_run(pairs_json, tmp_path, *words, tokenizer=tokenizer, fields=fields)
    reference = run.loss_function.reference
    before, start_of_policy = copy.deepcopy(reference.state_dict()), weights(run)
    assert all(torch.equal(before[name], tensor) for name, tensor in start_of_policy.items())
    run.train()
    after = reference.state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in reference.parameters())
    assert not any(torch.equal(start_of_policy[name], tensor) for name, tensor in run.model.state_dict().items())
    if fields:
        layers = run.model.config.n_layers
        assert len(reference.routing) == len(run.model.routing) == layers  # of one forward pass, not of all so far


def test_the_policy_computes_what_the_transformer_does(pairs_json, tmp_path, tokenizer):
    """Logits, balance loss and load of the experts, padding among the tokens; the balance loss reaches every router."""
    fields = {**MOE, "n_routed_experts": 5, "num_experts_per_tok": 3, "n_shared_experts": 2}
    run = make_run(pairs_json, tmp_path, tokenizer=tokenizer, fields=fields)
    policy, batch = run.model.eval(), run.train_loader.dataset[[0, 1, 2]]
    model, mask = transformer_of(policy.stock, policy.config).eval(), batch["attention_mask"]
    assert not mask.all()
    ours = model(batch["input_ids"], attention_mask=mask)
    theirs = policy(input_ids=batch["input_ids"], attention_mask=mask)
    assert ours.logits.std() > 1
    torch.testing.assert_close(theirs.logits[mask == 1], ours.logits[mask == 1], rtol=1e-3, atol=1e-3)
    balance = policy.balance_loss(mask)
    assert balance > 0.01 * policy.config.n_layers  # alpha times at least 1 a layer, when all is even
    torch.testing.assert_close(balance, ours.aux_loss)
    torch.testing.assert_close(policy.expert_load(), model.expert_load())
    run.accumulate([batch], [1.0], 1e9)  # the preference loss counts nothing here
    routers = [layer.block_sparse_moe.router for layer in policy.stock.model.layers]
    model.zero_grad()
    model(batch["input_ids"], attention_mask=mask).aux_loss.backward()
    for router, layer in zip(routers, model.layers):
        gradient = layer.feed_forward.gate.weight.grad
        assert gradient.abs().max() > 0
        torch.testing.assert_close(router.weight.grad, gradient, rtol=1e-3, atol=1e-6)


def test_a_dense_policy_has_no_balance_loss(pairs_json, tmp_path, tokenizer):
    run = make_run(pairs_json, tmp_path, tokenizer=tokenizer)
    batch = run.train_loader.dataset[[0, 1]]
    run.accumulate([batch], [1.0], 2)
    assert run.model.balance_loss(torch.ones_like(batch["labels"])) == 0 and run.model.expert_load() is None


def test_routing_is_in_float32_in_every_mode(pairs_json, tmp_path, tokenizer):
    run = make_run(pairs_json, tmp_path, "--dtype", "bfloat16", tokenizer=tokenizer, fields=MOE)
    seen = []
    for layer in run.model.stock.model.layers:
        experts = layer.block_sparse_moe.experts
        router = layer.block_sparse_moe.router
        experts.register_forward_pre_hook(lambda module, inputs, router=router: seen.append((router, inputs)))
    batch = run.train_loader.dataset[[0, 1, 2]]
    run.accumulate([batch], [1.0], 3)
    assert len(seen) == 2
    for (router, (hidden_states, experts, expert_weights)), (logits, noted) in zip(seen, run.model.routing):
        exact = hidden_states.double() @ router.weight.T.double()
        assert (logits - exact).abs().max() < 1e-4 and torch.equal(noted, experts)
        best = exact.topk(2, dim=1)
        assert torch.equal(best.indices, experts)
        assert (best.values.softmax(1) - expert_weights).abs().max() < 1e-5


@pytest.mark.parametrize("fields", [dict(num_experts_per_tok=1), dict(norm_topk_prob=False)])
def test_a_router_without_a_stock_class_is_one_line(fields):
    model = trained_scale(LMConfig(**{**TINY, "vocab_size": 50, **MOE, **fields}))
    with pytest.raises(UserError, match="--init_from: Granite renormalises.*DPO needs a stock class"):
        Policy(model)


def test_half_precision_keeps_the_weights_whole(pairs_json, tmp_path, tokenizer):
    run = make_run(
        pairs_json, tmp_path, "--dtype", "bfloat16", "--max_steps", 2, "--learning_rate", 1e-5, tokenizer=tokenizer
    )
    assert run.loss_at_start()[0] == pytest.approx(math.log(2), rel=1e-3)
    run.train()
    assert all(tensor.dtype == torch.float32 for tensor in torch.load(run.path).values())
    assert 0.5 < records(run)[-1]["validation_loss"] < 0.9


# ---- the log


def means(parts):
    """Over all pairs, or tokens, of some by_hand numbers."""
    return {name: torch.cat([part[name] for part in parts]).double().mean().item() for name in parts[0]}


def test_the_numbers_of_the_log_are_means_over_pairs(pairs_json, tmp_path, tokenizer, monkeypatch):
    """An epoch of steps of two micro-batches, whose last one is smaller, with validations between them; lr 0."""
    monkeypatch.setattr("model.training.dpo.KL_ROWS", 5)
    words = ("--learning_rate", 0, "--accumulation_steps", 2, "--batch_size", 5, "--eval_interval", 1)
    run = make_run(pairs_json, tmp_path, *words, "--log_interval", 100, tokenizer=tokenizer, beta=0.2)
    move(run, scale=0.05)
    data, held_out = run.train_loader.dataset, run.validation_loader.dataset
    order = run.train_loader.sampler.order(0).tolist()
    assert len(order) == 24 and len(held_out) == 6  # batches of 5, 5 | 5, 5 | 4 and of 5, 1
    config = run.model.config
    policy = transformer_of(run.model.stock, config).eval()
    reference = transformer_of(run.loss_function.reference.stock, config).eval()
    run.train()
    log = records(run)
    with torch.no_grad():
        parts = {name: [by_hand(policy, reference, source[[row]], 0.2) for row in rows] for name, source, rows in (
            ("first", data, order[:10]), ("rest", data, order[10:]), ("held out", held_out, range(6)))}  # fmt: skip
    expected = {name: means([numbers for _, numbers in part]) for name, part in parts.items()}
    losses = {name: torch.cat([loss for loss, _ in part]).mean().item() for name, part in parts.items()}
    assert expected["rest"]["kl"] > 0.01 and 0 < expected["rest"]["reward_accuracy"] < 1
    first, rest = (record for record in log if "loss" in record)
    for record, name in ((first, "first"), (rest, "rest")):
        assert {key: record[key] for key in expected[name]} == pytest.approx(expected[name], rel=2e-4, abs=1e-5)
        assert record["loss"] == pytest.approx(losses[name], rel=1e-4)
        assert "bits_per_byte" not in record and record["tokens_per_second"] > 0
    validations = [record for record in log if "validation_loss" in record]
    assert len(validations) == 4
    for record in validations:
        numbers = {key: record[f"validation_{key}"] for key in expected["held out"]}
        assert numbers == pytest.approx(expected["held out"], rel=2e-4, abs=1e-5)
        assert record["validation_loss"] == pytest.approx(losses["held out"], rel=1e-4)
        assert "validation_bits_per_byte" not in record
    described = json.loads(run.path.with_suffix(".json").read_text())
    assert described["validation"] == numbers and described["pairs_seen"] == 24
    assert described["tokens_seen"] == data.num_tokens  # real ones, of both sides


def test_the_numbers_start_at_zero(pairs_json, tmp_path, tokenizer, capsys):
    run = make_run(pairs_json, tmp_path, "--max_steps", 1, tokenizer=tokenizer)
    run.train()
    first = records(run)[0]
    assert first["step"] == 0 and first["validation_loss"] == pytest.approx(math.log(2), rel=1e-6)
    for name in ("kl", "reward_chosen", "reward_rejected", "reward_margin"):
        assert first[f"validation_{name}"] == pytest.approx(0, abs=1e-6)
    line = capsys.readouterr().out.splitlines()[1]
    assert line == ("step 0/1  validation loss 0.6931  margin 0.0000  accuracy 0.0000  KL 0.0000  (6 held-out pairs)")


def test_what_a_validation_that_was_cut_short_has_measured_is_forgotten(pairs_json, tmp_path, tokenizer):
    run = make_run(pairs_json, tmp_path, tokenizer=tokenizer)
    run.stop.requested = True
    run.validate()
    assert run.state.validation == {} and not any(run.loss_function.sums.values())


def test_the_last_validation_stays_in_the_description_of_a_resumed_run(pairs_json, tmp_path, tokenizer):
    words = ("--max_steps", 6, "--eval_interval", 2)
    make_run(pairs_json, tmp_path, *words, "--stop_after", 2, tokenizer=tokenizer).train()
    path = tmp_path / "dpo_32.json"
    before = json.loads(path.read_text())["validation"]
    run = make_run(pairs_json, tmp_path, *words, "--stop_after", 3, tokenizer=tokenizer)
    run.resume()
    run.train()
    assert json.loads(path.read_text())["step"] == 3 and json.loads(path.read_text())["validation"] == before


def test_operations_per_token_are_four_forward_passes(pairs_json, tmp_path, tokenizer):
    """Policy there and back, three of them, and the reference; see reports.flops_per_token."""
    run = make_run(pairs_json, tmp_path, tokenizer=tokenizer)
    parameters = sum(parameter.numel() for parameter in transformer_of(run.model.stock, run.model.config).parameters())
    assert run.flops_per_token(40) == pytest.approx((2 * parameters + 4 * 2 * 32 * 40) * 4)


# ---- learning


@pytest.mark.parametrize("fields", [None, MOE])
def test_checkpointed_layers_learn_the_same(pairs_json, tmp_path, tokenizer, fields):
    weights, calls = [], []
    for more in ([], ["--gradient_checkpointing"]):
        out, words = tmp_path / str(len(more)), ["--max_steps", 2, "--eval_interval", 9, *more]
        run, counted = make_run(pairs_json, out, *words, tokenizer=tokenizer, fields=fields), []
        layer = run.model.stock.base_model.layers[0]
        layer.input_layernorm.register_forward_hook(lambda *_, counted=counted: counted.append(torch.is_grad_enabled()))
        run.train()
        weights.append(run.strategy.weights())
        calls.append(sum(counted))
    assert calls == [2, 4] and weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_a_rule_is_learned_and_holds_for_pairs_not_seen(pairs_json, tmp_path, tokenizer, loss_type):
    words = ("--max_steps", 40, "--batch_size", 8, "--learning_rate", 2e-4, "--log_interval", 1)
    run = make_run(pairs_json, tmp_path, *words, tokenizer=tokenizer, loss_type=loss_type)
    run.train()
    log = [record for record in records(run) if "loss" in record]
    first, last = (record for record in records(run) if "validation_loss" in record)
    assert first["validation_reward_accuracy"] == 0 and last["validation_reward_accuracy"] == 1
    assert last["validation_reward_margin"] > 0.5 and last["validation_kl"] > 0
    assert log[-1]["reward_margin"] > log[1]["reward_margin"] > log[0]["reward_margin"] == pytest.approx(0, abs=1e-6)
    assert last["validation_loss"] < 0.8 * first["validation_loss"]


@pytest.mark.parametrize(
    "words, fields",
    [([], None), (["--optimizer", "muon", "--accumulation_steps", 2], MOE), (["--dtype", "bfloat16"], None)],
)
def test_resuming_is_exact(pairs_json, tmp_path, tokenizer, words, fields):
    words = ["--max_steps", 8, "--eval_interval", 3, "--learning_rate", 1e-4, "--log_interval", 1, *words]
    options = dict(tokenizer=tokenizer, fields=fields)
    straight = make_run(pairs_json, tmp_path / "straight", *words, **options)
    assert straight.train()
    assert not make_run(pairs_json, tmp_path / "parts", *words, "--stop_after", 5, **options).train()
    stopped = torch.load(tmp_path / "parts" / straight.path.name)
    run = make_run(pairs_json, tmp_path / "parts", *words, **options)
    run.resume()
    assert run.train()
    assert run.path.read_bytes() == straight.path.read_bytes()
    assert any(not torch.equal(tensor, stopped[name]) for name, tensor in torch.load(run.path).items())
    logs = [read_log(folder, run.path.stem) for folder in (tmp_path / "straight", tmp_path / "parts")]
    assert logs[0] == logs[1] and len(logs[0]) == 8 + 4


def test_a_training_state_of_another_shape_is_one_line(pairs_json, tmp_path, tokenizer):
    make_run(pairs_json, tmp_path, "--max_steps", 1, tokenizer=tokenizer).train()
    state = tmp_path / "dpo_32.resume.pth"
    saved = torch.load(state)
    for change in (
        lambda kept: kept.pop("norm.weight"),
        lambda kept: kept.update({"norm.weight": torch.ones(3)}),
    ):
        kept = dict(saved["weights"])
        change(kept)
        torch.save({**saved, "weights": kept}, state)
        with pytest.raises(UserError, match=r"dpo_32.resume.pth: .*norm.weight.*; omit --resume") as caught:
            make_run(pairs_json, tmp_path, "--max_steps", 1, tokenizer=tokenizer).resume()
        assert "\n" not in str(caught.value)


# ---- ranks


def train_both(folder, batch_size, tokenizer):
    """{number of pairs: weights} after two runs of two epochs, dense and with experts. Of two ranks the last batch of 11
    pairs leaves one a single pair, that of 9 none at all."""
    words, results = ("--batch_size", batch_size, "--epochs", 2, "--eval_interval", 2, "--log_interval", 1), {}
    for count, fields in ((11, None), (9, MOE)):
        options = dict(tokenizer=tokenizer, fields=fields, sft_weight=0.4)
        data = write_pairs(folder / f"{count}_{ranks.rank()}.json", {11: 14, 9: 11}[count])
        words += ("--optimizer", "adamw")  # Muon rounds to bfloat16, and two ranks add up in another order
        run = make_run(data, folder / str(count), *words, "--learning_rate", 2e-4, **options)
        assert len(run.train_loader.dataset) == count
        assert run.loss_at_start()[0] == pytest.approx(math.log(2), rel=1e-5)
        run.train()
        results[count] = weights_of_stock_model(run.model.stock, run.model.config)
        run.strategy.close()
    return results


PROGRAM = """
import sys
from pathlib import Path
sys.path[:0] = [".", "tests", "tests/training"]
import torch
from test_dpo import train_both
from model.tokenizer import load_tokenizer
from model.training import ranks

folder, tokenizer = sys.argv[1:]
results = train_both(Path(folder), 2, load_tokenizer(tokenizer))
torch.save(results, f"{folder}/result_{ranks.rank()}.pt")
ranks.shut_down()
"""


def test_two_ranks_train_as_one_process_also_where_one_has_fewer_pairs_or_none(
    tmp_path, small_tokenizer_path, tokenizer
):
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launcher, str(program), str(tmp_path / "2"), str(small_tokenizer_path)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr[-3000:]
    rank_0, rank_1 = (torch.load(tmp_path / "2" / f"result_{rank}.pt", weights_only=True) for rank in (0, 1))
    results = train_both(tmp_path / "1", 4, tokenizer), rank_0
    for count, log_name in ((11, "dpo_32"), (9, "dpo_32_moe")):
        for name, one in results[0][count].items():
            assert torch.isfinite(one).all() and torch.equal(rank_0[count][name], rank_1[count][name])
            torch.testing.assert_close(results[1][count][name], one, rtol=1e-5, atol=1e-5, msg=f"{count} {name}")
        single, double = (read_log(tmp_path / folder / str(count), log_name) for folder in "12")
        assert len(single) == len(double) == 6 + 4
        for one, two in zip(single, double):
            for record in (one, two):  # of two ranks each counts half, also one that has fewer rows
                record.pop("expert_load", None), record.pop("least_expert_load", None)
            assert two == pytest.approx(one, rel=1e-3, abs=1e-5)


def read_log(folder, name):
    """Records of a log without what depends on the clock."""
    lines = (folder / "logs" / f"{name}.jsonl").read_text().splitlines()
    clocks = "tokens_per_second", "seconds_left"
    return [{key: value for key, value in json.loads(line).items() if key not in clocks} for line in lines]
