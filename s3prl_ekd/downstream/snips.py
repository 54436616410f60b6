"""Audio SNIPS for ``-d ctc``: the corpus module of SF missing from s3prl's PyPI package.

Like :mod:`.libriphone`, it is installed by :func:`.requirements.provide_ctc_corpus` where s3prl has
none, with the constructor and items of s3prl's. In addition it orders files of equal length
independently of the disk, and has error messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..prepare.sf import find_utterances, read_texts
from .buckets import BucketDataset, as_list, warn_once


class SnipsDataset(BucketDataset):
    """Utterances of Audio SNIPS with their characters and slots, as token indices.

    Args:
        split: folders below ``path``, such as ``["train"]``.
        tokenizer: s3prl's text encoder of mode ``character-slot``.
        path: see :mod:`..prepare.sf`.
        settings: the YAML's ``corpus`` block; ``FOLDER_speakers`` for the first folder of ``split``
            has the beginnings of the names that are read.
        bucket_size, ascending: see :class:`.buckets.BucketDataset`.

    Raises:
        DataError: there are no such utterances.
    """

    def __init__(
        self,
        split: Sequence[str],
        tokenizer,
        bucket_size: int,
        path: str,
        ascending: bool = False,
        **settings,
    ):
        root, folders = Path(path), as_list(split)
        texts = read_texts(root)
        speakers = settings[f"{folders[0]}_speakers"]
        found = find_utterances(root, folders, speakers, texts)
        if found.without_text:
            warn_once(
                f"left out {found.without_text} audio files of {root} ({', '.join(folders)}) "
                "without a text"
            )
        tokens = map(tokenizer.encode, found.texts)
        super().__init__(list(zip(found.files, tokens, strict=True)), bucket_size, ascending)
