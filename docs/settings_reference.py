"""A Sphinx directive that lists the settings of a YAML file, read from their dataclass.

In a page::

    ```{settings} s3prl_ekd.pretrain.settings.ModelFile
    ```

Each field becomes an entry with its YAML path, type, default and description. A field's
description is the string literal under it (an attribute docstring); a field that is a dataclass
becomes a section of its own, introduced by the class docstring.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, Union

import yaml
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective

WORDS = {bool: "true or false", int: "whole number", float: "number", str: "text", Any: "any value"}
PLURALS = {"whole number": "whole numbers", "number": "numbers", "text": "texts"}
REQUIRED = "required"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One setting.

    ``path``: in the YAML file, ``NAME`` standing for a name of the user's. ``kind``: its type in
    words. ``default``: as YAML, or ``required``. ``fields``: the entries of a setting that is a
    mapping of other settings; empty for a value. ``anchor``: the path, with the kind of a mapping
    of which there are several kinds: ``student.copy.of``.
    """

    path: str
    kind: str
    default: str
    description: str
    fields: tuple[Entry, ...] = ()
    anchor: str = dataclasses.field(default="", compare=False)


def entries(settings: type, prefix: str = "", anchor: str | None = None) -> tuple[Entry, ...]:
    """The settings of a dataclass in their order; ``prefix`` is the YAML path to it, ``anchor`` the
    start of its anchors if that is another one."""
    start = prefix if anchor is None else anchor
    hints = typing.get_type_hints(settings)
    docs = _descriptions(settings)
    return tuple(
        _entry(
            f"{prefix}{field.name}",
            f"{start}{field.name}",
            hints[field.name],
            field,
            docs.get(field.name, ""),
        )
        for field in dataclasses.fields(settings)
        if field.init
    )


def leaves(settings: tuple[Entry, ...]) -> Iterator[Entry]:
    """All entries with a value, depth first."""
    for entry in settings:
        if entry.fields:
            yield from leaves(entry.fields)
        else:
            yield entry


def _entry(
    path: str, anchor: str, hint: Any, field: dataclasses.Field[Any], description: str
) -> Entry:
    kinds = typing.get_args(hint)
    if len(kinds) > 1 and all(map(dataclasses.is_dataclass, kinds)):
        fields = tuple(_kind(path, anchor, kind) for kind in kinds)
        return Entry(path, "mapping", "as below", description, fields, anchor)
    plain, optional = _without_none(hint)
    default = "null" if optional and field.default is None else _default(field)
    inner, name = plain, ""
    if typing.get_origin(plain) is dict:
        inner, name = typing.get_args(plain)[1], ".NAME"
    if not dataclasses.is_dataclass(inner):
        return Entry(path, _words(hint), default, description, (), anchor)
    about = _class_text(inner)
    text = "\n\n".join(filter(None, [description, about])) if inner is not hint else about
    path, anchor = f"{path}{name}", f"{anchor}{name}"
    fields = entries(inner, f"{path}.", f"{anchor}.")
    return Entry(path, _words(hint), default, text or description, fields, anchor)


def _kind(path: str, anchor: str, settings: Any) -> Entry:
    """The entry of one of the dataclasses among which the key ``kind`` chooses.

    Its name is the ``Literal`` of its field ``kind``, or the ``KIND`` of one without this field.
    """
    hint = typing.get_type_hints(settings).get("kind")
    name = typing.get_args(hint)[0] if hint else settings.KIND
    fields = entries(settings, f"{path}.", f"{anchor}.{name}.")
    about = _class_text(settings)
    return Entry(f"{path}: {{kind: {name}}}", "mapping", "", about, fields, f"{anchor}.{name}")


