"""The step: parity with s3prl's distiller, and invariants of every setting."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from s3prl.upstream.distiller.model import DistillerConfig, DistillerModel
from torch.nn.utils.rnn import pad_sequence

from s3prl_ekd.distill.batch import CachedTargets
from s3prl_ekd.distill.initialisation import initialise
from s3prl_ekd.distill.settings import LossSettings
from s3prl_ekd.distill.student import Student
from s3prl_ekd.distill.teachers import Teacher
from s3prl_ekd.errors import TeacherError
from s3prl_ekd.teachers.load import load_upstream
from s3prl_ekd.teachers.random_weights import hubert_checkpoint, wavlm_checkpoint

from .conftest import CONV, SIZES
from .experiments import LAYERS, batch_of, distiller, ensemble, load

REFERENCE = LossSettings(mask_padding=False, feature_penalty=0.1, reduce="batches")


def slow_reference_loss(pred, target, feat, cosine_weight, penalty):
    """s3prl's distiller loss from its definition: plain means, padding and all."""
    rec = (pred - target).abs().mean()
    sim = -F.logsigmoid((pred * target).sum(-1) / (pred.norm(dim=-1) * target.norm(dim=-1)))
    return rec + cosine_weight * sim.mean() + penalty * feat.pow(2).mean()


@pytest.mark.parametrize("aggregation", ["separate", "average", "concat"])
def test_one_teacher_is_s3prls_distiller(teachers, student_settings, waves, aggregation):
    """Loss and every gradient, against s3prl's DistillerModel and its teacher upstream."""
    ours = distiller(teachers, student_settings, ["hubert"], aggregation, REFERENCE)
    initialise(ours.student, [ours.teachers["t0"].upstream.model], conv=True, encoder=True)
    settings = {n: getattr(student_settings, n) for n in student_settings.__dataclass_fields__}
    settings.update(task_emb_type="expand-last", out_layer_type="expand-last", final_dim=48)
    settings.update(n_tasks=2, pred_layer_id=list(LAYERS))
    theirs = DistillerModel(DistillerConfig(settings))
    (head,) = ours.heads.values()
    theirs.load_state_dict(
        {
            **ours.student.backbone.state_dict(),
            **{f"output_layer.{key}": value for key, value in head.net.state_dict().items()},
        }
    )
    inputs = batch_of(waves)
    pad_mask = pad_sequence([torch.ones(n) for n in inputs.lengths], batch_first=True)
    feat, _, pred, _ = theirs(inputs.waves, pad_mask)
    with torch.no_grad():
        hidden = load(teachers["hubert"]).eval()(waves)["hidden_states"]
    target = torch.stack([hidden[layer] for layer in LAYERS], dim=1)
    expected = slow_reference_loss(pred, target, feat, 1.0, 0.1)
    expected.backward()
    loss, _ = ours(inputs)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    compared = 0
    for name, parameter in ours.student.backbone.named_parameters():
        wanted = gradients.pop(name)
        assert (wanted is None) == (parameter.grad is None), name
        if wanted is not None:
            assert torch.allclose(parameter.grad, wanted, atol=1e-6), name
            compared += 1
    for name, parameter in head.net.named_parameters():
        assert torch.allclose(parameter.grad, gradients.pop(f"output_layer.{name}"), atol=1e-6)
    assert not gradients and compared > 40


@pytest.mark.parametrize("aggregation", ["average", "separate"])
def test_equal_teachers_equal_one_teacher(teachers, student_settings, waves, aggregation):
    one = distiller(teachers, student_settings, ["hubert"], aggregation)
    three = distiller(teachers, student_settings, ["hubert"] * 3, aggregation)
    three.student.load_state_dict(one.student.state_dict())
    (state,) = [head.state_dict() for head in one.heads.values()]
    for head in three.heads.values():
        head.load_state_dict(state)
    batch = batch_of(waves)
    assert three(batch)[0].item() == pytest.approx(one(batch)[0].item(), abs=1e-6)


def test_more_padding_leaves_the_masked_loss_unchanged(teachers, student_settings, waves):
    """With layer norm in the student's extractor; group norm, the default, includes the padding in
    its statistics. Teachers always get unpadded waveforms."""
    settings = dataclasses.replace(student_settings, extractor_mode="layer_norm")
    ours = distiller(teachers, settings, ["hubert"])
    batch = batch_of(waves)
    with torch.no_grad():
        short, _ = ours(batch)
        long, _ = ours(dataclasses.replace(batch, waves=F.pad(batch.waves, (0, 6400))))
    assert long.item() == pytest.approx(short.item(), abs=1e-5)


