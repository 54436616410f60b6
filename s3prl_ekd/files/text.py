"""Read untrusted text, JSON and YAML files, with limits on size and nesting."""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Callable, Collection, Hashable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml

from ..errors import ConfigError, EkdError

MAX_TEXT = 1 << 20  # bytes; far above the largest file that the package writes
MAX_DEPTH = 50  # levels of nesting
MAX_NUMBER = 2**63  # Python's ints are unbounded, but are not printed beyond 4300 digits
_LFS = b"version https://git-lfs.github.com/spec/"
_WEB_PAGE = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype\s+html|html|\?xml)\b", re.IGNORECASE)
# Line breaks, other control characters and lone surrogates.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")

MAX_YAML = 1 << 17  # bytes; PyYAML parses this in one or two seconds
MAX_NODES = 10_000  # scalars, lists and mappings; an alias counts as all nodes that it refers to
MAX_SCALAR = 4096  # characters; the longest path


def check_regular(
    path: str | Path, noun: str, error: type[EkdError], limit: int | None = None
) -> None:
    """Raise ``error`` unless ``path`` is a regular file: reading a pipe or device may never end.

    ``noun`` says what the file is, such as "length table"; ``limit`` is its maximum size in bytes.
    """
    try:
        status = os.stat(path)
    except OSError as os_error:
        name = CONTROL.sub("?", str(path))[:500]  # a path from a file may have any characters
        raise error(f"cannot read the {noun} {name}: {os_error.strerror}") from None
    except ValueError:
        raise error(f"cannot read the {noun} {str(path)[:500]!r}: not a valid path") from None
    if stat.S_ISDIR(status.st_mode):
        raise error(f"cannot read the {noun} {path}: it is a folder")
    if not stat.S_ISREG(status.st_mode):
        raise error(f"cannot read the {noun} {path}: it is a pipe or a device, not a file")
    if limit is not None and status.st_size > limit:
        raise error(
            f"cannot read the {noun} {path}: it has {status.st_size:,} bytes, at most {limit:,} "
            "are allowed"
        )


