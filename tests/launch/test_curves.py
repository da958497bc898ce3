"""The picture of a run of launch/train.py."""

import io
from itertools import pairwise

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gq_triton.training.plots import draw_curves


def rows(highest, lowest):
    for step in range(1, 61):
        loss = highest * (lowest / highest) ** (step / 60)
        measures = {"norm_ratio": 1.2, "mean_weight": 1.1, "effective_length": 5.0}
        yield {"kind": "step", "step": step, "loss": loss, "skipped": False, **measures}
        if step % 6 == 0:
            scores = {"train_accuracy": 0.5, "test_accuracy": 0.5}
            yield {"kind": "epoch", "step": step, "train_loss": loss, "test_loss": loss, **scores}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("highest", "lowest"), [(2.4, 0.25), (2.4, 0.01), (2.3, 1e-7), (0.09, 0.07), (3.9, 1.0)]
)
def test_the_labels_of_the_loss_axis_do_not_overprint(monkeypatch, highest, lowest):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **_: drawn.append(figure))
    draw_curves(list(rows(highest, lowest)), "title", io.BytesIO())
    (figure,) = drawn
    FigureCanvasAgg(figure).draw()
    axis = figure.axes[0].yaxis
    low, high = figure.axes[0].get_ylim()
    ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    labels = [tick.label1 for tick in ticks if low <= tick.get_loc() <= high]
    boxes = [label.get_window_extent() for label in labels if label.get_text()]
    assert len(boxes) >= 2
    for below, above in pairwise(sorted(boxes, key=lambda box: box.y0)):
        assert above.y0 > below.y1
