"""tools/targets_speed.py: its table, and that each variant's step has the option in its name."""

import numpy as np
import pytest
import torch

from s3prl_ekd import compat
from tools.bench.inputs import SIZES, write_teachers
from tools.targets_speed import PLAIN, VARIANTS, TimedStep, measure, small, table

pytestmark = pytest.mark.slow  # of tools/

LENGTHS = torch.tensor([8000, 4000])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    compat.apply()
    return write_teachers(tmp_path_factory.mktemp("teachers"), small(SIZES["tiny"]))


def waves():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 8000, generator=generator) * (torch.arange(8000) < LENGTHS[:, None])


@pytest.mark.parametrize("variant", VARIANTS, ids=[variant.name for variant in VARIANTS])
def test_every_variant_takes_a_step_with_its_option(variant, models):
    step = TimedStep(variant, SIZES["tiny"], models, live=variant.teachers)
    batch = step.batch(waves(), LENGTHS)
    before = [p.clone() for p in step.distiller.student.parameters()]
    _, logs = step.distiller(batch)
    assert ("relation" in logs) == variant.name.startswith("relation")
    names = ("hubert_layer4", "robust_hubert_layer4", "wavlm_layer4")
    assert all((f"{name}/unit_loss" in logs) == variant.units for name in names)
    norm = step.distiller.target_norm
    assert (norm is not None) == variant.name.startswith("procrustes")
    assert step.seconds(batch) > 0
    changed = zip(before, step.distiller.student.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in changed)
    if norm is not None:  # two steps: the statistics of the second are those of both, or frozen
        assert int(norm.seen) == (1 if variant.name.endswith("frozen") else 2)


def test_without_running_teachers_the_targets_are_the_batch_s(models):
    step = TimedStep(PLAIN, SIZES["tiny"], models, live=False)
    assert sum(p.numel() for p in step.distiller.teachers.parameters()) == 0
    targets = step.batch(waves(), LENGTHS).cached_targets
    assert {name: tuple(v.shape) for name, v in targets.values.items()} == dict.fromkeys(
        ("hubert", "robust_hubert", "wavlm"), (2, 3, 24, 96)
    )
    assert targets.frames.tolist() == [24, 12]  # (samples - 400) / 320 + 1


def test_the_first_turn_is_not_counted_and_the_order_alternates():
    calls = []

    class Step:
        def __init__(self, name):
            self.name = name

        def batch(self, waves, lengths):
            return waves

        def seconds(self, batch):
            calls.append(self.name)
            return float(len(calls))

    steps = {name: Step(name) for name in "ab"}
    seconds = measure(steps, 2, lambda: (None, None))
    assert "".join(calls) == "baabba"
    assert {name: values.tolist() for name, values in seconds.items()} == {
        "a": [3.0, 6.0],
        "b": [4.0, 5.0],
    }


def test_ratios_are_those_of_the_same_turn():
    seconds = {PLAIN.name: np.array([1.0, 2.0, 4.0]), "b": np.array([1.5, 4.0, 4.0])}
    lines = table(seconds).splitlines()
    assert lines[2] == "| plain: average | 2.000 | 1.00 | 1.00–1.00 |"
    assert lines[3] == "| b | 4.000 | 1.50 | 1.25–1.75 |"  # of 1.5, 2 and 1
