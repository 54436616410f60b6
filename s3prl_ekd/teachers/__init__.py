"""Load teachers by name (``hubert_base``, ``tiny_hubert``), checkpoint or folder (Hugging Face,
hidden states that another program stored).

A loaded teacher is an s3prl upstream: it maps a list of unpadded 16 kHz waveforms to
``{"hidden_states": [[batch, frame, dim], ...]}``, where index 0 is the input of the first
transformer layer and index n the output of layer n.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .names import check_source, check_teacher_sources

if TYPE_CHECKING:
    from .load import (
        choose_teacher_precision,
        copied_student,
        load_teachers,
        load_tiny,
        load_upstream,
        teacher_model,
    )

__all__ = [
    "choose_teacher_precision",
    "check_source",
    "check_teacher_sources",
    "copied_student",
    "load_teachers",
    "load_tiny",
    "load_upstream",
    "teacher_model",
]


def __getattr__(name: str) -> Any:
    """A function of :mod:`.load`, which imports torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(importlib.import_module(f"{__name__}.load"), name)
