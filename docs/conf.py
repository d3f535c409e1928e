"""Sphinx configuration of the documentation. `make docs` builds it without a network; any warning is an error."""

import inspect
import re
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))

import generate  # noqa: E402

generate.main()

project = "expire-span"
version = release = tomllib.loads((DOCS.parent / "pyproject.toml").read_text())["project"]["version"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "_generated/*.md"]  # those are included by pages

html_theme = "furo"
html_title = f"expire-span {version}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_copy_source = html_show_copyright = False
html_math_renderer = "mathml"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

default_role = "code"  # docstrings put code in single backticks
highlight_language = "none"  # indented paragraphs of docstrings are drawings as often as code
autodoc_default_options = {"members": True, "member-order": "bysource", "show-inheritance": True}
autodoc_typehints_format = "short"
autodoc_use_type_comments = False
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Columns", "params_style")]
nitpick_ignore_regex = [  # without a network there is no inventory of other projects' documentation
    ("py:.*", r"(torch|numpy|pandas|omegaconf|collections|pathlib|typing|abc|nn|np|pd)\..*"),
    ("py:.*", r"expire_span\.transformer\.\w+"),  # internal classes that signatures name
    ("py:.*", r"(Tensor|State|Any|Path|ModuleType|optional|Ellipsis|[A-Z])"),
]


def visit_math(translator: Any, node: nodes.math) -> None:
    """Write inline math as MathML, which browsers render by themselves."""
    translator.body.append(convert(node.astext()))
    raise nodes.SkipNode


def visit_math_block(translator: Any, node: nodes.math_block) -> None:
    """Write display math as MathML."""
    translator.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode


def escape(text: str) -> str:
    """reStructuredText that shows `text` as it is; code in backticks stays code."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([*|]|_\b)", r"\\\1", part) for part in parts)


def plain_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Before napoleon: show the indented paragraphs of a docstring as they are, and take `*` and `|` literally.

    The indented text below the title of a Google section (`Args:` ...) is left to napoleon.
    """
    section = re.compile(r"(Args|Returns|Yields|Raises|Attributes|Columns|Example)s?:$")
    result: list[str] = []
    inside_section = literal = False
    for line in lines:
        indented = line.startswith("    ")
        if line and not indented:
            result += [""] if literal and result[-1] else []
            inside_section, literal = bool(section.match(line)), False
        elif indented and not inside_section and not literal:
            literal = True
            result += ["", "::", ""]
        result.append(line if literal else escape(line))
    lines[:] = result


def plain_attribute(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """After napoleon, which would read `shape: meaning` as a type: a property's own text, or a field's comment.

    Fields of a NamedTuple or dataclass are documented by the comment at the end of their line.
    """
    if what == "property":
        lines[:] = [escape(line) for line in (inspect.getdoc(obj) or "").splitlines()]
    elif what == "attribute":
        owner_name, _, field = name.rpartition(".")
        module_name, _, class_name = owner_name.rpartition(".")
        owner = getattr(import_module(module_name), class_name, None) if module_name else None
        source = inspect.getsource(owner) if inspect.isclass(owner) else ""
        comment = re.search(rf"^    {field}: .*?  # (.*)$", source, re.MULTILINE)
        lines[:] = [escape(comment[1])] if comment else []


def setup(app: Any) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    app.connect("autodoc-process-docstring", plain_docstring, priority=400)  # napoleon is at 500
    app.connect("autodoc-process-docstring", plain_attribute, priority=600)
    return {"parallel_read_safe": True}
