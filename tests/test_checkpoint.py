"""Checkpoints: round trips, v1's files, wrong files, a full disk, files of different generations."""

import builtins
import errno
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import TINY
from model import checkpoint
from model.checkpoint import check_tokenizer, load_model, resume_path, save_checkpoint
from model.errors import UserError
from model.LMConfig import LMConfig, preset_config
from model.model import Transformer
from model.tokenizer import load_tokenizer

SMALL = {**TINY, "vocab_size": 50}


def small_model(**overrides):
    torch.manual_seed(0)
    return Transformer(LMConfig(**{**SMALL, **overrides})).eval()


def save_bare(model, path, prefix="", **extra):
    """What v1's scripts left behind: a state dict and nothing beside it."""
    torch.save({**{prefix + name: tensor for name, tensor in model.state_dict().items()}, **extra}, path)


def assert_same_function(model, other):
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, other.eval()(ids).logits)


@pytest.mark.parametrize(
    "fields", [{}, {"use_moe": True, "n_shared_experts": 2}, {"rope_scaling": {"rope_type": "linear", "factor": 2}}]
)
def test_round_trip_keeps_weights_config_and_metadata(tmp_path, fields):
    model, path = small_model(**fields), tmp_path / "deep" / "x_32.pth"
    save_checkpoint(path, model, {"stage": "pretrain", "step": 3})
    loaded, metadata = load_model(path)
    assert_same_function(model, loaded)
    assert loaded.output.weight is loaded.tok_embeddings.weight and loaded.device.type == "cpu"
    assert (
        metadata["stage"] == "pretrain" and metadata["step"] == 3 and metadata["versions"]["torch"] == torch.__version__
    )
    assert loaded.config.to_dict() == model.config.to_dict()
    plain = torch.load(path, weights_only=True)
    assert list(plain) == list(model.state_dict()) and not any("_orig_mod" in name for name in plain)


def test_every_config_field_makes_the_round_trip(tmp_path):
    fields = dict(
        dim=48, n_layers=1, n_heads=3, n_kv_heads=1, vocab_size=50, hidden_dim=24, multiple_of=32, norm_eps=1e-3,
        max_seq_len=40, dropout=0.1, flash_attn=False, rope_theta=500.0, rope_scaling={"rope_type": "yarn", "factor": 2.0},
        use_moe=True, num_experts_per_tok=3, n_routed_experts=5, n_shared_experts=2, aux_loss_alpha=0.3, seq_aux=False,
        norm_topk_prob=False, head_dim=8,
    )  # fmt: skip
    default = LMConfig()
    assert all(value != getattr(default, name) for name, value in fields.items())  # or nothing is shown
    save_checkpoint(tmp_path / "x.pth", Transformer(LMConfig(**fields)), {})
    config = load_model(tmp_path / "x.pth")[0].config
    assert {name: getattr(config, name) for name in fields} == fields
    assert fields.keys() | {"scoring_func"} == set(checkpoint.CONFIG_FIELDS)  # which has one value only


def test_the_same_weights_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        save_checkpoint(tmp_path / f"{name}.pth", small_model(), {})
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod."])
@pytest.mark.parametrize("use_moe", [False, True])
def test_v1_files_load_without_a_description(tmp_path, prefix, use_moe):
    model, path = small_model(use_moe=use_moe), tmp_path / "pretrain_32.pth"
    buffers = {f"{prefix}pos_cis": torch.zeros(32, 4, dtype=torch.complex64)}  # head size 8
    buffers |= {f"{prefix}layers.{layer}.attention.mask": torch.zeros(1, 1, 32, 32) for layer in range(2)}
    save_bare(model, path, prefix, **buffers)
    loaded, metadata = load_model(path)
    assert metadata == {} and (loaded.config.n_heads, loaded.config.n_kv_heads) == (4, 2)
    assert_same_function(model, loaded)


def test_heads_come_from_flags_or_a_preset_where_shapes_cannot_tell(tmp_path):
    path = tmp_path / "x.pth"
    save_bare(small_model(), path)
    assert load_model(path, n_heads=4)[0].config.n_kv_heads == 2
    with pytest.raises(UserError, match="n_kv_heads 2, not 4; .*--n_kv_heads"):
        load_model(path, n_heads=4, n_kv_heads=4)
    with pytest.raises(UserError, match="--n_heads"):
        load_model(path, n_heads=5)
    tiny = Transformer(preset_config("minimind-tiny", vocab_size=50))
    save_bare(tiny, path)
    assert load_model(path)[0].config.n_heads == 6


@pytest.mark.parametrize("described", [True, False])
@pytest.mark.parametrize("field, value", [("dim", 64), ("n_layers", 3), ("vocab_size", 60), ("use_moe", True)])
def test_another_shape_is_one_line_with_both(tmp_path, described, field, value):
    model, path = small_model(), tmp_path / "x.pth"
    save_checkpoint(path, model, {}) if described else save_bare(model, path)
    with pytest.raises(
        UserError, match=rf"x.pth: has {field} {getattr(model.config, field)}, not {value}; .*--{field}"
    ):
        load_model(path, **{"n_heads": 4, field: value})


