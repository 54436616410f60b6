"""The loss against constants worked out by hand and a slow version in plain loops."""

import math

import pytest
import torch

from s3prl_ekd.distill.losses import LossWeights, distillation_loss, distillation_terms
from s3prl_ekd.distill.settings import LossSettings
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
def test_equals_a_slow_version(masked):
    torch.manual_seed(0)
    prediction, target = torch.randn(3, 2, 5, 4), torch.randn(3, 2, 5, 4)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]) if masked else None
    terms = distillation_terms(prediction, target, mask)
    for layer, (l1, cosine) in enumerate(slow_terms(prediction, target, mask)):
        assert terms.reconstruction[layer].item() == pytest.approx(l1, abs=1e-6)
        assert terms.cosine[layer].item() == pytest.approx(cosine, abs=1e-6)


def test_equals_worked_out_constants():
    # One layer, two frames of two dimensions: errors 1 and 2 in one frame, none in the other.
    prediction = torch.tensor([[[[2.0, 0.0], [0.0, 3.0]]]])
    target = torch.tensor([[[[1.0, 2.0], [0.0, 3.0]]]])
    terms = distillation_terms(prediction, target, None)
    assert terms.reconstruction.tolist() == pytest.approx([(1.5 + 0.0) / 2])
    # cos: 2 / (2 * sqrt 5) = 0.44721 and 1; -log sigmoid: 0.49433 and 0.31326
    assert terms.cosine.tolist() == pytest.approx([(0.4943348 + 0.3132617) / 2], abs=1e-6)
    first = distillation_terms(prediction, target, torch.tensor([[1.0, 0.0]]))
    assert first.reconstruction.tolist() == pytest.approx([1.5])
    assert first.cosine.tolist() == pytest.approx([0.4943348], abs=1e-6)


def test_masked_frames_do_not_count():
    torch.manual_seed(0)
    prediction, target = torch.randn(2, 2, 6, 4), torch.randn(2, 2, 6, 4)
    mask = torch.ones(2, 6)
    mask[1, 3:] = 0
    terms = distillation_terms(prediction, target, mask)
    prediction[1, :, 3:] = 1e6
    again = distillation_terms(prediction, target, mask)
    assert torch.equal(terms.reconstruction, again.reconstruction) and torch.equal(
        terms.cosine, again.cosine
    )


def test_all_masked_is_zero_and_has_a_gradient():
    prediction = torch.randn(1, 1, 3, 4, requires_grad=True)
    loss, _ = distillation_loss(
        {"x": prediction}, {"x": torch.randn(1, 1, 3, 4)}, LossWeights({"x": torch.zeros(1, 3)})
    )
    loss.backward()
    assert loss.item() == 0 and torch.equal(prediction.grad, torch.zeros_like(prediction))


def sets(*names):
    torch.manual_seed(0)
    predictions = {name: torch.randn(2, 3, 5, 4) for name in names}
    targets = {name: torch.randn(2, 3, 5, 4) for name in names}
    return predictions, targets, dict.fromkeys(names)


def test_target_sets_have_equal_weights():
    p, t, masks = sets("a", "b")
    half = LossSettings(cosine_weight=0.5)
    both, parts = distillation_loss(p, t, LossWeights(masks), half)
    alone = [distillation_loss({n: p[n]}, {n: t[n]}, LossWeights(masks), half)[0] for n in "ab"]
    assert both.item() == pytest.approx(sum(a.item() for a in alone) / 2, abs=1e-6)
    assert parts["loss/a"].item() == pytest.approx(alone[0].item(), abs=1e-6)
    assert both.item() == pytest.approx((parts["l1"] + 0.5 * parts["cosine"]).item(), abs=1e-6)


def test_target_sets_have_the_given_weights():
    p, t, masks = sets("a", "b")
    both, _ = distillation_loss(p, t, LossWeights(masks, {"a": 3.0, "b": 1.0}))
    alone = [distillation_loss({n: p[n]}, {n: t[n]}, LossWeights(masks))[0].item() for n in "ab"]
    assert both.item() == pytest.approx((3 * alone[0] + alone[1]) / 4, abs=1e-6)


