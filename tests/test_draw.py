"""images/draw.py: what must not lie on top of each other in the diagrams, what curves show."""

import json
import runpy

import pytest

from conftest import ROOT, assert_one_line_error


@pytest.mark.parametrize("preset", ["minimind-v1-small", "minimind-v1-moe"])
def test_no_line_of_a_diagram_crosses_a_text(preset):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.text import Annotation

    figure = runpy.run_path(str(ROOT / "images" / "draw.py"))["draw_model"](preset)
    figure.canvas.draw()
    axes = figure.axes[0]
    arrows = [text for text in axes.texts if isinstance(text, Annotation)]
    lines = [axes.transData.transform(line.get_xydata()) for line in axes.lines]
    lines += [axes.transData.transform([arrow.xyann, arrow.xy]) for arrow in arrows]
    texts = [text for text in axes.texts if text.get_text() not in ("", "+")]  # arrows end at a +
    assert len(lines) > 20 and any("layers" in text.get_text() for text in texts)
    for text in texts:
        frame = text.get_window_extent()
        for start, end in lines:
            points = [start + (end - start) * part / 200 for part in range(201)]
            assert not any(frame.contains(*point) for point in points), text.get_text()
    pyplot.close(figure)


def curves(tmp_path, *logs):
    """The figure of draw_curves on these lists of records."""
    import matplotlib

    matplotlib.use("Agg")
    paths = []
    for number, records in enumerate(logs):
        paths.append(tmp_path / f"{number}.jsonl")
        paths[-1].write_text("".join(json.dumps(record) + "\n" for record in records))
    return runpy.run_path(str(ROOT / "images" / "draw.py"))["draw_curves"](paths)


def test_experts_at_work(tmp_path):
    from matplotlib import pyplot

    from model.errors import UserError

    draw = runpy.run_path(str(ROOT / "images" / "draw.py"))["draw_experts_at_work"]
    path = tmp_path / "log.jsonl"
    records = [
        dict(step=0, validation_loss=6.0),
        dict(step=1, loss=6.0, expert_load=[0.5, 0.25, 0.25], least_expert_load=0.2),
        dict(step=9, loss=5.0, expert_load=[0.3, 0.4, 0.3], least_expert_load=0.1),
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    figure = draw([path])
    lines = list(figure.axes[0].lines)
    assert {line.get_label(): line.get_xydata().tolist() for line in lines[:4]} == {
        "expert 0": [[1, 0.5], [9, 0.3]], "expert 1": [[1, 0.25], [9, 0.4]], "expert 2": [[1, 0.25], [9, 0.3]],
        "least in a layer": [[1, 0.2], [9, 0.1]],
    }  # fmt: skip
    assert [line.get_ydata()[0] for line in lines[4:]] == pytest.approx([1 / 3, 1 / 6])
    pyplot.close(figure)
    path.write_text(json.dumps(dict(step=1, loss=6.0)))
    with pytest.raises(UserError, match="log.jsonl: nothing about experts"):
        draw([path])


TOKENS = [
    dict(step=0, validation_loss=6.0, validation_bits_per_byte=3.0),
    dict(step=1, loss=6.0, bits_per_byte=3.0),
    dict(step=2, loss=5.0, bits_per_byte=2.5),
    dict(step=2, validation_loss=5.5, validation_bits_per_byte=2.75),
]
PAIRS = [
    dict(step=0, validation_loss=0.69, validation_reward_accuracy=0.0, validation_reward_margin=0.0),
    dict(step=1, loss=0.69, reward_accuracy=0.5, reward_margin=0.0),
    dict(step=2, loss=0.4, reward_accuracy=0.75, reward_margin=0.8),
    dict(step=2, validation_loss=0.5, validation_reward_accuracy=1.0, validation_reward_margin=0.6),
]


def drawn(axes):
    return {line.get_label(): line.get_xydata().tolist() for line in axes.lines}


def test_curves_of_tokens_and_of_pairs(tmp_path):
    from matplotlib import pyplot

    figure = curves(tmp_path, TOKENS, PAIRS)
    figure.canvas.draw()
    tokens, pairs, right = figure.axes
    assert drawn(tokens) == {"training": [[1, 6], [2, 5]], "held out": [[0, 6], [2, 5.5]]}
    assert [text.get_text() for text in tokens.texts] == ["3.00 bits/byte", "2.75 bits/byte"]
    assert drawn(pairs) == {"training": [[1, 0.69], [2, 0.4]], "held out": [[0, 0.69], [2, 0.5]]} and not pairs.texts
    assert drawn(right) == {
        "accuracy, training": [[1, 0.5], [2, 0.75]], "accuracy, held out": [[0, 0], [2, 1]],
        "margin, training": [[1, 0], [2, 0.8]], "margin, held out": [[0, 0], [2, 0.6]],
    }  # fmt: skip
    assert (tokens.get_ylabel(), pairs.get_ylabel()) == ("loss (nats per token)", "loss (per pair)")
    assert len({line.get_color() for line in [*pairs.lines, *right.lines]}) == 3
    legend = pairs.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == [*drawn(pairs), *drawn(right)]
    assert not legend.get_window_extent().overlaps(pairs.xaxis.label.get_window_extent())
    assert not legend.get_window_extent().overlaps(pairs.get_window_extent())
    pyplot.close(figure)


def test_servers_by_number_of_clients(tmp_path):
    def point(clients, rate):
        return dict(clients=clients, tokens_per_second=rate, first_token_seconds=0.1 * clients, first_token_95=clients)

    curve = {
        "minimind int8": [point(1, 300.0), point(64, 900.0)],
        "llama.cpp q8_0": [point(1, 400.0), point(64, 700.0)],
    }
    (path := tmp_path / "serving.json").write_text(json.dumps({"processor": "Zen", "curve": curve}))
    left, right = runpy.run_path(str(ROOT / "images" / "draw.py"))["draw_serving"](path).axes
    assert [line.get_ydata()[1] for line in left.lines] == [900, 700]
    assert [line.get_ydata()[1] for line in right.lines] == [6.4, 64, 6.4, 64]
    assert [text.get_text() for text in left.get_legend().get_texts()] == list(curve)
    assert [int(label.get_text()) for label in left.get_xticklabels()] == [1, 64]


def test_results_that_are_none(run, tmp_path):
    (path := tmp_path / "serving.json").write_text("{}")
    process = run("images/draw.py", "serving", "--results", path, "--output", tmp_path / "x.png")
    assert_one_line_error(process, path, "not what benchmarks/serving.py prints")


def test_a_log_without_validations_or_steps(tmp_path):
    from matplotlib import pyplot

    from model.errors import UserError

    figure = curves(tmp_path, TOKENS[1:3], PAIRS[1:3])
    assert list(drawn(figure.axes[0])) == ["training"] and len(figure.axes[2].lines) == 2
    pyplot.close(figure)
    with pytest.raises(UserError, match="0.jsonl: no step in it yet"):
        curves(tmp_path, PAIRS[:1])
    with open(tmp_path / "0.jsonl", "w") as log:  # of a run that was killed while it wrote
        log.writelines(json.dumps(record) + "\n" for record in TOKENS[1:3])
        log.write('{"step": 99, "lo')
    read_log = runpy.run_path(str(ROOT / "images" / "draw.py"))["read_log"]
    assert read_log(tmp_path / "0.jsonl") == TOKENS[1:3]
    (tmp_path / "notes.md").write_text("# no log")
    for name, problem in (("none.jsonl", "no such file"), ("notes.md", "not a training log")):
        with pytest.raises(UserError, match=f"{name}: {problem}"):
            read_log(tmp_path / name)