@pytest.mark.parametrize("aggregation", ["separate", "average", "concat"])
def test_the_loss_falls_and_every_teacher_and_layer_is_logged(
    teachers, student_settings, waves, aggregation
):
    ours = distiller(teachers, student_settings, ["hubert", "robust", "wavlm"], aggregation)
    batch = batch_of(waves)
    optimizer = torch.optim.Adam(ours.trainable.parameters(), lr=2e-3)
    losses = []
    for _ in range(20):
        loss, parts = ours(batch, detail=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    for teacher in ("t0", "t1", "t2"):
        for layer in LAYERS:
            for term in ("l1", "cosine", "target_abs"):
                assert parts[f"{teacher}/{term}_layer{layer}"].item() > 0
    total = parts["l1"] + parts["cosine"]
    assert total.item() == pytest.approx(losses[-1], abs=1e-5)


@pytest.mark.parametrize("aggregation", ["separate", "average", "concat"])
def test_cached_targets_give_the_loss_of_computed_ones(
    teachers, student_settings, waves, aggregation
):
    """Per-teacher and aggregated ones; frames after the end of the targets count as padding."""
    ours = distiller(teachers, student_settings, ["hubert", "wavlm"], aggregation)
    batch = batch_of(waves)
    with torch.no_grad():
        live, logs = ours(batch, detail=True)
        targets = ours.teachers(waves)
        frames = ours.student(batch.waves, batch.lengths).mask.sum(1)
        for teacher in ours.teachers.values():
            teacher.upstream = None  # any later run of a teacher fails
        sets = ours.aggregate(targets, {"t0": 1.0, "t1": 1.0})
        for cached in (CachedTargets(targets, frames), CachedTargets(sets, frames, True)):
            loss, stored = ours(dataclasses.replace(batch, cached_targets=cached), detail=True)
            assert torch.equal(loss, live)
            if not cached.aggregated:
                assert stored.keys() == logs.keys()
            else:  # the cache has no targets of single teachers
                assert not any(name.startswith("t0/") for name in stored)
        half = {name: values.clone() for name, values in targets.items()}
        for values in half.values():
            values[:, :, 20:] = 1e6
        cached = CachedTargets(half, frames.clamp(max=20))
        cut = CachedTargets({n: v[:, :, :20] for n, v in targets.items()}, frames.clamp(max=20))
        losses = [ours(dataclasses.replace(batch, cached_targets=c))[0] for c in (cached, cut)]
        assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-6)


def test_logged_layers_add_up_to_the_loss_of_a_teacher(teachers, student_settings, waves):
    """With separate heads, a teacher's loss is the mean of its logged layers."""
    ours = distiller(teachers, student_settings, ["hubert", "wavlm"]).eval()
    _, parts = ours(batch_of(waves), detail=True)
    for name in ("t0", "t1"):
        l1 = sum(parts[f"{name}/l1_layer{layer}"] for layer in LAYERS) / 2
        cosine = sum(parts[f"{name}/cosine_layer{layer}"] for layer in LAYERS) / 2
        assert parts[f"loss/{name}"].item() == pytest.approx((l1 + cosine).item(), abs=1e-5)


def test_teachers_stay_frozen_and_in_eval(teachers, student_settings, waves):
    ours = distiller(teachers, student_settings, ["hubert", "wavlm"])
    before = {key: value.clone() for key, value in ours.teachers.state_dict().items()}
    ours.train()
    assert ours.student.training
    assert not any(module.training for module in ours.teachers.modules())
    assert not any(p.requires_grad for p in ours.teachers.parameters())
    first, second = (ours.teachers(waves)["t0"] for _ in range(2))
    assert torch.equal(first, second)
    loss, _ = ours(batch_of(waves))
    loss.backward()
    assert all(p.grad is None for p in ours.teachers.parameters())
    for key, value in ours.teachers.state_dict().items():
        assert torch.equal(value, before[key])
    trained = {id(p) for p in ours.trainable.parameters()}
    assert not trained & {id(p) for p in ours.teachers.parameters()}


def test_teacher_dropout_makes_targets_random(teachers, waves):
    noisy = ensemble(teachers, "hubert", dropout=True).train()
    first, second = (noisy(waves)["t0"] for _ in range(2))
    assert not torch.equal(first, second)


def test_layers_are_counted_as_s3prl_counts_them(teachers, waves):
    with torch.no_grad():
        states = load(teachers["wavlm"]).eval()(waves)["hidden_states"]
    ours = ensemble(teachers, "wavlm", layers=(0, 3, 4))(waves)["t0"]
    for i, layer in enumerate((0, 3, 4)):
        # not exactly equal: torch uses another kernel for frozen weights
        assert torch.allclose(ours[:, i], states[layer], atol=1e-5)


def test_a_layer_that_does_not_exist(teachers):
    with pytest.raises(TeacherError, match="teachers.hubert.layers.* 5.*0 to 4"):
        Teacher(load(teachers["hubert"]), (1, 5), "hubert")


