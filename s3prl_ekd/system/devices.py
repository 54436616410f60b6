"""The device of ``--device``, and that of a module."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ..errors import ConfigError, first_line

if TYPE_CHECKING:
    import torch
    from torch import nn


def choose_device(name: str | None) -> str:
    """Check a device name; by default cuda if available, else cpu.

    Raises:
        ConfigError: the device is unknown or not available.
    """
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|(cuda|xpu)(:\d+)?", name):
        raise ConfigError(f"--device {name}: expected cpu, cuda, cuda:N, xpu, xpu:N or mps")
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"cannot use --device {name}: {first_line(error)}") from None
    return name


def module_device(module: nn.Module) -> torch.device:
    """The device of a module's parameters; the CPU if it has none, as stored hidden states."""
    import torch

    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
