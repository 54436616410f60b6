"""Which parameters of an upstream its hidden states depend on.

SUPERB counts every parameter of the module, whether it is used or not; an unused one (a head whose
output nobody reads, an embedding of pretraining) only makes a submission look larger.

This module needs torch and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

States = Sequence[Tensor]  # hidden states, [batch, frame, dim] each
_SECONDS = 0.5
_RATE = 16_000


def unused_parameters(module: nn.Module, states_of: Callable[[list[Tensor]], States]) -> list[str]:
    """Names of the parameters that no hidden state depends on, in eval mode.

    A parameter is used if a backward from a random weighted sum of all hidden states gives it a
    gradient that is not zero throughout. (The plain sum would not do: that of a layer
    normalisation's output is constant.) One without is put to the test: it is used if other values
    in its place change any hidden state; so what runs under ``torch.no_grad`` counts as used.

    Args:
        module: on any device; it is left as it was.
        states_of: runs it on unpadded waveforms ``[sample]``.
    """
    parameters = dict(module.named_parameters())
    device = next((parameter.device for parameter in parameters.values()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    lengths = (int(_SECONDS * _RATE), int(0.8 * _SECONDS * _RATE))
    waves = [0.1 * torch.randn(n, generator=generator).to(device) for n in lengths]
    training = module.training
    module.eval()
    try:
        suspects = _without_gradient(parameters, states_of, waves, generator)
        return _without_effect(suspects, states_of, waves, generator)
    finally:
        module.train(training)


def _without_gradient(parameters, states_of, waves, generator) -> dict[str, nn.Parameter]:
    flags = {name: parameter.requires_grad for name, parameter in parameters.items()}
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        with torch.enable_grad():
            states = [state for state in states_of(waves) if state.requires_grad]
            goal = sum((state.float() * _noise(state, generator)).sum() for state in states)
        if not states:
            return parameters
        gradients = torch.autograd.grad(goal, list(parameters.values()), allow_unused=True)
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(flags[name])
    return {
        name: parameter
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True)
        if gradient is None or not gradient.any()
    }


@torch.no_grad()
def _without_effect(suspects, states_of, waves, generator) -> list[str]:
    before = [state.clone() for state in states_of(waves)]

    def changes(chosen) -> bool:
        kept = [parameter.clone() for parameter in chosen]
        for parameter in chosen:
            parameter.add_(_noise(parameter, generator))
        after = states_of(waves)
        for parameter, value in zip(chosen, kept, strict=True):
            parameter.copy_(value)
        return any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))

    if not suspects or not changes(list(suspects.values())):  # all at once: most often the case
        return list(suspects)
    return [name for name, parameter in suspects.items() if not changes([parameter])]


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like)
