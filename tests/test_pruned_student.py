"""The forward of a student with gates: padding, gradients, precision, random draws."""

import pytest
import torch

from s3prl_ekd.distill.pruning.gates import Gate

from .gated_students import ALL_UNITS, LAYOUTS, gated_settings, gated_student, noise


def outputs(student, *lengths, seed=5):
    waves, counts = noise(*lengths, seed=seed)
    return student(waves, counts)


@pytest.mark.parametrize("layout", [n for n, s in LAYOUTS.items() if "extractor_mode" in s])
def test_padding_does_not_change_valid_frames(layout):
    """With layer norms in the extractor; group norm is taken over the padding, too."""
    student = gated_student(gated_settings(ALL_UNITS, **LAYOUTS[layout]))
    waves, lengths = noise(9_000, 6_500)
    with torch.no_grad():
        batch = student(waves, lengths)
        for i, length in enumerate(lengths.tolist()):
            single = student(waves[i : i + 1, :length], lengths[i : i + 1])
            frames = single.last.shape[1]
            assert batch.mask[i].sum() == frames
            for a, b in zip(batch.hidden_states, single.hidden_states, strict=True):
                torch.testing.assert_close(a[i, :frames], b[0], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_utterances_do_not_change_an_utterance(layout):
    student = gated_student(gated_settings(ALL_UNITS, **LAYOUTS[layout]))
    waves, lengths = noise(9_000, 6_500)
    changed = waves.clone()
    changed[0] = torch.randn(9_000)
    with torch.no_grad():
        a, b = student(waves, lengths), student(changed, lengths)
    for x, y in zip(a.hidden_states, b.hidden_states, strict=True):
        torch.testing.assert_close(x[1], y[1], rtol=0, atol=1e-6)
        assert not torch.allclose(x[0], y[0], atol=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_reach_every_gate_and_weight(layout):
    student = gated_student(gated_settings(ALL_UNITS, **LAYOUTS[layout])).train()
    for _, _, gate in student.backbone.gates():
        gate.log_alpha.data.fill_(0.5)
    total = {name: torch.zeros(()) for name, _ in student.named_parameters()}
    torch.manual_seed(0)
    for _ in range(3):  # a gate that is drawn as 0 or 1 has no gradient
        student.zero_grad()
        outputs(student, 4_000).last.square().mean().backward()
        for name, parameter in student.named_parameters():
            if parameter.grad is not None:
                assert parameter.grad.isfinite().all()
                total[name] = total[name] + parameter.grad.abs().sum()
    # keys' biases cancel in the softmax; the scale of conv features is not trained
    untrained = {name for name in total if name.endswith(("k_proj.bias", "scale.weight"))}
    single = {
        n for n, m in student.named_modules() if isinstance(m, Gate) and len(m.log_alpha) == 1
    }
    without = {name for name, value in total.items() if value == 0}
    assert without - untrained <= {f"{name}.log_alpha" for name in single}


@pytest.mark.parametrize("unit", ALL_UNITS)
def test_the_gradient_of_a_gate_is_the_slope_of_the_loss(unit):
    """Against a difference of two losses with the same draws; some norms compute in float32."""
    student = gated_student(gated_settings((unit,), **LAYOUTS["wavlm"])).train().double()
    *_, (_, _, gate) = student.backbone.gates()
    waves, lengths = noise(3_000)

    def loss(shift):
        gate.log_alpha.data[:] = 0.2
        gate.log_alpha.data[chosen] += shift
        torch.manual_seed(2)
        return student(waves.double(), lengths).last.pow(3).mean()

    chosen = 0
    loss(0.0)
    chosen = int(((gate.values > 0) & (gate.values < 1)).nonzero()[0])  # others have no gradient
    loss(0.0).backward()
    slope = (loss(3e-3) - loss(-3e-3)).item() / 6e-3
    assert gate.log_alpha.grad[chosen].item() == pytest.approx(slope, rel=2e-3, abs=1e-5)
    assert abs(slope) > 1e-3


@pytest.mark.parametrize("layout", ["hubert", "wavlm_large"])
def test_recomputing_activations_gives_the_same_gradients(layout):
    settings = gated_settings(ALL_UNITS, **LAYOUTS[layout], dropout=0.1, attention_dropout=0.1)
    gradients = []
    for recompute in (False, True):
        student = gated_student(settings).train()
        student.activation_checkpointing = recompute
        torch.manual_seed(2)
        outputs(student, 4_000, 3_000).last.square().mean().backward()
        gradients.append([p.grad for p in student.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bfloat16_is_close_to_float32(layout):
    student = gated_student(gated_settings(ALL_UNITS, **LAYOUTS[layout]))
    for _, _, gate in student.backbone.gates():
        gate.log_alpha.data += 4  # otherwise little is left of the signal
    with torch.no_grad():
        exact = outputs(student, 4_000, 3_000)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = outputs(student, 4_000, 3_000)
    for a, b in zip(exact.hidden_states, rounded.hidden_states, strict=True):
        error = ((a - b.float()) * exact.mask[..., None]).norm() / (
            a * exact.mask[..., None]
        ).norm()
        assert error < 0.03


def test_equal_random_states_give_equal_draws():
    student = gated_student(gated_settings(ALL_UNITS)).train()
    results = []
    for seed in (4, 4, 5):
        torch.manual_seed(seed)
        results.append(outputs(student, 4_000).last)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
