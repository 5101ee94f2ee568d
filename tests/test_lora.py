"""LoRA adapters: on which matrices, what they compute against peft and by hand, their files, the folder for peft."""

import copy
import itertools
import json
import math
import re

import pytest
import torch

from conftest import TINY, trained_adapter, trained_scale
from model.checkpoint import file_sha256, load_model, save_checkpoint
from model.errors import UserError
from model.LMConfig import LMConfig
from model.lora import (
    PEFT_FILES,
    Adapter,
    adapter_weights,
    add_adapter,
    check_base,
    check_peft_folder,
    describe_adapter,
    load_adapter_weights,
    merge,
    merged_weights,
    named,
    read_adapter,
    save_peft_folder,
    target_matrices,
    weights_sha256,
)
from model.settings import LoraSettings

MOE = dict(use_moe=True, n_routed_experts=3, num_experts_per_tok=2, n_shared_experts=2)
IDS = torch.randint(3, 90, (3, 12), generator=torch.Generator().manual_seed(4))
RANK, ALPHA = 4, 6.0
PARENT = {"file": "out/full_sft_32.pth", "sha256": "0" * 64}


def make_model(fields=None):
    return trained_scale(LMConfig(**{**TINY, "vocab_size": 90, **(fields or {})}))


def settings(targets="all", **more):
    return LoraSettings(lora_rank=RANK, lora_alpha=ALPHA, lora_targets=targets, **more)


def with_adapter(fields=None, targets="all"):
    """(model as training leaves it, peft's layers in it and B not zero; its Adapter)."""
    model = make_model(fields)
    weights = trained_adapter(model, add_adapter(model, settings(targets)))
    load_adapter_weights(model, weights, "memory")
    return model, Adapter("lora_x_32.pth", weights, {"lora": {"alpha": ALPHA}, "parent": PARENT})


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@torch.no_grad()
def greedy(model, count=15):
    ids = IDS
    for _ in range(count):
        ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
    return ids[:, IDS.shape[1] :]


def assert_same_logits(ours, theirs):
    """Of two models in float64 (positions and router stay in float32)."""
    ours, theirs = logits(ours.double()), logits(theirs.double())
    assert theirs.std() > 1 and (ours - theirs).abs().max() < 1e-5 * theirs.std()


def same_bits(state, other):
    return state.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in state.items())


# ---- which matrices


ATTENTION, SWIGLU = [f"attention.{name}" for name in ("wq", "wk", "wv", "wo")], ["w1", "w2", "w3"]
DENSE = [f"layers.{layer}.{name}" for layer in (0, 1) for name in [*ATTENTION, *(f"feed_forward.{w}" for w in SWIGLU)]]
PARTS = ["experts.0", "experts.1", "experts.2", "shared_experts"]
ROUTED = [f"feed_forward.{part}.{name}" for part in PARTS for name in SWIGLU]
SPARSE = [f"layers.{layer}.{name}" for layer in (0, 1) for name in [*ATTENTION, *ROUTED]]


@pytest.mark.parametrize(
    ("fields", "targets", "expected"),
    [
        (None, "all", DENSE),
        (MOE, "all", SPARSE),
        (None, "wq", ["layers.0.attention.wq", "layers.1.attention.wq"]),
        (MOE, "attention", [*SPARSE[:4], *SPARSE[16:20]]),
        (MOE, "experts", [*SPARSE[4:13], *SPARSE[20:29]]),
        (MOE, "shared_experts", [*SPARSE[13:16], *SPARSE[29:]]),
        (MOE, "experts.1.w2", [SPARSE[8], SPARSE[24]]),
        (None, "layers.0", DENSE[:7]),
        (None, "layers.0.feed_forward.w1", ["layers.0.feed_forward.w1"]),
        (None, " w3 ,layers.1.attention.wo,wv", [DENSE[2], DENSE[6], DENSE[9], DENSE[10], DENSE[13]]),
        (None, "wq,attention,layers.0.attention.wq", [*DENSE[:4], *DENSE[7:11]]),
    ],
)
def test_targets_by_hand(fields, targets, expected):
    """In the model's order; neither router nor output matrix is among them."""
    assert target_matrices(make_model(fields), targets) == expected