@pytest.mark.parametrize("aggregation", ["separate", "concat"])
def test_teachers_of_different_widths(teachers, student_settings, waves, aggregation):
    ours = distiller(teachers, student_settings, ["hubert", "wide"], aggregation)
    loss, _ = ours(batch_of(waves), detail=True)
    assert torch.isfinite(loss)


def test_teachers_of_different_widths_cannot_be_averaged(teachers, student_settings):
    with pytest.raises(TeacherError, match="t0.*48.*t1.*64"):
        distiller(teachers, student_settings, ["hubert", "wide"], "average")


def test_a_student_of_another_frame_rate(teachers, student_settings):
    conv = "[(32,10,5)] + [(32,3,2)] * 4 + [(32,2,2)]"
    slow = dataclasses.replace(student_settings, extractor_conv_feature_layers=conv)
    with pytest.raises(TeacherError, match="t0.*320.*160"):
        distiller(teachers, slow, ["hubert"])


@pytest.mark.parametrize("name", ["hubert", "wavlm"])
def test_initialisation_copies_the_named_modules(teachers, student_settings, name):
    torch.manual_seed(3)
    student = Student(student_settings)
    before = {key: value.clone() for key, value in student.backbone.state_dict().items()}
    teacher = load(teachers[name]).model
    initialise(student, [teacher], conv=True, encoder=True)
    theirs = teacher.state_dict()
    copied = ("feature_extractor.", "post_extract_proj.", "encoder.pos_conv.", "encoder.layers.")
    for key, value in student.backbone.state_dict().items():
        wanted = theirs[key] if key.startswith(copied) else before[key]
        assert torch.equal(value, wanted), key


def test_initialisation_of_the_extractor_only(teachers, student_settings):
    torch.manual_seed(3)
    student = Student(student_settings)
    before = {key: value.clone() for key, value in student.backbone.state_dict().items()}
    initialise(student, [load(teachers["hubert"]).model], conv=True, encoder=False)
    state = student.backbone.state_dict()
    assert not torch.equal(
        state["feature_extractor.conv_layers.1.0.weight"],
        before["feature_extractor.conv_layers.1.0.weight"],
    )
    for key in state:
        if key.startswith("encoder."):
            assert torch.equal(state[key], before[key])


@pytest.mark.parametrize(
    ("change", "values"),
    [
        ({"encoder_embed_dim": 64}, "post_extract_proj.bias.*.48.*.64."),
        ({"encoder_layers": 5}, "encoder.layers.4"),
        ({"encoder_ffn_embed_dim": 96}, "encoder.layers.0.fc1.bias.*.64.*.96."),
        ({"extractor_mode": "layer_norm"}, "feature_extractor.conv_layers.0.2"),
        (
            {"extractor_conv_feature_layers": "[(48,10,5)] + [(48,3,2)]*4 + [(48,2,2)]*2"},
            "feature_extractor.conv_layers.0.0.weight.*.32, 1, 10.*.48, 1",
        ),
    ],
)
def test_an_init_teacher_that_does_not_fit(teachers, student_settings, change, values):
    student = Student(dataclasses.replace(student_settings, **change))
    with pytest.raises(TeacherError, match=values):
        initialise(student, [load(teachers["hubert"]).model], conv=True, encoder=True)


@pytest.mark.parametrize(
    ("part", "theirs", "ours", "values"),
    [
        (
            "encoder",
            {"config": {"layer_norm_first": True}},
            {},
            r"layers\.1 .*layer_norm_first: true .*false",
        ),
        ("encoder", {}, {"encoder_attention_heads": 12}, "layers.1 .*attention_heads: 4 .* 12 "),
        ("encoder", {"config": {"activation_fn": "relu"}}, {}, "layers.1 .*_fn: relu .* gelu "),
        (
            "conv",
            {"conv_layers": CONV.replace("(32,10,5)", "(32,10,2)")},
            {},
            r"strides \[2, 2.* strides \[5, 2.*student\.extractor_conv_feature_layers",
        ),
    ],
)
@pytest.mark.parametrize("checkpoint", [hubert_checkpoint, wavlm_checkpoint])
def test_an_init_teacher_that_computes_something_else(
    tmp_path, student_settings, checkpoint, part, theirs, ours, values
):
    """Its weights have the student's names and shapes."""
    torch.save(checkpoint(**{**SIZES, **theirs}), tmp_path / "teacher.pt")
    model = load_upstream(str(tmp_path / "teacher.pt"), "t").model
    student = Student(dataclasses.replace(student_settings, encoder_layers=1, **ours))
    chosen = {"conv": part == "conv", "encoder": part == "encoder", "layers": (1,)}
    with pytest.raises(TeacherError, match=f"{values}.*init.{part}: false"):
        initialise(student, [model], **chosen)
    initialise(student, [model], **chosen, same=False)  # a resumed run of an earlier version
    chosen |= {"conv": part != "conv", "encoder": part != "encoder"}
    initialise(student, [model], **chosen)
