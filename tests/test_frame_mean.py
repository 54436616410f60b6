"""``loss.reduce: frames``: the mean over all frames of a step, and its denominators."""

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s3prl_ekd.data.sampling import EpochSampler
from s3prl_ekd.distill.distiller import EnsembleDistiller
from s3prl_ekd.distill.frame_counts import FrameCounts
from s3prl_ekd.distill.settings import (
    DistillSettings,
    LossSettings,
    RelationSettings,
    TeacherSettings,
    UnitLossSettings,
)
from s3prl_ekd.distill.student import Student
from s3prl_ekd.distill.teachers import Teacher
from s3prl_ekd.essence.units import save_units
from s3prl_ekd.files.run_checkpoints import read_checkpoint
from s3prl_ekd.pretrain.curves import read_scalars
from s3prl_ekd.pretrain.expert import UpstreamPretrainExpert
from s3prl_ekd.pretrain.trainer import Trainer
from s3prl_ekd.teachers import load_teachers

from .cache_cases import datarc
from .conftest import NO_DROPOUT, edit_yaml, make_sound, saved_states, write_configs
from .fake_teachers import (
    LAYERS,
    MASK,
    STUDENT,
    FakeUpstream,
    batch_of,
    fake_distiller,
    noise,
    random_units,
    spans_of,
    student_frames,
)

LENGTHS = (24000, 3000, 11111, 700, 16000)
PARTS = ((0, 2), (1, 3, 4))  # as two batches
EVERY_TERM = {
    "loss": LossSettings(feature_penalty=0.5),
    "relation": RelationSettings(weight=2.0, window=12, between_layers=True),
}


def gradient(distiller):
    """All gradients as one vector, which are then cleared."""
    parts = []
    for parameter in distiller.trainable.parameters():
        parts.append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        parameter.grad = None
    return torch.cat([part.flatten() for part in parts]).double()


def distance(one, other):
    return float((one - other).norm() / other.norm())


def accumulated(distiller, batches):
    """The gradient of a step with several batches: the mean over them, as in the optimizer's
    step."""
    counts = None
    if distiller.settings.loss.reduce == "frames":
        totals = [distiller.count(batch.lengths, batch.spans, None) for batch in batches]
        counts = FrameCounts(*(sum(values) / len(batches) for values in zip(*totals, strict=True)))
    for batch in batches:
        (distiller(batch, counts=counts)[0] / len(batches)).backward()
    return gradient(distiller)


def parts_of(waves, spans, parts=PARTS):
    batches = []
    for part in parts:
        some = None if spans is None else [spans[i] for i in part]
        batches.append(batch_of([waves[i] for i in part], some))
    return batches


@pytest.fixture(scope="module")
def fast(teachers):
    """A distiller of fast teachers of two families, in which padding changes nothing."""

    def build(mask=MASK, **more):
        torch.manual_seed(0)
        chosen = {
            name: TeacherSettings(str(teachers[name]), LAYERS) for name in ("hubert", "wavlm")
        }
        units = [random_units("hubert", 3), random_units("wavlm", 4)]
        unmasked = 0.7 if mask else 0.0
        experiment = DistillSettings(
            chosen,
            student=dataclasses.replace(STUDENT, mask=mask),
            unit_loss=(UnitLossSettings("x", 1.5, unmasked), UnitLossSettings("y")),
            teacher_masked_norm=True,
            **more,
        )
        loaded = load_teachers(chosen, dropout=False, masked_norm=True)
        return EnsembleDistiller(loaded, Student(STUDENT), experiment, units).train()

    return build


@pytest.mark.parametrize("mask", [MASK, None])
def test_two_batches_of_any_lengths_equal_one(fast, mask):
    distiller = fast(mask, **EVERY_TERM)
    waves, spans = noise(*LENGTHS), spans_of(LENGTHS) if mask else None
    distiller(batch_of(waves, spans))[0].backward()
    whole = gradient(distiller)
    assert distance(accumulated(distiller, parts_of(waves, spans)), whole) < 1e-6


