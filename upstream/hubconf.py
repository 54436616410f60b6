"""The entries that ``s3prl_ekd.register()`` adds to ``s3prl.hub``, named as s3prl names them."""

from __future__ import annotations

from .expert import UpstreamExpert as _UpstreamExpert


def ekd_student_local(ckpt, *args, **kwargs):
    """A student from a local file: ``ckpt`` is a student file or a run's checkpoint."""
    return _UpstreamExpert(ckpt, *args, **kwargs)


def ekd_student_url(ckpt, refresh=False, *args, **kwargs):
    """A student from a URL, kept in s3prl's cache; ``refresh`` downloads it again."""
    from s3prl.util.download import _urls_to_filepaths

    return ekd_student_local(_urls_to_filepaths(ckpt, refresh=refresh), *args, **kwargs)


def ekd_student(ckpt=None, refresh=False, *args, **kwargs):
    """A student from a path or URL (``run_downstream.py -u ekd_student -k PATH``)."""
    if ckpt is None:
        from s3prl_ekd.errors import CheckpointError

        raise CheckpointError(
            "ekd_student needs a checkpoint: add -k STUDENT (a student file or states-*.ckpt)"
        )
    if str(ckpt).startswith(("http://", "https://")):
        return ekd_student_url(ckpt, refresh, *args, **kwargs)
    return ekd_student_local(ckpt, *args, **kwargs)
