"""The cut student computes what the student with gates computes in eval mode."""

import dataclasses

import pytest
import torch

from s3prl_ekd.distill.pruning.cut import cut, differences, gate_values
from s3prl_ekd.distill.student_settings import PrunedSettings
from s3prl_ekd.errors import CheckpointError
from s3prl_ekd.student_file import LoadedStudent, load_student, write_student

from .gated_students import ALL_UNITS, LAYOUTS, gated_settings, gated_student, noise, saturate

UNITS = [("conv",), ("heads",), ("ffn",), ("attention", "feed_forward"), ALL_UNITS]


def largest_difference(student, other):
    waves, lengths = noise(9_000, 6_500)
    with torch.no_grad():
        a, b = student(waves, lengths), other(waves, lengths)
    assert torch.equal(a.mask, b.mask)
    valid = a.mask[..., None]
    pairs = zip([*a.hidden_states, a.last], [*b.hidden_states, b.last], strict=True)
    return max(((x - y) * valid).abs().max().item() for x, y in pairs)


@pytest.mark.parametrize("units", UNITS, ids="+".join)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_cut_is_exact(layout, units):
    student = gated_student(gated_settings(units, **LAYOUTS[layout]))
    before = {name: value.clone() for name, value in student.state_dict().items()}
    small = cut(student, gate_values(student))
    assert small.is_cut
    assert sum(p.numel() for p in small.parameters()) < sum(v.numel() for v in before.values())
    assert largest_difference(student, small) < 1e-5
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_cut_is_exact_without_any_heads_and_units(layout):
    student = gated_student(gated_settings(ALL_UNITS, **LAYOUTS[layout]))
    saturate(student, {"heads": 1.0, "ffn": 1.0, "attention": 0.0, "feed_forward": 0.0})
    small = cut(student, gate_values(student))
    assert small.settings.heads == ((),) * 3
    assert small.settings.ffn_dims == (0,) * 3
    assert largest_difference(student, small) < 1e-5
    # what remains of the modules are the biases of their outputs
    layers, originals = small.backbone.encoder.layers, student.backbone.encoder.layers
    for layer, original in zip(layers, originals, strict=True):
        assert torch.equal(layer.self_attn.out_proj.bias, original.self_attn.out_proj.bias)
        assert torch.equal(layer.fc2.bias, original.fc2.bias)
    for layer in small.backbone.encoder.layers:
        layer.self_attn.out_proj.bias.data.zero_()
    assert largest_difference(student, small) > 1e-3


@pytest.mark.parametrize("layout", ["hubert", "wavlm_large", "soft"])
def test_all_channels_of_a_conv_layer_but_one_can_go(layout):
    student = gated_student(gated_settings(("conv",), **LAYOUTS[layout]))
    for _, _, gate in student.backbone.gates():
        gate.log_alpha.data.copy_(-20.0 - torch.arange(len(gate.log_alpha)))
    small = cut(student, gate_values(student))
    assert [channels for channels, _, _ in small.settings.conv_layers] == [1] * 7
    assert largest_difference(student, small) < 1e-5


def test_norms_over_all_channels_make_the_cut_differ():
    """As in DPHuBERT, and the reason for ``norms: kept``."""
    kept, all_ = (gated_student(gated_settings(("conv",), norms)) for norms in ("kept", "all"))
    assert largest_difference(kept, cut(kept, gate_values(kept))) < 1e-5
    assert largest_difference(all_, cut(all_, gate_values(all_))) > 1e-3
    # without closed gates in the last conv layer the norms are the same
    for student in (kept, all_):
        *_, (_, _, gate) = student.backbone.gates()
        gate.log_alpha.data.fill_(20)
    assert largest_difference(kept, all_) < 1e-5
    assert largest_difference(all_, cut(all_, gate_values(all_))) < 1e-5


def test_the_weights_of_kept_units_are_scaled_by_their_gates():
    """Against an indexing by hand, for the second layer's heads and units."""
    student = gated_student(gated_settings(("heads", "ffn")))
    values = gate_values(student)
    heads, units = values["heads", 1], values["ffn", 1]
    small, big = cut(student, values).backbone.encoder.layers[1], student.backbone.encoder.layers[1]
    kept_heads = [i for i in range(3) if heads[i] > 0]
    rows = [8 * head + i for head in kept_heads for i in range(8)]
    kept = [i for i in range(20) if units[i] > 0]
    assert 0 < len(kept_heads) < 3
    assert 0 < len(kept) < 20
    scale = torch.tensor([heads[row // 8] for row in rows])
    expected = big.self_attn.out_proj.weight[:, rows] * scale
    assert torch.equal(small.self_attn.out_proj.weight, expected)
    assert torch.equal(small.self_attn.q_proj.weight, big.self_attn.q_proj.weight[rows])
    assert torch.equal(small.self_attn.v_proj.bias, big.self_attn.v_proj.bias[rows])
    assert torch.equal(small.fc2.weight, big.fc2.weight[:, kept] * units[kept])
    assert torch.equal(small.fc1.bias, big.fc1.bias[kept])


def test_random_cuts_keep_as_many_units_and_draw_which():
    student = gated_student(gated_settings(ALL_UNITS))
    values, first, again, second = (gate_values(student, random) for random in (None, 1, 1, 2))
    for key, value in values.items():
        assert (first[key] > 0).sum() == (value > 0).sum()
        assert set(first[key].tolist()) <= {0.0, 1.0}
        assert torch.equal(first[key], again[key])
    assert any(not torch.equal(first[key], second[key]) for key in values)
    assert largest_difference(cut(student, first), cut(student, second)) > 1e-3


def test_differences_of_hidden_states():
    first, second = (gated_student(gated_settings()) for _ in range(2))
    last_norms = [s.backbone.encoder.layers[-1].final_layer_norm for s in (first, second)]
    with torch.no_grad():
        for norm in last_norms:
            norm.weight.fill_(1)
            norm.bias.zero_()
        last_norms[1].bias[0] = 0.5  # one of 24 dimensions
    *same, last = differences(first, second, [torch.randn(4_000), torch.randn(2_000)])
    assert same == [(0.0, 0.0)] * 3  # the states before the last
    assert last == pytest.approx((0.5, 0.5 / 24**0.5), rel=1e-3)  # the states have variance 1


def test_a_cut_student_has_no_gates_to_cut():
    student = gated_student(gated_settings())
    with pytest.raises(CheckpointError):
        gate_values(cut(student, gate_values(student)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_cut_student_is_read_from_its_file(layout, tmp_path):
    student = gated_student(gated_settings(ALL_UNITS, **LAYOUTS[layout]))
    saturate(student)
    small = cut(student, gate_values(student))
    for name in ("pruned.pt", "pruned.safetensors"):
        write_student(LoadedStudent(small, None, {}, {}), tmp_path / name)
        read = load_student(tmp_path / name).student
        assert read.settings == small.settings
        assert largest_difference(small, read) == 0


def test_a_pruned_student_with_gates_is_pruned_again():
    """A cut student gets new gates: its remaining heads keep their places."""
    student = gated_student(gated_settings(ALL_UNITS, **LAYOUTS["wavlm"]))
    small = cut(student, gate_values(student))
    gates = student.settings.gates
    settings = dataclasses.replace(small.settings, gates=gates)
    again = gated_student(settings)
    assert isinstance(settings, PrunedSettings)
    assert largest_difference(again, cut(again, gate_values(again))) < 1e-5
    kept = cut(again, gate_values(again)).settings.heads
    assert all(set(a) <= set(b) for a, b in zip(kept, small.settings.heads, strict=True))
