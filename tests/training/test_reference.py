"""References: what a thinned log keeps, what it says of a run of the same kind, and that a broken one breaks nothing."""

import json
import shutil

import numpy as np
import pytest
from test_loop import make_trainer, records

from conftest import CPU_FLAGS, ROOT, TINY_FLAGS, assert_one_line_error, good
from model.errors import UserError
from model.training import reference
from model.training.reference import POINTS, Reference, find_reference, reference_lines, thinned

LINE = dict(
    stage="test",
    config=dict.fromkeys(reference.SHAPE, 1),
    data=dict(name="a", fingerprint="f"),
    recipe={"rows a step": 8},
)
POINTS_OF_ONE = [
    dict(step=1, tokens_seen=100, loss=8.0, bits_per_byte=4.0),
    dict(step=9, tokens_seen=300, loss=4.0, bits_per_byte=2.0),
]


@pytest.fixture
def tokenizer(small_tokenizer):
    return small_tokenizer


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of references, empty."""
    monkeypatch.setattr(reference, "FOLDER", path := tmp_path / "references")
    path.mkdir()
    return path


@pytest.fixture
def trained(tmp_path, pretrain_csv, small_tokenizer_path, run):
    """(flags of a run, its out folder, its log) of pretraining."""
    flags = [
        *TINY_FLAGS,
        *CPU_FLAGS,
        "--tokenizer_path",
        small_tokenizer_path,
        "--data_path",
        pretrain_csv,
        "--max_steps",
        60,
    ]
    flags += ["--learning_rate", 1e-2, "--log_interval", 3, "--eval_interval", 10]
    good(run("1-pretrain.py", *flags, "--out_dir", tmp_path / "first"))
    return flags, tmp_path / "first", tmp_path / "first/logs/pretrain_32.jsonl"


def write(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), "utf-8")
    return path


def draw(run, log, path, *more):
    return run("images/draw.py", "reference", "--log", log, "--output", path, *more)


def test_numbers_lie_between_the_middles_of_the_stretches(tmp_path):
    found = Reference(write(tmp_path / "a.jsonl", LINE, *POINTS_OF_ONE))
    assert found.tokens.tolist() == [50, 200] and found.name == "a"
    assert [found.at(tokens) for tokens in (1, 50, 200, 300)] == [8, 8, 4, 4]
    assert found.at(100) == pytest.approx(6) and found.at(100, "bits_per_byte") == pytest.approx(
        3
    )  # 100 = sqrt(50 * 200)
    assert found.at(301) is None and found.at(0) is None and found.at(100, "other") is None


def test_thinning_keeps_the_sum_of_all_losses():
    chance, tokens, windows = np.random.default_rng(0), 0, []
    for step in range(1, 5000):
        tokens += int(chance.integers(50, 150))
        windows.append(dict(step=step, tokens_seen=tokens, loss=10 * step**-0.3, bits_per_byte=5 * step**-0.3))
    kept = list(thinned(windows))
    assert 60 < len(kept) <= POINTS and kept[0] == dict(windows[0], loss=10.0, bits_per_byte=5.0)
    assert kept[-1]["tokens_seen"] == tokens and kept[-1]["step"] == 4999
    sums = []
    for records_ in (windows, kept):
        sizes = np.diff([0, *(record["tokens_seen"] for record in records_)])
        sums.append(float(sizes @ [record["loss"] for record in records_]))
    assert sums[1] == pytest.approx(sums[0], rel=1e-4)
    early = [record for record in kept if record["tokens_seen"] < tokens / 10]
    assert len(early) > len(kept) / 2  # where the curve is steep


def test_a_run_like_the_reference_meets_its_own_losses(run, trained, folder):
    flags, first, log = trained
    assert "is written" in good(draw(run, log, folder / "one.jsonl"))
    text = good(run("1-pretrain.py", *flags, "--out_dir", first.parent / "second"))
    again = [json.loads(line) for line in (first.parent / "second/logs/pretrain_32.jsonl").read_text().splitlines()]
    compared = [record for record in again if "expected_loss" in record]
    assert len(compared) > 15 and not any("warning" in record for record in again)
    for record in compared:
        assert record["expected_loss"] == pytest.approx(record["loss"], rel=1e-4)
        assert f"loss {record['loss']:.4f} (expected here {record['expected_loss']:.2f})" in text
    assert [record["loss"] for record in again if "loss" in record] == [
        json.loads(line)["loss"] for line in log.read_text().splitlines() if '"loss"' in line
    ]


def test_a_run_far_above_says_what_it_does_differently(run, trained, folder):
    flags, first, log = trained
    good(draw(run, log, folder / "one.jsonl"))
    words = ("--learning_rate", 1e-5, "--embedding_rate_factor", 2)
    text = good(run("1-pretrain.py", *flags, "--out_dir", first.parent / "second", *words))
    (warning,) = [line for line in text.splitlines() if "warning: " in line]
    others = (
        "--learning_rate 1e-05 instead of 0.01",
        "--muon_learning_rate 0.0001 instead of 0.1",
        "--embedding_rate_factor 2.0 instead of 10.0",
    )
    assert f"usual here (one.jsonl): this run has {', '.join(others)}" in warning


def test_other_data_is_compared_by_bits_where_the_reference_is_typical(run, trained, folder, tmp_path):
    flags, first, log = trained
    other = tmp_path / "other.csv"
    shutil.copy(flags[flags.index("--data_path") + 1], other)
    other.write_text(other.read_text("utf-8") + "北京的火锅。\n", "utf-8")
    words = [other if word == flags[flags.index("--data_path") + 1] else word for word in flags]
    for more, typical in (([], 0), (["--typical"], 1)):
        good(draw(run, log, folder / "one.jsonl", *more))
        text = good(run("1-pretrain.py", *words, "--out_dir", tmp_path / str(typical)))
        assert "expected here" not in text and ("on other text)" in text) == typical
    log = [json.loads(line) for line in (tmp_path / "1/logs/pretrain_32.jsonl").read_text().splitlines()]
    record = next(record for record in log if record["step"] == 30 and "loss" in record)
    assert record["typical_bits_per_byte"] == pytest.approx(record["bits_per_byte"], rel=0.3)
    assert f"bpb {record['bits_per_byte']:.4f} ({record['typical_bits_per_byte']:.2f} on other text)" in text


def test_a_reference_of_another_kind_says_nothing(folder):
    write(folder / "a.jsonl", {**LINE, "typical": True}, *POINTS_OF_ONE)
    assert find_reference(LINE).name == "a"
    deeper = dict(LINE, config={**LINE["config"], "n_layers": 2})
    longer = dict(LINE, config={**LINE["config"], "max_seq_len": 2})
    assert find_reference(dict(LINE, stage="other")) is find_reference(deeper) is find_reference(longer) is None
    assert find_reference(dict(LINE, data=dict(fingerprint="g"))).name == "a"
    write(folder / "b.jsonl", dict(LINE, data=dict(fingerprint="g")), *POINTS_OF_ONE)
    assert find_reference(dict(LINE, data=dict(fingerprint="g"))).name == "b"


BROKEN = {
    "empty": [],
    "no object": ["[]"],
    "no data": [{"stage": "test", "config": {}}],
    "one point": [LINE, POINTS_OF_ONE[0]],
    "torn": [LINE, *POINTS_OF_ONE, '{"step": 1'],
    "backwards": [LINE, *POINTS_OF_ONE[::-1]],
    "not finite": [LINE, POINTS_OF_ONE[0], dict(POINTS_OF_ONE[1], loss=float("nan"))],
    "text": [LINE, POINTS_OF_ONE[0], dict(POINTS_OF_ONE[1], loss="low")],
    "no tokens": [LINE, POINTS_OF_ONE[0], dict(step=2, loss=1.0)],
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_damaged_reference_is_one_warning(tmp_path, folder, tokenizer, pretrain_csv, capsys, what):
    write(folder / "broken.jsonl", *BROKEN[what])
    with pytest.raises(
        UserError, match=r"broken.jsonl: no reference log \(.*\); python images/draw.py reference makes them"
    ):
        Reference(folder / "broken.jsonl")
    run = make_trainer(pretrain_csv, tmp_path, "--max_steps", 2, tokenizer=tokenizer)
    assert run.train() and not any("expected_loss" in record for record in records(run))
    assert capsys.readouterr().err.count("warning: ") == 1


def test_a_reference_needs_log_and_checkpoint(run, trained, tmp_path, folder):
    flags, first, log = trained
    header, *points = map(json.loads, reference_lines(log))
    assert header["stage"] == "pretrain" and header["recipe"]["rows a step"] == 4 and header["config"]["dim"] == 32
    assert header["recipe"]["steps in all"] == 60 and header["recipe"]["--embedding_rate_factor"] == 10
    assert header["data"]["name"] == "pretrain" and "1-pretrain.py --dim 32" in header["command"]
    assert points[0]["step"] == 0 and "validation_loss" in points[0] and len(points) <= 100
    assert_one_line_error(draw(run, tmp_path / "none.jsonl", tmp_path / "x"), "none.jsonl", "no training log")
    described = first / "pretrain_32.json"
    metadata = json.loads(described.read_text())
    del metadata["data"]
    described.write_text(json.dumps(metadata))
    assert_one_line_error(draw(run, log, tmp_path / "x"), log, "no checkpoint beside it says", "older")
    assert not (tmp_path / "x").exists()


def test_curves_with_the_reference_behind(run, trained, folder, tmp_path):
    import runpy

    import matplotlib

    matplotlib.use("Agg")
    flags, first, log = trained
    good(draw(run, log, folder / "one.jsonl"))
    draw_curves = runpy.run_path(str(ROOT / "images/draw.py"))["draw_curves"]
    lines = {which: draw_curves([log], which).axes[0].lines for which in ("auto", "none", str(folder / "one.jsonl"))}
    labels = {which: [line.get_label() for line in drawn] for which, drawn in lines.items()}
    assert labels["none"] == ["training", "held out"]
    assert labels["auto"] == labels[str(folder / "one.jsonl")] == ["reference: one", "training", "held out"]
    points = [json.loads(line) for line in log.read_text().splitlines() if '"loss"' in line]
    own, drawn = lines["auto"][1].get_xydata(), lines["auto"][0].get_xydata()
    assert [step for step, _ in own] == [record["step"] for record in points]
    assert np.allclose(drawn[:, 1], own[: len(drawn), 1], rtol=1e-4)  # as many points as there are reports
    steps = np.append(0, own[:, 0])
    assert np.allclose(drawn[:, 0], (steps[1:] + steps[:-1])[: len(drawn)] / 2, atol=0.6)
    other = write(tmp_path / "other.jsonl", LINE, *POINTS_OF_ONE)
    words = ["images/draw.py", "curves", "--logs", log, "--output", tmp_path / "x.png", "--reference"]
    assert_one_line_error(run(*words, other), "--reference", other, "another stage or preset", "pretrain of dim 32")
    assert_one_line_error(run(*words, tmp_path / "none.jsonl"), "none.jsonl", "No such file")
    assert not (tmp_path / "x.png").exists()


def test_the_references_that_are_shipped_can_be_read():
    paths = sorted((ROOT / "images/reference").glob("*.jsonl"))
    assert paths
    for path in paths:
        found = Reference(path)
        assert len(found.records) <= 100 and path.stat().st_size < 20_000 and found.header["command"]
