"""From the word in a config (``hubert_base``, ``tiny_hubert``, ``/my/hubert.pt``) to an upstream.

An upstream maps a list of unpadded 16 kHz waveforms to ``{"hidden_states": [[batch, frame, dim]]}``
with s3prl's meaning: 0 is the input of the first transformer layer, n the output of layer n.
"""

from .load import (
    check_precision,
    check_source,
    load_teachers,
    load_tiny,
    load_upstream,
    teacher_model,
)

__all__ = [
    "check_precision",
    "check_source",
    "load_teachers",
    "load_tiny",
    "load_upstream",
    "teacher_model",
]
