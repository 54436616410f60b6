"""The conv extractor as matrix products, against torch's convolutions and norms."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from s3prl.upstream.wav2vec2.wav2vec2_model import ConvFeatureExtractionModel
from torch import nn

from s3prl_ekd.distill import conv_extractor
from s3prl_ekd.distill.conv_extractor import ConvExtractor, supports_blocks
from s3prl_ekd.distill.student import Student
from s3prl_ekd.distill.student_forward import student_forward
from s3prl_ekd.distill.student_settings import StudentSettings

from .conftest import CONV, NO_DROPOUT
from .gated_students import gated_settings, gated_student

PUBLISHED = [(16, 10, 5), *[(16, 3, 2)] * 4, *[(24, 2, 2)] * 2]
CASES = {
    "group norm": (PUBLISHED, "default", False),
    "layer norms and biases": (PUBLISHED, "layer_norm", True),
    "a bias behind the group norm": (PUBLISHED, "default", True),
    "one layer": ([(8, 10, 5)], "default", False),
    "a stride above the kernel": ([(8, 10, 5), (8, 2, 3), (8, 3, 1), (8, 5, 2)], "default", True),
}


def by_modules(module, waves):
    """s3prl's own forward: ``[batch, frame, channel]``."""
    x = waves[:, None]
    for block in module.conv_layers:
        x = block(x)
    return x.transpose(1, 2)


def exact(module, waves):
    """Features and gradients of s3prl's own forward in float64."""
    module = copy.deepcopy(module).double()
    for part in module.modules():
        for kind in (nn.GroupNorm, nn.LayerNorm):
            if isinstance(part, kind):
                part.__class__ = kind  # s3prl's compute in float32
    features = by_modules(module, waves.double())
    return features, gradients(module, features)


def gradients(module, features):
    """Gradients of a sum in which every frame has another weight."""
    module.zero_grad()
    weight = torch.linspace(-1, 1, features.numel()).view_as(features)
    (features * weight).sum().backward()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("case", CASES)
def test_features_and_gradients_equal_those_of_convolutions(case):
    layers, mode, bias = CASES[case]
    torch.manual_seed(0)
    module = ConvFeatureExtractionModel(layers, 0.0, mode, bias)
    for name, weight in module.named_parameters():
        if weight.dim() == 1:  # else biases and norms have no effect
            nn.init.normal_(weight, 1.0 if "weight" in name else 0.0, 0.3)
    waves = 0.1 * torch.randn(3, 9_000) + 0.3
    assert supports_blocks(module)
    ours = ConvExtractor(module)(waves, torch.tensor([9_000] * 3))
    expected, others = exact(module, waves)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)
    own = gradients(module, ours)
    assert own.keys() == others.keys()
    if mode == "default" and bias:  # the norm subtracts it
        assert not own.pop("conv_layers.0.0.bias").any()
    for name, gradient in own.items():
        assert (gradient - others[name]).abs().max() <= 3e-5 * others[name].abs().max(), name


def test_an_utterance_of_several_chunks():
    """30 s: with one thread, the second layer has 48,000 frames and 47 chunks."""
    module = ConvFeatureExtractionModel([(4, 10, 5), (4, 3, 2)], 0.0, "default", False)
    waves = torch.randn(1, 480_000)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ours = ConvExtractor(module)(waves, torch.tensor([480_000]))
        own = gradients(module, ours)
    finally:
        torch.set_num_threads(threads)
    expected, others = exact(module, waves)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)
    for name, other in others.items():
        assert (own[name] - other).abs().max() <= 5e-4 * other.abs().max(), name


