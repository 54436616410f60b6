"""The aggregations against their definitions, written as loops."""

import pytest
import torch

from s3prl_ekd.distill.aggregation import AGGREGATIONS, TeacherShape, crop_frames
from s3prl_ekd.errors import TeacherError


def hidden_of(*widths, layers=2, frames=4):
    torch.manual_seed(0)
    return {f"t{i}": torch.randn(2, layers, frames, width) for i, width in enumerate(widths)}


def shapes_of(hidden):
    layers = {name: tuple(range(states.shape[1])) for name, states in hidden.items()}
    return {name: TeacherShape(layers[name], states.shape[-1]) for name, states in hidden.items()}


def test_separate_is_the_teachers_themselves():
    hidden = hidden_of(3, 5)
    aggregate = AGGREGATIONS["separate"](shapes_of(hidden))
    assert aggregate.targets(hidden) == hidden
    assert {name: spec.width for name, spec in aggregate.specs.items()} == {"t0": 3, "t1": 5}


def test_average_is_the_mean_of_every_number():
    hidden = hidden_of(3, 3, 3)
    target = AGGREGATIONS["average"](shapes_of(hidden)).targets(hidden)["average"]
    for index in torch.cartesian_prod(*map(torch.arange, target.shape)).tolist():
        mean = sum(hidden[name][tuple(index)].item() for name in hidden) / 3
        assert target[tuple(index)].item() == pytest.approx(mean, abs=1e-6)


def test_average_does_not_care_for_the_order_and_of_equals_is_the_same():
    hidden = hidden_of(3, 3, 3)
    turned = dict(reversed(hidden.items()))
    one = AGGREGATIONS["average"](shapes_of(hidden)).targets(hidden)["average"]
    other = AGGREGATIONS["average"](shapes_of(turned)).targets(turned)["average"]
    assert torch.allclose(one, other, atol=1e-7)
    same = {name: hidden["t0"] for name in hidden}
    mean = AGGREGATIONS["average"](shapes_of(same)).targets(same)["average"]
    assert torch.allclose(mean, hidden["t0"], atol=1e-7)


def test_concat_is_the_teachers_side_by_side_and_comes_apart_again():
    hidden = hidden_of(3, 5, 2)
    aggregate = AGGREGATIONS["concat"](shapes_of(hidden))
    target = aggregate.targets(hidden)["concat"]
    assert target.shape == (2, 2, 4, 10)
    assert torch.equal(target[..., :3], hidden["t0"])
    assert torch.equal(target[..., 3:8], hidden["t1"])
    assert torch.equal(target[..., 8:], hidden["t2"])
    for name, part in aggregate.per_teacher({"concat": target}).items():
        assert torch.equal(part, hidden[name])


def test_concat_of_k_teachers_is_k_times_as_wide():
    shapes = {name: TeacherShape((4, 8, 12), 768) for name in "abc"}
    assert AGGREGATIONS["concat"](shapes).specs["concat"].width == 3 * 768


def test_average_refuses_several_widths():
    with pytest.raises(TeacherError, match="t0 has 3, t1 has 5.*use aggregation: separate"):
        AGGREGATIONS["average"](shapes_of(hidden_of(3, 5)))


def test_frames_are_cut_to_the_fewest():
    hidden = {"a": torch.randn(1, 2, 7, 3), "b": torch.randn(1, 2, 6, 3)}
    cut = crop_frames(hidden)
    assert torch.equal(cut["a"], hidden["a"][:, :, :6]) and torch.equal(cut["b"], hidden["b"])


def test_another_frame_rate_is_refused():
    with pytest.raises(TeacherError, match="a: 100, b: 50"):
        crop_frames({"a": torch.zeros(1, 1, 100, 3), "b": torch.zeros(1, 1, 50, 3)})
