"""Read text, JSON and YAML of unknown origin as plain data, of bounded size and depth."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Collection, Hashable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml

from ..errors import ConfigError, EkdError

MAX_TEXT = 1 << 20  # bytes; the largest file that we write by hand or by program is far below
MAX_DEPTH = 50  # brackets within brackets
MAX_NUMBER = 2**63  # Python's numbers have no end, and cannot be shown beyond 4300 digits
_LFS = b"version https://git-lfs.github.com/spec/"
_WEB_PAGE = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype\s+html|html|\?xml)\b", re.IGNORECASE)
# Line breaks, other control characters and halves of surrogate pairs.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")

MAX_YAML = 1 << 17  # bytes; PyYAML reads about as many in a second or two
MAX_NODES = 10_000  # scalars, lists and mappings, each alias counted as all that it stands for
MAX_SCALAR = 4096  # characters; a path has no more


def check_regular(
    path: str | Path, what: str, error: type[EkdError], limit: int | None = None
) -> None:
    """Refuse what is no regular file: reading a pipe or a device may never end.

    Args:
        path: the file.
        what: the noun for messages.
        error: what is raised.
        limit: the most bytes it may have; None for any size.
    """
    try:
        found = os.stat(path)
    except OSError as problem:
        shown = CONTROL.sub("?", str(path))  # a path out of a file may be any text
        raise error(f"cannot read the {what} {shown[:500]}: {problem.strerror}") from None
    except ValueError:
        raise error(f"cannot read the {what} {str(path)[:500]!r}: that is no path") from None
    if stat.S_ISDIR(found.st_mode):
        raise error(f"cannot read the {what} {path}: it is a folder")
    if not stat.S_ISREG(found.st_mode):
        raise error(f"cannot read the {what} {path}: it is a pipe or a device, not a file")
    if limit is not None and found.st_size > limit:
        raise error(
            f"the {what} {path} has {found.st_size:,} bytes; {limit:,} are allowed, so it is no "
            f"{what}"
        )


def download_problem(path: str | Path) -> str:
    """Why a file is not the one that was to be downloaded: a clone without Git LFS leaves a pointer
    in its place, a wrong or expired link a web page.

    Returns:
        What continues "the file ...", with what to do; empty where it is neither or unreadable.
    """
    try:
        with open(path, "rb") as file:
            begin = file.read(512)
    except (OSError, ValueError):
        return ""
    if begin.startswith(_LFS):
        return "is a Git LFS pointer, not the file itself; type in its folder: git lfs pull"
    if _WEB_PAGE.match(begin):
        return (
            "is a web page, not the file itself; download it again from the link of the raw file "
            "(on Hugging Face the one with /resolve/, not /blob/)"
        )
    return ""


def check_inside(path: Path, folder: Path, what: str, error: type[EkdError]) -> None:
    """Refuse a path whose links lead out of a folder that others may have written: its contents are
    about to be given away. Links within the folder are followed.

    Args:
        path: below ``folder``.
        folder: may be a link itself.
        what: the noun for messages.
        error: what is raised.
    """
    place, home = folder, folder.resolve()
    for part in path.relative_to(folder).parts:
        place = place / part
        if place.is_symlink() and not place.resolve().is_relative_to(home):
            raise error(
                f"cannot take the {what} {path}: {place} is a link to {place.resolve()}, which is "
                f"not in {folder}; put the file itself there if it is to be given away"
            )


def read_text(
    path: str | Path, what: str, error: type[EkdError], limit: int = MAX_TEXT, utf8: str = "utf-8"
) -> str:
    """The text of a regular UTF-8 file; arguments as for :func:`check_regular`."""
    check_regular(path, what, error, limit)
    try:
        return Path(path).read_text(encoding=utf8)
    except OSError as problem:
        raise error(f"cannot read the {what} {path}: {problem.strerror}") from None
    except UnicodeDecodeError as problem:
        raise error(
            f"cannot read the {what} {path}: it is not UTF-8 text (byte {problem.start})"
        ) from None


def read_json(path: str | Path, what: str, error: type[EkdError]) -> dict[str, Any]:
    """A JSON object: no key twice, finite numbers, at most :data:`MAX_DEPTH` deep."""
    return parse_json(read_text(path, what, error), path, what, error)


def parse_json(text: str, path: str | Path, what: str, error: type[EkdError]) -> dict[str, Any]:
    """The same of a text out of the file ``path``."""
    try:
        data = json.loads(
            text, object_pairs_hook=_no_key_twice, parse_constant=_refuse, parse_float=_finite
        )
    except (ValueError, RecursionError) as problem:
        if other := download_problem(path):
            raise error(f"the {what} {path} {other}") from None
        reason = "it is nested too deeply" if isinstance(problem, RecursionError) else problem
        raise error(f"{path} cannot be read as JSON: {reason}") from None
    if not isinstance(data, dict):
        raise error(f"the {what} {path} is damaged: a JSON object is expected")
    check_data(data, lambda reason: error(f"the {what} {path} is damaged: {reason}"))
    return data


def check_data(data: Any, error: Callable[[str], EkdError], most: int = 200_000) -> None:
    """Refuse data that is small in a file and endless to whoever walks through it.

    A list may hold another twice, that one another twice, and so on: what counts is how often a
    walk would meet a value.

    Raises:
        EkdError: made by ``error`` from the reason.
    """
    waiting = [(data, 0)]
    while waiting:
        value, depth = waiting.pop()
        most -= 1
        if most < 0:
            raise error("it has too many values")
        inside: Collection[Any]
        if isinstance(value, dict):
            inside = [*value, *value.values()]
        elif isinstance(value, (list, tuple, set, frozenset)):
            inside = value
        elif type(value) is int and not -MAX_NUMBER <= value < 2 * MAX_NUMBER:
            raise error("it has a number of more than 64 bits")
        elif hasattr(value, "__dict__"):  # argparse.Namespace, of a run's checkpoint
            inside = list(vars(value).values())
        else:
            continue
        if depth >= MAX_DEPTH:
            raise error(f"it is nested more than {MAX_DEPTH} deep")
        if len(inside) > most:
            raise error("it has too many values")
        waiting += [(item, depth + 1) for item in inside]


def first_keys(data: Mapping[Any, Any], count: int = 8) -> str:
    """Some of a mapping's keys, for messages."""
    return ", ".join(CONTROL.sub("?", str(key)[:60]) for key in list(data)[:count])


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:60]!r} is written twice")
    return data


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"a finite number is expected, not {name}")


