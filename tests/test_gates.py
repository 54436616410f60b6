"""HardConcrete gates against the closed form of their distribution and a loop over units."""

import math

import pytest
import torch
from torch import nn

from s3prl_ekd.distill.pruning.gates import Gate, KeptLayerNorm

T, LOG_11 = 2 / 3, math.log(11)  # a gate is 0 below s = 1/12, the odds of which are 1/11


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def gate_with(log_alpha, **options):
    gate = Gate(len(log_alpha), 0.5, **options)
    gate.log_alpha.data = torch.tensor(log_alpha)
    return gate


@pytest.mark.parametrize("log_alpha", [-3.0, -1.0, 0.0, 1.6])
def test_draws_have_the_distribution_of_hard_concrete(log_alpha):
    count = 200_000
    torch.manual_seed(0)
    drawn = gate_with([log_alpha] * count).sampled()

    def value(u):  # of a uniform number, by the formulas of arXiv 1712.01312
        s = sigmoid((math.log(u / (1 - u)) + log_alpha) / T)
        return min(1.0, max(0.0, s * 1.2 - 0.1))

    mean = sum(value((i + 0.5) / 2000) for i in range(2000)) / 2000
    tolerance = 5 * math.sqrt(0.25 / count)
    zero, one = sigmoid(-log_alpha - T * LOG_11), sigmoid(log_alpha - T * LOG_11)
    assert (drawn == 0).double().mean().item() == pytest.approx(zero, abs=tolerance)
    assert (drawn == 1).double().mean().item() == pytest.approx(one, abs=tolerance)
    assert drawn.double().mean().item() == pytest.approx(mean, abs=tolerance)


def test_the_expected_number_of_open_gates_is_the_sum_of_their_probabilities():
    values = [-3.0, 0.0, 2.0]
    gate = gate_with(values)
    expected = gate.expected_open()
    open_ = [1 - sigmoid(-value - T * LOG_11) for value in values]
    assert expected.item() == pytest.approx(sum(open_), rel=1e-6)
    (gradient,) = torch.autograd.grad(expected, gate.log_alpha)
    assert gradient.tolist() == pytest.approx([p * (1 - p) for p in open_], rel=1e-5)


@pytest.mark.parametrize(("drop", "kept"), [(0.5, 0.8318), (0.01, 0.9980)])
def test_the_start_has_dphuberts_probabilities(drop, kept):
    torch.manual_seed(0)
    gate = Gate(4000, drop)
    assert gate.expected_open().item() / 4000 == pytest.approx(kept, abs=1e-4)
    assert gate.log_alpha.std().item() == pytest.approx(0.01, rel=0.1)


def fixed_by_loop(log_alpha, at_least, hard):
    """The values in eval mode, one unit after the other."""
    open_ = sum(1 - sigmoid(-value - T * LOG_11) for value in log_alpha)
    closed = min(round(len(log_alpha) - open_), len(log_alpha) - at_least)
    order = sorted(range(len(log_alpha)), key=lambda i: log_alpha[i])
    values = [1.0 if hard else sigmoid(0.8 * value / T) for value in log_alpha]
    for i in order[:closed]:
        values[i] = 0.0
    return values


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("at_least", [0, 1])
def test_fixed_values_equal_a_loop(hard, at_least):
    generator = torch.Generator().manual_seed(1)
    cases = (3 * torch.randn(40, 9, generator=generator) - 1).tolist()
    cases += [[-60.0 + i for i in range(9)], [60.0 + i for i in range(9)]]
    counts = set()
    for log_alpha in cases:
        gate = gate_with(log_alpha, at_least=at_least, hard=hard)
        expected = fixed_by_loop(log_alpha, at_least, hard)
        assert gate.fixed().tolist() == pytest.approx(expected, abs=1e-6)
        counts.add(sum(value > 0 for value in expected))
    assert min(counts) == at_least
    assert max(counts) == 9


def test_a_gate_draws_in_training_and_is_fixed_in_eval_mode():
    gate = gate_with([0.0] * 50, trailing=1)
    x = torch.ones(2, 50, 3)
    gate.draw()
    first = gate(x)
    gate.draw()
    assert not torch.equal(gate(x), first)
    assert torch.equal(gate(x)[0, :, 0], gate.values)
    assert torch.equal(gate(x)[1, :, 2], gate.values)
    gate.eval()
    gate.draw()
    assert torch.equal(gate(x)[0, :, 0], gate.fixed())


def test_kept_layer_norm_is_a_layer_norm_of_the_open_channels():
    torch.manual_seed(0)
    norm = nn.LayerNorm(10)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    gate = gate_with([0.0] * 10)
    gate.values = torch.tensor([0, 0.3, 1, 0, 0, 0.9, 1, 1, 0, 0.01])
    kept = gate.values.nonzero()[:, 0]
    x, upstream = torch.randn(3, 4, 10, requires_grad=True), torch.randn(3, 4, 10)
    y = KeptLayerNorm(norm, gate)(x)
    sub = x.detach()[..., kept].requires_grad_()
    weight, bias = norm.weight[kept], norm.bias[kept]
    expected = nn.functional.layer_norm(sub, [len(kept)], weight, bias)
    torch.testing.assert_close(y[..., kept], expected)
    assert y.count_nonzero() == expected.numel()
    (gradient,) = torch.autograd.grad((y * upstream).sum(), x)
    (sub_gradient,) = torch.autograd.grad((expected * upstream[..., kept]).sum(), sub)
    torch.testing.assert_close(gradient[..., kept], sub_gradient)
    assert gradient.count_nonzero() == sub_gradient.numel()


def test_kept_layer_norm_of_closed_channels_only_is_zero():
    gate = gate_with([0.0] * 4)
    gate.values = torch.zeros(4)
    x = torch.randn(2, 4, requires_grad=True)
    y = KeptLayerNorm(nn.LayerNorm(4), gate)(x)
    y.sum().backward()
    assert y.eq(0).all()
    assert x.grad.eq(0).all()
