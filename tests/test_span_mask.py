"""Masked spans: HuBERT's rule, what they depend on, their effect on student and loss."""

import dataclasses
import random

import numpy as np
import pytest
import torch

from s3prl_ekd import cli
from s3prl_ekd.data.batches import train_loader
from s3prl_ekd.distill.settings import LossSettings
from s3prl_ekd.distill.span_mask import SpanMask, draw_spans
from s3prl_ekd.distill.student import Student
from s3prl_ekd.distill.student_settings import MaskSettings, StudentSettings
from s3prl_ekd.essence.units import save_units
from s3prl_ekd.files.torch_load import safe_load
from s3prl_ekd.pretrain.trainer import dev_loss
from s3prl_ekd.student_file import load_student

from .cache_cases import adapter, configs
from .conftest import NO_DROPOUT, data_settings, edit_yaml, saved_states
from .fake_teachers import (
    MASK,
    FakeUpstream,
    batch_of,
    fake_distiller,
    noise,
    random_units,
    spans_of,
)
from .students import pruned_student, random_student

# HuBERT's rule


def runs(mask):
    """Lengths of the stretches of masked frames."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]])))
    return (edges[1::2] - edges[::2]).tolist()


def statistics(masks):
    """For each mask: share of masked frames, number of stretches, their mean length, mean square of
    their lengths, the longest; ``[draw, statistic]``."""
    rows = []
    for mask in masks:
        lengths = np.array(runs(np.asarray(mask, dtype=int)) or [0])
        rows.append(
            [np.mean(mask), len(lengths), lengths.mean(), (lengths**2).mean(), lengths.max()]
        )
    return np.array(rows)


@pytest.mark.parametrize(
    ("frames", "length", "share"), [(203, 10, 0.8), (120, 5, 0.35), (47, 10, 0.65)]
)
def test_the_masked_frames_are_distributed_as_in_hugging_face(frames, length, share):
    """Means of 1500 draws, within 4.5 standard errors of their difference."""
    from transformers.models.hubert.modeling_hubert import _compute_mask_indices

    generator, count = random.Random(3), 1500
    settings = MaskSettings(length, share)
    ours = statistics(draw_spans(frames, settings, generator).numpy() for _ in range(count))
    state = np.random.get_state()
    np.random.seed(4)
    draws = (_compute_mask_indices((1, frames), share, length, None, 2) for _ in range(count))
    theirs = statistics(draw[0] for draw in draws)
    np.random.set_state(state)
    errors = np.sqrt((ours.var(0) + theirs.var(0)) / count)
    assert (np.abs(ours.mean(0) - theirs.mean(0)) <= 4.5 * errors + 1e-12).all()
    assert ours[:, 2].min() >= length


def test_the_mean_number_of_spans_is_exact():
    """With spans of one frame, of which as many are masked: 0.0101 * 1234 = 12.4634."""
    settings, generator = MaskSettings(1, 0.0101), random.Random(0)
    counts = [int(draw_spans(1234, settings, generator).sum()) for _ in range(3000)]
    assert {*counts} == {12, 13}
    error = (0.4634 * 0.5366 / 3000) ** 0.5
    assert np.mean(counts) == pytest.approx(12.4634, abs=4.5 * error)


@pytest.mark.parametrize("share", [0.1, 0.8, 1.0])
@pytest.mark.parametrize("frames", [-1, 0, 1, 9])
def test_an_utterance_shorter_than_a_span_is_not_masked(frames, share):
    for seed in range(20):
        masked = draw_spans(frames, MaskSettings(10, share), random.Random(seed))
        assert masked.shape == (max(0, frames),) and not masked.any()


def test_short_utterances_have_at_least_two_spans_if_there_are_two_starts():
    """As in HuBERT: a share of 0.01 alone would give none."""
    settings = MaskSettings(10, 0.01)
    counts = {}
    for frames in (9, 10, 11, 200):
        draws = [draw_spans(frames, settings, random.Random(seed)) for seed in range(200)]
        counts[frames] = {int(draw.sum()) for draw in draws}
    assert counts[9] == {0}  # shorter than a span
    assert counts[10] == {10}  # one start
    assert counts[11] == {11}  # both starts
    assert counts[200] <= set(range(11, 21)) and 20 in counts[200]


def test_with_a_share_of_one_spans_still_overlap():
    """Starts are distinct, but spans overlap, so frames are left over."""
    shares = [
        float(draw_spans(200, MaskSettings(10, 1.0), random.Random(seed)).float().mean())
        for seed in range(300)
    ]
    assert 0.55 < np.mean(shares) < 0.75 and max(shares) < 1
    assert draw_spans(50, MaskSettings(1, 1.0), random.Random(0)).all()


@pytest.mark.parametrize("change", [{"length": 0}, {"share": 0.0}, {"share": 1.5}])
def test_settings_out_of_range(change):
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=rf"{name}\b.*\b{value}"):
        MaskSettings(**change)


# Batches


def spans_by_name(corpus, epochs=1, **options):
    """Utterance -> its masked frames in each epoch, from a loader."""
    changes = {"sequence_length": 0, "num_workers": 0}
    changes = {key: options.pop(key, value) for key, value in changes.items()}
    size = options.pop("batch_size", 4)
    data = data_settings(corpus / "audio", size, corpus / "tables", **changes)
    span_mask = SpanMask(MASK, StudentSettings(**NO_DROPOUT))
    options = {"seed": 3, **options}
    loader = train_loader(data, ["train"], min_samples=400, span_mask=span_mask, **options)
    result = []
    for _ in range(epochs):
        masks = {}
        for batch in loader:
            assert batch.spans.shape == (len(batch.names), (batch.waves.shape[1] - 400) // 320 + 1)
            for name, length, mask in zip(batch.names, batch.lengths, batch.spans, strict=True):
                count = (int(length) - 400) // 320 + 1
                assert not mask[count:].any()
                masks[name] = mask[:count]
        result.append(masks)
    loader.close()
    return result


def assert_equal(one, other):
    assert one.keys() == other.keys() and len(one) == 12
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_masks_depend_on_seed_epoch_and_utterance_only(corpus):
    first, second = spans_by_name(corpus, epochs=2)
    assert all(mask.any() and not mask.all() for mask in first.values())
    # other batches, another order of draws, a worker process
    torch.manual_seed(99)
    random.seed(99)
    for options in ({"batch_size": 5}, {"batch_size": 1}, {"num_workers": 1}, {"shuffle": False}):
        assert_equal(spans_by_name(corpus, **options)[0], first)


def test_masks_after_a_restart(corpus):
    """A loader that begins with the second epoch gives the masks of the second epoch."""
    _, second = spans_by_name(corpus, epochs=2)
    data = data_settings(corpus / "audio", 4, corpus / "tables")
    span_mask = SpanMask(MASK, StudentSettings(**NO_DROPOUT))
    loader = train_loader(data, ["train"], min_samples=400, seed=3, span_mask=span_mask)
    loader.sampler.seek(1, 1)  # after the first batch of that epoch
    batches = list(loader)
    assert 0 < len(batches) < 3
    for batch in batches:
        for name, mask in zip(batch.names, batch.spans, strict=True):
            count = len(second[name])
            assert torch.equal(mask[:count], second[name]) and not mask[count:].any()


def test_masks_differ_between_epochs_seeds_and_utterances(corpus):
    first, second = spans_by_name(corpus, epochs=2)
    other = spans_by_name(corpus, seed=4)[0]
    for masks in (second, other):
        assert sum(torch.equal(first[name], masks[name]) for name in first) <= 1
    starts = [tuple(mask[:24].tolist()) for mask in first.values()]  # the first 0.5 s
    assert len({*starts}) >= 11


def test_an_excerpt_has_a_mask_of_its_own_frames(corpus):
    masks = spans_by_name(corpus, sequence_length=8000)[0]
    assert {len(mask) for mask in masks.values()} == {24}


# The student


@pytest.fixture(params=["two layers", "pre-norm", "copied", "copied wavlm"])
def student(request):
    if request.param.startswith("copied"):
        return pruned_student(wavlm="wavlm" in request.param)
    pre_norm = request.param == "pre-norm"
    return random_student(StudentSettings(**NO_DROPOUT, layer_norm_first=pre_norm))


def encoder_input(student):
    """The inputs of the positional convolution, ``[batch, frame, dim]``, from now on."""
    seen = []
    student.backbone.encoder.pos_conv.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].transpose(1, 2))
    )
    return seen


def test_the_learned_vector_replaces_masked_frames(student):
    lengths = (9000, 6000)
    batch, vector = batch_of(noise(*lengths), spans_of(lengths)), torch.randn(48)
    vector.requires_grad_()
    seen = encoder_input(student)
    plain = student(batch.waves, batch.lengths)
    masked = student(batch.waves, batch.lengths, (batch.spans, vector))
    one, other = seen
    inside = batch.spans
    assert inside.any() and not inside.all()
    assert torch.equal(other[inside], vector.expand(int(inside.sum()), -1))
    assert torch.equal(other[~inside], one[~inside])
    assert torch.equal(plain.features, masked.features)  # conv features themselves are not masked
    assert torch.equal(plain.mask, masked.mask)
    # attention carries the change to the frames outside
    frame = int((~inside[0]).nonzero()[0])
    assert not torch.allclose(plain.last[0, frame], masked.last[0, frame], atol=1e-4)
    (gradient,) = torch.autograd.grad(other.sum(), vector, retain_graph=True)
    assert torch.equal(gradient, torch.full((48,), float(inside.sum())))
    (gradient,) = torch.autograd.grad(masked.last[~inside].square().sum(), vector)
    assert gradient.abs().max() > 0


def test_no_gradient_reaches_the_conv_features_of_masked_frames(student):
    batch = batch_of(noise(9000))
    spans = torch.zeros(1, 27, dtype=torch.bool)
    spans[0, 5:20] = True
    output = student(batch.waves, batch.lengths, (spans, torch.zeros(48)))
    (gradient,) = torch.autograd.grad(output.last.square().sum(), output.features)
    assert not gradient[spans].any() and gradient[~spans].abs().amax(-1).min() > 0


def test_activation_checkpointing_with_a_mask(student):
    """The same gradients, that of the vector too."""
    lengths = (9000, 6000)
    batch, vector = batch_of(noise(*lengths), spans_of(lengths)), torch.randn(48)
    student.train()
    for module in student.modules():  # the gates and dropouts of copied students are 0 already
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    gradients = []
    for activation_checkpointing in (False, True):
        student.activation_checkpointing = activation_checkpointing
        value = vector.clone().requires_grad_()
        student.zero_grad()
        student(batch.waves, batch.lengths, (batch.spans, value)).last.square().sum().backward()
        grads = [p.grad.flatten() for p in student.parameters() if p.grad is not None]
        gradients.append(torch.cat([value.grad, *grads]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-4)


# The loss


def changed_at(spans, value):
    """Changes a hidden state ``[batch, frame, dim]`` at these frames."""

    def change(states):
        changed = states.clone()
        frames = spans[:, : states.shape[1]]
        changed[:, : frames.shape[1]][frames] += value
        return changed

    return change


@pytest.mark.parametrize("reduce", ["frames", "batches"])
@pytest.mark.parametrize("aggregation", ["separate", "average", "concat"])
def test_targets_of_masked_frames_are_not_in_the_distillation_loss(reduce, aggregation):
    lengths = (16000, 9000)
    upstream = FakeUpstream()
    distiller = fake_distiller(
        {"a": upstream, "b": FakeUpstream(seed=1)},
        units=[random_units("b", 1)],
        mask=MASK,
        loss=LossSettings(reduce=reduce),
        aggregation=aggregation,
    )
    batch = batch_of(noise(*lengths), spans_of(lengths))
    inside = batch.spans
    outside = torch.stack([torch.arange(49) < n for n in (49, 27)]) & ~inside
    losses = []
    for frames in (None, inside, outside):
        upstream.change = None if frames is None else changed_at(frames, 2.0)
        losses.append(distiller(batch)[0].item())
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("unmasked_weight", [0.0, 0.5])
def test_units_of_unmasked_frames_count_only_with_unmasked_weight(unmasked_weight):
    lengths = (16000, 9000)
    upstream = FakeUpstream()
    distiller = fake_distiller(
        {"a": upstream},
        units=[random_units("a", 3)],
        weights=[(1.0, unmasked_weight)],
        mask=MASK,
        loss=LossSettings(weight=0.0),
    )
    batch = batch_of(noise(*lengths), spans_of(lengths))
    inside = batch.spans
    outside = torch.stack([torch.arange(49) < n for n in (49, 27)]) & ~inside
    losses = []
    for frames in (None, outside, inside):
        upstream.change = None if frames is None else changed_at(frames, 5.0)
        losses.append(distiller(batch)[0].item())
    before, other_outside, other_inside = losses
    assert before != other_inside
    assert (before == other_outside) == (unmasked_weight == 0)


def test_the_vector_learns():
    distiller = fake_distiller({"a": FakeUpstream()}, units=[random_units("a", 3)], mask=MASK)
    lengths = (16000, 9000)
    distiller(batch_of(noise(*lengths), spans_of(lengths)))[0].backward()
    vector = distiller.trainable["mask_embedding"].vector
    assert vector.grad.norm() > 0 and 0 <= vector.min() and vector.max() <= 1
    distiller.zero_grad()
    nothing = [torch.zeros(49, dtype=torch.bool), torch.zeros(27, dtype=torch.bool)]
    loss, logs = distiller(batch_of(noise(*lengths), nothing))
    loss.backward()
    assert logs["unit_loss"] == 0 and loss.isfinite() and not vector.grad.any()


# Runs


@pytest.fixture
def masked_run(pretrain_folder, teachers, corpus):
    """Configs with a mask and units, and three utterances to measure the dev loss on."""
    student = {**NO_DROPOUT, "mask": dataclasses.asdict(MASK)}
    unit_loss = [{"file": "units.safetensors"}]
    configs(pretrain_folder, teachers, corpus, student=student, unit_loss=unit_loss)
    save_units(random_units("hubert", 3), pretrain_folder / "units.safetensors")
    rows = (corpus / "tables/train.csv").read_text().splitlines()
    for name, part in (("train", rows), ("dev", [*rows[:2], rows[8]])):
        (pretrain_folder / f"{name}.csv").write_text("\n".join(part) + "\n")
    with edit_yaml(pretrain_folder / "runner.yaml") as config:
        data = config["pretrain_expert"]["datarc"]
        data |= {"file_path": str(pretrain_folder), "dev_sets": ["dev"]}
    return pretrain_folder


def test_the_dev_loss_is_measured_with_the_masks_of_epoch_0(masked_run):
    expert = adapter(masked_run)
    measured = [dev_loss(expert, expert.dev_dataloader, 1, "cpu") for _ in range(2)]
    assert measured[0] == measured[1]
    dataset = expert.dataloader.dataset
    first = {name: mask for i in range(len(dataset)) for name, mask in named_masks(dataset[i])}
    for batch in expert.dev_dataloader:
        for name, mask in named_masks(batch):
            count = min(len(mask), len(first[name]))
            assert mask.any() and torch.equal(mask[:count], first[name][:count])
    batches = [batch._replace(spans=~batch.spans) for batch in expert.dev_dataloader]
    other = dev_loss(expert, batches, 1, "cpu")
    assert abs(other[0] / other[1] - measured[0][0] / measured[0][1]) > 1e-3


def named_masks(batch):
    return list(zip(batch.names, batch.spans, strict=True))


def test_an_exported_student_of_a_masked_run_is_a_plain_student(masked_run, pretrain_with):
    assert pretrain_with("x", "-o", "config.runner.total_steps=4")[0] == 0

    assert cli.main(["export", "student", "result/pretrain/x", "-o", "student.pt"]) in (0, None)
    saved = saved_states("x")
    assert saved["MaskEmbedding"]["vector"].shape == (48,)
    for contents in (safe_load("student.pt", "student file"), saved["EKD"]):
        assert "mask" not in contents["settings"]
        assert not any("mask" in name for name in contents["student"])
    plain = Student(StudentSettings(**NO_DROPOUT)).eval()
    plain.load_state_dict(saved["EKD"]["student"])
    loaded = load_student("student.pt").student.eval()
    batch = batch_of(noise(9000, 6000))
    with torch.no_grad():
        expected, output = (s(batch.waves, batch.lengths) for s in (plain, loaded))
    for one, other in zip(output.hidden_states, expected.hidden_states, strict=True):
        assert torch.equal(one, other)
