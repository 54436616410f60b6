"""The settings of the training data. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DataSettings:
    """``pretrain_expert.datarc``: where the audio is and how it is batched. Names are s3prl's.

    ``libri_root``: the folder that the tables' paths start from, any corpus. ``file_path``: the
    folder of length tables (``s3prl-ekd lengths``). ``sets``: the tables to train on.
    ``sequence_length``: longest excerpt in samples, a random one of each longer utterance; 0 takes
    whole utterances. ``max_timestep``: as s3prl, drop utterances of that many samples or more
    (below 0: of that many or fewer). ``dev_sets``: tables to measure the loss on and not to train
    on (ours); see ``runner.eval_step``. ``on_bad_audio`` (ours): ``error`` stops at the first file
    that cannot be used, ``skip`` leaves such utterances out of their batches and lists them in
    ``bad_audio.tsv``; :mod:`.bad_audio` says which files these are. ``max_seconds``
    (ours): most audio of a batch in seconds, padding counted; ``train_batch_size`` is then the most
    utterances. 0: as in s3prl, ``train_batch_size`` utterances of any length.
    ``loader_timeout`` (ours): seconds that the processes which read audio may take for the next
    batch, after which the run ends with an error. 0 waits for ever; so does ``num_workers: 0``.
    ``target_cache`` (ours): a folder of ``s3prl-ekd cache``, whose targets are used instead of
    running teachers; each epoch then has the same excerpt of a long utterance.
    """

    libri_root: str
    file_path: str
    sets: tuple[str, ...]
    train_batch_size: int
    num_workers: int = 2
    sequence_length: int = 250000
    max_timestep: int = 0
    dev_sets: tuple[str, ...] = ()
    on_bad_audio: Literal["skip", "error"] = "error"
    max_seconds: float = 0.0
    loader_timeout: float = 600.0
    target_cache: str | None = None

    def __post_init__(self):
        if not self.sets:
            raise ValueError("sets is empty: name at least one table")
        for name in self.dev_sets:
            if name in self.sets:
                raise ValueError(f"dev_sets names {name!r}, which sets has too: it is trained on")
        if self.train_batch_size < 1 or not 0 <= self.num_workers <= 1024:
            raise ValueError("train_batch_size must be 1 or more and num_workers 0 to 1024")
        if self.sequence_length != 0 and self.sequence_length < 400:
            raise ValueError(
                f"sequence_length is {self.sequence_length} samples; use 0 (whole utterances) or "
                "400 (one frame) and more"
            )
        if self.loader_timeout != 0 and not 1 <= self.loader_timeout <= 604800:
            raise ValueError(
                f"loader_timeout is {self.loader_timeout:g} seconds; 1 to 604800 (a week) is "
                "allowed, and 0 to wait for ever"
            )
        if self.max_seconds < 0 or 0 < self.max_seconds * 16000 < self.sequence_length:
            raise ValueError(
                f"max_seconds is {self.max_seconds:g}; an excerpt of sequence_length has "
                f"{self.sequence_length / 16000:g} s, and so much must fit; 0 is no limit"
            )
