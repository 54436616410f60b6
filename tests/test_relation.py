"""Temporal relations against a version in plain loops, and their invariances."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from s3prl_ekd.distill.aggregation import TeacherShape
from s3prl_ekd.distill.batch import CachedTargets
from s3prl_ekd.distill.distiller import EnsembleDistiller
from s3prl_ekd.distill.frame_counts import FrameCounts, count_frames, split_windows
from s3prl_ekd.distill.losses import Comparison
from s3prl_ekd.distill.relation import RelationLoss
from s3prl_ekd.distill.settings import (
    DistillSettings,
    HeadSettings,
    LossSettings,
    RelationSettings,
    TargetSettings,
    TeacherSettings,
)
from s3prl_ekd.distill.student import Student
from s3prl_ekd.distill.student_forward import StudentOutput
from s3prl_ekd.distill.student_settings import StudentSettings
from s3prl_ekd.errors import ConfigError
from s3prl_ekd.hidden_states.fingerprint import check_aggregated

from .experiments import batch_of, distiller, ensemble
from .gated_students import gated_settings, gated_student

STUDENT_LAYERS = (1, 3, 2)  # the student's layer for each of three targets


def cosine(x, y):
    length = x.norm() * y.norm()
    return x @ y / length if length else length


def slow_relation(student, teachers, weights, counted, window, centred, between):
    """The term from its definition, without its weight.

    Args:
        student: the student's layer for each target, ``[batch, frame, dim]`` each.
        teachers: teacher -> ``[batch, target, frame, dim]``.
        weights: teacher -> its weight.
        counted: for each utterance, the frames that count.

    Returns:
        The mean over pairs of frames, and the number of pairs.
    """
    targets = len(student)
    neighbours = [(i, i + 1) for i in range(targets - 1)] if between else []
    kinds = [kind for kind in ([(i, i) for i in range(targets)], neighbours) if kind]
    sums, pairs = [0.0] * len(kinds), 0
    for b, frames in enumerate(counted):
        last = max(frames, default=-1)
        for start in range(0, last + 1, window):
            chosen = [f for f in frames if start <= f < start + window]

            def vectors(states, b=b, chosen=chosen):
                frames = {f: states[b, f].double() for f in chosen}
                mean = sum(frames.values()) / max(len(chosen), 1) if centred else 0.0
                return {f: frame - mean for f, frame in frames.items()}

            ours = [vectors(states) for states in student]
            theirs = {n: [vectors(x[:, i]) for i in range(targets)] for n, x in teachers.items()}
            for f in chosen:
                for g in chosen:
                    pairs += 1
                    for k, kind in enumerate(kinds):
                        for i, j in kind:
                            target = sum(
                                weights[name] * cosine(layers[i][f], layers[j][g])
                                for name, layers in theirs.items()
                            ) / sum(weights.values())
                            difference = cosine(ours[i][f], ours[j][g]) - target
                            sums[k] = sums[k] + difference**2 / len(kind)
    return sum(sums) / len(kinds) / max(pairs, 1), pairs


def example(lengths=(13, 5, 2), spans=(), widths=(6, 9), frames=14, seed=0):
    """A comparison of a student of 3 layers and width 8 with teachers of three targets; values
    behind the end of an utterance are arbitrary."""
    generator = torch.Generator().manual_seed(seed)
    batch = len(lengths)

    def noise(*shape):
        # a common vector, so that cosines are not centred at 0
        return torch.randn(*shape, generator=generator) + torch.randn(
            shape[-1], generator=generator
        )

    hidden = [noise(batch, frames + 1, 8).requires_grad_() for _ in range(4)]
    teachers = {f"t{i}": noise(batch, 3, frames, width) for i, width in enumerate(widths)}
    valid = (torch.arange(frames) < torch.tensor(lengths)[:, None]).float()
    mask = valid.clone()
    for b, frame in spans:
        mask[b, frame] = 0
    output = StudentOutput(hidden[0], hidden, hidden[-1], F.pad(valid, (0, 1)))
    shares = {name: 1.0 + 2 * i for i, name in enumerate(teachers)}
    return Comparison({}, {}, mask, valid, teachers, teachers, shares, {}, output)


def relation(comparison, layers=STUDENT_LAYERS, weight=1.0, **settings):
    shapes = {
        name: TeacherShape(tuple((i,) for i in range(states.shape[1])), states.shape[-1])
        for name, states in comparison.raw_teachers.items()
    }
    settings = RelationSettings(weight=weight, student_layers=layers, **settings)
    depths = dict.fromkeys(shapes, 3)
    return RelationLoss(settings, shapes, depths, StudentSettings(encoder_layers=3))


def value(comparison, **settings):
    return relation(comparison, **settings)(comparison)[0]


def counted_frames(mask):
    return [row.nonzero()[:, 0].tolist() for row in mask]


CASES = {
    "cosine": {"window": 100},
    "cosine in windows": {"window": 4},
    "cosine between layers": {"window": 5, "between_layers": True},
    "centred": {"similarity": "centred", "window": 100},
    "centred between layers in windows": {
        "similarity": "centred",
        "window": 4,
        "between_layers": True,
    },
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("spans", [(), ((0, 1), (0, 2), (0, 7), (1, 0))], ids=["", "spans"])
def test_the_term_and_its_gradients_equal_plain_loops(case, spans):
    """Teachers of two widths and weights, a shorter last window, padding and masked spans."""
    settings = CASES[case]
    comparison = example(spans=spans)
    loss, logs = relation(comparison, weight=0.7, **settings)(comparison)
    loss.backward()
    hidden = comparison.student.hidden_states
    copies = {i: hidden[i].detach().double().requires_grad_() for i in set(STUDENT_LAYERS)}
    expected, pairs = slow_relation(
        [copies[i] for i in STUDENT_LAYERS],
        comparison.raw_teachers,
        comparison.teacher_weights,
        counted_frames(comparison.mask),
        settings["window"],
        settings.get("similarity") == "centred",
        settings.get("between_layers", False),
    )
    expected.backward()
    assert logs["relation"].item() == pytest.approx(expected.item(), abs=1e-6)
    assert loss.item() == pytest.approx(0.7 * expected.item(), abs=1e-6)
    for layer, copy in copies.items():
        assert copy.grad.abs().max() > 1e-3
        assert torch.allclose(hidden[layer].grad, 0.7 * copy.grad.float(), atol=1e-6)
    assert hidden[0].grad is None

    # the denominator of a whole step, of which this batch is a part
    step = dataclasses.replace(comparison, counts=FrameCounts(pairs=3.0 * pairs))
    assert value(step, **settings).item() == pytest.approx(expected.item() / 3, abs=1e-6)


def two_frames(cosine_of_student, *cosines_of_teachers):
    """One utterance of two frames with these cosines, of any lengths."""

    def frames(cosine, first, second):
        states = [[first, 0.0], [second * cosine, second * math.sqrt(1 - cosine**2)]]
        return torch.tensor(states)[None]

    student = frames(cosine_of_student, 2.0, 0.5)
    teachers = {f"t{i}": frames(c, 3.0, 7.0)[:, None] for i, c in enumerate(cosines_of_teachers)}
    mask = torch.ones(1, 2)
    output = StudentOutput(student, [student] * 4, student, mask)
    shares = {name: 1.0 + 2 * i for i, name in enumerate(teachers)}
    return Comparison({}, {}, mask, mask, teachers, teachers, shares, {}, output)


def test_two_frames_by_hand():
    """Cosines 0.5 and 0.1 differ by 0.4 in two of four pairs; a frame has cosine 1 with itself."""
    assert value(two_frames(0.5, 0.1), layers=(1,)).item() == pytest.approx(0.16 / 2)
    # weights 1 and 3: the mean of the teachers' cosines is (0.1 + 3 * 0.7) / 4 = 0.55
    assert value(two_frames(0.5, 0.1, 0.7), layers=(1,)).item() == pytest.approx(
        0.0025 / 2, rel=1e-5
    )
    # two centred frames are opposite to each other in every model
    same = value(two_frames(0.5, 0.1), layers=(1,), similarity="centred")
    assert same.item() == pytest.approx(0, abs=1e-12)


def test_centred_frames_by_hand():
    """Frames (0, 0), (3, 0), (0, 3) minus their mean (1, 1): cosines of -1/sqrt(10), -1/sqrt(10)
    and -4/5. In the teacher, they are at equal angles: -1/2."""
    student = torch.tensor([[[0.0, 0.0], [3.0, 0.0], [0.0, 3.0]]])
    angles = torch.tensor([0.0, 2 * math.pi / 3, 4 * math.pi / 3])
    teacher = torch.stack([angles.cos(), angles.sin()], dim=-1)[None, None] + 4
    mask = torch.ones(1, 3)
    output = StudentOutput(student, [student] * 4, student, mask)
    hidden = {"t": teacher}
    comparison = Comparison({}, {}, mask, mask, hidden, hidden, {"t": 1.0}, {}, output)
    expected = 2 * (2 * (0.5 - 10**-0.5) ** 2 + 0.3**2) / 9
    result = value(comparison, layers=(1,), similarity="centred")
    assert result.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_rotation_and_scale_of_a_teacher_change_nothing(case):
    comparison = example()
    rotation = torch.linalg.qr(torch.randn(9, 9, generator=torch.Generator().manual_seed(1))).Q
    rotated = {**comparison.raw_teachers, "t1": 5 * comparison.raw_teachers["t1"] @ rotation}
    other = dataclasses.replace(comparison, raw_teachers=rotated)
    assert torch.allclose(value(other, **CASES[case]), value(comparison, **CASES[case]), atol=1e-6)
    sheared = {
        **comparison.raw_teachers,
        "t1": comparison.raw_teachers["t1"] @ torch.ones(9, 9).triu(),
    }
    other = dataclasses.replace(comparison, raw_teachers=sheared)
    assert not torch.allclose(
        value(other, **CASES[case]), value(comparison, **CASES[case]), atol=1e-3
    )


@pytest.mark.parametrize("case", CASES)
def test_order_of_teachers_and_padding_change_nothing(case):
    comparison = example()
    one = value(comparison, **CASES[case])
    turned = dict(reversed(comparison.raw_teachers.items()))
    other = value(dataclasses.replace(comparison, raw_teachers=turned), **CASES[case])
    assert torch.allclose(one, other, atol=1e-7)

    def longer(states, fill):
        return F.pad(states, (0, 0, 0, 9), value=fill)

    hidden = [longer(states, -3.0) for states in comparison.student.hidden_states]
    padded = dataclasses.replace(
        comparison,
        mask=F.pad(comparison.mask, (0, 9)),
        valid=F.pad(comparison.valid, (0, 9)),
        raw_teachers={
            name: longer(states, 1e4) for name, states in comparison.raw_teachers.items()
        },
        student=comparison.student._replace(hidden_states=hidden),
    )
    assert torch.allclose(one, value(padded, **CASES[case]), atol=1e-7)


@pytest.mark.parametrize("case", CASES)
def test_a_batch_is_the_mean_over_the_pairs_of_its_utterances(case):
    comparison = example()
    settings = CASES[case]
    total = pairs = 0.0
    for i, length in enumerate((13, 5, 2)):
        alone = dataclasses.replace(
            comparison,
            mask=comparison.mask[i : i + 1, :length],
            valid=comparison.valid[i : i + 1, :length],
            raw_teachers={
                n: states[i : i + 1, :, :length] for n, states in comparison.raw_teachers.items()
            },
            student=comparison.student._replace(
                hidden_states=[s[i : i + 1] for s in comparison.student.hidden_states]
            ),
        )
        starts = range(0, length, settings["window"])
        count = sum(min(settings["window"], length - start) ** 2 for start in starts)
        total, pairs = total + count * value(alone, **settings).item(), pairs + count
    assert value(comparison, **settings).item() == pytest.approx(total / pairs, abs=1e-6)


def test_a_student_with_the_teachers_frames_has_no_loss():
    comparison = example(widths=(8,))
    states = comparison.raw_teachers["t0"]
    hidden = [3 * states[:, min(i, 2)] for i in range(3)]
    output = comparison.student._replace(hidden_states=[*hidden, hidden[-1]])
    same = dataclasses.replace(comparison, student=output)
    for similarity in ("cosine", "centred"):
        loss = value(same, layers=(0, 1, 2), similarity=similarity, between_layers=True)
        assert loss.item() == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("similarity", ["cosine", "centred"])
def test_no_valid_frame_gives_zero(similarity):
    comparison = example(lengths=(0, 0))
    loss = value(comparison, similarity=similarity, window=4)
    loss.backward()
    assert loss.item() == 0
    assert comparison.student.hidden_states[1].grad.abs().max() == 0


@pytest.mark.parametrize("size", [0.0, 1e-7, 1e-5])
def test_equal_frames_have_small_gradients(size):
    """After the mean of the window is subtracted, only rounding errors remain."""
    comparison = example(lengths=(14,))
    frame = torch.randn(8, generator=torch.Generator().manual_seed(3))
    noise = torch.randn(1, 15, 8, generator=torch.Generator().manual_seed(4))
    silent = (frame + size * noise).requires_grad_()
    output = comparison.student._replace(hidden_states=[silent] * 4)
    loss = value(dataclasses.replace(comparison, student=output), similarity="centred")
    loss.backward()
    assert silent.grad.abs().max() < 10


# Denominators


@pytest.mark.parametrize("window", [2, 4, 7, 100])
def test_pairs_are_counted_from_lengths_as_in_the_term(window):
    lengths, spans = (13, 5, 2, 0), ((0, 1), (0, 2), (0, 9), (1, 0))
    comparison = example(lengths, spans)
    counted = counted_frames(comparison.mask)
    pairs = sum(f // window == g // window for frames in counted for f in frames for g in frames)
    masked = torch.zeros(4, 14, dtype=torch.bool)
    for b, frame in spans:
        masked[b, frame] = True
    counts = count_frames(comparison.valid, masked, window)
    assert counts == FrameCounts(frames=16, masked=4, pairs=pairs)
    without = count_frames(comparison.valid, None, window)
    assert without.frames == 20 and without.masked == 0 and without.valid == counts.valid == 20

    # the term with that number equals the term that counts by itself
    given = dataclasses.replace(comparison, counts=counts)
    assert torch.equal(value(given, window=window), value(comparison, window=window))


class SignUnits:
    """The sign of the first dimension: two units."""

    teacher, layer, clusters, width = "t0", 3, 2, 48

    def label(self, hidden):
        return (hidden[..., 0] > 0).long()


@pytest.mark.parametrize("mask_padding", [True, False])
def test_counts_from_lengths_give_the_loss_of_one_batch(
    teachers, student_settings, waves, mask_padding
):
    """Padded frames are neither compared nor classified, even where the distillation loss has
    them."""
    losses = []
    for reduce in ("frames", "batches"):
        ours = distiller(
            teachers,
            student_settings,
            ["hubert"],
            loss=LossSettings(mask_padding=mask_padding, reduce=reduce),
            relation=RelationSettings(1.0, window=10),
            units=[SignUnits()],
        )
        loss, logs = ours(batch_of(waves))
        scalars = {name: logs[name].item() for name in ("relation", "unit_loss", "l1")}
        losses.append({"loss": loss.item(), **scalars})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_distiller_counts_the_pairs_of_valid_frames(teachers, student_settings, waves):
    """16000, 12345 and 7000 samples, at a receptive field of 400 and a stride of 320, give 49, 38
    and 21 frames."""
    term = RelationSettings(1.0, window=10)
    lengths = batch_of(waves).lengths
    for mask_padding in (True, False):
        loss = LossSettings(mask_padding=mask_padding)
        ours = distiller(teachers, student_settings, ["hubert"], loss=loss, relation=term)
        counts = ours.count(lengths, None, None)
        assert counts.frames == counts.valid == 49 + 38 + 21
        assert counts.pairs == 4 * 100 + 81 + 3 * 100 + 64 + 2 * 100 + 1
        assert counts.padded == (0 if mask_padding else 11 + 28)


@pytest.mark.parametrize(("frames", "window"), [(10, 4), (8, 4), (3, 4), (1, 2), (0, 5)])
def test_windows_are_consecutive_frames_and_zeros(frames, window):
    values = torch.arange(1.0, 2 * frames + 1).view(1, frames, 2)
    windows = split_windows(values, window)
    flat = windows.flatten(1, 2)
    assert torch.equal(flat[:, :frames], values) and not flat[:, frames:].any()
    assert windows.shape[2] == max(1, min(window, frames))
    assert flat.shape[1] - frames < windows.shape[2]


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest result of an operation."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        return result


def test_memory_grows_linearly_with_the_length_of_an_utterance():
    sizes = []
    for frames in (200, 400, 800):
        comparison = example((frames,), frames=frames)
        with LargestTensor() as recorded:
            value(comparison, window=50, between_layers=True).backward()
        sizes.append(recorded.largest)
    # 3 targets of 8 windows of 50 x 50 pairs
    assert sizes == [3 * frames * 50 for frames in (200, 400, 800)]


# Precision


def test_similarities_are_computed_in_float32_under_autocast():
    comparison = example()
    half = [states.detach().bfloat16() for states in comparison.student.hidden_states]
    output = comparison.student._replace(hidden_states=half)
    comparison = dataclasses.replace(comparison, student=output)
    full = comparison.student._replace(hidden_states=[states.float() for states in half])
    expected = value(dataclasses.replace(comparison, student=full), between_layers=True)
    with torch.autocast("cpu", torch.bfloat16):
        result = value(comparison, between_layers=True)
    assert result.dtype == torch.float32 and torch.equal(result, expected)


def test_a_student_in_bfloat16_has_nearly_the_same_term(teachers, student_settings, waves):
    ours = distiller(
        teachers, student_settings, ["hubert", "wavlm"], relation=RelationSettings(1.0)
    )
    batch = batch_of(waves)
    with torch.no_grad():
        expected = ours(batch)[1]["relation"].item()
        with torch.autocast("cpu", torch.bfloat16):
            result = ours(batch)[1]["relation"].item()
    assert result == pytest.approx(expected, rel=0.02) and result != expected


# In an experiment


@pytest.fixture(scope="module")
def two_teachers(teachers):
    return ensemble(teachers, "hubert", "wavlm", layers=(1, 3))


def students(kind):
    if kind == "gated":
        return gated_student(gated_settings()).train()
    torch.manual_seed(0)
    return Student(StudentSettings(**{**SMALL, "encoder_layers": 4 if kind == "deep" else 2}))


SMALL = {
    "extractor_conv_feature_layers": "[(16,10,5)] + [(16,3,2)] * 4 + [(16,2,2)] * 2",
    "conv_pos": 16,
    "conv_pos_groups": 4,
    "encoder_embed_dim": 24,
    "encoder_ffn_embed_dim": 32,
    "encoder_attention_heads": 4,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
}


@pytest.mark.parametrize(
    ("kind", "heads"),
    [
        ("two layers", "split"),
        ("two layers", "linear"),
        ("deep", "layerwise"),
        ("gated", "split"),
        ("gated", "layerwise"),
    ],
)
@pytest.mark.parametrize("aggregation", ["separate", "average", "concat", "across"])
def test_every_aggregation_student_and_head(two_teachers, waves, kind, aggregation, heads):
    """The term depends on teachers and student only, and is added to the loss."""
    student = students(kind)
    across = aggregation == "across"
    groups = ((1,), (3,)) if across else None
    experiment = {
        "teachers": {n: TeacherSettings("x", (1, 3), groups, w) for n, w in (("t0", 1), ("t1", 2))},
        "aggregation": "separate" if across else aggregation,
        "targets": TargetSettings(across_teachers=across),
        "heads": HeadSettings(heads),
    }
    term = RelationSettings(2.0, "centred", 20, True)
    ours = EnsembleDistiller(
        two_teachers, student, DistillSettings(relation=term, **experiment)
    ).eval()
    plain = EnsembleDistiller(two_teachers, student, DistillSettings(**experiment)).eval()
    plain.trainable.load_state_dict(ours.trainable.state_dict())
    batch = batch_of([wave[:6000] for wave in waves[:2]])
    loss, logs = ours(batch)
    assert loss.item() == pytest.approx(
        plain(batch)[0].item() + 2 * logs["relation"].item(), abs=1e-5
    )

    with torch.no_grad():
        output = student(batch.waves, batch.lengths)
        hidden = two_teachers([wave[:6000] for wave in waves[:2]])
    # targets 1 and 3 of 4 layers, in a student of 2, 4 or 3
    layers = {"two layers": (1, 2), "deep": (1, 3), "gated": (1, 2)}[kind]
    comparison = Comparison(
        {}, {}, output.mask, output.mask, hidden, hidden, {"t0": 1.0, "t1": 2.0}, {}, output
    )
    expected = value(comparison, layers=layers, **vars_of(term))
    assert logs["relation"].item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    weights = [p.grad for p in student.parameters() if p.grad is not None]
    assert weights and all(grad.isfinite().all() for grad in weights)


def vars_of(term):
    names = ("similarity", "window", "between_layers")
    return {name: getattr(term, name) for name in names}


def test_the_term_alone_is_learned(two_teachers, waves):
    student = students("two layers")
    settings = DistillSettings(
        {name: TeacherSettings("x", (1, 3)) for name in two_teachers},
        loss=LossSettings(weight=0.0),
        relation=RelationSettings(1.0, "centred"),
    )
    ours = EnsembleDistiller(two_teachers, student, settings)
    batch = batch_of([wave[:6000] for wave in waves])
    optimizer = torch.optim.Adam(ours.trainable.parameters(), lr=2e-3)
    losses = []
    for _ in range(15):
        loss, logs = ours(batch)
        assert loss.item() == pytest.approx(logs["relation"].item(), abs=1e-7)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_cached_targets_give_the_same_term(two_teachers, waves):
    settings = DistillSettings(
        {name: TeacherSettings("x", (1, 3)) for name in two_teachers},
        "average",
        relation=RelationSettings(1.0, window=10),
    )
    ours = EnsembleDistiller(two_teachers, students("two layers"), settings)
    batch = batch_of(waves)
    with torch.no_grad():
        live = ours(batch)[1]["relation"]
        targets = two_teachers(waves)
        frames = ours.student(batch.waves, batch.lengths).mask.sum(1)
        cached = CachedTargets(targets, frames)
        assert torch.equal(
            ours(dataclasses.replace(batch, cached_targets=cached))[1]["relation"], live
        )
        # targets of fewer frames: the others are not compared
        short = CachedTargets({n: t[:, :, :15] for n, t in targets.items()}, frames.clamp(max=15))
        result = ours(dataclasses.replace(batch, cached_targets=short))[1]["relation"]
        output = ours.student(batch.waves, batch.lengths)
        mask = output.mask[:, :15]
        comparison = Comparison(
            {}, {}, mask, mask, short.values, short.values, {"t0": 1.0, "t1": 1.0}, {}, output
        )
        expected = value(comparison, layers=(1, 2), window=10)
    assert result.item() == pytest.approx(expected.item(), rel=1e-5)


def test_aggregated_targets_cannot_be_cached():
    teachers = {"a": TeacherSettings("x"), "b": TeacherSettings("y")}
    check_aggregated(DistillSettings(teachers, "average"))
    settings = DistillSettings(teachers, "average", relation=RelationSettings(1.0))
    with pytest.raises(ConfigError, match=r"\brelation\b.*--aggregated"):
        check_aggregated(settings)


# The student's layers


def default_layers(student_depth, *teachers):
    """The student's layers for teachers of ``(targets, depth)``."""
    shapes = {f"t{i}": TeacherShape(targets, 8) for i, (targets, _) in enumerate(teachers)}
    depths = {f"t{i}": depth for i, (_, depth) in enumerate(teachers)}
    student = StudentSettings(encoder_layers=student_depth)
    return [*RelationLoss(RelationSettings(1.0), shapes, depths, student).layers]