def _descriptions(settings: type) -> dict[str, str]:
    """Attribute docstrings by field, those of base classes included."""
    descriptions: dict[str, str] = {}
    for cls in reversed(settings.__mro__):
        if dataclasses.is_dataclass(cls):
            docs = ModuleAnalyzer.for_module(cls.__module__).find_attr_docs()
            names = {name: lines for (owner, name), lines in docs.items() if owner == cls.__name__}
            descriptions |= {name: "\n".join(lines).strip() for name, lines in names.items()}
    return descriptions


def _class_text(settings: type) -> str:
    text = (settings.__doc__ or "").strip()
    if text.startswith(f"{settings.__name__}("):  # written by dataclass itself
        return ""
    return "\n".join(line.strip() for line in text.splitlines())


def _without_none(hint: Any) -> tuple[Any, bool]:
    """``X | None`` -> ``(X, True)``; anything else -> ``(hint, False)``."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        types_ = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        if len(types_) == 1:
            return types_[0], True
    return hint, False


def _words(hint: Any) -> str:
    plain, optional = _without_none(hint)
    if optional:
        return f"{_words(plain)}, or null"
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " | ".join(map(_yaml, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(map(_words, arguments))
    if origin in (tuple, list):
        inner = _words(arguments[0])
        return f"list of {PLURALS.get(inner, inner.replace('list of', 'lists of', 1))}"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "mapping"
    return WORDS.get(hint, getattr(hint, "__name__", str(hint)))


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return _yaml(field.default)
    if field.default_factory is dataclasses.MISSING:
        return REQUIRED
    value = field.default_factory()
    return "as below" if dataclasses.is_dataclass(value) else _yaml(value)


def _yaml(value: Any) -> str:
    """Format a value as YAML on one line."""
    if isinstance(value, tuple):
        value = [list(item) if isinstance(item, tuple) else item for item in value]
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000)
    return text.replace("\n...", "").strip()


class SettingsDirective(SphinxDirective):
    """``settings DOTTED.NAME``: the entries of a dataclass."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        module, _, name = self.arguments[0].rpartition(".")
        try:
            settings = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ExtensionError(f"settings: cannot import {self.arguments[0]}: {error}") from error
        self.prefix = name.lower()
        self.env.note_dependency(importlib.import_module(module).__file__)
        return self._nodes(entries(settings))

    def _nodes(self, settings: tuple[Entry, ...]) -> list[nodes.Node]:
        values = nodes.definition_list(classes=["settings"])
        values += [self._item(entry) for entry in settings if not entry.fields]
        sections = [self._section(entry) for entry in settings if entry.fields]
        return [values, *sections] if len(values) else [*sections]

    def _item(self, entry: Entry) -> nodes.Node:
        term = nodes.term("", "", nodes.literal(entry.path, entry.path), ids=[self._id(entry)])
        if entry.default == REQUIRED:
            term += nodes.Text(f" ({entry.kind}; {REQUIRED})")
        else:
            term += nodes.Text(f" ({entry.kind}; default ")
            term += [nodes.literal(entry.default, entry.default), nodes.Text(")")]
        body = nodes.definition()
        self._parse(entry.description, body)
        return nodes.definition_list_item("", term, body)

    def _section(self, entry: Entry) -> nodes.Node:
        section = nodes.section(ids=[self._id(entry)], names=[self._id(entry)])
        section += nodes.title("", "", nodes.literal(entry.path, entry.path))
        self._parse(entry.description, section)
        section += self._nodes(entry.fields)
        return section

    def _id(self, entry: Entry) -> str:
        return nodes.make_id(f"{self.prefix}-{entry.anchor.replace('_', '-')}")

    def _parse(self, description: str, into: nodes.Element) -> None:
        """Add a description, in reStructuredText's inline markup, which is nearly Markdown's."""
        text = re.sub(r":[a-z:]+:`[~.]*([^`]+)`", r"`\1`", description)
        lines = StringList(text.splitlines(), source="settings")
        self.state.nested_parse(lines, self.content_offset, into)


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("settings", SettingsDirective)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
