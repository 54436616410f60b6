"""Parsing of the conv extractor's layers, without ``eval``.

s3prl and fairseq write this setting as Python source, ``"[(512,10,5)] + [(512,3,2)] * 4"``, and
evaluate it. Here only lists, tuples, integers, ``+`` and ``*`` are parsed, and s3prl gets a literal
written from the result.
"""

from __future__ import annotations

import ast
import math
from typing import Any

from ..errors import ConfigError

ConvLayers = tuple[tuple[int, int, int], ...]

DEFAULT = "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2"
# Limits far above any published extractor, so that a hostile file cannot allocate terabytes.
MAX_TEXT, MAX_LAYERS, MAX_NUMBER = 500, 32, 8192


def parse_conv_layers(text: str, where: str = "extractor_conv_feature_layers") -> ConvLayers:
    """Parse conv layers ``(channels, kernel [samples or frames], stride)``, in order.

    Raises:
        ConfigError: the text has anything but lists of triples of positive integers, ``+`` and
            ``*``.

    Example:
        >>> parse_conv_layers("[(8,10,5)] + [(8,3,2)] * 2")
        ((8, 10, 5), (8, 3, 2), (8, 3, 2))
    """
    error = ConfigError(
        f"{where}: {str(text)[:80]!r} is not a list of (channels, kernel, stride) triples; "
        f"write it like {DEFAULT!r}"
    )
    if not isinstance(text, str) or len(text) > MAX_TEXT:
        raise error
    try:
        layers = _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        raise error from None
    if not isinstance(layers, list) or not layers or not all(map(_is_layer, layers)):
        raise error
    return tuple(layers)


def conv_layers_text(layers: ConvLayers) -> str:
    """The layers as a Python literal, which s3prl evaluates."""
    return "[" + ", ".join(f"({c}, {k}, {s})" for c, k, s in layers) + "]"


def stride_of(layers: ConvLayers) -> int:
    """Samples from one frame to the next (320 for the default, 20 ms at 16 kHz)."""
    return math.prod(stride for _, _, stride in layers)


def receptive_field(layers: ConvLayers) -> int:
    """Smallest number of samples that gives a frame (400 for the default, 25 ms at 16 kHz)."""
    field = 1
    for _, kernel, step in reversed(layers):
        field = (field - 1) * step + kernel
    return field


def _is_layer(value: Any) -> bool:
    if not isinstance(value, tuple) or len(value) != 3:
        return False
    return all(type(n) is int and 0 < n <= MAX_NUMBER for n in value)


def _value(node: ast.AST) -> Any:
    """The value of a literal, of a list + list or a list * number. Raises ValueError otherwise."""
    if not isinstance(node, ast.BinOp):
        return ast.literal_eval(node)
    left, right = _value(node.left), _value(node.right)
    if isinstance(node.op, ast.Add) and isinstance(left, list) and isinstance(right, list):
        if len(left) + len(right) <= MAX_LAYERS:
            return left + right
    if isinstance(node.op, ast.Mult) and isinstance(left, list) and type(right) is int:
        if 0 <= right * len(left) <= MAX_LAYERS:
            return left * right
    raise ValueError(f"only list + list and list * number, of at most {MAX_LAYERS} layers")
