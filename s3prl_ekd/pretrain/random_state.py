"""The random number generators of Python, NumPy and torch: their states, put away and put back."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def random_states(device: str = "cpu") -> dict[str, Any]:
    """The states of all generators, as plain data and tensors that a checkpoint may hold.

    Args:
        device: of the run. The state of a CUDA device's generator is on the CPU: no wait for it.
    """
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    on_cuda = str(device).startswith("cuda")
    return {
        "python": [version, torch.tensor(words), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if on_cuda else None,
    }


def set_random_states(states: dict[str, Any], device: str = "cpu") -> None:
    """Put back what :func:`random_states` gave. The CUDA state is passed over on another device.

    Raises:
        ValueError: these are no such states.
    """
    try:
        version, words, gauss = states["python"]
        random.setstate((version, tuple(words.tolist()), gauss))
        name, keys, position, has_gauss, cached = states["numpy"]
        keys = keys.numpy().astype(np.uint32)
        np.random.set_state((name, keys, position, has_gauss, cached))
        torch.set_rng_state(states["torch"])
        if states["cuda"] is not None and str(device).startswith("cuda"):
            torch.cuda.set_rng_state(states["cuda"], device)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"no states of random number generators: {error}") from None


@contextlib.contextmanager
def random_numbers_untouched(device: str = "cpu") -> Iterator[None]:
    """What happens within draws as it likes; the generators are then as they were before."""
    states = random_states(device)
    try:
        yield
    finally:
        set_random_states(states, device)
