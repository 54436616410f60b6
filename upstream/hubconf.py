"""Entries that ``s3prl_ekd.register()`` adds to ``s3prl.hub``, with names in s3prl's style."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from .expert import UpstreamExpert as _UpstreamExpert


def tiny_hubert(ckpt: str | Path | None = None, *args: Any, **kwargs: Any) -> nn.Module:
    """HuBERT of 3.3 M parameters, trained on speech; see :mod:`s3prl_ekd.teachers.zoo`."""
    return _tiny("tiny_hubert", ckpt)


def tiny_robust_hubert(ckpt: str | Path | None = None, *args: Any, **kwargs: Any) -> nn.Module:
    """``tiny_hubert``, trained further with noisy and reverberant speech."""
    return _tiny("tiny_robust_hubert", ckpt)


def tiny_wavlm(ckpt: str | Path | None = None, *args: Any, **kwargs: Any) -> nn.Module:
    """WavLM of 3.3 M parameters, trained on speech."""
    return _tiny("tiny_wavlm", ckpt)


def tiny_hubert_random(ckpt: str | Path | None = None, *args: Any, **kwargs: Any) -> nn.Module:
    """``tiny_hubert`` with random weights, the same at each call."""
    return _tiny("tiny_hubert_random", ckpt)


def tiny_wavlm_random(ckpt: str | Path | None = None, *args: Any, **kwargs: Any) -> nn.Module:
    """``tiny_wavlm`` with random weights, the same at each call."""
    return _tiny("tiny_wavlm_random", ckpt)


def _tiny(name: str, ckpt: str | Path | None) -> nn.Module:
    from s3prl_ekd.errors import CheckpointError
    from s3prl_ekd.teachers import load_tiny

    if ckpt:
        raise CheckpointError(f"-k {ckpt}: {name} comes with its weights; leave out -k")
    return load_tiny(name, f"upstream {name}")


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
