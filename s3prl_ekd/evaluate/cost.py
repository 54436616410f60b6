"""What an upstream costs, counted as SUPERB's board counts: parameters and MACs.

MACs are those of matrix products and convolutions, half of what torch's flop counter gives, summed
over one forward for each of the 32 official utterances of LibriSpeech test-clean, by their
published lengths. Normalisation, activations and softmax are not in them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

# Samples at 16 kHz, sorted: every 82nd of the 2,620 utterances.
LENGTHS: Mapping[str, Sequence[int]] = {
    "short": (20560, 34560, 38480, 42560, 45600, 48720, 52000, 55120),
    "medium": (59120, 62720, 66400, 71200, 75200, 78640, 82800, 87520),
    "long": (92720, 98560, 104400, 111120, 118480, 125040, 132720, 142640),
    "longer": (154000, 166720, 180880, 197920, 217920, 239280, 268160, 326000),
}
PROFILER = "torch.utils.flop_counter, MACs = FLOPs / 2"


def count_parameters(module: torch.nn.Module) -> tuple[int, int]:
    """All parameters, and those of them that no hidden state depends on (SUPERB counts both).

    A parameter is unused if the sum of all hidden states of 1 s of noise has no gradient in it.
    """
    parameters = list(module.parameters())
    total = sum(parameter.numel() for parameter in parameters)
    if not total:
        return 0, 0
    before = [parameter.requires_grad for parameter in parameters]
    device = parameters[0].device
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        wave = torch.randn(16000, generator=torch.Generator().manual_seed(0)).to(device)
        with torch.enable_grad():
            outputs = module([wave])["hidden_states"]
            states = [outputs] if isinstance(outputs, torch.Tensor) else outputs
            goal = sum(state.float().sum() for state in states)
        gradients = torch.autograd.grad(goal, parameters, allow_unused=True)
    finally:
        for parameter, flag in zip(parameters, before, strict=True):
            parameter.requires_grad_(flag)
    return total, sum(
        parameter.numel()
        for parameter, gradient in zip(parameters, gradients, strict=True)
        if gradient is None
    )


@torch.no_grad()
def count_macs(module: torch.nn.Module, samples: int) -> int:
    """Multiply-accumulates of one forward on one waveform of ``samples``."""
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    counter = FlopCounterMode(display=False)
    # the plain kernel: its products are counted on every device
    with counter, sdpa_kernel(SDPBackend.MATH):
        module([torch.zeros(samples, device=device).uniform_(-1, 1)])
    return counter.get_total_flops() // 2


def measure_cost(
    module: torch.nn.Module, lengths: Mapping[str, Sequence[int]] = LENGTHS
) -> dict[str, Any]:
    """``parameters``, ``unused``, ``macs``, ``macs_buckets``, ``utterances``, ``profiler``."""
    module.eval()
    total, unused = count_parameters(module)
    buckets = dict.fromkeys(lengths, 0)
    work = [(bucket, samples) for bucket, many in lengths.items() for samples in many]
    for bucket, samples in tqdm(work, desc="MACs", unit=" utterances", leave=False):
        buckets[bucket] += count_macs(module, samples)
    return {
        "parameters": total,
        "unused": unused,
        "macs": sum(buckets.values()),
        "macs_buckets": buckets,
        "utterances": len(work),
        "profiler": PROFILER,
    }
