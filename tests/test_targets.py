"""Options for targets: groups, weights, teacher dropping, normalisation, agreement, units."""

import dataclasses
import itertools
import re

import pytest
import torch

from s3prl_ekd.distill.aggregation import TeacherShape
from s3prl_ekd.distill.initialisation import initialise
from s3prl_ekd.distill.losses import Comparison, LossWeights, distillation_loss, frame_terms
from s3prl_ekd.distill.moments import Moments, usable_frames
from s3prl_ekd.distill.phi_s import hadamard, phi_s
from s3prl_ekd.distill.settings import (
    HeadSettings,
    LossSettings,
    TargetSettings,
    TeacherSettings,
)
from s3prl_ekd.distill.student import Student
from s3prl_ekd.distill.target_norm import TargetNorm
from s3prl_ekd.distill.teachers import Teacher
from s3prl_ekd.distill.weighting import (
    TeacherDropping,
    agreeing_dims,
    drop_teachers,
    weights_at,
)
from s3prl_ekd.errors import TeacherError
from s3prl_ekd.hidden_states.store import encode_targets

from .experiments import LAYERS, batch_of, distiller, load


def test_a_groups_target_is_the_mean_of_its_layers(teachers, waves):
    teacher = Teacher(load(teachers["hubert"]), [(1, 2), (4,), (0, 3)], "hubert")
    with torch.no_grad():
        states, targets = teacher.states(waves), teacher(waves)
    assert torch.allclose(targets[:, 0], (states[1] + states[2]) / 2, atol=1e-6)
    assert torch.equal(targets[:, 1], states[4])
    assert torch.allclose(targets[:, 2], (states[0] + states[3]) / 2, atol=1e-6)
    assert teacher.labels == ["layers1-2", "layer4", "layers0_3"]


def test_groups_of_one_layer_equal_layers(teachers, student_settings, waves):
    plain = distiller(teachers, student_settings, ["hubert", "wavlm"])
    groups = distiller(teachers, student_settings, ["hubert", "wavlm"], groups=((2,), (4,)))
    groups.trainable.load_state_dict(plain.trainable.state_dict())
    batch = batch_of(waves)
    assert groups(batch)[0].item() == pytest.approx(plain(batch)[0].item(), abs=1e-6)


def test_across_teachers_needs_groups(teachers, student_settings):
    settings = TargetSettings(across_teachers=True)
    with pytest.raises(ValueError, match="targets.across_teachers"):
        distiller(teachers, student_settings, ["hubert", "wavlm"], targets=settings)


def test_groups_are_logged_with_their_layers(teachers, student_settings, waves):
    ours = distiller(teachers, student_settings, ["hubert"], groups=((1, 2), (3, 4)))
    _, parts = ours(batch_of(waves), detail=True)
    assert {"t0/l1_layers1-2", "t0/l1_layers3-4"} <= parts.keys()


OPTIONS = {
    "average and heads": ("average", {"heads": HeadSettings(per_teacher=True)}),
    "concat and heads": ("concat", {"heads": HeadSettings(per_teacher=True)}),
    "residual": ("separate", {"heads": HeadSettings(residual=True)}),
    "across": (
        "separate",
        {"targets": TargetSettings(across_teachers=True), "groups": ((1, 2), (3, 4))},
    ),
    "mean_std": ("average", {"target_norm": "mean_std"}),
    "phi_s": ("concat", {"target_norm": "phi_s"}),
    "dropping": ("separate", {"targets": TargetSettings(drop_teachers=0.5)}),
    "weights": ("concat", {"t0": {"weight": 3.0}}),
    "linear heads": ("separate", {"heads": HeadSettings("linear")}),
    "agreement": ("average", {"loss": LossSettings(agreement=0.5)}),
    "agreement of concat": (
        "concat",
        {"loss": LossSettings(agreement=0.5), "t1": {"weight": 2.0}},
    ),
    "l2 and raw": ("separate", {"loss": LossSettings(reconstruction="l2", cosine="raw")}),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_learns(teachers, student_settings, waves, option):
    aggregation, more = OPTIONS[option]
    ours = distiller(teachers, student_settings, ["hubert", "robust"], aggregation, **more)
    optimizer = torch.optim.Adam(ours.trainable.parameters(), lr=2e-3)
    batch = batch_of(waves)
    ours.train()
    losses = []
    for step in range(1, 26):
        loss, parts = ours(batch, step=step, detail=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert all(torch.isfinite(value).all() for value in parts.values())
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3])


