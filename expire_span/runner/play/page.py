"""A page to step through an episode: one HTML file with its frames, which loads nothing from elsewhere."""

import base64
import html
import io
import re
from collections.abc import Sequence
from importlib.resources import files

import numpy as np

from ...comparison_page import script_json
from .frames import Frame


def page(frames: Sequence[Frame], title: str) -> str:
    """The HTML page. The soft mask of a memory is rounded to hundredths; a map is text rather than an image."""
    data = [
        frame._asdict()
        | {
            "image": None if frame.text or frame.image is None else png_url(frame.image),
            "memories": [[round(100 * m) for m in row] for row in frame.memories],
        }
        for frame in frames
    ]
    legend = "Observed: r, b an object, R, B a door. " if frames[0].observed else ""
    values = {"TITLE": html.escape(title), "DATA": script_json(data), "OBSERVED": legend}
    template = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    return re.sub("{{(TITLE|DATA|OBSERVED)}}", lambda place: values[place[1]], template)


def png_url(image: np.ndarray) -> str:
    """An image (rows, columns, 3) uint8 as a URL that holds it."""
    from matplotlib.image import imsave  # only images need it

    png = io.BytesIO()
    imsave(png, image, format="png")
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
