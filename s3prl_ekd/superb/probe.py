"""Whether an upstream is one that s3prl's recipes can use, before hours are spent on it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch

from ..errors import EkdError, SetupError


def build_upstream(hub_name: str, checkpoint: str | None) -> torch.nn.Module:
    """The upstream of that hub name, as s3prl's downstream Runner builds it, in eval mode.

    Raises:
        SetupError: there is no such name, or it cannot be built.
    """
    from .. import compat
    from .. import register as plugin
    from ..files import trust
    from ..files.build_limit import build_limit
    from ..teachers.checkpoint import check_upstream_file

    trust.restrict_torch()
    compat.apply()
    plugin.register()
    from s3prl import hub

    if not hasattr(hub, hub_name):
        raise SetupError(f"{hub_name}: s3prl has no such upstream; see run_downstream.py -h")
    limit = contextlib.nullcontext()
    if checkpoint is not None and Path(checkpoint).exists() and not Path(checkpoint).is_dir():
        check_upstream_file(Path(checkpoint), hub_name)
        limit = build_limit(checkpoint)
    try:
        with limit:
            upstream = getattr(hub, hub_name)(ckpt=checkpoint, model_config=None, refresh=False)
    except EkdError:
        raise
    except Exception as error:  # whatever a foreign upstream raises is the answer
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        what = hub_name if checkpoint is None else f"{hub_name} with {checkpoint}"
        raise SetupError(f"the upstream {what} cannot be built: {first}") from None
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
    if len(shapes) != 1 or None in shapes or len(next(iter(shapes))) != 3:
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
