"""The numbers of a cache: two bytes each, or one byte and a scale an utterance and layer.

========  =====  =============================================================================
dtype     bytes  largest error of a number x (to nearest)
========  =====  =============================================================================
float16   2      2^-11 |x|, and 2^-25 near 0; nothing above 65504
bfloat16  2      2^-8 |x|; the range of float32
int8      1      half a step: the largest |x| of the utterance and layer, by 254
========  =====  =============================================================================
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..distill.outliers import usable_frames
from ..errors import TeacherError
from .layout import Layout

# numpy has no bfloat16: its files hold the bits as int16
NUMPY = {"float16": np.float16, "bfloat16": np.int16, "int8": np.int8}
BYTES = {name: np.dtype(kind).itemsize for name, kind in NUMPY.items()}
STEPS = 127  # of int8, on either side of 0


def to_numbers(
    values: Tensor, layout: Layout, dtype: str, utterance: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """Targets ``[frame, column]`` of an utterance as they are stored, and their scales ``[piece]``.

    Raises:
        TeacherError: a number is not finite, too large for float16, or so large that int8 would
            make zeros of all others.
    """
    values = values.float()
    if not values.isfinite().all():
        raise TeacherError(f"a teacher's output for {utterance} is not finite; leave it out")
    if dtype == "bfloat16":
        return values.to(torch.bfloat16).cpu().view(torch.int16).numpy(), None
    if dtype == "float16":
        stored = values.half()
        if not stored.isfinite().all():
            raise TeacherError(
                f"a target of {utterance} is {values.abs().max():g}, and float16 ends at 65504; "
                "build with --dtype bfloat16"
            )
        return stored.cpu().numpy(), None
    scales, stored, column = [], [], 0
    for _, count, dim in layout:
        part = values[:, column : column + count * dim].view(-1, count, dim)
        if not usable_frames(part).all():
            raise TeacherError(
                f"a target of {utterance} is {part.abs().max():g}, and int8 would make zeros of "
                "all others; build with --dtype bfloat16, or leave the utterance out"
            )
        scale = part.abs().amax((0, 2)) / STEPS  # [target]
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        stored.append((part / scale[:, None]).round().clamp(-STEPS, STEPS).flatten(1))
        scales.append(scale)
        column += count * dim
    return torch.cat(stored, 1).to(torch.int8).cpu().numpy(), torch.cat(scales).cpu().numpy()


def to_tensor(stored: np.ndarray, dtype: str) -> Tensor:
    """The array of :func:`to_numbers`, of any shape, as a tensor of its ``dtype``."""
    tensor = torch.from_numpy(stored)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor
