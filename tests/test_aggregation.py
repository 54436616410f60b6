"""The aggregations against their definitions, written as loops."""

import pytest
import torch

from s3prl_ekd.distill.aggregation import (
    AGGREGATIONS,
    Residual,
    TeacherShape,
    build_aggregation,
    crop_frames,
)
from s3prl_ekd.distill.settings import TargetSettings
from s3prl_ekd.errors import TeacherError


def hidden_of(*widths, layers=2, frames=4):
    torch.manual_seed(0)
    return {f"t{i}": torch.randn(2, layers, frames, width) for i, width in enumerate(widths)}


def shapes_of(hidden):
    return {
        name: TeacherShape(tuple((i,) for i in range(states.shape[1])), states.shape[-1])
        for name, states in hidden.items()
    }


EQUAL = {f"t{i}": 1.0 for i in range(3)}


def test_separate_is_the_teachers_themselves():
    hidden = hidden_of(3, 5)
    aggregate = AGGREGATIONS["separate"](shapes_of(hidden))
    assert aggregate(hidden, EQUAL) == hidden
    assert {name: spec.width for name, spec in aggregate.specs.items()} == {"t0": 3, "t1": 5}


def test_average_is_the_mean_of_every_number():
    hidden = hidden_of(3, 3, 3)
    target = AGGREGATIONS["average"](shapes_of(hidden))(hidden, EQUAL)["average"]
    for index in torch.cartesian_prod(*map(torch.arange, target.shape)).tolist():
        mean = sum(hidden[name][tuple(index)].item() for name in hidden) / 3
        assert target[tuple(index)].item() == pytest.approx(mean, abs=1e-6)


def test_average_does_not_care_for_the_order_and_of_equals_is_the_same():
    hidden = hidden_of(3, 3, 3)
    turned = dict(reversed(hidden.items()))
    one = AGGREGATIONS["average"](shapes_of(hidden))(hidden, EQUAL)["average"]
    other = AGGREGATIONS["average"](shapes_of(turned))(turned, EQUAL)["average"]
    assert torch.allclose(one, other, atol=1e-7)
    same = {name: hidden["t0"] for name in hidden}
    mean = AGGREGATIONS["average"](shapes_of(same))(same, EQUAL)["average"]
    assert torch.allclose(mean, hidden["t0"], atol=1e-7)


def test_concat_is_the_teachers_side_by_side_and_comes_apart_again():
    hidden = hidden_of(3, 5, 2)
    aggregate = AGGREGATIONS["concat"](shapes_of(hidden))
    target = aggregate(hidden, EQUAL)["concat"]
    assert target.shape == (2, 2, 4, 10)
    assert torch.equal(target[..., :3], hidden["t0"])
    assert torch.equal(target[..., 3:8], hidden["t1"])
    assert torch.equal(target[..., 8:], hidden["t2"])
    for name, part in aggregate.per_teacher({"concat": target}).items():
        assert torch.equal(part, hidden[name])


def test_concat_of_k_teachers_is_k_times_as_wide():
    shapes = {name: TeacherShape(((4,), (8,), (12,)), 768) for name in "abc"}
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


def test_weighted_average_by_hand():
    hidden = {"t0": torch.full((1, 1, 1, 2), 4.0), "t1": torch.full((1, 1, 1, 2), 1.0)}
    aggregate = AGGREGATIONS["average"](shapes_of(hidden))
    target = aggregate(hidden, {"t0": 3.0, "t1": 1.0})["average"]
    assert target.flatten().tolist() == pytest.approx([3.25, 3.25])


def test_weights_of_separate_sets_and_of_concats_dimensions():
    shapes = shapes_of(hidden_of(3, 2))
    weights = {"t0": 2.0, "t1": 0.5}
    assert AGGREGATIONS["separate"](shapes).set_weights(weights) == weights
    dims = AGGREGATIONS["concat"](shapes).dim_weights(weights)["concat"]
    assert dims.tolist() == [2.0, 2.0, 2.0, 0.5, 0.5]
    assert AGGREGATIONS["concat"](shapes).dim_weights(EQUAL) == {}


@pytest.mark.parametrize("kind", ["average", "concat"])
def test_heads_for_each_teacher_beside_the_aggregates(kind):
    hidden = hidden_of(3, 3)
    both = build_aggregation(kind, shapes_of(hidden), TargetSettings(separate_heads=True))
    targets = both(hidden, EQUAL)
    assert list(targets) == [kind, "t0", "t1"] == list(both.specs)
    alone = AGGREGATIONS[kind](shapes_of(hidden))(hidden, EQUAL)[kind]
    assert torch.equal(targets[kind], alone) and torch.equal(targets["t1"], hidden["t1"])
    assert both.per_teacher(targets) == {"t0": hidden["t0"], "t1": hidden["t1"]}


def test_residual_heads_predict_the_differences():
    hidden = hidden_of(3, 3, 3)
    settings = TargetSettings(residual_heads=True, residual_weight=0.3)
    aggregate = build_aggregation("separate", shapes_of(hidden), settings)
    targets = aggregate(hidden, EQUAL)
    assert list(targets) == ["t0", "t1", "t2", "t0-t1", "t1-t2"]
    assert torch.equal(targets["t1-t2"], hidden["t1"] - hidden["t2"])
    assert aggregate.set_weights(EQUAL)["t0-t1"] == 0.3
    with pytest.raises(TeacherError, match="targets.residual_heads needs teachers of one width"):
        build_aggregation("separate", shapes_of(hidden_of(3, 5)), settings)


@pytest.mark.parametrize("kind", AGGREGATIONS)
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_every_aggregation_keeps_the_contract(kind, separate, residual):
    """The same target sets everywhere, of the shapes that the specs say."""
    hidden = hidden_of(3, 3, 3)
    settings = TargetSettings(separate_heads=separate, residual_heads=residual)
    aggregate = build_aggregation(kind, shapes_of(hidden), settings)
    targets = aggregate(hidden, EQUAL)
    assert targets.keys() == aggregate.specs.keys() == aggregate.set_weights(EQUAL).keys()
    for name, spec in aggregate.specs.items():
        assert targets[name].shape == (2, spec.layers, 4, spec.width)
    unequal = {**EQUAL, "t0": 2.0}
    for name, dims in aggregate.dim_weights(unequal).items():
        assert dims.shape == (aggregate.specs[name].width,)
    parts = aggregate.per_teacher(targets)
    assert parts.keys() == hidden.keys()
    assert all(parts[name].shape == hidden[name].shape for name in hidden)
    if separate or kind == "concat":  # the parts that are a teacher's own
        assert all(torch.equal(parts[name], hidden[name]) for name in hidden)


def test_residuals_are_no_teachers_own():
    residual = Residual(shapes_of(hidden_of(3, 3)), 1.0)
    assert residual.per_teacher(residual(hidden_of(3, 3), EQUAL)) == {}


def test_groups_are_per_teacher_or_across():
    hidden = hidden_of(3, 3)
    shapes = shapes_of(hidden)
    per_teacher = build_aggregation("groups", shapes, TargetSettings())
    assert list(per_teacher(hidden, EQUAL)) == ["t0", "t1"]
    across = build_aggregation("groups", shapes, TargetSettings(across_teachers=True))
    (target,) = across(hidden, EQUAL).values()
    assert torch.allclose(target, (hidden["t0"] + hidden["t1"]) / 2, atol=1e-7)
