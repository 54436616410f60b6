"""Posterior selection and soft-label loss: slow references, values by hand, invariances."""

import math

import pytest
import torch

from s3prl_ekd.essence.selection import PosteriorSelection, select_posteriors, soft_label_loss


def random_posteriors(batch=2, frames=5, classes=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(batch, frames, classes, generator=generator)).softmax(-1)


def slow_select(posteriors, top_k, mass, confidence):
    """The same rules on lists: ([batch][frame][class], [batch][frame])."""
    targets, keep = [], []
    for utterance in posteriors.tolist():
        targets.append([])
        keep.append([])
        for frame in utterance:
            ranked = sorted(range(len(frame)), key=lambda c: (-frame[c], c))
            classes, total = set(), 0.0
            for rank, c in enumerate(ranked):
                if top_k is not None and rank >= top_k:
                    break
                if mass is not None and mass < 1 and total >= mass:
                    break
                classes.add(c)
                total += frame[c]
            targets[-1].append([p / total if c in classes else 0.0 for c, p in enumerate(frame)])
            keep[-1].append(confidence is None or max(frame) >= confidence)
    return targets, keep


RULES = [
    (None, None, None),
    (1, None, None),
    (3, None, None),
    (None, 0.5, None),
    (None, 0.95, None),
    (None, None, 0.6),
    (3, 0.8, 0.4),
]


@pytest.mark.parametrize("top_k, mass, confidence", RULES)
def test_selection_equals_a_slow_reference(top_k, mass, confidence):
    posteriors = random_posteriors()
    result = select_posteriors(posteriors, PosteriorSelection(top_k, mass, confidence))
    targets, keep = slow_select(posteriors, top_k, mass, confidence)
    torch.testing.assert_close(result.posteriors, torch.tensor(targets))
    assert result.keep.tolist() == keep
    torch.testing.assert_close(result.posteriors.sum(-1), torch.ones(2, 5))


def test_selection_by_hand():
    frame = torch.tensor([[[0.5, 0.125, 0.25, 0.125]]])
    two = select_posteriors(frame, PosteriorSelection(top_k=2))
    assert two.posteriors.tolist() == [[[pytest.approx(2 / 3), 0, pytest.approx(1 / 3), 0]]]
    assert two.mass.tolist() == [[0.75]]
    # two classes reach exactly 0.75; of the two equal classes the first is added third
    assert select_posteriors(frame, PosteriorSelection(mass=0.75)).posteriors.count_nonzero() == 2
    three = select_posteriors(frame, PosteriorSelection(mass=0.76)).posteriors
    assert [value > 0 for value in three.flatten().tolist()] == [True, True, True, False]
    assert select_posteriors(frame, PosteriorSelection(confidence=0.5)).keep.item() is True
    assert select_posteriors(frame, PosteriorSelection(confidence=0.51)).keep.item() is False


@pytest.mark.parametrize(
    "selection",
    [PosteriorSelection(top_k=7), PosteriorSelection(top_k=99), PosteriorSelection(mass=1)],
)
def test_keeping_all_classes_changes_nothing(selection):
    posteriors = random_posteriors()
    torch.testing.assert_close(select_posteriors(posteriors, selection).posteriors, posteriors)


def test_the_order_of_classes_does_not_matter():
    posteriors, order = random_posteriors(), torch.tensor([3, 0, 6, 1, 5, 2, 4])
    rules = PosteriorSelection(top_k=4, mass=0.9)
    permuted = select_posteriors(posteriors[..., order], rules).posteriors
    torch.testing.assert_close(
        permuted, select_posteriors(posteriors, rules).posteriors[..., order]
    )


@pytest.mark.parametrize(
    "rule", [{"top_k": 0}, {"mass": 0.0}, {"mass": 1.1}, {"mass": math.nan}, {"confidence": -0.1}]
)
def test_values_out_of_range(rule):
    with pytest.raises(ValueError, match=next(iter(rule))):
        PosteriorSelection(**rule)


def test_the_text_of_a_selection():
    assert str(PosteriorSelection()) == "full posteriors"
    assert str(PosteriorSelection(top_k=4, confidence=0.5)) == "top_k 4, confidence 0.5"


# The loss


def slow_loss(log_probs, targets, keep):
    total, count = 0.0, 0
    for b, utterance in enumerate(log_probs.tolist()):
        for t, frame in enumerate(utterance):
            if keep[b][t]:
                pairs = zip(targets[b, t].tolist(), frame, strict=True)
                total -= sum(p * q for p, q in pairs)
                count += 1
    return total / max(count, 1)


def test_the_loss_equals_a_slow_reference():
    log_probs, targets = random_posteriors(seed=1).log(), random_posteriors(seed=2)
    keep = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 0, 0]])
    loss = soft_label_loss(log_probs, targets, keep).item()
    assert loss == pytest.approx(slow_loss(log_probs, targets, keep), rel=1e-5)


def test_the_loss_by_hand():
    log_probs = torch.tensor([[[0.5, 0.25, 0.25]]]).log()
    targets = torch.tensor([[[0.5, 0.5, 0.0]]])
    # 0.5 ln 2 + 0.5 ln 4
    loss = soft_label_loss(log_probs, targets, torch.ones(1, 1))
    assert loss.item() == pytest.approx(1.5 * math.log(2))


def test_the_loss_is_the_kl_divergence_plus_the_entropy_of_the_targets():
    logits = random_posteriors(seed=1).log().requires_grad_()
    targets = random_posteriors(seed=2)
    keep = torch.ones(2, 5)
    loss = soft_label_loss(logits.log_softmax(-1), targets, keep)
    (gradient,) = torch.autograd.grad(loss, logits)
    divergence = torch.nn.functional.kl_div(
        logits.log_softmax(-1).flatten(0, 1), targets.flatten(0, 1), reduction="batchmean"
    )
    (expected,) = torch.autograd.grad(divergence, logits)
    torch.testing.assert_close(gradient, expected)
    # the textbook gradient: (student - target) / frames
    torch.testing.assert_close(gradient, (logits.softmax(-1) - targets) / 10)
    entropy = -(targets * targets.log()).sum(-1).mean()
    torch.testing.assert_close(loss, divergence + entropy)


def test_without_kept_frames_loss_and_gradients_are_zero():
    logits = torch.randn(2, 3, 4, requires_grad=True)
    selected = select_posteriors(torch.full((2, 3, 4), 0.25), PosteriorSelection(confidence=0.9))
    loss = soft_label_loss(logits.log_softmax(-1), selected.posteriors, selected.keep)
    loss.backward()
    assert loss.item() == 0 and logits.grad.count_nonzero() == 0


def test_dropped_classes_and_frames_may_have_any_values():
    log_probs = torch.tensor([[[-0.1, -math.inf], [math.nan, math.nan]]], requires_grad=True)
    targets = torch.tensor([[[1.0, 0.0], [0.5, 0.5]]])
    loss = soft_label_loss(log_probs, targets, torch.tensor([[1, 0]]))
    loss.backward()
    assert loss.item() == pytest.approx(0.1)
    assert log_probs.grad.tolist() == [[[-1, 0], [0, 0]]]


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4)])
def test_empty_input(shape):
    selected = select_posteriors(
        torch.zeros(shape), PosteriorSelection(top_k=2, mass=0.5, confidence=0.1)
    )
    assert selected.posteriors.shape == shape
    loss = soft_label_loss(torch.zeros(shape), selected.posteriors, selected.keep)
    assert loss.item() == 0
