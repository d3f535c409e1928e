"""The page that `expire-span-spans` writes: one HTML file with its data, which loads nothing from elsewhere."""

import html
import math
import re
from importlib.resources import files
from typing import Any

from ...comparison_page import script_json

SCRIPTS = ("values", "around", "text")  # in the order in which they run
NUM_COLORS = 64


def page(data: dict[str, Any]) -> str:
    """The HTML page, from what `describe.describe_runs` returns."""
    scales = {
        theme: {"spans": span_colors(is_dark), "changes": change_colors(is_dark)}
        for theme, is_dark in (("light", False), ("dark", True))
    }
    folder = files(__package__)
    values = {
        "TITLE": html.escape(f"What the run {data['run']} remembers"),
        "STYLE": folder.joinpath("page.css").read_text(encoding="utf-8"),
        "SCRIPT": "".join(folder.joinpath(f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS),
        "DATA": script_json({**data, "scales": scales}),
    }
    template = folder.joinpath("page.html").read_text(encoding="utf-8")
    return re.sub("{{(TITLE|STYLE|SCRIPT|DATA)}}", lambda place: values[place[1]], template)


def span_colors(is_dark: bool = False) -> list[str]:
    """From 0, like the page itself, to the longest span: lightness, as perceived, changes by equal steps."""
    if is_dark:
        return [oklch(0.24 + 0.66 * share, 0.02 + 0.13 * hump(share), 20 + 75 * share) for share in shares()]
    return [oklch(0.985 - 0.575 * share, 0.005 + 0.145 * hump(share), 95 - 70 * share) for share in shares()]


def change_colors(is_dark: bool = False) -> list[str]:
    """From blue, for the largest decrease, over the color of the page to red, for the largest increase."""
    colors = []
    for share in shares():
        size = abs(2 * share - 1)
        lightness = 0.26 + 0.5 * size if is_dark else 0.985 - 0.42 * size
        colors.append(oklch(lightness, 0.16 * size, 255 if share < 0.5 else 35))
    return colors


def shares() -> list[float]:
    return [index / (NUM_COLORS - 1) for index in range(NUM_COLORS)]


def hump(share: float) -> float:
    """From 0 quickly up, and down again: very light and very dark colors have little chroma."""
    return min(1.0, 5 * share) * math.sin(math.pi * (0.1 + 0.72 * share))


def oklch(lightness: float, chroma: float, hue: float) -> str:
    """A color of the perceptually uniform space OKLCH (Ottosson 2020; hue in degrees) as #rrggbb."""
    a, b = chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue))
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )
    gamma = [12.92 * max(0.0, c) if c <= 0.0031308 else 1.055 * c ** (1 / 2.4) - 0.055 for c in linear]
    return "#" + "".join(f"{round(255 * min(1.0, value)):02x}" for value in gamma)