def test_a_layer_of_two_digits_is_not_one_of_one():
    assert target_matrices(make_model(dict(n_layers=11)), "layers.1.attention.wq") == ["layers.1.attention.wq"]


@pytest.mark.parametrize(
    ("targets", "wrong"),
    [("output", "output"), ("gate", "gate"), ("", ""), ("wq,,wk", ""), ("w", "w"), ("wq, lm_head", "lm_head"),
     ("wq,layers.2", "layers.2"), ("all,wq", "all"), ("tok_embeddings", "tok_embeddings"), ("norm", "norm"), (".", ".")],
)  # fmt: skip
def test_a_target_that_matches_nothing_is_one_line(targets, wrong):
    choices = "attention, experts, feed_forward, shared_experts, w1, w2, w3, wk, wo, wq, wv, or all"
    with pytest.raises(UserError, match=re.escape(f"--lora_targets: {wrong!r} matches no matrix")) as caught:
        add_adapter(make_model(MOE), settings(targets))
    assert caught.value.exit_code == 2 and str(caught.value).endswith(f"choose from {choices}")


# ---- training


@pytest.mark.parametrize(("fields", "targets"), [(None, "all"), (MOE, "all"), (MOE, "experts,wq")])
def test_a_new_adapter_changes_nothing_and_learns_alone(fields, targets):
    plain, model = make_model(fields), make_model(fields)
    matrices = add_adapter(model, settings(targets))
    assert matrices == target_matrices(plain, targets)
    assert torch.equal(logits(model), logits(plain))
    base = {name.replace(".base_layer", ""): parameter for name, parameter in model.named_parameters()}
    base, learned = ({n: p for n, p in base.items() if ("lora" in n) == own} for own in (False, True))
    assert same_bits(base, dict(plain.named_parameters())) and len(learned) == 2 * len(matrices)
    assert all(parameter.requires_grad == (name in learned) for name, parameter in (base | learned).items())

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)  # of all: what is frozen has no gradient to move it
    for _ in range(3):
        output = model.train()(IDS, labels=IDS)
        (output.loss + output.aux_loss).backward()
        assert not any(parameter.grad is not None for parameter in base.values())
        assert all(parameter.grad is not None for parameter in learned.values())
        optimizer.step()
    assert same_bits(base, dict(plain.named_parameters()))
    assert all(parameter.abs().max() > 0 for parameter in learned.values())
    assert (logits(model.eval()) - logits(plain)).abs().max() > 0.1


def test_dropout_is_of_training_alone():
    model = make_model()
    load_adapter_weights(model, trained_adapter(model, add_adapter(model, settings(lora_dropout=0.5))), "memory")
    assert torch.equal(logits(model.eval()), logits(with_adapter()[0]))
    assert not torch.equal(logits(model.train()), logits(model))


def test_what_trains_is_described():
    """By hand: rank times rows and columns, for wq 4 (32 + 32), wk 4 (16 + 32), a matrix of an expert 4 (128 + 32)."""
    model = make_model(MOE)
    assert describe_adapter(model, add_adapter(model, settings("wq,wk,experts"))) == (
        "adapter on 22 matrices: 2 attention.wq, 2 attention.wk, "
        "6 feed_forward.experts.w1, 6 feed_forward.experts.w2, 6 feed_forward.experts.w3\n"
        "12,416 of 144,672 parameters train (8.58%)"
    )


