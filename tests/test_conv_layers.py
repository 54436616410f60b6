"""The conv layers' grammar: what it reads, and that nothing else gets through."""

import pytest

from s3prl_ekd.distill.conv_layers import (
    DEFAULT,
    conv_layers_text,
    parse_conv_layers,
    receptive_field,
    stride_of,
)
from s3prl_ekd.errors import ConfigError


def test_the_default_has_seven_layers_and_a_stride_of_20_ms():
    layers = parse_conv_layers(DEFAULT)
    assert layers == ((512, 10, 5),) + ((512, 3, 2),) * 4 + ((512, 2, 2),) * 2
    assert stride_of(layers) == 320
    assert receptive_field(layers) == 400


def test_s3prl_gets_a_literal():
    layers = parse_conv_layers("[(8, 10, 5)]*2+[(4,3,2)]")
    assert conv_layers_text(layers) == "[(8, 10, 5), (8, 10, 5), (4, 3, 2)]"
    assert parse_conv_layers(conv_layers_text(layers)) == layers


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "[(512, 10, 5)] + print('x')",
        "[(512, 10, 5) for _ in range(9)]",
        "[(512, 10, 5)] * 10**9",
        "[(512, 10, 5)] * 999999999",
        "[(99999999, 10, 5)]",
        "[(512, 10)]",
        "[(512, 10, -5)]",
        "[(512, 10, 5.0)]",
        "[(True, 10, 5)]",
        "[]",
        "",
        "(512, 10, 5)",
        "[" * 200 + "]" * 200,
        "[(1,1,1)]+" * 100,
        "\x00",
    ],
)
def test_any_other_text_is_an_error(text):
    with pytest.raises(ConfigError, match="student.conv: "):
        parse_conv_layers(text, "student.conv")
