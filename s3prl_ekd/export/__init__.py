"""What leaves a finished run: the student file (and, in time, other formats)."""

from .student_file import load_student

__all__ = ["load_student"]