def test_an_adapter_is_kept_under_v1s_names():
    model, adapter = with_adapter(targets="wk,layers.0.feed_forward.w2")
    weights = adapter_weights(model)
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == {
        "layers.0.attention.wk.lora_A.weight": (4, 32),
        "layers.0.attention.wk.lora_B.weight": (16, 4),
        "layers.0.feed_forward.w2.lora_A.weight": (4, 128),
        "layers.0.feed_forward.w2.lora_B.weight": (32, 4),
        "layers.1.attention.wk.lora_A.weight": (4, 32),
        "layers.1.attention.wk.lora_B.weight": (16, 4),
    }
    assert same_bits(weights, adapter.weights) and not any(tensor.requires_grad for tensor in weights.values())
    assert adapter.matrices == ["layers.0.attention.wk", "layers.0.feed_forward.w2", "layers.1.attention.wk"]


A_OF_WK = "layers.0.attention.wk.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({A_OF_WK: None}, f"{A_OF_WK} is missing in the file but (4, 32) in the adapter"),
        ({A_OF_WK: torch.ones(3, 32)}, f"{A_OF_WK} is (3, 32) in the file but (4, 32) in the adapter"),
        ({"layers.9.x": torch.ones(2)}, "layers.9.x is (2,) in the file but missing in the adapter"),
    ],
)
def test_weights_of_another_adapter_are_not_loaded(change, problem):
    model, adapter = with_adapter(targets="wk")
    other = {name: tensor for name, tensor in ({n: t + 1 for n, t in adapter.weights.items()} | change).items()}
    with pytest.raises(UserError, match=re.escape(f"x.resume.pth: {problem}")):
        load_adapter_weights(
            model, {name: tensor for name, tensor in other.items() if tensor is not None}, "x.resume.pth"
        )
    assert same_bits(adapter_weights(model), adapter.weights)


# ---- merging


@pytest.mark.parametrize(("rank", "alpha"), [(1, 16.0), (4, 6.0), (8, 0.5), (3, 3)])
def test_the_update_by_hand(rank, alpha):
    model = make_model()
    adapter = Adapter("x.pth", trained_adapter(model, ["layers.1.attention.wv"], rank), {"lora": {"alpha": alpha}})
    narrow, wide = (tensor.double().tolist() for tensor in adapter.weights.values())
    expected = [
        [alpha / rank * math.fsum(wide[row][k] * narrow[k][column] for k in range(rank)) for column in range(32)]
        for row in range(16)
    ]
    update = adapter.update("layers.1.attention.wv")
    assert update.dtype == torch.float32
    torch.testing.assert_close(update.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "targets"), [(None, "all"), (MOE, "all"), (MOE, "experts"), (None, "wq,layers.1.feed_forward.w2")]
)
def test_a_merged_model_computes_what_peft_does(fields, targets):
    model, adapter = with_adapter(fields, targets)
    plain, merged = make_model(fields), make_model(fields)
    before = copy.deepcopy(plain.state_dict())
    assert list(merged_weights(plain, adapter)) == target_matrices(plain, targets)
    assert same_bits(plain.state_dict(), before)
    merge(merged, adapter)
    assert (logits(model) - logits(plain)).abs().mean() > 0.5
    changed = {f"{matrix}.weight" for matrix in adapter.matrices}
    assert {name for name, tensor in merged.state_dict().items() if not torch.equal(tensor, before[name])} == changed
    assert torch.equal(greedy(merged), greedy(model)) and not torch.equal(greedy(merged), greedy(plain))
    assert_same_logits(merged, model)