def test_the_students_layer_is_at_the_same_relative_depth():
    base = (((4,), (8,), (12,)), 12)
    assert default_layers(2, base) == [1, 1, 2]
    assert default_layers(12, base) == [4, 8, 12]
    assert default_layers(6, base) == [2, 4, 6]
    # layer 0 is the input of the transformer in both; any other layer is at least layer 1
    assert default_layers(2, (((0,), (1,), (12,)), 12)) == [0, 1, 2]
    # a group of layers is at their mean depth
    assert default_layers(12, (((1, 2, 3), (10, 12)), 12)) == [2, 11]
    # teachers of different depths: the mean of the relative depths
    assert default_layers(4, (((6,),), 12), (((12,),), 24)) == [2]
    assert default_layers(4, (((12,),), 12), (((12,),), 24)) == [3]


def test_layers_that_the_student_lacks(two_teachers):
    teachers = {name: TeacherSettings("x", (1, 3)) for name in two_teachers}
    term = RelationSettings(1.0, student_layers=(1, 3))
    with pytest.raises(ValueError, match=r"student_layers.*\b3\b.*0 to 2"):
        DistillSettings(teachers, relation=term)  # before a teacher is loaded
    settings = DistillSettings(teachers, relation=term, student=StudentSettings(encoder_layers=4))
    with pytest.raises(ConfigError, match=r"student_layers.*\b3\b.*0 to 2"):
        EnsembleDistiller(two_teachers, students("two layers"), settings)
    EnsembleDistiller(two_teachers, students("gated"), settings)


