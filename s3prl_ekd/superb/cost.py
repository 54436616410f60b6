"""Count an upstream's parameters and MACs, as SUPERB's leaderboard counts them.

MACs are summed over one forward for each of 32 utterances of LibriSpeech test-clean; see
:mod:`.macs` for the counting rules. They depend on the utterances' lengths alone, so noise of the
published lengths gives the same figures as the corpus. SUPERB counts all parameters of the module,
including those that no hidden state depends on; :func:`unused_parameters` lists these, since they
only make a submission look larger.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import DataError, EkdError, SetupError, first_line
from ..system.devices import module_device
from .macs import count_macs

States = Sequence[Tensor]  # hidden states, [batch, frame, dim] each

# In samples at 16 kHz: every 82nd of the 2,620 utterances sorted by length.
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

    A parameter is used if a random weighted sum of all hidden states has a non-zero gradient with
    respect to it. (An unweighted sum does not work: that of a layer normalisation's output is
    constant.) A parameter without gradient is used if changing its values changes any hidden state,
    so parameters of modules that run under ``torch.no_grad`` count as used.

    ``states_of`` runs the module on unpadded waveforms ``[sample]``. Parameters, ``requires_grad``
    and training mode are restored.
    """
    parameters = dict(module.named_parameters())
    generator = torch.Generator().manual_seed(0)
    waves = [wave.to(module_device(module)) for wave in _noise_waves(generator, 8000, 6400)]
    training = module.training
    module.eval()
    try:
        candidates = _without_gradient(parameters, lambda: states_of(waves), generator)
        return _without_effect(candidates, lambda: states_of(waves), generator)
    finally:
        module.train(training)


def _without_gradient(
    parameters: dict[str, nn.Parameter], run: Callable[[], States], generator: torch.Generator
) -> dict[str, nn.Parameter]:
    flags = {name: parameter.requires_grad for name, parameter in parameters.items()}
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        with torch.enable_grad():
            states = [state for state in run() if state.requires_grad]
            if not states:
                return parameters
            sums = [(state.float() * _noise(state, generator)).sum() for state in states]
        gradients = torch.autograd.grad(sums, list(parameters.values()), allow_unused=True)
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
    candidates: dict[str, nn.Parameter], run: Callable[[], States], generator: torch.Generator
) -> list[str]:
    original = [state.clone() for state in run()]

    def has_effect(changed: list[nn.Parameter]) -> bool:
        saved = [parameter.clone() for parameter in changed]
        for parameter in changed:
            parameter.add_(_noise(parameter, generator))
        states = run()
        for parameter, value in zip(changed, saved, strict=True):
            parameter.copy_(value)
        return any(not torch.equal(a, b) for a, b in zip(original, states, strict=True))

    # usually none has an effect, so change all at once first
    if not candidates or not has_effect(list(candidates.values())):
        return list(candidates)
    return [name for name, parameter in candidates.items() if not has_effect([parameter])]


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like)


def build_upstream(hub_name: str, checkpoint: str | None) -> nn.Module:
    """Build an upstream as s3prl's downstream Runner does, in eval mode.

    Raises:
        SetupError: no such name in ``s3prl.hub``, or the upstream cannot be built.
        CheckpointError: a student that still has gates, whose size is not final.
    """
    from .. import compat
    from ..distill.student import Student
    from ..files.torch_load import build_limit, restrict_torch
    from ..registration import register
    from ..student_file import require_cut
    from ..teachers.checkpoint import check_upstream_file

    restrict_torch()
    compat.apply()
    register()
    from s3prl import hub

    if not inspect.isfunction(getattr(hub, hub_name, None)):  # the hub also has modules, as os
        raise SetupError(f"no such upstream in s3prl: {hub_name}; see run_downstream.py -h")
    file = Path(checkpoint or ".")
    is_file = file.exists() and not file.is_dir()
    if is_file:
        check_upstream_file(file, hub_name)
    try:
        with build_limit(file) if is_file else contextlib.nullcontext():
            upstream = getattr(hub, hub_name)(ckpt=checkpoint, model_config=None, refresh=False)
    except EkdError:
        raise
    except Exception as error:  # an upstream may raise anything
        source = hub_name if checkpoint is None else f"{hub_name} with {checkpoint}"
        raise SetupError(f"cannot build upstream {source}: {first_line(error)}") from None
    student = getattr(upstream, "student", None)
    if isinstance(student, Student):
        require_cut(student, file)
    return upstream.eval()


