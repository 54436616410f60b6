"""The sparsity term against a twin in plain Python, its schedule, and its refusals."""

import math
import re

import pytest
import torch
from torch import nn

from s3prl_ekd.distill.losses import Comparison
from s3prl_ekd.distill.pruning.cut import cut, gate_values
from s3prl_ekd.distill.pruning.sparsity import SparsityTerm
from s3prl_ekd.distill.student import Student
from s3prl_ekd.distill.student_settings import PruningSettings
from s3prl_ekd.errors import ConfigError
from s3prl_ekd.pretrain.optim import fused_adamw
from s3prl_ekd.superb.macs import count_macs

from .gated_students import ALL_UNITS, WAVLM, gated_settings, gated_student, noise, saturate


def comparison(step):
    empty = {}
    mask = torch.ones(1, 1)
    return Comparison(empty, empty, mask, mask, empty, empty, {}, empty, None, step)


def make(units=("conv", "heads", "ffn"), changes=None, **pruning):
    student = gated_student(gated_settings(units, **(changes or {})))
    return student, SparsityTerm(student, PruningSettings(units=units, **pruning))


class Adam:
    """Adam in plain Python (arXiv 1412.6980) for one number."""

    def __init__(self, rate):
        self.rate, self.first, self.second, self.step = rate, 0.0, 0.0, 0

    def update(self, value, gradient):
        self.step += 1
        self.first = 0.9 * self.first + 0.1 * gradient
        self.second = 0.999 * self.second + 0.001 * gradient**2
        mean, square = self.first / (1 - 0.9**self.step), self.second / (1 - 0.999**self.step)
        return value - self.rate * mean / (math.sqrt(square) + 1e-8)


def test_50_updates_equal_a_twin_in_plain_python():
    """Gates of feed-forward units only, for which the cost is a sum over units."""
    student, term = make(("ffn",), sparsity=0.15, reach_at=30, lr=0.05)
    for _, _, gate in student.backbone.gates():
        gate.log_alpha.data.normal_(0, 0.5)
    alphas = [a for _, _, gate in student.backbone.gates() for a in gate.log_alpha.tolist()]
    total = sum(p.numel() for p in student.parameters()) - len(alphas)
    each, shift = 2 * 24 + 1, 2 / 3 * math.log(11)
    first = second = 0.0
    start = term.expected().item()
    optimizers = [Adam(0.05) for _ in alphas]
    ascent = Adam(-0.05), Adam(-0.05)
    model = nn.ModuleDict({"student": student, "multipliers": term.multipliers})
    config = {"lr": 0.0, "weight_decay": 0.0, "eps": 1e-8}
    optimizer = fused_adamw(model, config, term.pruning)
    for step in range(1, 51):
        value, logs = term(comparison(step))
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

        kept = [1 / (1 + math.exp(-a - shift)) for a in alphas]
        sparsity = each * sum(1 - p for p in kept) / total
        excess = sparsity - 0.15 * min(1, (step - 1) / 30)
        assert value.item() == pytest.approx(first * excess + second * excess**2, abs=1e-6)
        assert logs["sparsity/expected"].item() == pytest.approx(sparsity, abs=1e-6)
        slope = first + 2 * second * excess
        alphas = [
            adam.update(a, -slope * each / total * p * (1 - p))
            for adam, a, p in zip(optimizers, alphas, kept, strict=True)
        ]
        first = ascent[0].update(first, excess)
        second = ascent[1].update(second, excess**2)
        assert term.multipliers.first.item() == pytest.approx(first, abs=1e-5)
        assert term.multipliers.second.item() == pytest.approx(second, abs=1e-5)
    got = [a for _, _, gate in student.backbone.gates() for a in gate.log_alpha.tolist()]
    assert got == pytest.approx(alphas, abs=2e-3)
    assert abs(sparsity - start) > 0.01


def test_updates_reach_the_target():
    student, term = make(sparsity=0.5, reach_at=50, lr=0.1)
    optimizer = fused_adamw(
        nn.ModuleDict({"student": student, "multipliers": term.multipliers}),
        {"lr": 0.0},
        term.pruning,
    )
    assert not term.is_reached()
    for step in range(1, 401):
        term(comparison(step))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert term.expected().item() == pytest.approx(0.5, abs=0.01)
    assert term.is_reached()


@pytest.mark.parametrize(
    ("step", "target"), [(1, 0.0), (2, 0.006), (51, 0.3), (101, 0.6), (102, 0.6), (9999, 0.6)]
)
def test_the_target_grows_linearly(step, target):
    _, term = make(sparsity=0.6, reach_at=100)
    assert term.target(step) == pytest.approx(target)
    assert term(comparison(step))[1]["sparsity/target"].item() == pytest.approx(target)


@pytest.mark.parametrize("changes", [{}, WAVLM])
def test_by_macs_the_sparsity_is_that_of_the_macs(changes):
    student, term = make(ALL_UNITS, changes, by="macs", seconds=0.5, sparsity=0.3)
    counts = []
    for closed in (0.0, 0.5):
        saturate(student, dict.fromkeys(ALL_UNITS, closed))
        small = cut(student, gate_values(student))
        waves, lengths = noise(8_000)
        with count_macs() as counted:
            small(waves, lengths)
        counts.append(counted.products)
    assert term.full == counts[0]
    assert term.expected().item() == pytest.approx(1 - counts[1] / counts[0], abs=1e-6)


def test_the_term_is_zero_in_eval_mode():
    _, term = make()
    term.multipliers.first.data.fill_(2.0)
    value, logs = term.train()(comparison(7))
    assert value.item() == pytest.approx(2 * (term.expected().item() - term.target(7)), rel=1e-5)
    value, again = term.eval()(comparison(7))
    assert value.item() == 0
    assert not value.requires_grad
    assert again == logs


def test_expected_and_full_widths():
    student, term = make(("conv", "ffn"), sparsity=0.1)
    saturate(student, {"ffn": 1.0, "conv": 0.0})
    expected, full = term.widths()
    assert expected == {"conv": [12, 10, 10, 10, 10, 8, 14], "ffn": [0, 0, 0]}
    assert full == {"conv": [12, 10, 10, 10, 10, 8, 14], "ffn": [20, 20, 20]}


def test_a_target_out_of_reach_is_refused():
    student, term = make(("ffn",), sparsity=0.1)
    highest = 3 * 20 * (2 * 24 + 1) / term.full
    with pytest.raises(ConfigError, match=re.escape(f"{highest:.3f}")):
        SparsityTerm(student, PruningSettings(units=("ffn",), sparsity=highest + 0.01))
    SparsityTerm(student, PruningSettings(units=("ffn",), sparsity=highest - 0.01))


def test_units_that_the_student_lacks_are_refused():
    student = Student(gated_settings(("heads", "ffn"), heads=((),) * 3))
    with pytest.raises(ConfigError, match="heads"):
        SparsityTerm(student, PruningSettings(units=("heads", "ffn"), sparsity=0.1))
