"""What an upstream costs, counted as SUPERB's board counts: parameters and MACs.

MACs are summed over one forward for each of 32 utterances of LibriSpeech test-clean; see
:mod:`.macs` for what counts. They depend on the lengths alone, so noise of the published lengths
gives the same figures as the corpus. SUPERB counts every parameter of the module, whether its
hidden states depend on it or not; :func:`unused_parameters` names those that only make a submission
look larger.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import DataError, EkdError, SetupError, first_line
from .macs import count_macs

States = Sequence[Tensor]  # hidden states, [batch, frame, dim] each
_SECONDS = 0.5
_RATE = 16_000

# Samples at 16 kHz: all 2,620 utterances sorted by length, of them every 82nd.
LENGTHS: Mapping[str, Sequence[int]] = {
    "short": (20560, 34560, 38480, 42560, 45600, 48720, 52000, 55120),
    "medium": (59120, 62720, 66400, 71200, 75200, 78640, 82800, 87520),
    "long": (92720, 98560, 104400, 111120, 118480, 125040, 132720, 142640),
    "longer": (154000, 166720, 180880, 197920, 217920, 239280, 268160, 326000),
}
PROFILER = "s3prl_ekd: products by torch.utils.flop_counter, attention as SUPERB's DeepSpeed fork"
SPLIT, UTTERANCES, EVERY = "test-clean", 2620, 82


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


def _without_gradient(
    parameters: dict[str, nn.Parameter],
    states_of: Callable[[list[Tensor]], States],
    waves: list[Tensor],
    generator: torch.Generator,
) -> dict[str, nn.Parameter]:
    flags = {name: parameter.requires_grad for name, parameter in parameters.items()}
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        with torch.enable_grad():
            states = [state for state in states_of(waves) if state.requires_grad]
            if not states:
                return parameters
            first, *others = [(state.float() * _noise(state, generator)).sum() for state in states]
            goal = sum(others, first)
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
def _without_effect(
    suspects: dict[str, nn.Parameter],
    states_of: Callable[[list[Tensor]], States],
    waves: list[Tensor],
    generator: torch.Generator,
) -> list[str]:
    before = [state.clone() for state in states_of(waves)]

    def changes(chosen: list[nn.Parameter]) -> bool:
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


def build_upstream(hub_name: str, checkpoint: str | None) -> torch.nn.Module:
    """The upstream of that hub name, as s3prl's downstream Runner builds it, in eval mode.

    Raises:
        SetupError: there is no such name, or it cannot be built.
    """
    from .. import compat
    from ..files.torch_load import build_limit, restrict_torch
    from ..registration import register
    from ..teachers.checkpoint import check_upstream_file

    restrict_torch()
    compat.apply()
    register()
    from s3prl import hub

    if not hasattr(hub, hub_name):
        raise SetupError(f"{hub_name}: s3prl has no such upstream; see run_downstream.py -h")
    limit: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if checkpoint is not None and Path(checkpoint).exists() and not Path(checkpoint).is_dir():
        check_upstream_file(Path(checkpoint), hub_name)
        limit = build_limit(checkpoint)
    try:
        with limit:
            upstream = getattr(hub, hub_name)(ckpt=checkpoint, model_config=None, refresh=False)
    except EkdError:
        raise
    except Exception as error:  # whatever a foreign upstream raises is the answer
        what = hub_name if checkpoint is None else f"{hub_name} with {checkpoint}"
        raise SetupError(f"the upstream {what} cannot be built: {first_line(error)}") from None
    return upstream.eval()


def check_outputs(outputs: Any, selection: str, name: str) -> None:
    """What s3prl's Featurizer wants: a dict with a list of tensors ``[batch, frame, dim]``.

    A tuple of tensors is taken too, as some upstreams of s3prl give one; SUPERB's hidden set is
    stricter, see ``s3prl-ekd validate``.

    Raises:
        SetupError: it is something else.
    """
    if not isinstance(outputs, dict):
        raise SetupError(
            f"the upstream {name} returns a {type(outputs).__name__}; its forward must return a "
            'dict with "hidden_states", a list of tensors [batch, frame, dim]'
        )
    if selection not in outputs:
        known = ", ".join(map(str, outputs)) or "nothing"
        raise SetupError(f"the upstream {name} gives no {selection}; it gives: {known}")
    states = outputs[selection]
    if isinstance(states, torch.Tensor):
        states = [states]
    if not isinstance(states, (list, tuple)):
        raise SetupError(
            f"the upstream {name} gives {selection} as a {type(states).__name__}; it must be a "
            "list of tensors [batch, frame, dim]"
        )
    shapes = {tuple(state.shape) if isinstance(state, torch.Tensor) else None for state in states}
    shape, *others = shapes or {None}
    if others or shape is None or len(shape) != 3:
        raise SetupError(
            f"the upstream {name} gives {selection} of shapes {sorted(map(str, shapes))}; all must "
            "be tensors [batch, frame, dim] of one shape"
        )
    if not all(torch.isfinite(state).all() for state in states):
        raise SetupError(f"the upstream {name} gives values that are not finite in {selection}")


def probe(upstream: torch.nn.Module, selection: str, name: str) -> None:
    """One forward on two waveforms of 1 and 0.6 s. Raises SetupError; see :func:`check_outputs`."""
    generator = torch.Generator().manual_seed(0)
    waves = [0.1 * torch.randn(n, generator=generator) for n in (16000, 9600)]
    with torch.no_grad():
        check_outputs(upstream(waves), selection, name)


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
    samples = []
    for header in read_headers(folder, names):
        if isinstance(header, DataError):
            raise header
        samples.append(header.samples)
    chosen = sorted(samples)[::EVERY]
    size = len(chosen) // len(LENGTHS)
    return {bucket: chosen[i * size : (i + 1) * size] for i, bucket in enumerate(LENGTHS)}
