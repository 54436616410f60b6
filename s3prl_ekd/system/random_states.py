"""Snapshot of the random generators of Python, NumPy, torch and CUDA, for exact resume."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def random_states(device: str = "cpu") -> dict[str, Any]:
    """The states of all generators, as plain data and tensors.

    Args:
        device: of the run. Reading a CUDA generator's state does not make it wait.
    """
    version, internal, gauss = random.getstate()
    state: Any = np.random.get_state()  # a tuple, unless legacy=False
    name, keys, position, has_gauss, cached = state
    on_cuda = str(device).startswith("cuda")
    return {
        "python": [version, torch.tensor(internal), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if on_cuda else None,
    }


def set_random_states(states: dict[str, Any], device: str = "cpu") -> None:
    """Restore the states of :func:`random_states`. On a CPU the CUDA state is ignored.

    Raises:
        ValueError: ``states`` is invalid.
    """
    try:
        version, internal, gauss = states["python"]
        random.setstate((version, tuple(map(int, internal)), gauss))
        name, keys, position, has_gauss, cached = states["numpy"]
        keys = keys.numpy().astype(np.uint32)
        np.random.set_state((name, keys, position, has_gauss, cached))
        torch.set_rng_state(states["torch"])
        cuda = states["cuda"]
        if isinstance(cuda, list):  # of all devices: downstream checkpoints of version 0.1
            same = cuda and len(cuda) == torch.cuda.device_count()
            cuda = cuda[torch.cuda.current_device()] if same else None
        if cuda is not None and str(device).startswith("cuda"):
            torch.cuda.set_rng_state(cuda, device)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as err:
        raise ValueError(f"invalid random states: {err}") from None


@contextlib.contextmanager
def preserve_random_states(device: str = "cpu") -> Iterator[None]:
    """Restore the states of all generators on exit."""
    states = random_states(device)
    try:
        yield
    finally:
        set_random_states(states, device)
