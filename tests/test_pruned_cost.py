"""The cost of a student with gates: parameters and MACs, as counted on the student that is cut."""

import math

import pytest
import torch

from s3prl_ekd.distill.pruning.backbone import PrunedBackbone
from s3prl_ekd.distill.pruning.cost import (
    Widths,
    expected_widths,
    full_widths,
    macs,
    parameters,
    smallest_widths,
)
from s3prl_ekd.distill.pruning.cut import cut, gate_values
from s3prl_ekd.distill.student_settings import GateSettings, PrunedSettings
from s3prl_ekd.superb.macs import count_macs

from .gated_students import ALL_UNITS, LAYOUTS, gated_settings, gated_student, noise, saturate

BASE = {
    "conv_layers": ((512, 10, 5), *[(512, 3, 2)] * 4, *[(512, 2, 2)] * 2),
    "extractor_mode": "default",
    "conv_bias": False,
    "normalize_waveforms": False,
    "encoder_embed_dim": 768,
    "encoder_attention_heads": 12,
    "heads": (tuple(range(12)),) * 12,
    "ffn_dims": (3072,) * 12,
    "conv_pos": 128,
    "conv_pos_groups": 16,
    "activation_fn": "gelu",
    "layer_norm_first": False,
}
# Shares of closed gates: a mixture, all of them, and none.
CLOSED = {
    "half": {},
    "all": dict.fromkeys(ALL_UNITS, 1.0),
    "none": dict.fromkeys(ALL_UNITS, 0.0),
    "modules": {"attention": 1.0, "feed_forward": 1.0},
}


@pytest.mark.parametrize(("last_conv", "total"), [("hard", 94_370_944), ("soft", 94_371_456)])
def test_hubert_base_has_the_counts_of_dphuberts_code(last_conv, total):
    soft = last_conv == "soft"
    settings = PrunedSettings(**BASE, feature_scale=soft, gates=GateSettings(last_conv=last_conv))
    with torch.device("meta"):
        backbone = PrunedBackbone(settings)
    gates = sum(len(gate.log_alpha) for _, _, gate in backbone.gates())
    assert gates == 7 * 512 + 12 * 12 + 12 * 3072 == 40_592
    assert sum(p.numel() for p in backbone.parameters()) - gates == total
    assert parameters(settings, full_widths(settings)) == total


def test_the_expected_sparsity_of_hubert_base_at_the_start():
    settings = PrunedSettings(**BASE, feature_scale=True)

    def kept(drop):  # probability that a gate is open
        return 1 / (1 + drop / (1 - drop) * 11 ** (-2 / 3))

    start = Widths(
        conv=[512 * kept(0.01)] * 7,
        heads=[12 * kept(0.01)] * 12,
        ffn=[3072 * kept(0.5)] * 12,
        attention=[1] * 12,
        feed_forward=[1] * 12,
    )
    assert 1 - parameters(settings, start) / 94_371_456 == pytest.approx(0.1018, abs=5e-5)


def saturated(layout, closed):
    student = gated_student(gated_settings(ALL_UNITS, **LAYOUTS[layout]))
    saturate(student, CLOSED[closed])
    return student, cut(student, gate_values(student))


@pytest.mark.parametrize("closed", CLOSED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_expected_parameters_are_those_of_the_cut_student(layout, closed):
    student, small = saturated(layout, closed)
    counted = sum(weight.numel() for weight in small.parameters())
    expected = parameters(student.settings, expected_widths(student.settings, student.backbone))
    # WavLM's gate of positions goes with all heads of a layer, but is counted as if it stayed
    gates = small.settings.heads.count(()) if small.settings.position_buckets else 0
    gates *= 8 * (8 + 1) + 3
    # and a pre-norm layer's norms go with what they are in front of
    settings = small.settings
    empty = settings.heads.count(()) + settings.ffn_dims.count(0)
    norms = 2 * settings.encoder_embed_dim * empty * settings.layer_norm_first
    assert expected.item() == counted + gates + norms
    assert parameters(small.settings, full_widths(small.settings)) == counted


@pytest.mark.parametrize("closed", CLOSED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_expected_macs_are_those_of_the_cut_student(layout, closed):
    student, small = saturated(layout, closed)
    waves, lengths = noise(9_000)
    with count_macs() as counted:
        small(waves, lengths)
    expected = macs(student.settings, expected_widths(student.settings, student.backbone), 9_000)
    assert expected.item() == counted.products
    assert macs(small.settings, full_widths(small.settings), 9_000) == counted.products


def test_the_cost_between_whole_widths_is_a_product_of_expectations():
    """By a sum over all of a layer's weights, each with the probability that it is kept."""
    settings = gated_settings(ALL_UNITS)
    student = gated_student(settings)
    probability = {
        (unit, i): [1 / (1 + math.exp(-a) * 11 ** (-2 / 3)) for a in gate.log_alpha.tolist()]
        for unit, i, gate in student.backbone.gates()
    }
    expected, before = 0.0, [1.0]
    for i, (_, kernel, _) in enumerate(settings.conv_layers):
        here = probability["conv", i]
        expected += sum(a * b * kernel for a in before for b in here)
        expected += 2 * sum(here) * (i == 0)  # group norm
        before = here
    expected += sum(before) * (2 + 24) + 24  # layer norm, projection
    expected += 24 * 6 * 16 + 16 + 24 + 2 * 24  # positional convolution, layer norm
    for i in range(3):
        (attention,), (feed_forward,) = probability["attention", i], probability["feed_forward", i]
        expected += attention * sum(p * (3 * 25 * 8 + 8 * 24) for p in probability["heads", i])
        expected += feed_forward * sum(p * (25 + 24) for p in probability["ffn", i])
        expected += 2 * 24 + 4 * 24  # biases of the outputs, layer norms
    cost = parameters(settings, expected_widths(settings, student.backbone))
    assert cost.item() == pytest.approx(expected, rel=1e-6)


def test_the_smallest_widths_keep_one_channel():
    settings = gated_settings()
    widths = smallest_widths(settings, gated_student(settings).backbone)
    assert (widths.conv, widths.heads, widths.ffn) == ([1] * 7, [0] * 3, [0] * 3)
    assert widths.attention == widths.feed_forward == [1] * 3
