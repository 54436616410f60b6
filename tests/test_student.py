"""The student and its heads: sizes of method.md, s3prl's own forward, padding."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from s3prl.upstream.distiller.model import DistillerConfig, DistillerModel
from torch.nn.utils.rnn import pad_sequence

from s3prl_ekd.distill.aggregation import AGGREGATIONS, TeacherShape
from s3prl_ekd.distill.heads import LinearHead, PredictionHeads, SplitHead
from s3prl_ekd.distill.student import Student
from s3prl_ekd.distill.student_settings import StudentSettings

from .conftest import CONV, STUDENT, write_configs


def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


@pytest.mark.parametrize(
    ("aggregation", "teachers", "with_heads"),
    [
        ("average", 1, 27_034_752),
        ("average", 3, 27_034_752),
        ("separate", 1, 27_034_752),
        ("separate", 2, 30_578_304),
        ("separate", 3, 34_121_856),
    ],
)
def test_full_size_parameter_counts(aggregation, teachers, with_heads):
    student = Student(StudentSettings())
    shapes = {f"t{i}": TeacherShape(((4,), (8,), (12,)), 768) for i in range(teachers)}
    heads = PredictionHeads(768, AGGREGATIONS[aggregation](shapes).specs)
    assert count(student) == 23_491_200
    assert count(student, heads) == with_heads


def test_equals_s3prls_distiller(student_settings, waves):
    settings = {
        name: getattr(student_settings, name) for name in student_settings.__dataclass_fields__
    }
    settings.update(task_emb_type="expand-last", out_layer_type="expand-last", final_dim=40)
    settings.update(n_tasks=3, pred_layer_id=[1, 2, 3])
    theirs = DistillerModel(DistillerConfig(settings)).eval()
    student = Student(student_settings).eval()
    head = SplitHead(student.width, 3, 40).eval()
    state = theirs.state_dict()
    student.backbone.load_state_dict(
        {key: value for key, value in state.items() if not key.startswith("output_layer.")}
    )
    head.net.load_state_dict(
        {key[13:]: value for key, value in state.items() if key.startswith("output_layer.")}
    )
    lengths = torch.tensor([len(wave) for wave in waves])
    batch = pad_sequence(waves, batch_first=True)
    pad_mask = pad_sequence([torch.ones(n) for n in lengths], batch_first=True)
    with torch.no_grad():
        feat, feat_final, pred, mask, layers = theirs(batch, pad_mask, get_hidden=True)
        out = student(batch, lengths)
        ours = head(out.last)
    assert torch.allclose(out.features, feat, atol=1e-5) and torch.equal(out.mask, mask)
    assert len(out.hidden_states) == 3
    for state, expected in zip(out.hidden_states, [feat_final, *layers], strict=True):
        assert torch.allclose(state, expected, atol=1e-5)
    assert torch.allclose(ours, pred, atol=1e-5)


AS_WIDE = CONV.replace("32,2,2)] * 2", "32,2,2)] + [(48,2,2)]")
SIZES = [
    {"extractor_mode": mode, "layer_norm_first": norm_first, "feature_grad_mult": scale, **more}
    for mode, norm_first, scale, more in itertools.product(
        ("default", "layer_norm"),
        (False, True),
        (0.0, 0.1, 1.0),
        (
            {"encoder_layers": 1, "activation_fn": "relu", "conv_pos": 15},
            {"encoder_layers": 3, "encoder_layerdrop": 0.4, "extractor_dropout": 0.1},
            {"extractor_conv_feature_layers": AS_WIDE, "encoder_layerdrop": 0.4},
        ),
    )
]


def describe(size):
    return "-".join(str(value) for value in size.values())


def own_input(encoder, args):
    """A copy of the encoder's input, into which s3prl writes zeros over the padding.

    Without a projection that is the extractor's output, which autograd needs as it was.
    """
    return args[0].clone(), *args[1:]


def run_seeded(student, waves, lengths):
    """Outputs and gradients, and the next random numbers, of a forward from the same seeds."""
    torch.manual_seed(2)
    np.random.seed(3)
    out = student(waves, lengths)
    after = torch.rand(1).item(), np.random.random()
    loss = out.last.square().mean() + out.features.square().mean()
    for i, state in enumerate(out.hidden_states):
        loss = loss + (1 + i) * (state * out.mask[..., None]).square().mean()
    student.zero_grad()
    loss.backward()
    return out, {name: weight.grad for name, weight in student.named_parameters()}, after


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=describe)
def test_both_backends_give_the_same(size, training):
    """Outputs and gradients of our forward and of s3prl's, dropout and layer drop included."""
    settings = StudentSettings(**{**STUDENT, **size})
    if settings.conv_layers[-1][0] == settings.encoder_embed_dim:
        # without a projection, dropout draws in the order in which the extractor stores frames
        off = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
        settings = dataclasses.replace(settings, **off)
    ours = Student(settings).train(training)
    theirs = Student(settings, "s3prl").train(training)
    theirs.load_state_dict(ours.state_dict())
    if theirs.backbone.post_extract_proj is None:
        theirs.backbone.encoder.register_forward_pre_hook(own_input)
    lengths = torch.tensor([6000, 400, 3001])  # 400: one frame
    waves = pad_sequence([torch.randn(n) for n in lengths], batch_first=True)

    out, gradients, after = run_seeded(ours, waves, lengths)
    expected, expected_gradients, expected_after = run_seeded(theirs, waves, lengths)

    assert after[0] == expected_after[0]
    if training and settings.encoder_layerdrop:  # without, s3prl draws numbers that it does not use
        assert after[1] == expected_after[1]
    assert torch.equal(out.mask, expected.mask) and out.mask.sum(1).tolist() == [18, 1, 9]
    assert len(out.hidden_states) == len(expected.hidden_states)
    same = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(out.features, expected.features, **same)
    torch.testing.assert_close(out.last, expected.last, **same)
    for state, other in zip(out.hidden_states[1:], expected.hidden_states[1:], strict=True):
        torch.testing.assert_close(state, other, **same)
    projected = expected.hidden_states[0] * expected.mask[..., None]
    torch.testing.assert_close(out.hidden_states[0], projected, **same)
    for name, gradient in gradients.items():
        other = expected_gradients[name]
        assert (gradient is None) == (other is None), name
        if gradient is not None:
            assert (gradient - other).abs().max() <= 2e-5 * other.abs().max().clamp(min=1), name


