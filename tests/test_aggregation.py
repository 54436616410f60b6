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
from s3prl_ekd.distill.losses import LossWeights, distillation_loss, distillation_terms
from s3prl_ekd.distill.settings import (
    DistillSettings,
    HeadSettings,
    LossSettings,
    TargetSettings,
    TeacherSettings,
)
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


def build(aggregation, hidden, heads=None, targets=None):
    """The aggregation of an experiment with teachers t0, t1, ... of these hidden states."""
    layers = tuple(range(next(iter(hidden.values())).shape[1]))
    groups = tuple((layer,) for layer in layers) if targets else None
    settings = DistillSettings(
        {name: TeacherSettings("x", layers, groups) for name in hidden},
        aggregation,
        heads=heads or HeadSettings(),
        targets=targets or TargetSettings(),
    )
    return build_aggregation(settings, shapes_of(hidden))


def test_separate_keeps_each_teachers_targets():
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


def test_average_is_independent_of_the_order_and_of_copies():
    hidden = hidden_of(3, 3, 3)
    turned = dict(reversed(hidden.items()))
    one = AGGREGATIONS["average"](shapes_of(hidden))(hidden, EQUAL)["average"]
    other = AGGREGATIONS["average"](shapes_of(turned))(turned, EQUAL)["average"]
    assert torch.allclose(one, other, atol=1e-7)
    same = {name: hidden["t0"] for name in hidden}
    mean = AGGREGATIONS["average"](shapes_of(same))(same, EQUAL)["average"]
    assert torch.allclose(mean, hidden["t0"], atol=1e-7)


def test_concat_is_the_teachers_side_by_side_and_can_be_split():
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


def test_average_of_different_widths_is_an_error():
    with pytest.raises(TeacherError, match="t0.*3.*t1.*5"):
        AGGREGATIONS["average"](shapes_of(hidden_of(3, 5)))


def test_frames_are_cut_to_the_fewest():
    hidden = {"a": torch.randn(1, 2, 7, 3), "b": torch.randn(1, 2, 6, 3)}
    cut = crop_frames(hidden)
    assert torch.equal(cut["a"], hidden["a"][:, :, :6]) and torch.equal(cut["b"], hidden["b"])


def test_another_frame_rate_is_an_error():
    with pytest.raises(TeacherError, match="a.*100.*b.*50"):
        crop_frames({"a": torch.zeros(1, 1, 100, 3), "b": torch.zeros(1, 1, 50, 3)})


def test_weighted_average_by_hand():
    hidden = {"t0": torch.full((1, 1, 1, 2), 4.0), "t1": torch.full((1, 1, 1, 2), 1.0)}
    aggregate = AGGREGATIONS["average"](shapes_of(hidden))
    target = aggregate(hidden, {"t0": 3.0, "t1": 1.0})["average"]
    assert target.flatten().tolist() == pytest.approx([3.25, 3.25])


def test_weights_of_target_sets_and_of_dimensions():
    shapes = shapes_of(hidden_of(3, 2))
    weights = {"t0": 2.0, "t1": 0.5}
    assert AGGREGATIONS["separate"](shapes).set_weights(weights) == weights
    dims = AGGREGATIONS["concat"](shapes).dim_weights(weights)["concat"]
    # each teacher in proportion to its weight, whatever its width
    assert dims[:3].sum() / dims[3:].sum() == 2.0 / 0.5
    equal = AGGREGATIONS["concat"](shapes).dim_weights(EQUAL)["concat"]
    assert equal[:3].sum() == equal[3:].sum()
    assert AGGREGATIONS["concat"](shapes_of(hidden_of(3, 3))).dim_weights(EQUAL) == {}


def concat_loss(hidden, weights, predictions):
    """Loss and logs of ``concat`` for predictions of each teacher's targets."""
    aggregate = AGGREGATIONS["concat"](shapes_of(hidden))
    target = aggregate(hidden, weights)
    predicted = aggregate(predictions, weights)
    loss_weights = LossWeights({"concat": torch.ones(2, 4)}, dims=aggregate.dim_weights(weights))
    return distillation_loss(predicted, target, loss_weights)


@pytest.mark.parametrize("widths", [(48, 96), (96, 48, 5)])
@pytest.mark.parametrize("weights", [{}, {"t0": 3.0}, {"t1": 0.0}], ids=str)
def test_the_l1_of_concat_is_the_weighted_mean_of_the_teachers(widths, weights):
    hidden = hidden_of(*widths)
    predictions = {
        name: i * 0.5 + states.roll(1, 0) for i, (name, states) in enumerate(hidden.items())
    }
    weights = {name: weights.get(name, 1.0) for name in hidden}
    _, logs = concat_loss(hidden, weights, predictions)
    by_teacher = {n: (predictions[n] - hidden[n]).abs().mean().item() for n in hidden}
    expected = sum(weights[n] * by_teacher[n] for n in hidden) / sum(weights.values())
    assert logs["l1"].item() == pytest.approx(expected, rel=1e-5)
    plain = (torch.cat([*predictions.values()], -1) - torch.cat([*hidden.values()], -1)).abs()
    assert logs["l1"].item() != pytest.approx(plain.mean().item(), rel=1e-3)