def test_bfloat16_gradients_are_summed_in_float32():
    """Sums over 240 chunks; in bfloat16, later addends would be rounded away."""
    torch.manual_seed(0)
    module = ConvFeatureExtractionModel([(4, 10, 5), (4, 3, 2)], 0.0, "default", False)
    waves = 0.1 * torch.randn(8, 480_000)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            features = ConvExtractor(module)(waves, torch.tensor([480_000] * 8))
        assert features.dtype == torch.bfloat16
        module.zero_grad()
        features.float().square().sum().backward()
    finally:
        torch.set_num_threads(threads)
    own = module.conv_layers[1][0].weight.grad.clone()
    module.zero_grad()
    by_modules(module, waves).square().sum().backward()
    other = module.conv_layers[1][0].weight.grad
    assert ((own - other).norm() / other.norm()) < 5e-3


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_of_the_waveforms(frozen):
    student = Student(StudentSettings(**NO_DROPOUT)).requires_grad_(not frozen)
    lengths, gradients_by_forward = torch.tensor([4_000]), []
    wave = torch.randn(1, 4_000)
    for forward in (student, partial(student_forward, student.backbone)):
        leaf = wave.clone().requires_grad_()
        forward(leaf, lengths).last.square().sum().backward()
        gradients_by_forward.append(leaf.grad)
    assert gradients_by_forward[0].abs().max() > 0
    torch.testing.assert_close(*gradients_by_forward, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_students_of_other_types(dtype):
    student = Student(StudentSettings(**NO_DROPOUT)).to(dtype).eval()
    waves, lengths = torch.randn(1, 4_000, dtype=dtype), torch.tensor([4_000])
    ours = student(waves, lengths).last
    expected = student_forward(student.backbone, waves, lengths).last
    assert ours.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float64 else 0.1
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)
    ours.square().sum().backward()


def test_gradients_if_only_the_first_layer_is_frozen():
    module = ConvFeatureExtractionModel(PUBLISHED, 0.0, "default", False)
    module.conv_layers[0].requires_grad_(False)
    waves = torch.randn(1, 4_000)
    own = gradients(module, ConvExtractor(module)(waves, torch.tensor([4_000])))
    assert own.keys() == gradients(module, by_modules(module, waves)).keys() and len(own) == 6


def test_gates_scale_the_channels_and_get_gradients():
    student = gated_student(gated_settings()).train()
    waves, lengths = 0.1 * torch.randn(2, 6_000), torch.tensor([6_000, 6_000])
    torch.manual_seed(0)
    student.backbone.draw_gates()
    ours = student.conv(waves, lengths)
    own = gradients(student, ours)
    expected = by_modules(student.backbone.feature_extractor, waves)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    torch.manual_seed(0)
    student.backbone.draw_gates()
    others = gradients(student, by_modules(student.backbone.feature_extractor, waves))
    assert own.keys() == others.keys() and any("log_alpha" in name for name in own)
    for name, other in others.items():
        assert (own[name] - other).abs().max() <= 2e-5 * other.abs().max().clamp(min=1), name


def test_masked_statistics_are_those_of_the_unpadded_utterance():
    module = ConvFeatureExtractionModel(PUBLISHED, 0.0, "default", False)
    waves = torch.randn(2, 8_000)
    waves[1, 5_000:] = 0
    masked = ConvExtractor(module, masked_norm=True)(waves, torch.tensor([8_000, 5_000]))
    alone = by_modules(module, waves[1:, :5_000])
    torch.testing.assert_close(masked[1:, : alone.shape[1]], alone, rtol=1e-5, atol=1e-5)
    with_padding = by_modules(module, waves)[1:, : alone.shape[1]]
    assert (with_padding - alone).abs().max() > 1e-2


def test_far_fewer_activations_are_stored():
    """Stored for the backward pass of the published extractor: one tensor for each layer but the
    first, in place of two or three."""
    module = ConvFeatureExtractionModel(PUBLISHED, 0.0, "default", False)
    waves = torch.randn(1, 16_000)

    def stored(forward):
        sizes = {}

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = forward()
        del result
        return sum(sizes.values())

    ours = stored(lambda: ConvExtractor(module)(waves, torch.tensor([16_000])))
    assert ours < 0.5 * stored(lambda: by_modules(module, waves))


@pytest.mark.parametrize("change", ["load_state_dict", "in place", "by .data", "moved"])
def test_changed_weights_are_used(change):
    torch.manual_seed(0)
    student = Student(StudentSettings(**NO_DROPOUT)).eval()
    other = Student(StudentSettings(**NO_DROPOUT)).eval()
    waves, lengths = torch.randn(1, 4_000), torch.tensor([4_000])
    with torch.no_grad():
        before, expected = student(waves, lengths).last, other(waves, lengths).last
        if change == "load_state_dict":
            student.load_state_dict(other.state_dict())
        elif change == "moved":
            student.load_state_dict(other.state_dict())
            student = copy.deepcopy(student).double().float()
        else:
            pairs = zip(student.parameters(), other.parameters(), strict=True)
            for weight, new in pairs:
                if change == "in place":
                    weight.copy_(new)
                else:
                    weight.data.copy_(new)
        after = student(waves, lengths).last
    assert not torch.allclose(before, expected, atol=1e-3)
    torch.testing.assert_close(after, expected)