def test_layer_drop_leaves_layers_out(student_settings):
    settings = dataclasses.replace(student_settings, encoder_layers=3, encoder_layerdrop=0.5)
    student = Student(settings).train()
    waves, lengths = torch.randn(1, 4000), torch.tensor([4000])
    np.random.seed(0)
    layers = [len(student(waves, lengths).hidden_states) - 1 for _ in range(8)]
    np.random.seed(0)
    assert layers == [int((np.random.random(3) > 0.5).sum()) for _ in range(8)]
    assert len(student.eval()(waves, lengths).hidden_states) == 4


def test_frames_and_mask_follow_the_conv_arithmetic(student_settings):
    student = Student(student_settings).eval()
    lengths = [16000, 400, 719, 720]
    waves = pad_sequence([torch.randn(n) for n in lengths], batch_first=True)
    out = student(waves, torch.tensor(lengths))
    # by hand: 1 + (samples - 400) // 320 frames
    assert out.mask.sum(1).tolist() == [49, 1, 1, 2]
    assert out.last.shape == (4, 49, student.width)


def test_more_padding_changes_nothing_with_layer_norm_in_the_extractor(student_settings, waves):
    # The default extractor's GroupNorm sees the padding (a property of HuBERT too); this does not.
    settings = dataclasses.replace(student_settings, extractor_mode="layer_norm")
    student = Student(settings).eval()
    lengths = torch.tensor([len(wave) for wave in waves])
    batch = pad_sequence(waves, batch_first=True)
    longer = torch.nn.functional.pad(batch, (0, 3200))
    with torch.no_grad():
        short, long = student(batch, lengths), student(longer, lengths)
    frames = short.last.shape[1]
    valid = short.mask.bool()
    assert torch.allclose(short.last[valid], long.last[:, :frames][valid], atol=1e-5)
    assert long.mask[:, frames:].sum() == 0


