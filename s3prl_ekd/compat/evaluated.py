"""The names in a config that s3prl evaluates: they may be names and nothing else.

s3prl turns ``optimizer.name``, ``modelrc.select`` and their like into classes by ``eval``. In a
YAML or a checkpoint of somebody else they could be any expression, so they are looked at before.
"""

from __future__ import annotations

import builtins
import re
from collections.abc import Iterator
from typing import Any

from ..errors import ConfigError

# The keys whose text s3prl 0.4.18 evaluates, wherever they stand in a recipe.
EVALUATED = {"select", "module", "pooling", "agg_module", "model_type", "metric", "unk_weight"}
EVALUATED |= {"feat_type", "utter_module", "ObjectiveLoss"}
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ALSO = {"-math.inf", "math.inf"}  # what s3prl's own ASR recipe has for unk_weight


def check_names(config: Any, where: str) -> None:
    """Refuse a config in which something that s3prl evaluates is not a plain name.

    Raises:
        ConfigError: naming the key.
    """
    for path, value in _found(config, ()):
        if isinstance(value, str) and not _is_name(value):
            raise ConfigError(
                f"{where}: {'.'.join(path)} is {value[:60]!r}, which s3prl would run as code; it "
                "must be a plain name"
            )


def _is_name(text: str) -> bool:
    if hasattr(builtins, text):  # exec, open, exit: no class of s3prl's is called so
        return False
    return bool(_NAME.fullmatch(text)) or text in _ALSO


def _found(config: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(config, dict):
        for key, value in config.items():
            here = (*path, str(key))
            named = key == "name" and path and path[-1] in ("optimizer", "scheduler")
            if key in EVALUATED or named:
                yield from ((here, item) for item in _items(value))
            yield from _found(value, here)
    elif isinstance(config, (list, tuple)):
        for i, value in enumerate(config):
            yield from _found(value, (*path, str(i)))


def _items(value: Any) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value]