def test_teacher_waves_are_the_input_of_the_teachers(teachers, student_settings, waves):
    ours = distiller(teachers, student_settings, ["hubert"])
    batch = batch_of(waves)
    louder = batch.waves * 2 + 0.01
    with torch.no_grad():
        crossed, _ = ours(dataclasses.replace(batch, teacher_waves=louder))
        out = ours.student(batch.waves, batch.lengths)
        hidden = ours.teachers([w[:n] for w, n in zip(louder, batch.lengths, strict=True)])
        weights = LossWeights({"t0": out.mask})
        expected, _ = distillation_loss(ours.heads(out), hidden, weights)
    assert crossed.item() == pytest.approx(expected.item(), abs=1e-6)


def test_weights_change_linearly():
    teachers = {"a": TeacherSettings("x", weight=1.0, final_weight=0.0), "b": TeacherSettings("x")}
    assert weights_at(teachers, 1, 10) == {"a": 1.0, "b": 1.0}
    assert weights_at(teachers, 6, 10)["a"] == pytest.approx(0.5)
    assert weights_at(teachers, 11, 10)["a"] == 0.0 == weights_at(teachers, 999, 10)["a"]
    assert weights_at(teachers, 1, 0)["a"] == 1.0


def test_a_teacher_of_weight_zero_has_no_effect(teachers, student_settings, waves):
    batch = batch_of(waves)
    for aggregation in ("separate", "average"):
        two = distiller(
            teachers, student_settings, ["hubert", "wavlm"], aggregation, t1={"weight": 0.0}
        )
        one = distiller(teachers, student_settings, ["hubert"], aggregation)
        one.student.load_state_dict(two.student.state_dict())
        head = next(iter(two.heads.values()))
        next(iter(one.heads.values())).load_state_dict(head.state_dict())
        assert two(batch)[0].item() == pytest.approx(one(batch)[0].item(), abs=1e-6)


def test_dropping_keeps_the_hardest_and_drops_the_others_half_the_time():
    torch.manual_seed(0)
    losses = {"a": torch.rand(4000), "b": torch.rand(4000), "c": torch.rand(4000)}
    stays = drop_teachers(losses, 0.5)
    hardest = torch.stack(list(losses.values())).argmax(0)
    for i, name in enumerate(losses):
        assert (stays[name][hardest == i] == 1).all()
        others = stays[name][hardest != i]
        assert others.mean().item() == pytest.approx(0.5, abs=0.03)
    assert all((s == 1).all() for s in drop_teachers(losses, 0.0).values())
    everyone = torch.stack(list(drop_teachers(losses, 1.0).values()))
    assert (everyone.sum(0) == 1).all()


def test_dropping_does_not_raise_the_weight_of_other_utterances(teachers, student_settings, waves):
    """Teacher dropping at probability 1: each utterance keeps one teacher, and the loss is the sum
    over teachers of what is kept, divided by all valid frames."""
    options = {"targets": TargetSettings(drop_teachers=1.0)}
    ours = distiller(teachers, student_settings, ["hubert", "wavlm"], **options)
    batch = batch_of(waves)
    loss, _ = ours(batch)
    with torch.no_grad():
        out = ours.student(batch.waves, batch.lengths)
        hidden, predictions = ours.teachers(waves), ours.heads(out)
        each = {}  # teacher -> [batch], the sum of the loss over an utterance's frames
        for name in hidden:
            rec, cosine = frame_terms(predictions[name], hidden[name])
            each[name] = ((rec + cosine).mean(1) * out.mask).sum(1)
    kept = torch.stack(list(each.values())).max(0).values.sum()
    assert loss.item() == pytest.approx((kept / out.mask.sum() / 2).item(), abs=1e-5)


