"""Load teachers by name (``hubert_base``, ``tiny_hubert``), checkpoint or Hugging Face folder.

A loaded teacher is an s3prl upstream: it maps a list of unpadded 16 kHz waveforms to
``{"hidden_states": [[batch, frame, dim], ...]}``, where index 0 is the input of the first
transformer layer and index n the output of layer n.
"""

from .load import (
    check_source,
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
    "copied_student",
    "load_teachers",
    "load_tiny",
    "load_upstream",
    "teacher_model",
]