def test_a_student_that_skips_layers_is_refused(two_teachers):
    teachers = {name: TeacherSettings("x", (1, 3)) for name in two_teachers}
    settings = DistillSettings(teachers, relation=RelationSettings(1.0))
    small = StudentSettings(**SMALL, encoder_layerdrop=0.1)
    with pytest.raises(ValueError, match="encoder_layerdrop"):  # before a teacher is loaded
        dataclasses.replace(settings, student=small)
    student = Student(small)
    with pytest.raises(ConfigError, match="encoder_layerdrop"):
        EnsembleDistiller(two_teachers, student, settings)


def test_between_layers_needs_a_layer_of_the_student_for_each_target(two_teachers):
    """Targets 1 and 2 of 4 layers are both nearest to layer 1 of a student of two layers."""
    teachers = {name: TeacherSettings("x", (1, 2)) for name in two_teachers}
    for teacher in two_teachers.values():
        teacher.targets = ((1,), (2,))
    term = RelationSettings(1.0, between_layers=True)
    settings = DistillSettings(teachers, relation=term)
    with pytest.raises(ConfigError, match=r"between_layers.*\[1, 1\]"):
        EnsembleDistiller(two_teachers, students("two layers"), settings)
    term = dataclasses.replace(term, student_layers=(0, 1))
    settings = DistillSettings(teachers, relation=term)
    EnsembleDistiller(two_teachers, students("two layers"), settings)