@pytest.mark.parametrize(
    ("teacher_count", "probability"), [(2, 0.5), (3, 0.5), (3, 0.25), (3, 1.0)]
)
def test_the_scale_of_the_loss_with_dropping(monkeypatch, teacher_count, probability):
    """The mean over all possible draws for two utterances, with teachers of equal losses."""
    generator = torch.Generator().manual_seed(1)
    frame, error = torch.randn(2, 1, 2, 1, 4, generator=generator)  # of two layers
    target = frame.expand(2, 2, 5, 4)
    mask = (torch.arange(5) < torch.tensor([[5], [2]])).float()
    names = [f"t{i}" for i in range(teacher_count)]
    targets = dict.fromkeys(names, target)
    predictions, shares = dict.fromkeys(names, target + error), dict.fromkeys(names, 1.0)
    comparison = Comparison(predictions, targets, mask, mask, targets, targets, shares, {}, None)
    weights = LossWeights(dict.fromkeys(names, mask))
    plain, _ = distillation_loss(predictions, targets, weights)
    dropping = TeacherDropping(probability, LossSettings())

    mean = kept = 0.0
    for draw in itertools.product([0.0, 1.0], repeat=2 * teacher_count):  # 0: dropped
        share = (1 - probability) ** sum(draw) * probability ** (len(draw) - sum(draw))
        numbers = torch.tensor(draw).view(teacher_count, 2)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "rand", lambda *args, numbers=numbers, **kwargs: numbers)
            changed = dropping(weights, comparison)
        loss, _ = distillation_loss(predictions, targets, changed)
        mean += share * loss.item()
        kept += share * changed.logs["teachers_kept"].item()
    scale = (1 + (teacher_count - 1) * (1 - probability)) / teacher_count
    assert mean == pytest.approx(scale * plain.item(), rel=1e-5)
    assert kept == pytest.approx(scale)


def test_a_teacher_of_weight_zero_is_not_the_one_that_is_kept(teachers, student_settings, waves):
    """Without it the loss is the same, however high its own loss is."""
    options = {"targets": TargetSettings(drop_teachers=1.0)}
    names = ["hubert", "wavlm", "robust"]
    three = distiller(teachers, student_settings, names, t2={"weight": 0.0}, **options)
    two = distiller(teachers, student_settings, names[:2], **options)
    two.student.load_state_dict(three.student.state_dict())
    for name, head in two.heads.items():
        head.load_state_dict(three.heads[name].state_dict())
    with torch.no_grad():
        for weight in three.heads["t2"].parameters():
            weight.mul_(100)
    expected = two(batch_of(waves))[0].item()
    assert three(batch_of(waves))[0].item() == pytest.approx(expected, rel=1e-6) and expected > 0


def test_the_share_of_teachers_that_a_batch_keeps_is_logged(teachers, student_settings, waves):
    options = {"targets": TargetSettings(drop_teachers=1.0)}
    ours = distiller(teachers, student_settings, ["hubert", "wavlm", "robust"], **options)
    assert ours(batch_of(waves))[1]["teachers_kept"].item() == pytest.approx(1 / 3)
    assert "teachers_kept" not in ours.eval()(batch_of(waves))[1]


