"""Entries that ``s3prl_ekd.register()`` adds to ``s3prl.hub``, with names in s3prl's style."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from .expert import UpstreamExpert as _UpstreamExpert


def _tiny(name: str) -> Callable[..., nn.Module]:
    """The entry of a tiny teacher; see :mod:`s3prl_ekd.teachers.zoo`."""

    def entry(ckpt: str | Path | None = None, *args: Any, **kwargs: Any) -> nn.Module:
        from s3prl_ekd.errors import CheckpointError
        from s3prl_ekd.teachers import load_tiny

        if ckpt:
            raise CheckpointError(f"-k {ckpt}: {name} comes with its weights; leave out -k")
        return load_tiny(name, f"upstream {name}")

    return entry


tiny_hubert = _tiny("tiny_hubert")
tiny_robust_hubert = _tiny("tiny_robust_hubert")
tiny_wavlm = _tiny("tiny_wavlm")
tiny_hubert_random = _tiny("tiny_hubert_random")
tiny_wavlm_random = _tiny("tiny_wavlm_random")


def ekd_student_local(ckpt: str | Path, *args: Any, **kwargs: Any) -> nn.Module:
    """A student from a local file: ``ckpt`` is a student file or a run's checkpoint."""
    return _UpstreamExpert(ckpt, *args, **kwargs)


def ekd_student_url(
    ckpt: str | Path, refresh: bool = False, *args: Any, **kwargs: Any
) -> nn.Module:
    """A student from a URL, stored in s3prl's download cache; ``refresh`` downloads it again."""
    from s3prl.util.download import _urls_to_filepaths

    return ekd_student_local(_urls_to_filepaths(ckpt, refresh=refresh), *args, **kwargs)


def ekd_student(
    ckpt: str | Path | None = None, refresh: bool = False, *args: Any, **kwargs: Any
) -> nn.Module:
    """A student from a path or URL (``run_downstream.py -u ekd_student -k PATH``)."""
    if ckpt is None:
        from s3prl_ekd.errors import CheckpointError

        raise CheckpointError(
            "-u ekd_student needs a checkpoint: add -k STUDENT (a student file or states-*.ckpt)"
        )
    if str(ckpt).startswith(("http://", "https://")):
        return ekd_student_url(ckpt, refresh, *args, **kwargs)
    return ekd_student_local(ckpt, *args, **kwargs)


ekd_student_custom = ekd_student  # the suffix of s3prl's entries that take a path or URL