def _finite(text: str) -> float:
    number = float(text)
    if abs(number) == float("inf"):
        raise ValueError(f"{text[:60]} is too large")
    return number


class PlainLoader(yaml.SafeLoader):
    """``yaml.SafeLoader`` with bounds, that refuses a key written twice.

    The bounds are kept while the nodes are composed, so that a hostile file is left where it goes
    beyond them: aliases that double each other ten times stand for a thousand values.
    """

    def __init__(self, stream: str):
        super().__init__(stream)
        self._depth = self._total = 0
        self._weights: dict[int, int] = {}  # id of a finished node -> nodes in it, itself included

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        if self.check_event(yaml.AliasEvent):
            node = super().compose_node(parent, index)
            weight = self._weights.get(id(node))
            if weight is None:
                _yaml_error("an alias stands for something that it is in itself", mark)
            self._count(weight, mark)
            return node
        before = self._total
        self._count(1, mark)
        self._depth += 1
        if self._depth > MAX_DEPTH:
            _yaml_error(f"it is nested more than {MAX_DEPTH} deep", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        self._weights[id(node)] = self._total - before
        return node

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if len(event.value) > MAX_SCALAR:
            _yaml_error(f"a text of more than {MAX_SCALAR} characters", event.start_mark)
        return super().compose_scalar_node(anchor)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (str, int, float, bool, type(None))):
                if key in seen:
                    _yaml_error(f"the key {key!r} is written twice", key_node.start_mark)
                seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        value = super().construct_object(node, deep)
        if isinstance(value, str) and CONTROL.search(value.removesuffix("\n")):
            _yaml_error("a text with a line break or a control character in it", node.start_mark)
        if type(value) is int and not -MAX_NUMBER <= value < MAX_NUMBER:
            _yaml_error("a number of more than 64 bits", node.start_mark)
        return value

    def _count(self, weight: int, mark: yaml.Mark) -> None:
        self._total += weight
        if self._total > MAX_NODES:
            _yaml_error(f"it has more than {MAX_NODES:,} values", mark)


def parse_yaml(text: str, where: str) -> Any:
    """Plain data out of YAML text.

    Raises:
        ConfigError: it is not YAML, or goes beyond a bound; ``where`` and the line are named.
    """
    try:
        return yaml.load(text, Loader=PlainLoader)  # a SafeLoader
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except Exception as error:  # PyYAML passes on what Python raises: an IndexError for `!!int ""`
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or str(error) or type(error).__name__
        what = CONTROL.sub(" ", " ".join(str(what).split()))[:200]
        raise ConfigError(f"{where} is not valid YAML{line}: {what}") from None


def _yaml_error(problem: str, mark: yaml.Mark) -> NoReturn:
    raise ConfigError(f"{problem} (line {mark.line + 1})")