def test_concat_of_two_widths_logs_the_mean_of_its_teachers(teachers, student_settings, waves):
    """The L1 term of widths 48 and 64 is the mean of the terms that are logged for each teacher and
    layer; with weights 3 and 1, the weighted one."""
    for weight in (1.0, 3.0):
        ours = distiller(
            teachers, student_settings, ["hubert", "wide"], "concat", t0={"weight": weight}
        )
        _, logs = ours(batch_of(waves), detail=True)
        first, second = (
            sum(logs[f"{name}/l1_layer{layer}"].item() for layer in LAYERS) / 2
            for name in ("t0", "t1")
        )
        assert logs["l1"].item() == pytest.approx(
            (weight * first + second) / (weight + 1), rel=1e-5
        )


def test_dropping_only_in_training(teachers, student_settings, waves):
    options = {"targets": TargetSettings(drop_teachers=1.0)}
    dropping = distiller(teachers, student_settings, ["hubert", "wavlm"], **options)
    plain = distiller(teachers, student_settings, ["hubert", "wavlm"])
    dropping.trainable.load_state_dict(plain.trainable.state_dict())
    batch = batch_of(waves)
    assert dropping.eval()(batch)[0].item() == plain.eval()(batch)[0].item()
    assert dropping.train()(batch)[0].item() != plain.train()(batch)[0].item()


def test_agreeing_dims_by_hand():
    # spreads of the dimensions: 0, 2, 1, 3 (times a constant)
    hidden = {
        "a": torch.tensor([0.0, 0.0, 0.0, 0.0]).view(1, 1, 1, 4),
        "b": torch.tensor([0.0, 2.0, 1.0, -3.0]).view(1, 1, 1, 4),
    }
    assert agreeing_dims(hidden, 0.5).flatten().tolist() == [1, 0, 1, 0]
    assert agreeing_dims(hidden, 0.75).flatten().tolist() == [1, 1, 1, 0]
    assert agreeing_dims(hidden, 0.01).flatten().tolist() == [1, 0, 0, 0]


