"""LibriSpeech with phones for ``-d ctc``: the corpus module that s3prl's PyPI package forgets.

``s3prl.downstream.ctc.data`` imports ``LibriPhoneDataset`` from ``.corpus.libriphone``. That folder
has no ``__init__.py`` in s3prl's repository, so it is in no wheel. Where the host lacks it,
:func:`.requirements.provide_ctc_corpus` puts this module in its place. Same constructor, same
items. It also reads every kind of audio and each transcript once, gives files of equal length in
an order that does not depend on the disk, and says what is wrong in a sentence.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from pathlib import Path

from torch.utils.data import Dataset

from ..errors import DataError
from ..prepare.lexicon import Pronunciations, read_lexicon
from ..prepare.librispeech import read_texts

logger = logging.getLogger(__name__)

Item = tuple[Path, list[int]]  # audio file, indices of its phones with <eos> at the end


class LibriPhoneDataset(Dataset):
    """Utterances of LibriSpeech-like folders with their phones, those with most phones first.

    An item is one :data:`Item` where ``bucket_size`` is 1, else the list of the ``bucket_size``
    items from the index on: neighbours, so of similar length. There are as many buckets as
    utterances, so a pass over the dataset meets each utterance about ``bucket_size`` times.

    Args:
        split: folders below ``path``, such as ``["train-clean-100"]``. The words of
            ``SPK-CHAP-NNNN.flac`` are a line of ``SPK-CHAP.trans.txt`` beside it.
        tokenizer: s3prl's text encoder of mode ``word``.
        bucket_size: items in a bucket; there are fewer only where there are fewer utterances.
        path: the corpus.
        lexicon: text files ``WORD<tab>PHONES``; see :mod:`..prepare.lexicon`.
        ascending: those with fewest phones first.
        skip_unknown_words: leave out utterances with a word that the lexicon lacks, and say how
            many, instead of stopping. s3prl's own module, in a checkout, knows no such setting.
        others: the rest of the YAML's ``corpus`` block, for other parts of s3prl.

    Raises:
        DataError: a folder has no audio, an utterance has no text or a word that the lexicon
            lacks, or the lexicon has a phone that the vocabulary lacks.
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
        **others,
    ):
        self.path = path
        self.bucket_size = bucket_size
        split, lexicon = _as_list(split), _as_list(lexicon)
        texts = read_texts(Path(path), split)
        pronunciations = read_lexicon(
            lexicon,
            {word for words in texts.values() for word in words},
            known=lambda phone: tokenizer.vocab_to_idx(phone) != tokenizer.unk_idx,
        )
        kept = complete(texts, pronunciations, lexicon, skip=skip_unknown_words)
        items: list[Item] = []
        for file in kept:
            phones = (phone for word in texts[file] for phone in pronunciations[word])
            items.append((file, tokenizer.encode(" ".join(phones))))
        items.sort(key=lambda item: len(item[1]), reverse=not ascending)  # stable: then by path
        self.file_list, self.text = zip(*items, strict=True)

    def __getitem__(self, index: int) -> Item | list[Item]:
        if self.bucket_size == 1:
            return self.file_list[index], self.text[index]
        start = max(0, min(len(self) - self.bucket_size, index))
        bucket = slice(start, start + self.bucket_size)
        return list(zip(self.file_list[bucket], self.text[bucket], strict=True))

    def __len__(self) -> int:
        return len(self.file_list)


def complete(
    texts: dict[Path, list[str]],
    pronunciations: Pronunciations,
    lexicon: Sequence[str],
    *,
    skip: bool,
) -> list[Path]:
    """The files all of whose words have a pronunciation.

    Raises:
        DataError: there are others and ``skip`` is not set, or nothing is left.
    """
    named = ", ".join(map(str, lexicon))
    unknown = {
        file: [word for word in words if word not in pronunciations]
        for file, words in texts.items()
    }
    bad = [file for file, words in unknown.items() if words]
    if bad and not skip:
        count = len({word for words in unknown.values() for word in words})
        more = f" (and {count - 1} more words of this split)" if count > 1 else ""
        raise DataError(
            f"the lexicon {named} lacks the word {unknown[bad[0]][0]} of the utterance "
            f"{bad[0].name}{more}; add it, or set downstream_expert.corpus.skip_unknown_words: true"
        )
    if len(bad) == len(texts):
        raise DataError(f"every utterance has a word that the lexicon {named} lacks")
    if bad:
        _say_once(f"{len(bad)} of {len(texts)} utterances left out: words not in {named}")
    return [file for file, words in unknown.items() if not words]


@functools.cache
def _say_once(line: str) -> None:
    """s3prl builds its datasets anew for each pass and evaluation; once is enough."""
    logger.warning(line)


def _as_list(value: str | Sequence[str]) -> list[str]:
    """A single name is allowed where s3prl's YAML has a list."""
    return [value] if isinstance(value, str) else list(value)