def download_problem(path: str | Path) -> str:
    """Detect a failed download: a Git LFS pointer, or a web page from a wrong or expired link.

    Returns:
        The rest of a sentence that begins with "the file", with what to do; "" if the file is
        neither or cannot be read.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except (OSError, ValueError):
        return ""
    if head.startswith(_LFS):
        return "is a Git LFS pointer, not the file itself; type in its folder: git lfs pull"
    if _WEB_PAGE.match(head):
        return (
            "is a web page, not the file itself; download it again from the link to the raw file "
            "(on Hugging Face the link with /resolve/, not /blob/)"
        )
    return ""


def check_inside(path: Path, folder: Path, noun: str, error: type[EkdError]) -> None:
    """Raise ``error`` if a symlink on the way to ``path`` leads out of ``folder``.

    For files that are about to be published from a folder that others may have written. Symlinks
    within the folder are allowed, and ``folder`` may be one itself.
    """
    current, root = folder, folder.resolve()
    for part in path.relative_to(folder).parts:
        current = current / part
        if current.is_symlink() and not current.resolve().is_relative_to(root):
            raise error(
                f"cannot include the {noun} {path}: {current} is a symlink to {current.resolve()}, "
                f"outside {folder}; to publish the file, copy it there"
            )


def read_text(
    path: str | Path, noun: str, error: type[EkdError], limit: int = MAX_TEXT, utf8: str = "utf-8"
) -> str:
    """Read a UTF-8 text file; arguments as for :func:`check_regular`."""
    check_regular(path, noun, error, limit)
    try:
        return Path(path).read_text(encoding=utf8)
    except OSError as os_error:
        raise error(f"cannot read the {noun} {path}: {os_error.strerror}") from None
    except UnicodeDecodeError as decode_error:
        raise error(
            f"cannot read the {noun} {path}: it is not UTF-8 text (byte {decode_error.start})"
        ) from None


def read_json(path: str | Path, noun: str, error: type[EkdError]) -> dict[str, Any]:
    """Read a JSON file whose top level is an object; see :func:`parse_json`."""
    return parse_json(read_text(path, noun, error), path, noun, error)


def parse_json(text: str, path: str | Path, noun: str, error: type[EkdError]) -> dict[str, Any]:
    """Parse a JSON object: unique keys, finite numbers, nested at most :data:`MAX_DEPTH` deep.

    ``text`` is the contents of the file ``path``, or a part of them.
    """
    try:
        data = json.loads(
            text, object_pairs_hook=_unique_keys, parse_constant=_finite, parse_float=_finite
        )
    except (ValueError, RecursionError) as json_error:
        if problem := download_problem(path):
            raise error(f"the {noun} {path} {problem}") from None
        too_deep = isinstance(json_error, RecursionError)
        reason = "it is nested too deeply" if too_deep else json_error
        raise error(f"cannot read {path} as JSON: {reason}") from None
    if not isinstance(data, dict):
        raise error(f"the {noun} {path} is damaged: expected a JSON object")
    check_data(data, lambda reason: error(f"the {noun} {path} is damaged: {reason}"))
    return data


def check_data(data: Any, error: Callable[[str], EkdError], limit: int = 200_000) -> None:
    """Reject data that is small in a file but takes too long to traverse.

    If a list contains another list twice, that one a third list twice, and so on, the work doubles
    each time. So a value counts each time that a traversal reaches it.

    Raises:
        EkdError: made by ``error`` from the reason: more than ``limit`` values, too deeply nested,
            or a number of more than 64 bits.
    """
    queue = [(data, 0)]
    while queue:
        value, depth = queue.pop()
        limit -= 1
        if limit < 0:
            raise error("it has too many values")
        children: Collection[Any]
        if isinstance(value, dict):
            children = [*value, *value.values()]
        elif isinstance(value, (list, tuple, set, frozenset)):
            children = value
        elif type(value) is int and not -MAX_NUMBER <= value < 2 * MAX_NUMBER:
            raise error("it has a number of more than 64 bits")
        elif hasattr(value, "__dict__"):  # argparse.Namespace, of a run's checkpoint
            children = list(vars(value).values())
        else:
            continue
        if depth >= MAX_DEPTH:
            raise error(f"it is nested more than {MAX_DEPTH} levels deep")
        if len(children) > limit:
            raise error("it has too many values")
        queue += [(item, depth + 1) for item in children]


def first_keys(data: Mapping[Any, Any], count: int = 8) -> str:
    """The first keys of a mapping, for error messages."""
    return ", ".join(CONTROL.sub("?", str(key)[:60]) for key in list(data)[:count])


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        keys = [key for key, _ in pairs]
        duplicate = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"duplicate key {duplicate[:60]!r}")
    return data


def _finite(text: str) -> float:
    number = float(text)  # NaN, Infinity, or too large
    if not math.isfinite(number):
        raise ValueError(f"expected a finite number, got {text[:60]}")
    return number


class BoundedLoader(yaml.SafeLoader):
    """``yaml.SafeLoader`` with limits on size and nesting, and without duplicate keys.

    The limits are checked while nodes are composed, so that a hostile file is rejected early: ten
    anchored lists, each with two aliases of the previous one, expand to a thousand values.
    """

    def __init__(self, stream: str):
        super().__init__(stream)
        self._depth = self._total = 0
        self._sizes: dict[int, int] = {}  # id of a composed node -> number of nodes in it

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        if self.check_event(yaml.AliasEvent):
            node = super().compose_node(parent, index)
            size = self._sizes.get(id(node))
            if size is None:
                _yaml_error("an alias refers to a node that contains it", mark)
            self._count(size, mark)
            return node
        start = self._total
        self._count(1, mark)
        self._depth += 1
        if self._depth > MAX_DEPTH:
            _yaml_error(f"nested more than {MAX_DEPTH} levels deep", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        self._sizes[id(node)] = self._total - start
        return node

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if len(event.value) > MAX_SCALAR:
            _yaml_error(f"text of more than {MAX_SCALAR} characters", event.start_mark)
        return super().compose_scalar_node(anchor)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (str, int, float, bool, type(None))):
                if key in keys:
                    _yaml_error(f"duplicate key {key!r}", key_node.start_mark)
                keys.add(key)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        value = super().construct_object(node, deep)
        if isinstance(value, str) and CONTROL.search(value.removesuffix("\n")):
            _yaml_error("text with a line break or a control character", node.start_mark)
        if type(value) is int and not -MAX_NUMBER <= value < MAX_NUMBER:
            _yaml_error("number of more than 64 bits", node.start_mark)
        return value

    def _count(self, size: int, mark: yaml.Mark) -> None:
        self._total += size
        if self._total > MAX_NODES:
            _yaml_error(f"more than {MAX_NODES:,} values", mark)


def parse_yaml(text: str, location: str) -> Any:
    """Parse untrusted YAML; ``location`` is the file for error messages.

    Raises:
        ConfigError: it is not valid YAML or exceeds a limit.
    """
    try:
        return yaml.load(text, Loader=BoundedLoader)  # a SafeLoader
    except ConfigError as error:
        raise ConfigError(f"{location}: {error}") from None
    except Exception as error:  # PyYAML does not wrap all errors: `!!int ""` is an IndexError
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error) or type(error).__name__
        problem = CONTROL.sub(" ", " ".join(str(problem).split()))[:200]
        raise ConfigError(f"{location} is not valid YAML{line}: {problem}") from None


def _yaml_error(problem: str, mark: yaml.Mark) -> NoReturn:
    raise ConfigError(f"{problem} (line {mark.line + 1})")
