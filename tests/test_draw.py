"""images/draw.py: what must not lie on top of each other in the diagrams."""

import runpy

import pytest

from conftest import ROOT


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
