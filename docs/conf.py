"""Sphinx: ``make docs`` writes docs/_build/html. Needs no network."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from s3prl_ekd import __version__  # noqa: E402

project = "s3prl_ekd"
author = "The s3prl_ekd authors"
project_copyright = author
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "settings_reference"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"s3prl_ekd {release}"
html_show_sourcelink = False

myst_heading_anchors = 3  # a link to a heading, [text](page.md#heading), has to be right

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True

# Every cross-reference has to be found, but for names of other projects.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|numpy|np|nn|s3prl|collections|pathlib|typing)\..*"),
    (r"py:.*", r"(Tensor|Module|Path|Any|Callable|Mapping|Sequence|Iterable|Iterator)"),
]
# Named by docstrings of modules that import them, or too small to be listed.
nitpick_ignore = [
    ("py:class", "Teacher"),
    ("py:class", "UnitLabels"),
    ("py:class", "Architecture"),
    ("py:data", "FACTOR"),
]

kept: dict[str, list[str]] = {}  # name of a property or field -> docstring


def before_napoleon(
    app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Keep napoleon from taking the words before a colon for a type; types are annotations here."""
    if what in ("attribute", "data", "property"):
        kept[name] = list(lines)
    for i, line in enumerate(lines[:-1]):
        if line.strip() == "Returns:":
            lines[i] = line.replace("Returns:", f":returns: {lines[i + 1].strip()}")
            del lines[i + 1]
            return


def after_napoleon(
    app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    if name in kept:
        lines[:] = kept.pop(name)


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", before_napoleon, priority=400)
    app.connect("autodoc-process-docstring", after_napoleon, priority=600)
