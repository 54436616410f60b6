"""The splits that a downstream run evaluates: names that its recipe has, and nothing else.

s3prl 0.4.18 makes code of them (``eval(f'self.get_{split}_dataloader')`` in the recipes of SID and
ER), and looks for those of ASR and PR only at the first evaluation, after minutes of training.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError

# The experts of SID and ER have one method a split; those of ASR and PR a list of sets, here:
_METHODS = dict.fromkeys(("voxceleb1", "emotion"), ("train", "dev", "test"))
_SECTIONS = {"asr": "datarc", "ctc": "corpus"}
_OTHER_LISTS = {"lexicon"}  # of these sections
_SPLIT_NAME = re.compile(r"\w[\w.-]*", re.ASCII)


def check_splits(
    downstream: str | None, config: Mapping[str, Any], where: str, asked: str | None = None
) -> None:
    """Refuse splits that the recipe has not.

    Args:
        downstream: the name after ``-d``; of others than the four only the form is checked.
        config: the recipe, with ``-o`` put in.
        where: the recipe's file, for messages.
        asked: the split after ``-t``; None: this run trains, and takes those in ``runner``.

    Raises:
        ConfigError: naming the key or option, and the splits there are.
    """
    runner = config.get("runner")
    runner = runner if isinstance(runner, Mapping) else {}
    named = [(f"{where}: runner.train_dataloader", runner.get("train_dataloader", "train"))]
    several = runner.get("eval_dataloaders") or ()
    several = several if isinstance(several, (list, tuple)) else [several]
    named += [(f"{where}: runner.eval_dataloaders", split) for split in several]
    if asked is not None:
        named = [("-t", asked)]
    expert = config.get("downstream_expert")
    datarc = expert.get("datarc") if isinstance(expert, Mapping) else None
    if isinstance(datarc, Mapping):
        check_fold(datarc.get("test_fold"), f"{where}: downstream_expert.datarc.test_fold")
    known = _known(downstream, config)
    for key, split in named:
        if known is None and isinstance(split, str) and _SPLIT_NAME.fullmatch(split):
            continue
        if known is None or split not in known:
            allowed = "a plain name is needed" if known is None else f"use {_listed(known)}"
            raise ConfigError(f"{key}: there is no split {split!r:.60}; {allowed}")


def check_fold(fold: Any, where: str) -> None:
    """Refuse an ER fold that is no plain name: s3prl puts it into the names of files.

    Raises:
        ConfigError: naming ``where`` it stands.
    """
    if fold is not None and not (isinstance(fold, str) and _SPLIT_NAME.fullmatch(fold)):
        raise ConfigError(f"{where} is {fold!r:.60}; fold1, fold2, ... is expected")


def _known(downstream: str | None, config: Mapping[str, Any]) -> tuple[str, ...] | None:
    if not isinstance(downstream, str):  # a checkpoint may say anything
        return None
    if downstream in _METHODS:
        return _METHODS[downstream]
    expert = config.get("downstream_expert")
    section = expert.get(_SECTIONS.get(downstream)) if isinstance(expert, Mapping) else None
    if not isinstance(section, Mapping):
        return None
    return tuple(
        key for key, sets in section.items() if isinstance(sets, list) and key not in _OTHER_LISTS
    )


def _listed(names: tuple[str, ...]) -> str:
    return " or ".join(names) if names else "a list of sets in the recipe, which has none"
