"""Linear CKA and frame cosine: slow references, values by hand, invariances."""

import math

import pytest
import torch

from s3prl_ekd.analysis.layers import cka_matrix, cosine_matrix


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hsic(k, m):
    """trace(K H M H), in loops over the n x n kernels."""
    n = len(k)

    def centred(kernel):
        rows = [sum(kernel[i]) / n for i in range(n)]
        columns = [sum(kernel[i][j] for i in range(n)) / n for j in range(n)]
        total = sum(rows) / n
        return [[kernel[i][j] - rows[i] - columns[j] + total for j in range(n)] for i in range(n)]

    a, b = centred(k), centred(m)
    return sum(a[i][j] * b[j][i] for i in range(n) for j in range(n))


def dot(a, b):
    return sum(p * q for p, q in zip(a, b, strict=True))


def slow_cka(x, y):
    kernels = []
    for frames in (x.tolist(), y.tolist()):
        kernels.append([[dot(a, b) for b in frames] for a in frames])
    k, m = kernels
    return hsic(k, m) / math.sqrt(hsic(k, k) * hsic(m, m))


def cka(x, y):
    return cka_matrix([x, y])[0, 1].item()


def test_cka_equals_the_kernel_definition():
    x = random(17, 5) + 3
    y = x[:, :3] @ random(3, 4, seed=1) + 0.5 * random(17, 4, seed=2)
    assert 0.3 < cka(x, y) < 1
    assert cka(x, y) == pytest.approx(slow_cka(x, y), abs=1e-6)


def test_cka_by_hand():
    """In one dimension it is the squared correlation."""
    x = torch.tensor([[1.0], [2.0], [3.0]])
    y = torch.tensor([[1.0], [3.0], [2.0]])
    assert cka(x, y) == pytest.approx(0.25)


def test_cka_is_invariant_to_rotation_scale_shift_and_order():
    x, y = random(40, 6), random(40, 6, seed=1)
    rotation, _ = torch.linalg.qr(random(6, 6, seed=2))
    assert cka(x, x) == pytest.approx(1)
    assert cka(x, -3 * x @ rotation + 5) == pytest.approx(1)
    assert cka(x, y) == pytest.approx(cka(0.1 * y @ rotation - 2, x))
    stretched = x * torch.tensor([10.0, 1, 1, 1, 1, 1], dtype=torch.float64)
    assert cka(x, stretched) < 0.9  # not invariant to other linear maps
    matrix = cka_matrix([x, x @ rotation, y])
    assert torch.allclose(matrix, matrix.T)
    torch.testing.assert_close(matrix.diagonal(), torch.ones(3).double(), atol=1e-6, rtol=0)
    assert matrix[0, 1].item() == pytest.approx(1, abs=1e-6)


def test_the_cka_of_a_constant_layer_is_nan():
    constant = torch.full((10, 4), 1e3 / 3)
    assert cka_matrix([constant, random(10, 4)]).isnan().tolist() == [[True, True], [True, False]]


def test_frame_cosine():
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    y = torch.tensor([[3.0, 4.0], [0.0, -1.0]])
    matrix = cosine_matrix([x, y, 7 * x])
    assert matrix[1, 0].item() == matrix[0, 1].item() == pytest.approx((0.6 - 1) / 2)
    assert matrix[1, 1].item() == pytest.approx(1) == matrix[0, 2].item()