def test_the_cosine_of_concat_by_hand():
    """Widths 1 and 2: the first teacher's dimension counts twice, (2 + 1 - 1) / (2 + 1 + 1)."""
    prediction = torch.tensor([1.0, 1.0, 1.0]).view(1, 1, 1, 3)
    target = torch.tensor([1.0, 1.0, -1.0]).view(1, 1, 1, 3)
    shapes = {name: TeacherShape(((0,),), width) for name, width in (("a", 1), ("b", 2))}
    equal = AGGREGATIONS["concat"](shapes).dim_weights({"a": 1.0, "b": 1.0})["concat"]
    raw = LossSettings(cosine="raw")
    assert distillation_terms(prediction, target, None, raw, equal).cosine.item() == (
        pytest.approx(1 - 0.5)
    )
    # weights 1 and 2: each dimension counts once
    assert AGGREGATIONS["concat"](shapes).dim_weights({"a": 1.0, "b": 2.0}) == {}
    assert distillation_terms(prediction, target, None, raw).cosine.item() == (
        pytest.approx(1 - 1 / 3)
    )


def test_concat_of_equal_widths_has_the_plain_mean():
    """Bit for bit, also at equal weights other than 1."""
    hidden = hidden_of(6, 6, 6)
    predictions = {name: states.roll(1, 0) for name, states in hidden.items()}
    plain = distillation_loss(
        {"concat": torch.cat([*predictions.values()], -1)},
        {"concat": torch.cat([*hidden.values()], -1)},
        LossWeights({"concat": torch.ones(2, 4)}),
    )[0]
    for weight in (1.0, 0.3):
        loss = concat_loss(hidden, dict.fromkeys(hidden, weight), predictions)[0]
        assert torch.equal(loss, plain)


@pytest.mark.parametrize("kind", ["average", "concat"])
def test_heads_for_each_teacher_and_for_the_aggregate(kind):
    hidden = hidden_of(3, 3)
    both = build(kind, hidden, HeadSettings(per_teacher=True))
    targets = both(hidden, EQUAL)
    assert list(targets) == [kind, "t0", "t1"] == list(both.specs)
    alone = AGGREGATIONS[kind](shapes_of(hidden))(hidden, EQUAL)[kind]
    assert torch.equal(targets[kind], alone) and torch.equal(targets["t1"], hidden["t1"])
    assert both.per_teacher(targets) == {"t0": hidden["t0"], "t1": hidden["t1"]}


def test_residual_heads_predict_the_differences():
    hidden = hidden_of(3, 3, 3)
    heads = HeadSettings(residual=True, residual_weight=0.3)
    aggregate = build("separate", hidden, heads)
    targets = aggregate(hidden, EQUAL)
    assert list(targets) == ["t0", "t1", "t2", "t0-t1", "t1-t2"]
    assert torch.equal(targets["t1-t2"], hidden["t1"] - hidden["t2"])
    assert aggregate.set_weights(EQUAL)["t0-t1"] == 0.3
    with pytest.raises(TeacherError, match="heads.residual.*t0.*3.*t1.*5"):
        build("separate", hidden_of(3, 5), heads)


@pytest.mark.parametrize("kind", AGGREGATIONS)
@pytest.mark.parametrize("per_teacher", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_every_aggregation_has_the_target_sets_of_its_specs(kind, per_teacher, residual):
    hidden = hidden_of(3, 3, 3)
    heads = HeadSettings(per_teacher=per_teacher, residual=residual)
    aggregate = build(kind, hidden, heads)
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
    if per_teacher or kind == "concat":  # predictions of each teacher's own targets
        assert all(torch.equal(parts[name], hidden[name]) for name in hidden)


def test_residuals_predict_no_teachers_own_targets():
    residual = Residual(shapes_of(hidden_of(3, 3)), 1.0)
    assert residual.per_teacher(residual(hidden_of(3, 3), EQUAL)) == {}


def test_groups_averaged_across_teachers():
    hidden = hidden_of(3, 3)
    across = build("separate", hidden, targets=TargetSettings(across_teachers=True))
    (target,) = across(hidden, EQUAL).values()
    assert torch.allclose(target, (hidden["t0"] + hidden["t1"]) / 2, atol=1e-7)