def test_a_bfloat16_matrix_is_rounded_once():
    _, adapter = with_adapter()
    model = make_model().to(torch.bfloat16)
    for matrix, weight in merged_weights(model, adapter).items():
        narrow, wide = (adapter.weights[f"{matrix}.lora_{part}.weight"].double() for part in "AB")
        exact = model.get_submodule(matrix).weight.double() + ALPHA / RANK * wide @ narrow
        assert weight.dtype == torch.bfloat16 and not weight.requires_grad
        # A sum in float32 may lie on the other side of a tie, a rounded summand puts every fifth number elsewhere.
        assert (weight != exact.bfloat16()).double().mean() < 0.002


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        (MOE, "layers.0.feed_forward.w1, which the model does not have; it is for another one"),
        (dict(n_layers=1), "layers.1.attention.wq, which the model does not have"),
        (dict(dim=48), "layers.0.attention.wq of (32, 32), which is (48, 48) in the model"),
        (dict(hidden_dim=100), "layers.0.feed_forward.w1 of (128, 32), which is (100, 32) in the model"),
    ],
)
def test_an_adapter_of_another_model_is_refused_and_changes_nothing(fields, problem):
    _, adapter = with_adapter()
    model = make_model(fields)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=re.escape(f"lora_x_32.pth: changes {problem}")):
        merge(model, adapter)
    assert same_bits(model.state_dict(), before)


@pytest.mark.parametrize(
    "matrix", ["tok_embeddings", "output", "norm", "layers.0.attention", "layers.0.attention_norm"]
)
def test_only_linear_layers_of_blocks_can_be_changed(matrix):
    weights = {f"{matrix}.lora_A.weight": torch.ones(1, 32), f"{matrix}.lora_B.weight": torch.ones(90, 1)}
    with pytest.raises(UserError, match=f"changes {matrix}, which the model does not have"):
        merge(make_model(), Adapter("x.pth", weights, {"lora": {"alpha": 1.0}}))


def test_two_halves_of_different_rank_are_refused():
    _, adapter = with_adapter(targets="wq")
    adapter.weights[A_OF_WK.replace("wk", "wq")] = torch.ones(3, 32)
    with pytest.raises(UserError, match=re.escape("changes layers.0.attention.wq of (32, 32)")):
        merge(make_model(), adapter)


# ---- files


LORA = {"rank": RANK, "alpha": ALPHA, "targets": ["layers.0.attention.wk", "layers.1.attention.wk"]}


@pytest.fixture
def files(tmp_path):
    """Folder with a base and an adapter on it, as the stages leave them."""
    model, adapter = with_adapter(targets="wk")
    base = tmp_path / "full_sft_32.pth"
    save_checkpoint(base, make_model(), {"stage": "full_sft"})
    parent = {"file": str(base), "sha256": file_sha256(base)}
    metadata = {"stage": "lora_x", "lora": LORA, "parent": parent}
    save_checkpoint(tmp_path / "lora_x_32.pth", model, metadata, weights=adapter_weights(model))
    return tmp_path


def test_an_adapter_is_read_as_it_was_written(files, capsys):
    model, written = with_adapter(targets="wk")
    adapter = read_adapter(str(files / "lora_x_32.pth"))
    assert same_bits(adapter.weights, written.weights) and adapter.metadata["lora"] == LORA
    base, merged = load_model(files / "full_sft_32.pth")[0], load_model(files / "full_sft_32.pth")[0]
    check_base(adapter, files / "full_sft_32.pth")
    merge(merged.eval(), adapter)
    assert same_bits(base.state_dict(), make_model().state_dict())
    assert_same_logits(merged, model)
    assert capsys.readouterr().err == ""


def test_half_precision_in_a_file_becomes_float32(files):
    path, (_, adapter) = files / "lora_x_32.pth", with_adapter(targets="wk")
    torch.save({name: tensor.half() for name, tensor in adapter.weights.items()}, path)
    weights = read_adapter(path).weights
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    assert same_bits(weights, {name: tensor.half().float() for name, tensor in adapter.weights.items()})


DESCRIPTION = "needs its .json beside it, which says rank, alpha and base"


def without(name):
    return lambda description: description.pop(name)


def alpha(value):
    return lambda description: description.update(lora={"rank": RANK, "alpha": value})


