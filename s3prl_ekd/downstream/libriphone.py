"""LibriSpeech with phones for ``-d ctc``: the corpus module missing from s3prl's PyPI package.

``s3prl.downstream.ctc.data`` imports ``LibriPhoneDataset`` from ``.corpus.libriphone``. That folder
has no ``__init__.py`` in s3prl's repository, so the wheel does not contain it. If the module is
missing, :func:`.requirements.provide_ctc_corpus` installs this one. It has the same constructor and
items. In addition it supports all audio formats, reads each transcript once, orders files of equal
length independently of the disk, and has error messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import DataError
from ..prepare.lexicon import Pronunciations, read_lexicon
from ..prepare.librispeech import read_texts
from .buckets import BucketDataset, Item, as_list, warn_once


class LibriPhoneDataset(BucketDataset):
    """Utterances of a LibriSpeech-like corpus with their phone indices, ending in ``<eos>``.

    Args:
        split: folders below ``path``, such as ``["train-clean-100"]``.
        tokenizer: s3prl's text encoder of mode ``word``.
        lexicon: text files ``WORD<tab>PHONES``; see :mod:`..prepare.lexicon`.
        skip_unknown_words: skip utterances with a word that is not in the lexicon and log how
            many, instead of raising. s3prl's own module (in a checkout) has no such setting.
        unused: other keys of the YAML's ``corpus`` block, for other modules of s3prl.
        bucket_size, ascending: see :class:`.buckets.BucketDataset`.

    Raises:
        DataError: a folder has no audio; an utterance has no transcript, or a word that is not in
            the lexicon; or the lexicon has a phone that is not in the vocabulary.
    """

    def __init__(
        self,
        split: Sequence[str],
        tokenizer,
        bucket_size: int,
        path: str,
        lexicon: Sequence[str],
        ascending: bool = False,
        skip_unknown_words: bool = False,
        **unused,
    ):
        split, lexicon = as_list(split), as_list(lexicon)
        texts = read_texts(Path(path), split)
        pronunciations = read_lexicon(
            lexicon,
            {word for words in texts.values() for word in words},
            is_phone=lambda phone: tokenizer.vocab_to_idx(phone) != tokenizer.unk_idx,
        )
        files = files_in_lexicon(texts, pronunciations, lexicon, skip=skip_unknown_words)
        items: list[Item] = []
        for file in files:
            phones = (phone for word in texts[file] for phone in pronunciations[word])
            items.append((file, tokenizer.encode(" ".join(phones))))
        super().__init__(items, bucket_size, ascending)


def files_in_lexicon(
    texts: dict[Path, list[str]],
    pronunciations: Pronunciations,
    lexicon: Sequence[str],
    *,
    skip: bool,
) -> list[Path]:
    """Select the files whose words all have a pronunciation; raise for others, unless ``skip``."""
    lexicon_names = ", ".join(map(str, lexicon))
    unknown = {
        file: [word for word in words if word not in pronunciations]
        for file, words in texts.items()
    }
    bad = [file for file, words in unknown.items() if words]
    if bad and not skip:
        count = len({word for words in unknown.values() for word in words})
        more = f" (and {count - 1} more words of this split)" if count > 1 else ""
        raise DataError(
            f"{bad[0].name}: the word {unknown[bad[0]][0]} is not in the lexicon {lexicon_names}"
            f"{more}; add it, or set downstream_expert.corpus.skip_unknown_words: true"
        )
    if len(bad) == len(texts):
        raise DataError(f"every utterance has a word that is not in the lexicon {lexicon_names}")
    if bad:
        warn_once(
            f"skipped {len(bad)} of {len(texts)} utterances with words not in {lexicon_names}"
        )
    return [file for file, words in unknown.items() if not words]