def test_one_target_layer(student_settings):
    # s3prl's SplitLinear is another class of layer for a single split
    head = SplitHead(48, 1, 20)
    assert head(torch.randn(2, 5, 48)).shape == (2, 1, 5, 20)


def test_a_linear_head_is_one_matrix():
    head = LinearHead(48, 3, 20)
    hidden = torch.randn(2, 5, 48)
    slow = hidden @ head.net.weight.T + head.net.bias
    assert torch.allclose(head(hidden)[:, 1], slow[..., 20:40], atol=1e-6)
    assert count(head) == 48 * 60 + 60


def test_a_frozen_conv_extractor(student_settings, waves):
    frozen = Student(dataclasses.replace(student_settings, feature_grad_mult=0.0))
    lengths = torch.tensor([len(wave) for wave in waves])
    frozen(pad_sequence(waves, batch_first=True), lengths).last.sum().backward()
    extractor = frozen.backbone.feature_extractor
    assert all(p.grad is None and not p.requires_grad for p in extractor.parameters())
    assert frozen.backbone.post_extract_proj.weight.grad is not None


KINDS = [
    {},
    {"feature_grad_mult": 1.0},
    {"extractor_mode": "layer_norm"},
    {"layer_norm_first": True},
    {"feature_grad_mult": 0.0},
]


@pytest.mark.parametrize("changes", KINDS)
def test_a_conv_extractor_as_wide_as_the_layers(student_settings, waves, changes):
    """Nothing is projected then: the same as a projection by the identity, gradients too."""
    settings = dataclasses.replace(
        student_settings, extractor_conv_feature_layers=AS_WIDE, **changes
    )
    student, projecting = Student(settings), Student(settings)
    assert student.backbone.post_extract_proj is None
    projecting.load_state_dict(student.state_dict())
    identity = projecting.backbone.post_extract_proj = torch.nn.Linear(48, 48).requires_grad_(False)
    torch.nn.init.eye_(identity.weight)
    torch.nn.init.zeros_(identity.bias)

    lengths = torch.tensor([len(wave) for wave in waves])
    batch = pad_sequence(waves, batch_first=True)
    outs = [model(batch, lengths) for model in (student, projecting)]
    for out in outs:
        loss = out.last.square().mean() + out.features.pow(2).mean()
        (loss + out.hidden_states[0].mean()).backward()
    assert torch.allclose(outs[0].features, outs[1].features, atol=1e-6)
    for ours, theirs in zip(outs[0].hidden_states, outs[1].hidden_states, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    wanted = dict(projecting.named_parameters())
    for name, weight in student.named_parameters():
        assert (weight.grad is None) == (wanted[name].grad is None), name
        if weight.grad is not None:
            assert torch.allclose(weight.grad, wanted[name].grad, rtol=1e-3, atol=1e-5), name


def test_a_student_without_a_projection_is_trained(pretrain_folder, teachers, corpus, pretrain):
    student = {**STUDENT, "extractor_conv_feature_layers": AS_WIDE}
    penalty = {"feature_penalty": 1.0}
    write_configs(pretrain_folder, teachers, corpus, student=student, init={}, loss=penalty)
    code, out = pretrain("-c", "runner.yaml", "-g", "model.yaml", "-n", "wide")
    assert code == 0, out