@pytest.mark.parametrize(
    "change",
    [without("lora"), without("parent"), *map(alpha, (math.nan, math.inf, -math.inf, None, "16", [16])),
     lambda description: description.update(lora=[16]), lambda description: description.update(parent="base.pth")],
)  # fmt: skip
def test_an_adapter_without_its_description_is_refused(files, change):
    path, description = files / "lora_x_32.pth", files / "lora_x_32.json"
    record = json.loads(description.read_text())
    change(record)
    description.write_text(json.dumps(record))
    with pytest.raises(UserError, match=re.escape(f"{path}: {DESCRIPTION}")):
        read_adapter(path)


def test_a_description_that_is_missing_or_damaged_is_named(files):
    path, description = files / "lora_x_32.pth", files / "lora_x_32.json"
    text = description.read_text()
    for damaged in (text[:-20], "[]", "{}", "\x00"):
        description.write_text(damaged)
        with pytest.raises(UserError, match=re.escape(f"{description}: describes no checkpoint")):
            read_adapter(path)
    description.unlink()
    with pytest.raises(UserError, match=re.escape(f"{path}: {DESCRIPTION}")):
        read_adapter(path)


WHOLE = "is not a whole adapter"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({A_OF_WK: None}, WHOLE),
        ({A_OF_WK.replace("lora_A", "lora_B"): None}, WHOLE),
        ({A_OF_WK: torch.ones(4, 32, 1)}, WHOLE),
        ({A_OF_WK: torch.tensor(1.0)}, WHOLE),
        ({A_OF_WK: 1.0}, WHOLE),
        ({"norm.weight": torch.ones(32)}, WHOLE),
        ({7: torch.ones(2, 2)}, WHOLE),
        ({A_OF_WK: torch.full((4, 32), math.nan)}, "holds numbers that are not finite"),
        ({A_OF_WK: torch.full((4, 32), -math.inf)}, "holds numbers that are not finite"),
    ],
)
def test_a_damaged_adapter_is_refused(files, change, problem):
    path, (_, adapter) = files / "lora_x_32.pth", with_adapter(targets="wk")
    state = {name: value for name, value in (adapter.weights | change).items() if value is not None}
    torch.save(state, path)
    with pytest.raises(UserError, match=re.escape(f"{path}: {problem}")):
        read_adapter(path)


def test_what_is_no_adapter_is_refused(files):
    with pytest.raises(UserError, match="full_sft_32.pth: holds no LoRA adapter; --lora takes"):
        read_adapter(files / "full_sft_32.pth")
    torch.save([A_OF_WK], files / "list.pth")
    with pytest.raises(UserError, match="list.pth: holds no LoRA adapter"):
        read_adapter(files / "list.pth")
    cut = files / "cut.pth"
    cut.write_bytes((files / "lora_x_32.pth").read_bytes()[:-100])
    for path, problem in (
        (cut, "not a PyTorch checkpoint, or a truncated one"),
        (files / "no.pth", "no such checkpoint"),
    ):
        with pytest.raises(UserError, match=f"{path.name}: {problem}"):
            read_adapter(path)


def test_a_file_that_its_description_is_not_of_is_warned_of(files, capsys):
    path, (_, adapter) = files / "lora_x_32.pth", with_adapter(targets="wk")
    torch.save({name: tensor + 1 for name, tensor in adapter.weights.items()}, path)
    read_adapter(path)
    assert (
        capsys.readouterr().err == f"warning: {path} is not the file its .json describes (changed or half replaced)\n"
    )


def test_the_base_is_known_by_its_bytes(files, capsys):
    adapter, base = read_adapter(files / "lora_x_32.pth"), files / "full_sft_32.pth"
    elsewhere, other = files / "copy.pth", files / "other.pth"
    elsewhere.write_bytes(base.read_bytes())
    check_base(adapter, base)
    check_base(adapter, str(elsewhere))
    save_checkpoint(other, make_model(dict(n_layers=1)), {})
    problem = f"{files / 'lora_x_32.pth'}: was trained on {base}, and the weights in {other} are not those"
    with pytest.raises(UserError, match=re.escape(problem) + "; give its base with --checkpoint, or --force"):
        check_base(adapter, other)
    assert capsys.readouterr().err == ""
    check_base(adapter, other, force=True)
    assert capsys.readouterr().err == f"warning: {problem}\n"
    del adapter.metadata["parent"]["sha256"]
    with pytest.raises(UserError, match="are not those"):
        check_base(adapter, base)


