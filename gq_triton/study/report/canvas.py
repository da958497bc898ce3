"""What all pictures share: the canvas, the palette, and the PNG."""

from io import BytesIO
from typing import Any

__all__ = ["COLOURS", "LINES", "MARKERS", "figure", "finish", "png"]

# Okabe and Ito's palette, whose colours stay distinct with every common form of colour blindness.
# Markers and lines distinguish the arms too, and go on where the colours repeat.
COLOURS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"
MARKERS = "osD^vP*X"
LINES = "-", "--", "-.", ":"


def figure(width: float, height: float) -> Any:
    """Return an empty figure of some inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def finish(panel: Any) -> None:
    """Give a panel its grid and take the upper and right edges away."""
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)


def png(drawn: Any) -> bytes:
    """Return a figure as PNG, the same bytes for the same picture.

    The picture is as large as what was drawn, so that the name of a task or arm is never cut off.
    """
    content = BytesIO()
    drawn.savefig(content, format="png", metadata={"Software": None}, bbox_inches="tight")
    return content.getvalue()