@pytest.mark.parametrize("part", ["units", "relation", "feature_penalty", "distillation"])
def test_each_term_has_its_own_denominator(part):
    """With the other terms off; the mean of the batches' means is another gradient."""
    loss = LossSettings(
        weight=float(part == "distillation"), feature_penalty=float(part == "feature_penalty")
    )
    more = {
        "relation": RelationSettings(weight=float(part == "relation"), window=12),
        "units": [random_units("a", 3), random_units("b", 2)],
        "weights": [(1.0, 0.5), (0.5, 0.0)] if part == "units" else [(1e-30,), (1e-30,)],
        "mask": MASK,
    }
    upstreams = {"a": FakeUpstream(), "b": FakeUpstream(720, seed=1)}
    waves, spans = noise(*LENGTHS), spans_of(LENGTHS)
    distances = {}
    for reduce in ("frames", "batches"):
        distiller = fake_distiller(upstreams, loss=dataclasses.replace(loss, reduce=reduce), **more)
        distiller(batch_of(waves, spans))[0].backward()
        whole = gradient(distiller)
        distances[reduce] = distance(accumulated(distiller, parts_of(waves, spans)), whole)
    assert distances["frames"] < 1e-6 and distances["batches"] > 0.01


def test_reduce_batches_takes_the_mean_of_each_batch():
    """By hand, over its own valid frames, of each layer and teacher."""
    upstreams = {"a": FakeUpstream(), "b": FakeUpstream(seed=1)}
    distiller = fake_distiller(upstreams, loss=LossSettings(reduce="batches"))
    waves = noise(*LENGTHS)
    for batch in parts_of(waves, None):
        assert distiller.count(batch.lengths, None, None) is None
        with torch.no_grad():
            output = distiller.student(batch.waves, batch.lengths)
            predictions = distiller.heads(output)
        by_set = []
        for name, upstream in upstreams.items():
            terms = []
            for i, length in enumerate(batch.lengths.tolist()):
                states = upstream([batch.waves[i, :length]])["hidden_states"]
                for place, layer in enumerate(LAYERS):
                    for t in range(student_frames(length)):
                        one, two = predictions[name][i, place, t], states[layer][0, t]
                        cosine = (one @ two) / (one.norm() * two.norm())
                        l1 = (one - two).abs().sum() / len(two)
                        terms.append(float(l1 - torch.log(1 / (1 + torch.exp(-cosine)))))
            by_set.append(sum(terms) / len(terms))
        expected = sum(by_set) / len(by_set)
        assert distiller(batch)[0].item() == pytest.approx(expected, rel=1e-5)


# A teacher with fewer frames than the student


@pytest.mark.parametrize(
    ("field", "ceil", "expected"),
    [
        (400, False, 400),
        (720, False, 720),
        (320, False, 320),
        (1, False, 1),
        (80, False, 80),
        (3000, False, 3000),
        (400, True, 1),
    ],
)
def test_the_receptive_field_of_a_teacher(field, ceil, expected):
    upstream = FakeUpstream(field, ceil)
    teacher = Teacher(upstream, LAYERS, "t")
    assert teacher.field == expected
    lengths = torch.tensor([*range(field, field + 700, 9), 16000, 123456])
    assert teacher.frames(lengths).tolist() == [upstream.frames(n) for n in lengths.tolist()]


@pytest.mark.parametrize("reduce", ["frames", "batches"])
def test_frames_beyond_a_teachers_own_count_change_nothing(reduce):
    """A field of 720 samples gives a frame less than the student's 400, or an equal number."""
    lengths = (16000, 9000, 9130)
    upstream = FakeUpstream(720)
    counts = [upstream.frames(n) for n in lengths]
    assert [student_frames(n) - c for n, c in zip(lengths, counts, strict=True)] == [1, 1, 1]
    distiller = fake_distiller(
        {"a": FakeUpstream(), "b": upstream},
        units=[random_units("a", 3), random_units("b", 3)],
        weights=[(1.0, 0.5), (1.0, 0.5)],
        mask=MASK,
        loss=LossSettings(feature_penalty=0.5, reduce=reduce),
        relation=RelationSettings(weight=1.0, window=12),
    )
    batch = batch_of(noise(*lengths), spans_of(lengths))
    losses = []
    for own in (True, False):  # change the last frame of an utterance, or the one after it
        upstream.change = None
        before = distiller(batch)[0].item()

        def change(states, own=own):
            changed = states.clone()
            for i in (1, 2):
                place = counts[i] - own
                changed[i, place : place + 1] = states[i, place] + 3
            return changed

        upstream.change = change
        losses.append((before, distiller(batch)[0].item()))
    (before, own), (same, beyond) = losses
    assert abs(own - before) > 1e-3 and beyond == same == before


