"""What s3prl evaluates out of files and of ``-o``, read instead: a guard on its modules.

s3prl's models call ``eval`` on the conv layers that a checkpoint or a config names, wherever that
comes from, and ``-o`` is evaluated too. Each of its modules that does so gets an ``eval`` of its
own, which shadows Python's: it reads that one kind of value and runs nothing.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from ..distill.conv_spec import parse_conv_layers
from .child_processes import repeat_in_children
from .import_hooks import on_import


def read_conv_layers(text: Any) -> list[tuple[int, int, int]]:
    """The conv layers that s3prl would evaluate. Raises ConfigError: they are something else."""
    return list(parse_conv_layers(text))


def read_layers(text: Any) -> Any:
    """Conv layers, or a list of whole numbers. Raises ConfigError: they are something else."""
    try:
        value = ast.literal_eval(text)
    except Exception:  # literal_eval documents five of them
        return read_conv_layers(text)
    if isinstance(value, (list, tuple)) and all(type(each) is int for each in value):
        return value
    return read_conv_layers(text)


def read_value(text: str) -> Any:
    """A number, text, list or mapping of ``-o``. Raises ValueError: s3prl then takes the text."""
    try:
        return ast.literal_eval(text)
    except Exception:  # literal_eval documents five of them
        raise ValueError("not a plain value") from None


_READERS: dict[str, Callable[[Any], Any]] = {
    "upstream.distiller.model": read_conv_layers,
    "upstream.hubert.hubert_model": read_conv_layers,
    "upstream.wav2vec2.wav2vec2_model": read_conv_layers,
    "upstream.data2vec.data2vec_model": read_conv_layers,
    "upstream.wavlm.WavLM": read_conv_layers,
    "upstream.wav2vec.wav2vec_model": read_conv_layers,
    "upstream.lighthubert.lighthubert.lighthubert": read_conv_layers,
    "upstream.multires_hubert.hubert_model": read_layers,
    "utility.helper": read_value,
}
# Under the bare names too, by which s3prl's checkout and its pretraining code import them.
READERS = {f"{root}{name}": reader for name, reader in _READERS.items() for root in ("s3prl.", "")}


def guard() -> None:
    """Keep those modules of s3prl from evaluating, whenever this process or a child imports them.

    Calling it twice changes nothing.
    """
    for name, reader in READERS.items():
        if name in sys.modules:
            vars(sys.modules[name])["eval"] = reader
        on_import(name, _run_and_guard)
    repeat_in_children(guard)


def _run_and_guard(module: ModuleType, run: Callable[[ModuleType], None]) -> None:
    run(module)
    vars(module)["eval"] = READERS[module.__name__]
