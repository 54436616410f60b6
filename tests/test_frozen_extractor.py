"""``student.train_extractor: false``: the conv extractor keeps its weights, and teachers with the
same weights share its features."""

import dataclasses

import pytest
import torch

from s3prl_ekd.distill.conv_extractor import ConvExtractor
from s3prl_ekd.distill.distiller import EnsembleDistiller
from s3prl_ekd.distill.initialisation import initialise
from s3prl_ekd.distill.settings import DistillSettings, TeacherSettings
from s3prl_ekd.distill.student_settings import CopySettings
from s3prl_ekd.student_file import load_student
from s3prl_ekd.teachers import copied_student
from s3prl_ekd.teachers.fast.encoder import fast_encoders

from .conftest import STUDENT, edit_yaml, saved_states, write_configs
from .experiments import LAYERS, batch_of, distiller, ensemble

NAMES = ("hubert", "robust", "wavlm")


@pytest.fixture
def runs(monkeypatch):
    """Every run of a conv extractor, as its number of waveforms."""
    calls = []
    original = ConvExtractor.__call__

    def counting(self, waves, lengths):
        calls.append(len(waves))
        return original(self, waves, lengths)

    monkeypatch.setattr(ConvExtractor, "__call__", counting)
    return calls


@pytest.fixture
def frozen(teachers, student_settings):
    """A distiller with three fast teachers; the student has the extractor of ``t0``, frozen."""
    settings = dataclasses.replace(student_settings, feature_grad_mult=0.0)
    model = distiller(teachers, settings, NAMES)
    initialise(model.student, [model.teachers["t0"].upstream.model], conv=True, encoder=False)
    return accelerated(model)


def accelerated(model, **options):
    upstreams = {name: teacher.upstream for name, teacher in model.teachers.items()}
    for name, encoder in fast_encoders(upstreams, **options).items():
        model.teachers[name].encoder = encoder
    return model


def gradients(model, batch):
    model.zero_grad()
    loss, _ = model(batch)
    loss.backward()
    trained = model.trainable.named_parameters()
    return loss.detach(), {name: p.grad.clone() for name, p in trained if p.grad is not None}


def test_a_step_equals_that_of_separate_models(frozen, waves, runs):
    """Loss and gradients of s3prl's own teachers and s3prl's own forward of the student, from one
    run of the shared extractor and one of each other teacher's."""
    batch = batch_of(waves)
    loss, ours = gradients(frozen, batch)
    assert runs == [3, 3, 3]
    targets = frozen.run_teachers(batch)[0]
    for name, teacher in frozen.teachers.items():
        expected = teacher(waves)  # of the upstream, without an encoder
        torch.testing.assert_close(targets[name], expected, rtol=0, atol=1e-5)
        teacher.encoder = None
    frozen.student.backend = "s3prl"
    runs.clear()
    separate_loss, theirs = gradients(frozen, batch)
    assert runs == []
    assert float(loss) == pytest.approx(float(separate_loss), abs=1e-6)
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if "feature_extractor" in name]
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-5)


def test_all_teachers_with_the_students_weights_share_its_features(
    teachers, student_settings, waves, runs
):
    settings = dataclasses.replace(student_settings, feature_grad_mult=0.0)
    model = distiller(teachers, settings, ["hubert"] * 3)
    initialise(model.student, [model.teachers["t0"].upstream.model], conv=True, encoder=False)
    accelerated(model)(batch_of(waves))
    assert runs == [3]
    with torch.no_grad():
        model.eval()(batch_of(waves))  # as for the dev loss
    assert runs == [3, 3]


