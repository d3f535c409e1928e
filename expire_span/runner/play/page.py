"""A page to step through an episode: one HTML file with its frames, which loads nothing from elsewhere."""

import html
import re
from collections.abc import Sequence
from importlib.resources import files

from ...comparison_page import script_json
from .frames import Frame


def page(frames: Sequence[Frame], title: str) -> str:
    """The HTML page. The soft mask of a memory is rounded to hundredths."""
    data = [
        frame._asdict() | {"memories": [[round(100 * m) for m in row] for row in frame.memories]} for frame in frames
    ]
    values = {"TITLE": html.escape(title), "DATA": script_json(data)}
    template = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    return re.sub("{{(TITLE|DATA)}}", lambda place: values[place[1]], template)
