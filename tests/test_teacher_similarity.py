"""The measures of tools/teacher_similarity.py on constructed frames."""

from __future__ import annotations

import pytest
import torch

from tools.teacher_similarity import compare

pytestmark = pytest.mark.slow


def test_a_rotated_teacher_shares_gram_matrices_but_no_basis():
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
    utterances = [torch.randn(60, 16, generator=generator) for _ in range(8)]
    cosine, grams, before, after = compare([(x, 3 * x @ rotation) for x in utterances])
    assert abs(cosine) < 0.3 and abs(before) < 0.3
    assert grams == pytest.approx(1, abs=1e-4) and after == pytest.approx(1, abs=1e-4)


def test_unrelated_teachers_share_nothing():
    """The rotation fits the frames that it is fitted on, but not others."""
    generator = torch.Generator().manual_seed(0)
    pairs = [(torch.randn(60, 16, generator=generator), torch.randn(60, 16)) for _ in range(8)]
    assert all(abs(value) < 0.2 for value in compare(pairs))