def test_inference_tensors_that_change():
    """They have no version counter."""
    with torch.inference_mode():
        student = Student(StudentSettings(**NO_DROPOUT)).eval()
        waves, lengths = torch.randn(1, 4_000), torch.tensor([4_000])
        before = student(waves, lengths).last
        for weight in student.parameters():
            weight.mul_(0.5)
        after = student(waves, lengths).last
        expected = student_forward(student.backbone, waves, lengths).last
    assert not torch.allclose(before, expected, atol=1e-3)
    torch.testing.assert_close(after, expected)


def test_equal_weights_are_converted_once(monkeypatch):
    calls = []
    original = conv_extractor.read_layers
    monkeypatch.setattr(
        conv_extractor, "read_layers", lambda *a, **k: calls.append(1) or original(*a, **k)
    )
    module = ConvFeatureExtractionModel(PUBLISHED, 0.0, "default", False)
    extractor, waves, lengths = ConvExtractor(module), torch.randn(1, 4_000), torch.tensor([4_000])
    with torch.no_grad():
        for dtype in (torch.float32, torch.float32, torch.bfloat16, torch.bfloat16):
            extractor.dtype = dtype
            extractor(waves, lengths)
    assert len(calls) == 2


def test_inference_mode_before_training():
    student = Student(StudentSettings(**NO_DROPOUT))
    waves, lengths = torch.randn(1, 4_000), torch.tensor([4_000])
    with torch.inference_mode():
        expected = student(waves, lengths).last.clone()
    last = student(waves, lengths).last
    last.square().sum().backward()
    torch.testing.assert_close(last, expected)
    student.backbone.feature_extractor.requires_grad_(False)  # frozen: weights are kept
    student(waves, lengths).last.square().sum().backward()


def test_unusual_extractors_run_as_modules():
    conv = nn.Conv1d(1, 4, 10, 5)
    for block in (
        nn.Sequential(nn.Conv1d(1, 4, 10, 5, padding=1), nn.Dropout(0.0), nn.GELU()),
        nn.Sequential(conv, nn.Dropout(0.0), nn.GELU("tanh")),
        nn.Sequential(conv, nn.Dropout(0.0), nn.GroupNorm(2, 4), nn.GELU()),
        nn.Sequential(conv, nn.Dropout(0.0), nn.ReLU()),
    ):
        module = nn.Module()
        module.conv_layers = nn.ModuleList([block])
        assert not supports_blocks(module)


def test_the_student_traces_as_one_graph():
    """Without breaks: with ``fullgraph`` torch raises at the first."""
    student = Student(StudentSettings(**{**NO_DROPOUT, "extractor_conv_feature_layers": CONV}))
    waves, lengths = torch.randn(2, 4_000), torch.tensor([4_000, 3_000])
    waves[1, 3_000:] = 0
    traced = torch.compile(student, fullgraph=True, backend="eager")(waves, lengths)
    torch.testing.assert_close(traced.last, student(waves, lengths).last, rtol=1e-5, atol=1e-5)


def test_attention_without_a_mask_where_nothing_is_padded(monkeypatch):
    """A GPU then uses flash attention; the values are those with a mask."""
    masks = []
    original = F.multi_head_attention_forward

    def recorded(*args, **kwargs):
        masks.append(kwargs["key_padding_mask"])
        return original(*args, **kwargs)

    monkeypatch.setattr(F, "multi_head_attention_forward", recorded)
    student = Student(StudentSettings(**NO_DROPOUT)).eval()
    waves = torch.randn(2, 4_000)
    with torch.no_grad():
        ours = student(waves, torch.tensor([4_000, 4_000])).last
        assert masks and all(mask is None for mask in masks)
        student(waves, torch.tensor([4_000, 3_000]))
        assert masks[-1] is not None
        masked = student_forward(student.backbone, waves, torch.tensor([4_000, 4_000])).last
    torch.testing.assert_close(ours, masked, rtol=1e-5, atol=1e-5)