def random_states(width=24, frames=400, targets=2):
    """Correlated, shifted frames ``[batch, target, frame, dim]`` and a mask of the first 300."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(width, width, generator=generator)
    states = torch.randn(3, targets, frames, width, generator=generator) @ mix + 50.0
    mask = torch.ones(3, frames)
    mask[:, 300:] = 0
    return states, mask


@pytest.mark.parametrize("full", [False, True])
def test_moments_are_those_of_all_valid_frames(full):
    states, mask = random_states()
    moments = Moments(2, 24, full)
    for i in range(3):  # batch by batch
        moments.update(states[i : i + 1], mask[i : i + 1])
    for target in range(2):
        frames = states[:, target, :300].reshape(-1, 24)
        assert torch.allclose(moments.mean[target], frames.mean(0), rtol=1e-4)
        covariance = torch.cov(frames.T, correction=0)
        wanted = covariance if full else covariance.diagonal()
        assert torch.allclose(moments.covariance[target], wanted, rtol=1e-3, atol=1e-2)


def test_mean_std_gives_mean_0_and_deviation_1():
    states, mask = random_states()
    norm = TargetNorm({"a": TeacherShape(((1,), (2,)), 24)}, "mean_std", 10)
    out = norm({"a": states}, mask)["a"][:, :, :300]
    assert torch.allclose(out.mean((0, 2)), torch.zeros(2, 24), atol=1e-3)
    assert torch.allclose(out.std((0, 2)), torch.ones(2, 24), atol=1e-2)


def test_phi_s_spreads_the_variance_evenly_and_keeps_the_shape():
    states, mask = random_states()
    norm = TargetNorm({"a": TeacherShape(((1,), (2,)), 24)}, "phi_s", 10)
    out = norm({"a": states}, mask)["a"][:, :, :300]
    assert torch.allclose(out.mean((0, 2)), torch.zeros(2, 24), atol=1e-3)
    assert torch.allclose(out.var((0, 2)), torch.ones(2, 24), atol=1e-2)
    # one rotation and one scale: the ratios of all distances stay
    before = torch.cdist(states[0, 0, :5], states[0, 0, :5])
    after = torch.cdist(out[0, 0, :5], out[0, 0, :5])
    ratio = (after / before)[~torch.eye(5, dtype=torch.bool)]
    assert torch.allclose(ratio, ratio[0].expand_as(ratio), rtol=1e-3)


@pytest.mark.parametrize("size", [1, 2, 12, 20, 48, 96, 768, 1024])
def test_hadamard_matrices(size):
    matrix = hadamard(size)
    assert torch.allclose(matrix @ matrix.T, torch.eye(size), atol=1e-5)
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, size**-0.5), atol=1e-6)


def test_phi_s_needs_a_hadamard_matrix():
    assert hadamard(7) is None
    with pytest.raises(TeacherError, match="mine.* 7;.*mean_std"):
        TargetNorm({"mine": TeacherShape(((1,),), 7)}, "phi_s", 10)


def test_statistics_are_fixed_after_their_steps_and_in_evaluation():
    states, mask = random_states()
    norm = TargetNorm({"a": TeacherShape(((1,), (2,)), 24)}, "mean_std", 2)
    for scale, training in ((1, True), (1, True), (9, True), (9, False)):
        norm.train(training)({"a": states * scale}, mask)
    assert norm.moments["a"].count == 2 * 900


@pytest.mark.parametrize("kind", ["mean_std", "phi_s"])
def test_a_resumed_norm_equals_an_uninterrupted_one(kind):
    states, mask = random_states()
    shapes = {"a": TeacherShape(((1,), (2,)), 24)}
    norm, fresh = TargetNorm(shapes, kind, 9), TargetNorm(shapes, kind, 9)
    for scale in (1.0, 1.3, 0.7):  # stop between two updates of the rotation, at 2 and 4
        norm({"a": states * scale}, mask)
    fresh.load_state_dict(norm.state_dict())
    for scale, training in ((1.1, False), (0.9, True), (1.2, True)):
        one, other = (n.train(training)({"a": states * scale}, mask)["a"] for n in (norm, fresh))
        assert torch.equal(one, other)


def test_phi_s_of_a_diagonal_covariance_by_hand():
    transform = phi_s(torch.diag(torch.tensor([1.0, 3.0]))[None])[0]
    # mean variance 2; columns mix the two axes by +-1/sqrt 2, divided by sqrt 2
    assert torch.allclose(transform.abs(), torch.full((2, 2), 0.5), atol=1e-6)
    assert (transform.T @ torch.diag(torch.tensor([1.0, 3.0])) @ transform).diagonal().tolist() == (
        pytest.approx([1.0, 1.0], abs=1e-5)
    )


def test_initialisation_from_chosen_layers(teachers, student_settings):
    teacher = load(teachers["hubert"]).model
    student = Student(student_settings)
    initialise(student, [teacher], conv=True, encoder=True, layers=(0, 3))
    state, theirs = student.backbone.state_dict(), teacher.state_dict()
    for ours, source in ((0, 0), (1, 3)):
        key = "self_attn.k_proj.weight"
        wanted = theirs[f"encoder.layers.{source}.{key}"]
        assert torch.equal(state[f"encoder.layers.{ours}.{key}"], wanted)
    with pytest.raises(TeacherError, match="encoder.layers.9"):
        initialise(student, [teacher], conv=True, encoder=True, layers=(0, 9))


def test_initialisation_from_the_average_of_several(teachers, student_settings):
    models = [load(teachers[name]).model for name in ("hubert", "robust", "wavlm")]
    student = Student(student_settings)
    initialise(student, models, conv=True, encoder=True)
    for key in ("post_extract_proj.weight", "encoder.layers.1.fc2.bias"):
        mean = sum(model.state_dict()[key] for model in models) / 3
        assert torch.allclose(student.backbone.state_dict()[key], mean, atol=1e-6)
    wide = load(teachers["wide"]).model
    with pytest.raises(TeacherError, match="init.teacher.*post_extract_proj"):
        initialise(student, [models[0], wide], conv=True, encoder=True)


def test_more_layers_than_two(teachers, student_settings, waves):
    deep = dataclasses.replace(student_settings, encoder_layers=4)
    ours = distiller(teachers, deep, ["hubert"])
    initialise(ours.student, [load(teachers["hubert"]).model], conv=True, encoder=True)
    batch = batch_of(waves)
    assert len(ours.student(batch.waves, batch.lengths).hidden_states) == 5


class FakeUnits:
    """The sign of the first two dimensions: four units."""

    teacher, layer, clusters, width = "t0", 3, 4, 48

    def label(self, hidden):
        return (hidden[..., 0] > 0).long() + 2 * (hidden[..., 1] > 0).long()


def test_the_unit_head_learns_hard_labels(teachers, student_settings, waves):
    ours = distiller(teachers, student_settings, ["hubert"], units=[FakeUnits()])
    plain = distiller(teachers, student_settings, ["hubert"])
    plain.student.load_state_dict(ours.student.state_dict())
    plain.heads.load_state_dict(ours.heads.state_dict())
    batch = batch_of(waves)
    loss, parts = ours(batch)
    alone, _ = plain(batch)
    assert loss.item() == pytest.approx((alone + parts["unit_loss"]).item(), abs=1e-5)
    # by hand: cross-entropy of the head's logits on the labels of valid frames
    with torch.no_grad():
        hidden = load(teachers["hubert"]).eval()(waves)["hidden_states"][3]
        out = ours.student(batch.waves, batch.lengths)
        chosen = out.mask.bool()
        logits = ours.trainable["unit_heads"]["t0_layer3"](out.last)[chosen]
        labels = FakeUnits().label(hidden)[chosen]
        picked = logits.log_softmax(-1)[torch.arange(len(labels)), labels]
    assert parts["unit_loss"].item() == pytest.approx(-picked.mean().item(), abs=1e-4)
    right = (logits.argmax(-1) == labels).float().mean().item()
    assert parts["unit_accuracy"].item() == pytest.approx(right, abs=1e-6)
    optimizer = torch.optim.Adam(ours.trainable.parameters(), lr=3e-3)
    for _ in range(40):
        loss, parts = ours(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert parts["unit_accuracy"].item() > max(right, 0.5)


@pytest.mark.parametrize(
    ("change", "values"),
    [
        ({"teacher": "t7"}, r"unit_loss\[0\].file.*t7.*t0"),
        ({"layer": 9}, r"unit_loss\[0\].file.*9.*48.*0 to 4"),
        ({"width": 64}, r"unit_loss\[0\].file.*64.*48"),
    ],
)
def test_units_that_do_not_fit(teachers, student_settings, change, values):
    units = FakeUnits()
    vars(units).update(change)
    with pytest.raises(TeacherError, match=values):
        distiller(teachers, student_settings, ["hubert"], units=[units])


# Frames and dimensions that would distort the statistics


def with_outlier(states, value):
    states = states.clone()
    states[0, 1, 7, 3] = value  # batch, target, frame, dim
    return states


@pytest.mark.parametrize("value", [1e20, -1e20, 1e9, float("inf"), float("nan")])
@pytest.mark.parametrize("kind", ["mean_std", "phi_s"])
def test_a_frame_with_a_huge_value_is_left_out_of_the_statistics(kind, value, caplog):
    states, mask = random_states()
    shapes = {"a": TeacherShape(((1,), (2,)), 24)}
    norm, other = TargetNorm(shapes, kind, 2), TargetNorm(shapes, kind, 2)
    without = mask.clone()
    without[0, 7] = 0
    for _ in range(2):
        out = norm({"a": with_outlier(states, value)}, mask)["a"]
        wanted = other({"a": states}, without)["a"]
    assert torch.equal(norm.moments["a"].scatter, other.moments["a"].scatter)
    assert torch.equal(out[1:], wanted[1:]) and out[1:].abs().mean() > 0.1
    assert norm.left_out() == {"a/frames_left_out": 2.0} and other.left_out() == {}
    texts = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(texts) == 2
    assert re.search(r"\ba\b.*\b1\b", texts[0]) and re.search(r"\ba\b.*\b2\b", texts[1])

    again = TargetNorm(shapes, kind, 2)
    again.load_state_dict(norm.state_dict())
    assert again.left_out() == norm.left_out()


def test_a_batch_of_huge_values_is_left_out():
    states, mask = random_states()
    norm = TargetNorm({"a": TeacherShape(((1,), (2,)), 24)}, "mean_std", 3)
    norm({"a": torch.full_like(states, 1e20)}, mask)
    assert norm.moments["a"].count == 0
    norm({"a": states}, mask)
    assert norm.moments["a"].count == 900


@pytest.mark.parametrize("constant", [0.0, 5.0, -300.0])
def test_a_dimension_that_does_not_vary_is_not_scaled(constant, caplog):
    states, mask = random_states()
    states[:, 0, :, 3] = constant
    norm = TargetNorm({"a": TeacherShape(((1,), (2,)), 24)}, "mean_std", 1)
    norm({"a": states}, mask)
    (warning,) = (r for r in caplog.records if r.levelname == "WARNING")
    assert re.search(r"\ba\b.*\b900\b.*\b1\b", warning.getMessage())
    noise = torch.randn(states[:, 0, :, 3].shape) * 1e-3
    states[:, 0, :, 3] += noise
    out = norm({"a": states}, mask)["a"][:, 0, :, 3]
    assert torch.allclose(out, noise, atol=1e-4)


@pytest.mark.parametrize("constant", [0.0, 100.0])
def test_phi_s_of_a_target_that_does_not_vary_is_not_scaled(constant):
    states, mask = random_states()
    states[:, 0] = constant
    norm = TargetNorm({"a": TeacherShape(((1,), (2,)), 24)}, "phi_s", 1)
    norm({"a": states}, mask)
    out = norm({"a": states + 0.01}, mask)["a"]
    assert out[:, 0].abs().max() < 0.1 and out[:, 1, :300].var() > 0.5


def test_a_small_scale_is_normalised():
    states, mask = random_states()
    norm = TargetNorm({"a": TeacherShape(((1,), (2,)), 24)}, "mean_std", 1)
    out = norm({"a": states * 1e-6}, mask)["a"][:, :, :300]
    assert torch.allclose(out.std((0, 2)), torch.ones(2, 24), atol=1e-2)


def test_statistics_of_version_0_1_load_unless_they_are_not_finite():
    norm = TargetNorm({"a": TeacherShape(((1,), (2,)), 24)}, "mean_std", 9)
    old = {k: v for k, v in norm.state_dict().items() if not k.endswith("left_out")}
    norm.load_state_dict(old)
    old["moments.a.scatter"] = torch.full((2, 24), torch.inf)
    with pytest.raises(TeacherError, match=r"\ba\b.*target_norm"):
        norm.load_state_dict(old)


def test_usable_frames():
    frames = torch.ones(6, 2, 3)
    frames[1, 0, 2] = 999
    frames[2, 1, 0] = -1001
    frames[3, 0, 0] = torch.nan
    assert usable_frames(frames).tolist() == [True, True, False, False, True, True]
    assert usable_frames(frames[:0]).tolist() == []
    assert usable_frames(torch.full((2, 1, 3), torch.inf)).tolist() == [False, False]
    zeros = torch.zeros(4, 1, 3)
    zeros[0] = 5
    assert usable_frames(zeros).all()  # of a target that is nearly always 0


def test_an_outlier_that_int8_cannot_store_is_an_error():
    layout = (("a", 2, 4),)
    values = torch.randn(10, 8)
    encode_targets(values, layout, "int8", "u1")
    values[3, 5] = 1e6
    with pytest.raises(TeacherError, match="u1.*1e.06.*int8.*bfloat16"):
        encode_targets(values, layout, "int8", "u1")