def test_a_frame_that_a_teacher_lacks_is_not_counted():
    lengths = torch.tensor([16000, 9000, 500])  # 49, 27 and 1 frames of the student
    distiller = fake_distiller({"a": FakeUpstream(), "b": FakeUpstream(720)})
    counts = distiller.count(lengths, None, None)
    assert counts.frames == (16000 - 720) // 320 + 1 + (9000 - 720) // 320 + 1


# Counts


def test_cached_targets_have_frame_counts_of_their_own():
    """The teachers do not run, so their receptive fields do not matter."""
    distiller = fake_distiller({"a": FakeUpstream(720)})
    lengths, cached = torch.tensor([16000, 9000]), torch.tensor([49, 20])
    assert distiller.count(lengths, None, cached).frames == 49 + 20
    assert distiller.count(lengths, None, cached + 9).frames == 49 + 27  # the student's own
    assert distiller.count(torch.zeros(0), None, None) == FrameCounts()


@functools.cache
def small_distiller(field, masked):
    units = [random_units("a", 2)] if masked else []
    return fake_distiller({"a": FakeUpstream(field)}, units=units, mask=MASK if masked else None)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(720, 12000), min_size=1, max_size=4),
    field=st.sampled_from([80, 400, 720]),
    window=st.integers(2, 40),
    masked=st.booleans(),
    seed=st.integers(0, 99),
)
def test_counts_from_lengths_equal_those_of_the_masks(lengths, field, window, masked, seed):
    """By loops over the frames that student and teacher have of each utterance."""
    distiller = small_distiller(field, masked)
    relation = RelationSettings(window=window)
    distiller.settings = dataclasses.replace(distiller.settings, relation=relation)
    spans = spans_of(lengths, seed) if masked else None
    batch = batch_of(noise(*lengths), spans)
    counts = distiller.count(batch.lengths, batch.spans, None)
    frames = inside = pairs = 0
    for i, length in enumerate(lengths):
        count = min(student_frames(length), (length - field) // 320 + 1)
        outside = [not (masked and bool(spans[i][t])) for t in range(count)]
        frames += sum(outside)
        inside += count - sum(outside)
        pairs += sum(sum(outside[t : t + window]) ** 2 for t in range(0, count, window))
    assert counts == FrameCounts(frames, inside, pairs) and counts.valid == frames + inside
    with torch.no_grad():
        mask = distiller.run_student(batch).mask
    assert mask.sum() == counts.valid


@pytest.mark.parametrize("mask", [MASK, None])
@pytest.mark.parametrize("mask_padding", [True, False])
def test_with_one_batch_both_ways_to_reduce_are_equal(mask, mask_padding):
    """``mask_padding: false`` counts padded frames in the distillation loss only."""
    losses, logs = {}, {}
    waves, spans = noise(*LENGTHS), spans_of(LENGTHS) if mask else None
    for reduce in ("frames", "batches"):
        distiller = fake_distiller(
            {"a": FakeUpstream(), "b": FakeUpstream(720, seed=1)},
            units=[random_units("a", 3), random_units("b", 2)],
            weights=[(1.0, 0.5 if mask else 0.0), (0.5,)],
            mask=mask,
            loss=LossSettings(reduce=reduce, mask_padding=mask_padding),
            relation=RelationSettings(weight=1.0, window=12),
        )
        loss, scalars = distiller(batch_of(waves, spans))
        losses[reduce] = loss.item()
        logs[reduce] = {name: value.item() for name, value in scalars.items()}
    assert logs["frames"] == pytest.approx(logs["batches"], rel=1e-5)
    assert losses["frames"] == pytest.approx(losses["batches"], rel=1e-5)


# Whole runs

RATE = 0.3
SAMPLES = (24000, 23000, 12000, 11000, 7000, 6500, 3000, 1500)
ROWS = [(f"u{i}.flac", samples) for i, samples in enumerate(SAMPLES)]
FOUR = [*ROWS[:2], *ROWS[6:]]  # batches of two have very different lengths

TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


@pytest.fixture
def folder(pretrain_folder, teachers):
    """Configs of two steps without dropout, with plain gradient descent and every term."""
    student = {**NO_DROPOUT, "masked_norm": True, "mask": {"length": 5, "share": 0.5}}
    corpus = pretrain_folder / "corpus"
    write_configs(
        pretrain_folder,
        teachers,
        corpus,
        student=student,
        teacher_masked_norm=True,
        unit_loss=[{"file": "units.safetensors", "weight": 1.5, "unmasked_weight": 0.7}],
        relation={"weight": 2.0, "window": 12},
        loss={"feature_penalty": 0.5},
    )
    save_units(random_units("hubert", 3), pretrain_folder / "units.safetensors")
    corpus.mkdir()
    (corpus / "audio").mkdir()
    (corpus / "tables").mkdir()
    for i, length in enumerate(SAMPLES):
        soundfile.write(corpus / f"audio/u{i}.flac", make_sound(length / 16000, seed=i), 16000)
    with edit_yaml(pretrain_folder / "runner.yaml") as config:
        config["optimizer"] = {"name": "TorchOptim", "torch_optim_name": "SGD", "lr": RATE}
        config["runner"] |= {"total_steps": 2, "log_step": 1, "save_step": 1}
        config["runner"]["gradient_clipping"] = 1e9  # of the norm
        data = config["pretrain_expert"]["datarc"]
        data |= {"sequence_length": 0, "train_batch_size": 2, "on_bad_audio": "skip"}
    return pretrain_folder


def write_table(folder, rows):
    """Rows of the length table: (file, samples)."""
    lines = [f"{i},{file},{length}," for i, (file, length) in enumerate(rows)]
    text = "\n".join([",file_path,length,label", *lines]) + "\n"
    (folder / "corpus/tables/train.csv").write_text(text)


def parts_of_run(distiller):
    """What a step changes, by key in a checkpoint."""
    trainable = distiller.trainable
    return {
        "student": trainable["student"],
        "heads": trainable["heads"],
        "UnitHead": trainable["unit_heads"],
        "MaskEmbedding": trainable["mask_embedding"],
    }


def weights(distiller):
    modules = parts_of_run(distiller).values()
    values = [value.flatten() for part in modules for value in part.state_dict().values()]
    return torch.cat(values).double()


def trained(name, file=None):
    """The same of a checkpoint."""
    saved = saved_states(name, file)
    parts = [*saved["EKD"]["student"].values(), *saved["EKD"]["heads"].values()]
    parts += [*saved["UnitHead"].values(), *saved["MaskEmbedding"].values()]
    return torch.cat([part.flatten() for part in parts]).double()


def test_a_step_is_the_same_with_one_batch_and_two(folder, pretrain_with, monkeypatch):
    """Accumulated batches of very different lengths; the logged scalars are the same too. The mean
    of batch means is another update."""
    starts, train = [], Trainer.train

    def and_keep_start(self):
        starts.append(weights(self.upstream.distiller))
        train(self)

    monkeypatch.setattr(Trainer, "train", and_keep_start)
    write_table(folder, FOUR)
    assert pretrain_with("two", gradient_accumulate_steps=2)[0] == 0
    with edit_yaml(folder / "model.yaml") as model:
        model["loss"]["reduce"] = "batches"
    assert pretrain_with("batches")[0] == 0
    with edit_yaml(folder / "model.yaml") as model:
        del model["loss"]["reduce"]
    with edit_yaml(folder / "runner.yaml") as config:
        config["pretrain_expert"]["datarc"]["train_batch_size"] = 4
    assert pretrain_with("one", gradient_accumulate_steps=1)[0] == 0
    start, one, two = starts[0], trained("one"), trained("two")
    assert all(torch.equal(start, other) for other in starts)
    moved = float((one - start).norm())
    assert (two - one).abs().max() < 1e-6 and (two - one).norm() < 5e-6 * moved
    assert (trained("batches") - one).norm() > 0.01 * moved
    scalars, other = (read_scalars(f"result/pretrain/{name}") for name in ("one", "two"))
    assert other.keys() == scalars.keys()
    for tag, points in scalars.items():
        assert other[tag] == pytest.approx(points, rel=1e-4, abs=1e-6), tag


def test_steps_of_two_processes_by_hand(folder):
    """Gradient descent on one batch with all utterances of a step. In the first step one process
    has only bad audio, in the second both have good batches of different lengths. The scalars in
    the log are those of the one batch."""
    order = [index for _, index in EpochSampler(4, seed=1337)]
    batches = [ROWS[i : i + 2] for i in range(0, 8, 2)]
    bad = order[1]
    batches[bad] = [(f"missing{i}.flac", samples) for i, (_, samples) in enumerate(batches[bad])]
    write_table(folder, [row for batch in batches for row in batch])
    argv = ("run_pretrain.py", "-u", "ekd", "-c", "runner.yaml", "-g", "model.yaml", "-n", "x")
    done = subprocess.run(
        [sys.executable, *TWO_PROCESSES, "-m", "s3prl_ekd", *argv, "--device", "cpu"],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    torch.manual_seed(1337)
    expert = UpstreamPretrainExpert(datarc(folder), str(folder / "model.yaml"), device="cpu")
    distiller, dataset = expert.distiller.train(), expert.dataloader.dataset
    scalars = read_scalars(folder / "result/pretrain/x")
    for step, members in ((1, order[:1]), (2, order[2:])):
        if step == 2:
            saved = saved_states("x", "states-1.ckpt")
            for name, part in parts_of_run(distiller).items():
                part.load_state_dict(saved[name] if name in saved else saved["EKD"][name])
        start = weights(distiller)
        waves, spans = [], []
        for batch in (dataset[0, index] for index in members):
            for wave, length, mask in zip(batch.waves, batch.lengths, batch.spans, strict=True):
                waves.append(wave[:length])
                spans.append(mask[: student_frames(int(length))])
        assert len(waves) == 2 * step
        distiller.zero_grad()
        loss, logs = distiller(batch_of(waves, spans), step=step)
        loss.backward()
        with torch.no_grad():
            for parameter in distiller.trainable.parameters():
                parameter -= RATE * parameter.grad
        expected, found = weights(distiller), trained("x", f"states-{step}.ckpt")
        assert (found - expected).abs().max() < 1e-6
        assert (found - expected).norm() < 5e-6 * (expected - start).norm()
        for name, value in {"loss": loss, "loss_mean": loss, **logs}.items():
            logged = scalars[f"ekd/train-{name}"][step]
            assert logged == pytest.approx(value.item(), rel=1e-4), name
    listed = (folder / "result/pretrain/x/bad_audio.tsv").read_text()
    assert listed.count("missing") == 2


def test_a_checkpoint_without_reduce_keeps_the_mean_of_batch_means(folder, pretrain_with, pretrain):
    write_table(folder, FOUR)
    with edit_yaml(folder / "model.yaml") as model:
        model["loss"]["reduce"] = "batches"
    assert pretrain_with("x", gradient_accumulate_steps=2)[0] == 0
    expected = trained("x")
    first = Path("result/pretrain/x/states-1.ckpt")
    saved = read_checkpoint(first)
    assert saved["Upstream_Config"]["loss"].pop("reduce") == "batches"
    old = Path("result/pretrain/old")
    old.mkdir()
    torch.save(saved, old / first.name)
    assert pretrain("-e", str(old / first.name))[0] == 0
    assert saved_states("old")["Upstream_Config"]["loss"]["reduce"] == "batches"
    assert torch.equal(trained("old"), expected)