def test_names_and_hashes_tell_a_model_from_the_same_with_an_adapter(files):
    base, adapter, other = (files / name for name in ("full_sft_32.pth", "lora_x_32.pth", "lora_y_32.pth"))
    other.write_bytes(b"another")
    assert named(base) == base and named(base, None) == base
    assert named(base, adapter) == f"{base} with {adapter}"
    assert weights_sha256(base) == file_sha256(base)
    pairs = list(itertools.product((base, other), (None, adapter, other)))
    hashes = [weights_sha256(*pair) for pair in pairs]
    assert len(set(hashes)) == len(pairs) and all(re.fullmatch("[0-9a-f]{64}", digest) for digest in hashes)
    folder = files / "folder"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(base.read_bytes())
    assert weights_sha256(folder, adapter) == weights_sha256(base, adapter)


# ---- for peft


@pytest.mark.parametrize(("fields", "targets"), [(None, "all"), (MOE, "all"), (MOE, "experts,wq")])
def test_peft_reads_the_folder_and_computes_what_the_merged_model_does(tmp_path, fields, targets):
    from peft import PeftModel

    model, adapter = with_adapter(fields, targets)
    merged = make_model(fields)
    merge(merged, adapter)
    check_peft_folder(tmp_path / "peft")
    for _ in range(2):  # the second one takes the place of the first
        save_peft_folder(
            tmp_path / "peft", adapter_weights(model), settings(targets), adapter.matrices, tmp_path / "base.pth"
        )
        check_peft_folder(tmp_path / "peft")
    assert {file.name for file in (tmp_path / "peft").iterdir()} == set(PEFT_FILES) - {"README.md"}
    read = PeftModel.from_pretrained(make_model(fields), tmp_path / "peft").eval()
    config = read.peft_config["default"]
    assert (config.r, config.lora_alpha, config.base_model_name_or_path) == (RANK, ALPHA, str(tmp_path / "base.pth"))
    assert_same_logits(read, merged)


@pytest.mark.parametrize("foreign", ["model.safetensors", "adapter_model.bin", "adapter_config.json/x"])
def test_a_folder_with_other_files_is_not_replaced(tmp_path, foreign):
    (tmp_path / foreign).parent.mkdir(exist_ok=True)
    (tmp_path / foreign).write_text("mine")
    with pytest.raises(UserError, match=f"{tmp_path}: holds {foreign.split('/')[0]}, which is not of an export"):
        check_peft_folder(tmp_path)
    with pytest.raises(UserError, match="is a file, not a folder"):
        check_peft_folder(tmp_path / foreign)


def test_the_scale_stays_where_only_the_rank_changes():
    assert [LoraSettings(lora_rank=rank).lora_alpha for rank in (1, 8, 16)] == [2, 16, 32]
    assert LoraSettings(lora_rank=4, lora_alpha=3.0).lora_alpha == 3


def test_frozen_parameters_cost_no_gradient_of_their_own():
    """6 operations for a parameter that trains, 4 for one that does not, and those of attention."""
    from model.training.reports import flops_per_token

    model = trained_scale(LMConfig(**TINY, vocab_size=100))
    frozen, attention = sum(parameter.numel() for parameter in model.parameters()), 12 * 2 * 32 * 20
    assert flops_per_token(model, 20) == 6 * frozen + attention
    add_adapter(model, LoraSettings(lora_rank=2))
    trained = sum(parameter.numel() for parameter in model.parameters()) - frozen
    assert flops_per_token(model, 20) == 4 * frozen + 6 * trained + attention