def check_outputs(outputs: Any, selection: str, name: str) -> None:
    """Raise SetupError unless ``outputs[selection]`` is a list of tensors ``[batch, frame, dim]``,
    as s3prl's Featurizer needs it. A tuple or a single tensor is allowed too, because some
    upstreams of s3prl return one; SUPERB's hidden set is stricter, see ``s3prl-ekd validate``.
    """
    states = outputs.get(selection) if isinstance(outputs, dict) else None
    if isinstance(states, Tensor):
        states = [states]
    if not isinstance(outputs, dict):
        problem = type(outputs).__name__
    elif selection not in outputs:
        problem = f"the keys {', '.join(map(str, outputs)) or '(none)'}"
    elif not isinstance(states, (list, tuple)):
        problem = f"{selection} of type {type(states).__name__}"
    else:
        shapes = {tuple(x.shape) if isinstance(x, Tensor) else () for x in states}
        if len(shapes) == 1 and all(len(shape) == 3 for shape in shapes):
            if all(torch.isfinite(state).all() for state in states):
                return
            problem = "values that are not finite"
        else:
            problem = f"the shapes {sorted(map(str, shapes))}"
    raise SetupError(
        f"upstream {name}: its forward must return a dict with {selection}, a list of tensors "
        f"[batch, frame, dim] of the same shape, got {problem}"
    )


def check_forward(upstream: nn.Module, selection: str, name: str) -> int:
    """Check the outputs of a forward on waveforms of 1 and 0.6 s with :func:`check_outputs`.

    Returns:
        The number of hidden states.
    """
    waves = _noise_waves(torch.Generator().manual_seed(0), 16_000, 9600)
    with torch.no_grad():
        outputs = upstream(waves)
    check_outputs(outputs, selection, name)
    states = outputs[selection]
    return 1 if isinstance(states, Tensor) else len(states)


def _noise_waves(generator: torch.Generator, *lengths: int) -> list[Tensor]:
    return [0.1 * torch.randn(samples, generator=generator) for samples in lengths]


def measure_cost(
    module: nn.Module,
    lengths: Mapping[str, Sequence[int]] = LENGTHS,
    selection: str | Sequence[str] = "hidden_states",
) -> dict[str, Any]:
    """Count parameters and MACs: the contents of ``cost.json``.

    Args:
        module: an upstream, ``list of [sample] -> {"hidden_states": [...]}``; put in eval mode.
        lengths: bucket -> lengths of its utterances in samples.
        selection: the key or keys of the outputs that are computed, and so decide which parameters
            are used.

    Returns:
        ``parameters``; ``unused``, the parameters that no output depends on; ``macs`` and
        ``macs_buckets``, MACs as the leaderboard counts them; ``macs_products``, the MACs of matrix
        products and convolutions alone; ``utterances``, their number; ``profiler``.
    """
    module.eval()
    keys = [selection] if isinstance(selection, str) else selection
    parameters = dict(module.named_parameters())
    unused = unused_parameters(module, lambda waves: hidden_states(module(waves), keys))
    device = module_device(module)
    buckets, products = dict.fromkeys(lengths, 0.0), 0
    utterances = [(bucket, samples) for bucket, group in lengths.items() for samples in group]
    for bucket, samples in tqdm(utterances, "MACs", leave=False, disable=None, unit=" utterances"):
        with count_macs() as macs:
            hidden_states(module([torch.zeros(samples, device=device).uniform_(-1, 1)]), keys)
        buckets[bucket] += macs.total
        products += macs.products
    return {
        "parameters": sum(parameter.numel() for parameter in parameters.values()),
        "unused": sum(parameters[name].numel() for name in unused),
        "macs": sum(buckets.values()),
        "macs_buckets": buckets,
        "macs_products": float(products),
        "utterances": len(utterances),
        "profiler": PROFILER,
    }


def hidden_states(result: Mapping[str, Any], keys: Sequence[str]) -> list[Tensor]:
    """The hidden states under ``keys``; for a missing key ``hidden_states``, as in SUPERB.

    A single tensor, as s3prl's baselines return it, counts as a list of one.
    """
    states = []
    for key in keys:
        value = result.get(key, result["hidden_states"])
        states += [value] if isinstance(value, Tensor) else list(value)
    return states


def librispeech_lengths(folder: Path) -> dict[str, list[int]]:
    """Read the lengths of the 32 utterances from the audio headers of LibriSpeech test-clean.

    ``folder`` is ``test-clean`` or its parent. Raises DataError if a file is missing or damaged.
    """
    from ..data.audio_files import find_audio, read_headers

    folder = folder / SPLIT if (folder / SPLIT).is_dir() else folder
    names = find_audio(folder)
    if len(names) != UTTERANCES:
        raise DataError(
            f"{folder}: expected the {UTTERANCES} files of LibriSpeech {SPLIT}, got {len(names)}"
        )
    samples = []
    for header in read_headers(folder, names):
        if isinstance(header, DataError):
            raise header
        samples.append(header.samples)
    lengths = sorted(samples)[::EVERY]
    size = len(lengths) // len(LENGTHS)
    return {bucket: lengths[i * size : (i + 1) * size] for i, bucket in enumerate(LENGTHS)}
