"""Settings of the training data; needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DataSettings:
    """``pretrain_expert.datarc``. The keys without "(ours)" are s3prl's."""

    libri_root: str
    """Folder of the audio, to which the paths in the tables are relative; any corpus. With Shar
    folders in ``sets``, which have their own audio, any folder."""

    file_path: str
    """Folder of the length tables (``s3prl-ekd length-tables``) or Shar folders."""

    sets: tuple[str, ...]
    """Tables to train on: ``SET.csv`` in ``file_path``. Or lhotse's Shar folders: ``SET`` in
    ``file_path`` (ours)."""

    train_batch_size: int
    """Utterances in a batch; the maximum if ``max_seconds`` is set."""

    num_workers: int = 2
    """Processes that read audio; 0 reads in the training process."""

    sequence_length: int = 250000
    """Length of excerpts, in samples: of a longer utterance a random excerpt is used, a different
    one in each epoch. 0: whole utterances."""

    max_timestep: int = 0
    """N above 0: leave out utterances of N samples or more. -N: of N samples or fewer. 0: none."""

    dev_sets: tuple[str, ...] = ()
    """Tables to measure the loss on, at every ``runner.eval_step`` (ours)."""

    on_bad_audio: Literal["skip", "error"] = "error"
    """``error``: stop at the first file that cannot be used. ``skip``: leave it out of its batch
    and list it in the run's ``bad_audio.tsv`` (ours)."""

    max_seconds: float = 0.0
    """Maximal audio in a batch, in seconds, including padding; 0: no limit (ours)."""

    loader_timeout: float = 600.0
    """Seconds to wait for a batch before the run ends with an error; no limit if this or
    ``num_workers`` is 0 (ours)."""

    shar_streams: int = 8
    """Sequences of shards of Shar folders that are read side by side. The order of the batches
    depends on it, and not on ``num_workers`` or the number of processes. Reading is fastest if it
    is a multiple of workers × processes. Each holds 16 batches of encoded audio (ours)."""

    target_cache: str | None = None
    """Folder of ``s3prl-ekd cache``, whose targets are used instead of running the teachers; every
    epoch then has the same excerpt of a long utterance (ours)."""

    def __post_init__(self):
        if not self.sets:
            raise ValueError("sets is empty; name at least one table")
        for name in self.dev_sets:
            if name in self.sets:
                raise ValueError(f"dev_sets: {name!r} is also in sets; remove it from one of them")
        if self.train_batch_size < 1 or not 0 <= self.num_workers <= 1024:
            raise ValueError("train_batch_size must be 1 or more, and num_workers 0 to 1024")
        if self.sequence_length != 0 and self.sequence_length < 400:
            raise ValueError(
                "sequence_length must be 0 (whole utterances) or at least 400 samples (one frame), "
                f"got {self.sequence_length}"
            )
        if not 1 <= self.shar_streams <= 4096:
            raise ValueError(f"shar_streams must be 1 to 4096, got {self.shar_streams}")
        if self.loader_timeout != 0 and not 1 <= self.loader_timeout <= 604800:
            raise ValueError(
                "loader_timeout must be 1 to 604800 seconds (a week), or 0 for no limit, got "
                f"{self.loader_timeout:g}"
            )
        if self.max_seconds < 0 or 0 < self.max_seconds * 16000 < self.sequence_length:
            raise ValueError(
                "max_seconds must be 0 (no limit) or at least the length of an excerpt, "
                f"{self.sequence_length / 16000:g} s (sequence_length), got {self.max_seconds:g}"
            )