@pytest.mark.parametrize("reconstruction", ["l1", "l2", "smooth_l1"])
@pytest.mark.parametrize("cosine", ["log_sigmoid", "raw"])
def test_every_kind_equals_a_slow_version(reconstruction, cosine):
    one = {
        "l1": abs,
        "l2": lambda e: e * e,
        "smooth_l1": lambda e: 0.5 * e * e if abs(e) < 1 else abs(e) - 0.5,
    }[reconstruction]
    two = {"log_sigmoid": lambda c: math.log(1 + math.exp(-c)), "raw": lambda c: 1 - c}[cosine]
    torch.manual_seed(1)
    p, t = 2 * torch.randn(2, 1, 3, 4), torch.randn(2, 1, 3, 4)
    settings = LossSettings(reconstruction=reconstruction, cosine=cosine)
    terms = distillation_terms(p, t, None, settings)
    errors, cosines = [], []
    for x, y in zip(p.reshape(-1, 4).tolist(), t.reshape(-1, 4).tolist(), strict=True):
        errors += [one(a - b) for a, b in zip(x, y, strict=True)]
        norm = math.sqrt(sum(a * a for a in x) * sum(b * b for b in y))
        cosines.append(two(sum(a * b for a, b in zip(x, y, strict=True)) / norm))
    assert terms.reconstruction.item() == pytest.approx(sum(errors) / len(errors), abs=1e-5)
    assert terms.cosine.item() == pytest.approx(sum(cosines) / len(cosines), abs=1e-5)


def test_worked_out_constants_of_the_other_kinds():
    p, t = torch.tensor([[[[3.0, 0.5]]]]), torch.tensor([[[[0.0, 0.5]]]])
    for kind, value in (("l2", 4.5), ("smooth_l1", 1.25), ("l1", 1.5)):
        terms = distillation_terms(p, t, None, LossSettings(reconstruction=kind))
        assert terms.reconstruction.tolist() == pytest.approx([value])
    # cos = 0.25 / (0.5 * sqrt 9.25) = 0.164399
    terms = distillation_terms(p, t, None, LossSettings(cosine="raw"))
    assert terms.cosine.tolist() == pytest.approx([1 - 0.164399], abs=1e-5)


def test_a_dimension_of_weight_zero_does_not_count():
    p, t, _ = sets("a")
    dims = torch.tensor([1.0, 0.0, 1.0, 0.0])
    kept = distillation_terms(p["a"], t["a"], None, dims=dims)
    less = distillation_terms(p["a"][..., ::2], t["a"][..., ::2], None)
    assert torch.allclose(kept.reconstruction, less.reconstruction, atol=1e-6)
    assert torch.allclose(kept.cosine, less.cosine, atol=1e-6)


def test_a_dimension_of_weight_two_counts_twice():
    p, t, _ = sets("a")
    heavy = distillation_terms(p["a"], t["a"], None, dims=torch.tensor([2.0, 1.0, 1.0, 1.0]))
    index = [0, 0, 1, 2, 3]
    twice = distillation_terms(p["a"][..., index], t["a"][..., index], None)
    assert torch.allclose(heavy.reconstruction, twice.reconstruction, atol=1e-6)
    assert torch.allclose(heavy.cosine, twice.cosine, atol=1e-6)


@pytest.mark.parametrize("cosine", ["log_sigmoid", "raw"])
def test_a_prediction_of_zero_gets_no_gradient_of_the_cosine(cosine):
    """As of padded frames; the other frames get the gradient that they had."""
    torch.manual_seed(0)
    prediction, target = torch.randn(2, 1, 4, 3), torch.randn(2, 1, 4, 3)
    prediction[1, :, 2:] = 0
    results = []
    for mask_padding in (True, False):
        settings = LossSettings(cosine=cosine, mask_padding=mask_padding)
        leaf = prediction.clone().requires_grad_()
        value = distillation_terms(leaf, target, None, settings).cosine.sum()
        value.backward()
        results.append((value.item(), leaf.grad))
    (first, before), (second, after) = results
    assert first == second and (after[1, :, 2:] == 0).all()
    assert torch.equal(before[0], after[0]) and torch.equal(before[1, :, :2], after[1, :, :2])


def test_different_shapes_are_an_error():
    with pytest.raises(TeacherError, match=r"\[1, 1, 3, 4\].*\[1, 1, 3, 8\]"):
        distillation_terms(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 8), None)