def test_relations_compare_the_teachers_before_target_norm(two_teachers, waves):
    """Statistics of another shift and scale change the targets, but not the relation."""
    teachers = {name: TeacherSettings("x", (1, 3)) for name in two_teachers}
    results = []
    for norm in ("none", "mean_std"):
        settings = DistillSettings(teachers, target_norm=norm, relation=RelationSettings(1.0))
        torch.manual_seed(0)
        ours = EnsembleDistiller(two_teachers, students("two layers"), settings).train()
        results.append(ours(batch_of(waves))[1])
    assert results[0]["relation"].item() == results[1]["relation"].item()
    assert results[0]["l1"].item() != pytest.approx(results[1]["l1"].item(), rel=1e-3)


def test_student_layers_that_do_not_match_the_targets():
    teachers = {"a": TeacherSettings("x", (4, 8)), "b": TeacherSettings("y", (4, 8))}
    with pytest.raises(ValueError, match=r"student_layers.*\b1 for 2"):
        DistillSettings(teachers, relation=RelationSettings(1.0, student_layers=(1,)))
    uneven = {**teachers, "b": TeacherSettings("y", (4,))}
    DistillSettings(uneven)
    with pytest.raises(ValueError, match="relation.*a has 2, b has 1"):
        DistillSettings(uneven, relation=RelationSettings(1.0))
    for wrong in ({"student_layers": ()}, {"student_layers": (-1,)}, {"window": 1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            RelationSettings(1.0, **wrong)
