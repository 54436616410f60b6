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
    """A student, see :class:`.expert.UpstreamExpert`, or a Hugging Face model of another kind."""
    from s3prl_ekd.teachers.hf_student import STUDENT_TYPES
    from s3prl_ekd.teachers.huggingface import check_hf_folder, load_folder
    from s3prl_ekd.teachers.student_source import find_student

    source = find_student(ckpt, f"ekd_student: {ckpt}")
    if source.path.is_dir():
        location = f"ekd_student: {source}"
        if check_hf_folder(source.path, location) not in STUDENT_TYPES:
            return load_folder(source.path, location)
    return _UpstreamExpert(source.name, *args, **kwargs)


def ekd_student_url(
    ckpt: str | Path, refresh: bool = False, *args: Any, **kwargs: Any
) -> nn.Module:
    """A student from a URL, stored in s3prl's download cache; ``refresh`` downloads it again."""
    from s3prl.util.download import _urls_to_filepaths

    return ekd_student_local(_urls_to_filepaths(ckpt, refresh=refresh), *args, **kwargs)


def ekd_student(
    ckpt: str | Path | None = None, refresh: bool = False, *args: Any, **kwargs: Any
) -> nn.Module:
    """A student (``run_downstream.py -u ekd_student -k STUDENT``): a path, URL or id on the Hub."""
    if ckpt is None:
        from s3prl_ekd.errors import CheckpointError

        raise CheckpointError(
            "-u ekd_student needs a checkpoint: add -k STUDENT (a student file, a run's folder or "
            "an id of the Hugging Face Hub)"
        )
    if str(ckpt).startswith(("http://", "https://")):
        return ekd_student_url(ckpt, refresh, *args, **kwargs)
    return ekd_student_local(ckpt, *args, **kwargs)


ekd_student_custom = ekd_student  # the suffix of s3prl's entries that take a path or URL
