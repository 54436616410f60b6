"""Number formats of training: which one fits a device, and TF32."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch

from ..errors import SetupError

logger = logging.getLogger(__name__)

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}  # other precisions are float32
AMX = {"amx_tile", "amx_bf16"}  # Intel: Sapphire Rapids and newer


def automatic_precision(device: str) -> tuple[str, str]:
    """The precision that ``auto`` stands for on ``device``, and the reason.

    bfloat16 on NVIDIA GPUs from Ampere on (compute capability 8) and on CPUs with AMX, float32
    elsewhere (ours). Never float16, whose range needs loss scaling.
    """
    if device.startswith("cuda"):
        major, minor = torch.cuda.get_device_capability(device)
        return "bfloat16" if major >= 8 else "float32", f"GPU of compute capability {major}.{minor}"
    if device != "cpu":
        return "float32", f"device {device}"
    return ("bfloat16", "CPU with AMX") if has_amx() else ("float32", "CPU without AMX")


def has_amx() -> bool:
    """Whether the CPU multiplies bfloat16 matrices in hardware, and torch uses this (oneDNN).

    The flags are Linux's, which leaves out what a virtual machine or the kernel does not support;
    torch's own ``torch.cpu._is_amx_tile_supported`` is not in all versions, and of tiles only.
    """
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    lines = (line for line in text.splitlines() if line.startswith("flags"))
    return AMX <= set(next(lines, "").split()) and torch.backends.mkldnn.is_available()


def choose_precision(setting: str, device: str, key: str) -> tuple[Any, str]:
    """The precision to compute in, and the reason; ``auto`` is resolved.

    Args:
        setting: ``auto`` or a precision.
        device: such as ``cpu`` or ``cuda:1``.
        key: the setting's name, for messages.
    """
    fitting, why = automatic_precision(device)
    if setting == "auto":
        return fitting, why
    if setting == "bfloat16" != fitting or (setting == "float16" and device == "cpu"):
        logger.warning("%s: %s is slower than float32 here (%s)", key, setting, why)
    return setting, key


def choose_training_precision(setting: str, device: str, is_resumed: bool) -> tuple[Any, str]:
    """:func:`choose_precision` for the student, whose float16 and TF32 need CUDA.

    Without CUDA a new run trains in float32 instead, with a warning.

    Args:
        setting, device: see :func:`choose_precision`.
        is_resumed: whether the run is resumed.

    Raises:
        SetupError: a resumed run cannot train in ``setting`` on this device.
    """
    key = "runner.precision"
    if setting not in ("float16", "tf32") or device.startswith("cuda"):
        return choose_precision(setting, device, key)
    if is_resumed and setting == "float16":
        raise SetupError(
            f"{key}: float16 needs a CUDA device, got {device}; resume the run on a GPU, or add -o "
            f"\"config.{key}='float32'\""
        )
    logger.warning("%s: %s needs a CUDA device: training in float32", key, setting)
    return "float32", f"{key}: {setting}, without CUDA"


def allow_tf32(device: str, allowed: bool) -> None:
    """Set whether float32 matrix products and convolutions on CUDA may use TF32, which has 10 bits
    of mantissa (float32: 23, bfloat16: 7) and is several times faster.

    For the whole process, as torch has no narrower setting.
    """
    if device.startswith("cuda"):
        with warnings.catch_warnings():  # torch 2.9 has newer names, which 2.8 lacks
            warnings.simplefilter("ignore")
            torch.backends.cuda.matmul.allow_tf32 = allowed
            torch.backends.cudnn.allow_tf32 = allowed
