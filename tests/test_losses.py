"""The loss against worked-out constants and a twin in plain loops."""

import math

import pytest
import torch

from s3prl_ekd.distill.losses import distillation_loss, distillation_terms
from s3prl_ekd.errors import TeacherError


def slow_terms(prediction, target, mask):
    """L1 and -log sigmoid cos for each layer, in loops over plain numbers."""
    batch, layers, frames, dim = prediction.shape
    result = []
    for layer in range(layers):
        l1 = cosine = 0.0
        count = 0
        for b in range(batch):
            for t in range(frames):
                if mask is not None and not mask[b][t]:
                    continue
                p, q = prediction[b, layer, t].tolist(), target[b, layer, t].tolist()
                l1 += sum(abs(x - y) for x, y in zip(p, q, strict=True)) / dim
                norms = math.sqrt(sum(x * x for x in p)) * math.sqrt(sum(y * y for y in q))
                cos = sum(x * y for x, y in zip(p, q, strict=True)) / norms
                cosine += math.log(1 + math.exp(-cos))
                count += 1
        result.append((l1 / count, cosine / count))
    return result


@pytest.mark.parametrize("masked", [False, True])
def test_equals_a_slow_twin(masked):
    torch.manual_seed(0)
    prediction, target = torch.randn(3, 2, 5, 4), torch.randn(3, 2, 5, 4)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]) if masked else None
    terms = distillation_terms(prediction, target, mask)
    for layer, (l1, cosine) in enumerate(slow_terms(prediction, target, mask)):
        assert terms.l1[layer].item() == pytest.approx(l1, abs=1e-6)
        assert terms.cosine[layer].item() == pytest.approx(cosine, abs=1e-6)


def test_equals_worked_out_constants():
    # One layer, two frames of two dimensions: errors 1 and 2 in one frame, none in the other.
    prediction = torch.tensor([[[[2.0, 0.0], [0.0, 3.0]]]])
    target = torch.tensor([[[[1.0, 2.0], [0.0, 3.0]]]])
    terms = distillation_terms(prediction, target, None)
    assert terms.l1.tolist() == pytest.approx([(1.5 + 0.0) / 2])
    # cos: 2 / (2 * sqrt 5) = 0.44721 and 1; -log sigmoid: 0.49433 and 0.31326
    assert terms.cosine.tolist() == pytest.approx([(0.4943348 + 0.3132617) / 2], abs=1e-6)
    first = distillation_terms(prediction, target, torch.tensor([[1.0, 0.0]]))
    assert first.l1.tolist() == pytest.approx([1.5])
    assert first.cosine.tolist() == pytest.approx([0.4943348], abs=1e-6)


def test_masked_frames_do_not_count():
    torch.manual_seed(0)
    prediction, target = torch.randn(2, 2, 6, 4), torch.randn(2, 2, 6, 4)
    mask = torch.ones(2, 6)
    mask[1, 3:] = 0
    terms = distillation_terms(prediction, target, mask)
    prediction[1, :, 3:] = 1e6
    again = distillation_terms(prediction, target, mask)
    assert torch.equal(terms.l1, again.l1) and torch.equal(terms.cosine, again.cosine)


def test_all_masked_is_zero_and_has_a_gradient():
    prediction = torch.randn(1, 1, 3, 4, requires_grad=True)
    loss, _ = distillation_loss(
        {"x": prediction}, {"x": torch.randn(1, 1, 3, 4)}, torch.zeros(1, 3)
    )
    loss.backward()
    assert loss.item() == 0 and torch.equal(prediction.grad, torch.zeros_like(prediction))


def test_sets_weigh_the_same():
    torch.manual_seed(0)
    p = {name: torch.randn(2, 3, 5, 4) for name in "ab"}
    t = {name: torch.randn(2, 3, 5, 4) for name in "ab"}
    both, parts = distillation_loss(p, t, None, 0.5)
    alone = [distillation_loss({n: p[n]}, {n: t[n]}, None, 0.5)[0] for n in "ab"]
    assert both.item() == pytest.approx(sum(a.item() for a in alone) / 2, abs=1e-6)
    assert parts["loss/a"].item() == pytest.approx(alone[0].item(), abs=1e-6)
    assert both.item() == pytest.approx((parts["l1"] + 0.5 * parts["cosine"]).item(), abs=1e-6)


def test_shapes_that_differ_are_refused():
    with pytest.raises(TeacherError, match=r"\[1, 1, 3, 4\] do not match .*\[1, 1, 3, 8\]"):
        distillation_terms(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 8), None)