def test_a_description_that_does_not_fit_names_both_shapes(tmp_path):
    path = tmp_path / "x.pth"
    save_checkpoint(path, small_model(), {})
    save_bare(small_model(dim=64), path)
    with pytest.raises(UserError, match=r"x.pth: has dim 64, but its .json says 32"):
        load_model(path)
    save_bare(small_model(n_layers=1), path)
    with pytest.raises(UserError, match=r"has n_layers 1, but its .json says 2"):
        load_model(path)


@pytest.mark.parametrize(
    "change",
    [dict(n_layers=10**12), dict(dim=2**40, n_heads=1), dict(use_moe=True, n_routed_experts=10**12), dict(dim="32"),
     dict(vocab_size=10**15), dict(n_heads=3), dict(norm_eps="small"), dict(n_heads=0), dict(max_seq_len=-1),
     dict(rope_scaling={"rope_type": "yarn", "factor": 2, "beta_fast": "x"}), dict(hidden_dim=None, multiple_of="x")],
)  # fmt: skip
def test_a_crafted_description_is_one_line(tmp_path, change):
    path = tmp_path / "x.pth"
    save_checkpoint(path, small_model(), {})
    metadata = json.loads(path.with_suffix(".json").read_text())
    metadata["config"].update(change)
    path.with_suffix(".json").write_text(json.dumps(metadata))
    with pytest.raises(UserError, match=r"x\.(pth|json): "):
        load_model(path)
    path.with_suffix(".json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"x\.json: describes no checkpoint"):
        load_model(path)


def test_a_context_beyond_memory_takes_none_before_it_is_used(tmp_path):
    save_checkpoint(tmp_path / "x.pth", small_model(), {})
    model, _ = load_model(tmp_path / "x.pth", max_seq_len=10**15)
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_free_fields_can_be_overridden(tmp_path):
    save_checkpoint(tmp_path / "x.pth", small_model(), {})
    scaling = {"rope_type": "linear", "factor": 2.0}
    config = load_model(tmp_path / "x.pth", max_seq_len=64, dropout=0.1, rope_scaling=scaling)[0].config
    assert (config.max_seq_len, config.dropout, config.rope_scaling) == (64, 0.1, scaling)


@pytest.mark.parametrize(
    "field, value",
    [("n_heads", 2), ("n_kv_heads", 1), ("norm_eps", 1e-3), ("rope_theta", 500.0), ("num_experts_per_tok", 3),
     ("norm_topk_prob", False)],
)  # fmt: skip
def test_what_weights_mean_cannot_be_overridden(tmp_path, field, value):
    save_checkpoint(tmp_path / "x.pth", small_model(use_moe=True), {})
    with pytest.raises(UserError, match=f"x.pth: has {field} .*, not {value}; .*--{field}"):
        load_model(tmp_path / "x.pth", **{field: value})


class Malicious:
    def __reduce__(self):
        return print, ("this code must not run",)


def broken_files():
    whole = pickle.dumps(Malicious())
    return {
        "empty": lambda path: path.write_bytes(b""),
        "text": lambda path: path.write_text("<html>not found</html>\n"),
        "pickle": lambda path: path.write_bytes(whole),
        "malicious": lambda path: torch.save({"tok_embeddings.weight": Malicious()}, path),
        "whole model": lambda path: torch.save(small_model(), path),
        "truncated": lambda path: path.write_bytes(saved_bytes(path)[:-1000]),
        "half": lambda path: path.write_bytes(saved_bytes(path)[:5000]),
        "list": lambda path: torch.save([1, 2], path),
        "nested": lambda path: torch.save({"model": small_model().state_dict()}, path),
        "foreign": lambda path: torch.save({"weight": torch.zeros(3)}, path),
        "scalar": lambda path: torch.save({"tok_embeddings.weight": torch.zeros(3)}, path),
        "no layers": lambda path: torch.save({"tok_embeddings.weight": torch.zeros(3, 4)}, path),
        "untied": lambda path: save_bare(small_model(), path, **{"output.weight": torch.zeros(50, 32)}),
    }


def saved_bytes(path):
    save_bare(small_model(), path)
    return path.read_bytes()


@pytest.mark.parametrize("kind", broken_files())
def test_broken_foreign_and_malicious_files_are_one_line(tmp_path, capsys, kind):
    path = tmp_path / "x.pth"
    broken_files()[kind](path)
    with pytest.raises(UserError, match=r"x\.pth: ") as caught:
        load_model(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert capsys.readouterr().out == ""
    if kind in ("malicious", "whole model"):
        assert "refused" in str(caught.value)


def test_missing_file_and_broken_description(tmp_path):
    with pytest.raises(UserError, match="no such checkpoint"):
        load_model(tmp_path / "none.pth")
    path = tmp_path / "x.pth"
    for text in ("{", "[]", "{}", '{"config": {"dim": 33}}', '{"config": 3}'):
        save_checkpoint(path, small_model(), {})
        path.with_suffix(".json").write_text(text)
        with pytest.raises(UserError, match=r"x\.json"):
            load_model(path)


def test_files_of_different_generations_are_noticed(tmp_path, capsys):
    path = tmp_path / "x.pth"
    save_checkpoint(path, small_model(), {"step": 1})
    load_model(path)
    assert capsys.readouterr().err == ""
    model = small_model()
    model.norm.weight.data.fill_(2.0)
    save_bare(model, path)  # as if the power had gone between two renames
    assert_same_function(model, load_model(path)[0])
    assert "not the file its .json describes" in capsys.readouterr().err


class Full:
    """A disk that is full after so many bytes."""

    def __init__(self, handle, room):
        self.handle, self.room = handle, room

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.handle.write(data)

    def __getattr__(self, name):
        return getattr(self.handle, name)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.handle.close()


@pytest.mark.parametrize("suffix", [".pth", ".resume.pth", ".json"])
def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, monkeypatch, suffix):
    path = tmp_path / "x.pth"
    save_checkpoint(path, small_model(), {"step": 1}, {"progress": 1})
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert len(before) == 3
    model = small_model()
    model.norm.weight.data.fill_(2.0)
    really_open = builtins.open

    def limited_open(file, *positional, **named):
        handle = really_open(file, *positional, **named)
        return Full(handle, 300) if f"x{suffix}.tmp-" in str(file) else handle

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", limited_open)
        with pytest.raises(OSError) as caught:
            save_checkpoint(path, model, {"step": 2}, {"progress": 2})
    assert caught.value.errno == errno.ENOSPC
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_all_is_on_the_disk_before_the_first_rename_and_the_training_state_is_renamed_first(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (done.append("fsync"), fsync(number)))
    monkeypatch.setattr(os, "replace", lambda source, target: (done.append(Path(target).name), replace(source, target)))
    save_checkpoint(tmp_path / "x.pth", small_model(), {"step": 1}, {"progress": 1})
    assert done == ["fsync"] * 3 + ["x.resume.pth", "x.pth", "x.json"] + ["fsync"]  # the folder, once


def test_the_training_state_holds_its_own_weights(tmp_path):
    path, model = tmp_path / "x.pth", small_model()
    save_checkpoint(path, model, {}, {"progress": {"step": 1}})
    state = checkpoint.read_tensors(resume_path(path))
    assert state["weights_sha256"] == json.loads((tmp_path / "x.json").read_text())["weights_sha256"]
    assert all(torch.equal(tensor, state["weights"][name]) for name, tensor in model.state_dict().items())


def test_another_tokenizer_is_refused(tokenizer):
    model = small_model()
    with pytest.raises(UserError, match=f"has 50 words but the tokenizer {len(tokenizer)}; .*--tokenizer_path"):
        check_tokenizer(tokenizer, "x.pth", model, {})
    model = small_model(vocab_size=len(tokenizer))
    check_tokenizer(tokenizer, "x.pth", model, {})
    check_tokenizer(tokenizer, "x.pth", model, {"tokenizer_hash": checkpoint.tokenizer_hash(tokenizer)})
    with pytest.raises(UserError, match="another tokenizer of the same size"):
        check_tokenizer(tokenizer, "x.pth", model, {"tokenizer_hash": "other"})


def test_a_bare_file_with_the_shipped_tokenizer_gets_one_warning(small_tokenizer, capsys):
    tokenizer = load_tokenizer()
    model = small_model(vocab_size=len(tokenizer))
    check_tokenizer(tokenizer, "v1.pth", model, {})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: v1.pth: cannot tell which tokenizer") and "--tokenizer_path" in line
    check_tokenizer(tokenizer, "x.pth", model, {"tokenizer_hash": checkpoint.tokenizer_hash(tokenizer)})
    check_tokenizer(small_tokenizer, "x.pth", small_model(vocab_size=len(small_tokenizer)), {})  # given on purpose
    assert not capsys.readouterr().err


def test_a_kill_while_saving_leaves_a_whole_checkpoint(tmp_path):
    """kill -9 at random moments: what lies under the final names always loads and belongs together."""
    program = (
        "import sys, torch; from pathlib import Path; sys.path[:0] = ['.', 'tests']\n"
        "from test_checkpoint import small_model; from model.checkpoint import save_checkpoint\n"
        "model = small_model(); step = 0\n"
        "while True:\n"
        "    step += 1; model.norm.weight.data.fill_(step)\n"
        f"    save_checkpoint({str(tmp_path / 'x.pth')!r}, model, dict(step=step), dict(progress=step))\n"
        "    print(step, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    for _ in range(20):
        done = int(process.stdout.readline())
    process.kill()
    process.wait()
    model, metadata = load_model(tmp_path / "x.pth")
    state = checkpoint.read_tensors(resume_path(tmp_path / "x.pth"))
    assert model.norm.weight[0].item() >= done and metadata["step"] >= done and state["progress"] >= done
    assert state["weights"]["norm.weight"][0].item() == state["progress"]
