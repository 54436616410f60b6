"""What an upstream costs, counted as SUPERB's board counts: parameters and MACs.

MACs are summed over one forward for each of 32 utterances of LibriSpeech test-clean; see
:mod:`.macs` for what counts. They depend on the lengths alone, so noise of the published lengths
gives the same figures as the corpus.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import DataError
from .macs import count_macs
from .parameters import unused_parameters

# Samples at 16 kHz: all 2,620 utterances sorted by length, of them every 82nd.
LENGTHS: Mapping[str, Sequence[int]] = {
    "short": (20560, 34560, 38480, 42560, 45600, 48720, 52000, 55120),
    "medium": (59120, 62720, 66400, 71200, 75200, 78640, 82800, 87520),
    "long": (92720, 98560, 104400, 111120, 118480, 125040, 132720, 142640),
    "longer": (154000, 166720, 180880, 197920, 217920, 239280, 268160, 326000),
}
PROFILER = "s3prl_ekd: products by torch.utils.flop_counter, attention as SUPERB's DeepSpeed fork"
SPLIT, UTTERANCES, EVERY = "test-clean", 2620, 82


def measure_cost(
    module: nn.Module,
    lengths: Mapping[str, Sequence[int]] = LENGTHS,
    selection: str | Sequence[str] = "hidden_states",
    progress: Callable = tqdm,
) -> dict[str, Any]:
    """The contents of ``cost.json``.

    Args:
        module: an upstream, ``list of [sample] -> {"hidden_states": [...]}``; put in eval mode.
        lengths: of the utterances in samples, by bucket.
        selection: the key or keys whose hidden states count as outputs.
        progress: wraps what is iterated over, as ``tqdm`` does.

    Returns:
        ``parameters``; ``unused``, those of them that no hidden state depends on; ``macs`` and
        ``macs_buckets``, MACs as the board counts them; ``macs_products``, those of matrix products
        and convolutions alone; ``utterances``; ``profiler``.
    """
    module.eval()
    keys = [selection] if isinstance(selection, str) else list(selection)
    parameters = dict(module.named_parameters())
    unused = unused_parameters(module, lambda waves: hidden_states(module(waves), keys))
    device = next((parameter.device for parameter in parameters.values()), torch.device("cpu"))
    buckets, products = dict.fromkeys(lengths, 0.0), 0
    work = [(bucket, samples) for bucket, many in lengths.items() for samples in many]
    for bucket, samples in progress(work, desc="MACs", unit=" utterances", leave=False):
        with count_macs() as macs:
            module([torch.zeros(samples, device=device).uniform_(-1, 1)])
        buckets[bucket] += macs.total
        products += macs.products
    return {
        "parameters": sum(parameter.numel() for parameter in parameters.values()),
        "unused": sum(parameters[name].numel() for name in unused),
        "macs": sum(buckets.values()),
        "macs_buckets": buckets,
        "macs_products": float(products),
        "utterances": len(work),
        "profiler": PROFILER,
    }


def hidden_states(result: Mapping[str, Any], keys: Sequence[str]) -> list[Tensor]:
    """What ``keys`` select from an upstream's result; as SUPERB, ``hidden_states`` for a missing
    one. A single tensor (a baseline's) stands for a list of one."""
    states = []
    for key in keys:
        found = result.get(key, result["hidden_states"])
        states += [found] if isinstance(found, Tensor) else list(found)
    return states


def librispeech_lengths(folder: Path) -> dict[str, list[int]]:
    """The lengths of the 32 utterances, read from the headers of LibriSpeech test-clean.

    Args:
        folder: ``test-clean``, or the folder that has it.

    Raises:
        DataError: it is not there, not whole, or a file of it cannot be read.
    """
    from ..data.audio_files import find_audio, read_headers

    folder = folder / SPLIT if (folder / SPLIT).is_dir() else folder
    names = find_audio(folder)
    if len(names) != UTTERANCES:
        raise DataError(
            f"{folder} has {len(names)} audio files; LibriSpeech's {SPLIT} has {UTTERANCES}"
        )
    headers = read_headers(folder, names)
    for header in headers:
        if isinstance(header, DataError):
            raise header
    chosen = sorted(header.samples for header in headers)[::EVERY]
    size = len(chosen) // len(LENGTHS)
    return {bucket: chosen[i * size : (i + 1) * size] for i, bucket in enumerate(LENGTHS)}
