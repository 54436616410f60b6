"""Changes to s3prl's recipe for ASV, ``downstream/sv_voxceleb1``.

- s3prl decodes all recordings for training at the first start, to find those that are long enough
  without silence, and caches the lengths in its own folder, whatever the corpus
  (``.wav_lengths/Voxceleb1_length.pt``). Here the lengths come from the table that `prepare` wrote
  (:mod:`..prepare.asv`), or are computed at each start of a training, and never for an evaluation.
- Its expert calls ``Tensor.cuda``, which fails without a GPU and ignores ``--device``.
- It writes no labels into ``test_truth.txt``, and fails with a traceback if a training diverged.
- Its data set imports ``sox`` and ``librosa``, and needs neither.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..compat.child_processes import forget_in_children, repeat_in_children
from ..compat.import_hooks import forget_import
from ..compat.patched_modules import patch_module
from ..compat.replaced import replaced
from ..compat.voxceleb1_cache import librosa
from ..errors import CheckpointError, DataError
from ..prepare.asv import (
    PREPARED,
    TRAIN,
    check_trimmed,
    find_recordings,
    measure_trimmed,
    read_lengths,
    subfolders,
)

logger = logging.getLogger(__name__)

DATASET = "s3prl.downstream.sv_voxceleb1.dataset"
EXPERT = "s3prl.downstream.sv_voxceleb1.expert"
_OBJECTIVE = "objective."  # parameters of the loss, a row or column for each speaker


def patch_recipe() -> None:
    """Patch the recipe's modules, here and in child processes; further calls change nothing.

    It applies to modules that are imported already and to a later import.
    """
    sox = ModuleType("sox")
    vars(sox)["Transformer"] = None  # imported and never used
    patch_module(DATASET, _patch_dataset, (sox, *librosa()))
    patch_module(EXPERT, _patch_expert)
    repeat_in_children(patch_recipe)


@contextlib.contextmanager
def recipe_patched() -> Iterator[None]:
    """:func:`patch_recipe` for a ``with`` block, undone on exit, unless it was called before."""
    patched_before = bool(_replaced)
    patch_recipe()
    try:
        yield
    finally:
        if not patched_before:
            forget_in_children(patch_recipe)
            for name in (DATASET, EXPERT):
                forget_import(name)
                for cls, attributes in _replaced.pop(name, {}).items():
                    _restore(cls, attributes)


# module -> class -> what the class itself had of the attributes that are replaced
_replaced: dict[str, dict[type, dict[str, Any]]] = {}


def _replace(module: Any, classes: Mapping[type, Mapping[str, Any]]) -> None:
    if module.__name__ in _replaced:
        return
    # The classes and not their names: the expert may have imported them before.
    _replaced[module.__name__] = {
        cls: {name: vars(cls).get(name) for name in attributes}
        for cls, attributes in classes.items()
    }
    for cls, attributes in classes.items():
        for name, value in attributes.items():
            setattr(cls, name, value)


def _restore(cls: type, attributes: Mapping[str, Any]) -> None:
    for name, value in attributes.items():
        if value is None:
            delattr(cls, name)
        else:
            setattr(cls, name, value)


def _patch_dataset(module: Any) -> None:
    test = module.SpeakerVerifi_test

    @functools.wraps(test.__getitem__)
    def get_test_item(self: Any, index: int) -> tuple[Any, str]:
        wave, path = s3prl_get_test_item(self, index)
        check_trimmed(path, len(wave))
        return wave, path

    s3prl_get_test_item = test.__getitem__
    train = {"__init__": _init_train, "dataset": property(_long_recordings)}
    _replace(module, {module.SpeakerVerifi_train: train, test: {"__getitem__": get_test_item}})


def _init_train(
    self: Any,
    vad_config: Mapping[str, Any],
    key_list: list[str],
    file_path: list[Path],
    meta_data: str,
    max_timestep: int | None = None,
    n_jobs: int = 12,
) -> None:
    self.roots, self.root_key = file_path, key_list
    self.vad_c, self.max_timestep, self._jobs = vad_config, max_timestep, n_jobs
    # also those without a long recording, as in s3prl
    self.all_speakers = sorted(name for root in file_path for name in subfolders(root))
    self.speaker_num = len(self.all_speakers)
    self._dataset = None


def _long_recordings(self: Any) -> list[str]:
    """The recordings of more than ``min_sec`` samples without silence, found on first use."""
    if self._dataset is None:
        self._dataset = [
            str(root / name)
            for root in self.roots
            for name, length in _lengths(self, Path(root)).items()
            if length > self.vad_c["min_sec"]
        ]
    return self._dataset


def _lengths(self: Any, root: Path) -> dict[str, int]:
    """The samples of each recording without silence, sorted by name."""
    corpus = Path(str(root).removesuffix(TRAIN))
    table = read_lengths(corpus, DataError)
    if table is not None:
        check_table(corpus, table)
        return {name: table[name][1] for name in sorted(table)}
    names = find_recordings(root)
    logger.warning(
        "removing silence from the %d recordings in %s, to find those that are long enough; "
        "s3prl-ekd prepare asv or voxceleb1_asv does this once",
        len(names),
        root,
    )
    jobs = min(self._jobs, os.cpu_count() or 1)
    lengths = measure_trimmed([root / name for name in names], jobs)
    return dict(zip(names, lengths, strict=True))


def check_table(corpus: Path, table: Mapping[str, tuple[int, int]]) -> None:
    """Check that the recordings of a table are those for which it was written.

    Raises:
        DataError: a file is missing, or its size is another one.
    """
    for name, (size, _) in table.items():
        path = corpus / TRAIN / name
        try:
            changed = os.stat(path).st_size != size
        except OSError as error:
            problem = f"cannot read {path}, of {corpus / PREPARED}"
            raise DataError(f"{problem}: {error.strerror}") from None
        if changed:
            raise DataError(
                f"{path} has changed since {corpus / PREPARED} was written; run `prepare` again "
                "with --replace"
            )


def _patch_expert(module: Any) -> None:
    expert = module.DownstreamExpert
    s3prl_forward, s3prl_log_records = expert.forward, expert.log_records

    @functools.wraps(s3prl_forward)
    def forward(self: Any, mode: str, features: list, *args: Any, **kwargs: Any) -> Any:
        device = features[0].device

        def to_device(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            return tensor.to(device)

        with replaced(torch.Tensor, "cuda", to_device):
            return s3prl_forward(self, mode, features, *args, **kwargs)

    @functools.wraps(s3prl_log_records)
    def log_records(self: Any, mode: str, records: dict, *args: Any, **kwargs: Any) -> list[str]:
        if mode != "train":
            for name, embedding in records.items():
                if not torch.isfinite(embedding).all():
                    raise DataError(
                        f"the embedding of {name} is not finite, so the training diverged; lower "
                        "its learning rate"
                    )
            records["labels"] = [label for label, _, _ in self.test_dataset.pair_table]
        return s3prl_log_records(self, mode, records, *args, **kwargs)

    def load_state_dict(self: Any, states: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        own = self.state_dict()
        for name, value in states.items():
            if name.startswith(_OBJECTIVE) and name in own and own[name].shape != value.shape:
                raise CheckpointError(
                    f"the checkpoint is of a training on other speakers than the "
                    f"{self.train_dataset.speaker_num} in {self.train_dataset.roots[0]}; set "
                    "downstream_expert.datarc.file_path to its corpus"
                )
        return super(expert, self).load_state_dict(states, *args, **kwargs)

    _replace(
        module,
        {
            expert: {
                "forward": forward,
                "log_records": log_records,
                "load_state_dict": load_state_dict,
            }
        },
    )
