"""The sparsity term: an augmented Lagrangian that drives the expected sparsity to a target.

Added to the loss: ``λ1 (s - t) + λ2 (s - t)²`` with the expected sparsity ``s``, the target ``t``
and multipliers that are raised by gradient ascent (Wang et al. 2020, arXiv 1910.04732, as in
DPHuBERT, arXiv 2305.17651, section 2.3). The target grows linearly from 0.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ..losses import Comparison, Logs
from ..student import Student
from ..student_settings import PrunedSettings, PruningSettings, Unit
from .backbone import PrunedBackbone
from .cost import (
    Width,
    Widths,
    as_number,
    expected_widths,
    full_widths,
    macs,
    parameters,
    smallest_widths,
)

SAMPLE_RATE = 16_000  # Hz
NEAR = 0.02  # expected sparsities this close to the target count as having reached it


class Multipliers(nn.Module):
    """The Lagrange multipliers λ1 and λ2, which the optimizer maximises."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.zeros(()))
        self.second = nn.Parameter(torch.zeros(()))


class SparsityTerm(nn.Module):
    """A term of the loss.

    Args:
        student: with gates.
        pruning: target and schedule.

    Raises:
        ConfigError: a kind of unit does not exist in the student, or its gates cannot reach the
            target.
    """

    def __init__(self, student: Student, pruning: PruningSettings):
        super().__init__()
        assert isinstance(student.settings, PrunedSettings)
        assert isinstance(student.backbone, PrunedBackbone)
        self.settings, self.pruning = student.settings, pruning
        self._backbone = (student.backbone,)  # in a tuple: the student is not part of this module
        self.multipliers = Multipliers()
        self.full = as_number(self.cost(full_widths(self.settings)))
        present = {unit for unit, _, _ in student.backbone.gates()}
        for unit in pruning.units:
            if unit not in present:
                raise ConfigError(
                    f"pruning.units: the student has no {unit} to prune; leave it out"
                )
        smallest = as_number(self.cost(smallest_widths(self.settings, student.backbone)))
        highest = 1 - smallest / self.full
        if highest < pruning.sparsity:
            raise ConfigError(
                f"pruning.sparsity: {pruning.sparsity} is out of reach; without any of its "
                f"{', '.join(pruning.units)} the student has a sparsity of {highest:.3f}; lower it "
                "or add kinds of units"
            )

    def cost(self, widths: Widths) -> Width:
        """Parameters or MACs of the student, by ``pruning.by``."""
        if self.pruning.by == "macs":
            return macs(self.settings, widths, round(self.pruning.seconds * SAMPLE_RATE))
        return parameters(self.settings, widths)

    def expected(self) -> Tensor:
        """The expected sparsity, a scalar: 1 - expected cost / cost without pruning."""
        cost = self.cost(expected_widths(self.settings, self._backbone[0]))
        return torch.as_tensor(1 - cost / self.full)

    def target(self, step: int) -> float:
        """The target at a step, counted from 1; 0 at the first."""
        return self.pruning.sparsity * min(1.0, (step - 1) / self.pruning.reach_at)

    @torch.no_grad()
    def is_reached(self) -> bool:
        """Whether the expected sparsity is that of the settings, up to ``NEAR``."""
        return abs(float(self.expected()) - self.pruning.sparsity) <= NEAR

    @torch.no_grad()
    def widths(self) -> tuple[dict[Unit, list[float]], dict[Unit, list[float]]]:
        """The expected and the full width of each layer, for each kind of unit with gates."""
        both = expected_widths(self.settings, self._backbone[0]), full_widths(self.settings)
        expected, full = (
            {unit: [as_number(width) for width in widths.of(unit)] for unit in self.pruning.units}
            for widths in both
        )
        return expected, full

    def forward(self, comparison: Comparison) -> tuple[Tensor, Logs]:
        """The term, 0 in eval mode; and scalars for the log."""
        expected, target = self.expected(), self.target(comparison.step)
        excess = expected - target
        first, second = self.multipliers.first, self.multipliers.second
        value = first * excess + second * excess.square()
        logs = {
            "sparsity/expected": expected.detach(),
            "sparsity/target": torch.tensor(target),
            "sparsity/lambda1": first.detach().clone(),
            "sparsity/lambda2": second.detach().clone(),
            "sparsity/term": value.detach(),
        }
        return (value if self.training else value.detach() * 0), logs