def test_features_are_not_shared_where_they_differ(frozen, waves, runs):
    """From one run of the student's extractor and one for each teacher."""
    batch = batch_of(waves)

    def count(changed=batch):
        runs.clear()
        frozen(changed)
        return len(runs)

    assert count() == 3
    assert count(dataclasses.replace(batch, teacher_waves=batch.waves / 2)) == 4
    padded = torch.nn.functional.pad(batch.waves, (0, 800))  # group norms include the padding
    assert count(dataclasses.replace(batch, waves=padded)) == 4
    for option in ({"masked_norm": True}, {"precision": "bfloat16"}):
        accelerated(frozen, **option)
        frozen(batch)  # the first step logs the error of bfloat16, with further runs
        assert count() == 4, option
    accelerated(frozen)
    frozen.teachers["t0"].encoder.normalize = True
    assert count() == 4
    frozen.teachers["t0"].encoder.normalize = False
    assert count() == 3
    with torch.no_grad():
        frozen.student.backbone.feature_extractor.conv_layers[3][0].weight[0, 0, 0] += 1e-3
    assert count() == 4


def test_autocast_and_teachers_in_bfloat16_share_features(frozen, waves, runs):
    accelerated(frozen, precision="bfloat16")
    frozen(batch_of(waves))  # logs the error of bfloat16, with further runs
    runs.clear()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = frozen(batch_of(waves))
    assert len(runs) == 3 and loss.isfinite()


@pytest.mark.parametrize(("name", "normalize"), [("hubert", True), ("wavlm", False)])
def test_a_copied_student_shares_features(teachers, waves, runs, name, normalize):
    """Student and teacher have equal weights, so the student's hidden states are the targets."""
    loaded = ensemble(teachers, name)
    upstream = loaded["t0"].upstream
    (upstream.cfg if name == "wavlm" else upstream.task_cfg).normalize = normalize
    copy = CopySettings("copy", "t0", train_extractor=False)
    settings = DistillSettings({"t0": TeacherSettings("x", LAYERS)}, student=copy)
    student = copied_student(loaded, copy, None)
    assert student.settings.normalize_waveforms == normalize
    model = accelerated(EnsembleDistiller(loaded, student, settings)).eval()
    batch = batch_of([wave[:7000] for wave in waves])
    model(batch)
    assert runs == [3]
    targets, output = model.run_teachers(batch)[0]["t0"], model.run_student(batch)
    for index, layer in enumerate(LAYERS):
        ours = output.hidden_states[layer]
        torch.testing.assert_close(ours, targets[:, index], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["distil", "copy", "file"])
def test_a_run_does_not_change_the_extractor(
    pretrain_folder, pretrain, teachers, corpus, student_file, kind
):
    """Bit for bit, for every kind of student, and in a resumed run, which keeps the setting. A
    student file does not have it."""
    student = {
        "distil": STUDENT,
        "copy": {"kind": "copy", "of": "hubert"},
        "file": {"kind": "file", "file": str(student_file), "keep_heads": False},
    }[kind]
    init = {"teacher": "hubert"} if kind == "distil" else {}
    student = {**student, "train_extractor": False}
    write_configs(pretrain_folder, teachers, corpus, student=student, init=init)
    argv = ("-n", "x", "-c", "runner.yaml", "-g", "model.yaml")
    code, out = pretrain(*argv)
    assert code == 0, out
    if kind == "distil":
        with edit_yaml("model.yaml") as model:
            model["student"]["train_extractor"] = True
        longer = ("-a", "-o", "config.runner.total_steps=8")
        code, out = pretrain(*argv, *longer)
        assert code == 2 and "student.train_extractor False -> True" in out
        code, out = pretrain("-n", "x", *longer)
        assert code == 0, out
    start = torch.load(teachers["hubert"], weights_only=True)["model_weight"]
    if kind == "file":
        start = load_student(student_file).student.backbone.state_dict()
    saved = saved_states("x")
    weights = saved["EKD"]["student"]
    extractor = [name for name in weights if "feature_extractor" in name]
    assert len(extractor) == 9  # seven convolutions, and weight and bias of a group norm
    for name in extractor:
        assert torch.equal(weights[name], start[name.removeprefix("backbone.")]), name
    projection = "post_extract_proj.weight"
    assert not torch.equal(weights[f"backbone.{projection}"], start[projection])
    settings = saved["EKD"]["settings"]
    assert "train_extractor" not in settings
    assert (settings["feature_grad_mult"] == 0) == (kind != "file")  # what its model card says
    assert saved["Upstream_Config"]["student"]["train_extractor"] is False
