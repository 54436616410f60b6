"""s3prl_ekd: distil several speech SSL teachers into one small student, inside s3prl.

Importing this package is cheap and has no side effects: torch and s3prl are imported when needed.
The public interface is

* :func:`register`: add ``ekd_student`` to ``s3prl.hub`` (and so to ``S3PRLUpstream``);
* :func:`load_student`: load a trained student as a ``torch.nn.Module``;
* the commands ``run_pretrain.py``, ``run_downstream.py`` and ``s3prl-ekd``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from .student_file import LoadedStudent

__version__ = "0.2.0"
__all__ = ["__version__", "load_student", "register"]


def register() -> None:
    """Add ``ekd_student`` to ``s3prl.hub``; see :func:`s3prl_ekd.registration.register`."""
    from .registration import register as _register

    _register()


def load_student(path: str | Path) -> LoadedStudent:
    """Load a student from a file, a run's folder, a Hugging Face folder or an id on the Hub; see
    :func:`.teachers.student_source.find_student`."""
    from .system.s3prl_distribution import require_s3prl

    require_s3prl()
    from .teachers.student_source import find_student

    return find_student(path).load()
