"""What s3prl passes to ``eval``, read as data or checked instead.

s3prl's models evaluate the conv layers that a checkpoint or config names, and ``-o``:
:func:`guard` gives each of its modules that does so an ``eval`` that reads that kind of value and
runs nothing. ``optimizer.name``, ``modelrc.select`` and the like become classes by ``eval``:
:func:`check_names` allows names only. The recipes of SID and ER evaluate the names of splits
(``eval(f'self.get_{split}_dataloader')``): :func:`check_splits` allows those that a recipe has.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

from ..distill.conv_layers import parse_conv_layers
from ..errors import ConfigError
from .child_processes import forget_in_children, repeat_in_children
from .import_hooks import forget_import, on_import

# The keys whose text s3prl 0.4.18 evaluates, wherever they stand in a recipe.
EVALUATED = {"select", "module", "pooling", "agg_module", "model_type", "metric", "unk_weight"}
EVALUATED |= {"feat_type", "utter_module", "ObjectiveLoss"}
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ALSO = {"-math.inf", "math.inf"}  # what s3prl's own ASR recipe has for unk_weight


def check_names(config: Any, where: str) -> None:
    """Refuse a config in which something that s3prl evaluates is not a plain name.

    Raises:
        ConfigError: naming the key.
    """
    for path, value in _found(config, ()):
        if isinstance(value, str) and not _is_name(value):
            raise ConfigError(
                f"{where}: {'.'.join(path)} is {value[:60]!r}, which s3prl would run as code; it "
                "must be a plain name"
            )


def _is_name(text: str) -> bool:
    if hasattr(builtins, text):  # exec, open, exit: no class of s3prl's is called so
        return False
    return bool(_NAME.fullmatch(text)) or text in _ALSO


def _found(config: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(config, dict):
        for key, value in config.items():
            here = (*path, str(key))
            named = key == "name" and path and path[-1] in ("optimizer", "scheduler")
            if key in EVALUATED or named:
                yield from ((here, item) for item in _items(value))
            yield from _found(value, here)
    elif isinstance(config, (list, tuple)):
        for i, value in enumerate(config):
            yield from _found(value, (*path, str(i)))


def _items(value: Any) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def read_conv_layers(text: Any) -> list[tuple[int, int, int]]:
    """The conv layers that s3prl would evaluate. Raises ConfigError: they are something else."""
    return list(parse_conv_layers(text))


def read_layers(text: Any) -> Any:
    """Conv layers, or a list of whole numbers. Raises ConfigError: they are something else."""
    try:
        value = ast.literal_eval(text)
    except Exception:  # literal_eval documents five of them
        return read_conv_layers(text)
    if isinstance(value, (list, tuple)) and all(type(each) is int for each in value):
        return value
    return read_conv_layers(text)


def read_value(text: str) -> Any:
    """A number, text, list or mapping of ``-o``. Raises ValueError: s3prl then takes the text."""
    try:
        return ast.literal_eval(text)
    except Exception:  # literal_eval documents five of them
        raise ValueError("not a plain value") from None


_READERS: dict[str, Callable[[Any], Any]] = {
    "upstream.distiller.model": read_conv_layers,
    "upstream.hubert.hubert_model": read_conv_layers,
    "upstream.wav2vec2.wav2vec2_model": read_conv_layers,
    "upstream.data2vec.data2vec_model": read_conv_layers,
    "upstream.wavlm.WavLM": read_conv_layers,
    "upstream.wav2vec.wav2vec_model": read_conv_layers,
    "upstream.lighthubert.lighthubert.lighthubert": read_conv_layers,
    "upstream.multires_hubert.hubert_model": read_layers,
    "utility.helper": read_value,
}
# Under the bare names too, by which s3prl's checkout and its pretraining code import them.
READERS = {f"{root}{name}": reader for name, reader in _READERS.items() for root in ("s3prl.", "")}


_for_good = False  # guarded by :func:`guard`


def guard() -> None:
    """Keep those modules of s3prl from evaluating, whenever this process or a child imports them.

    Calling it twice changes nothing.
    """
    global _for_good
    _for_good = True
    _guard()


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Within it they do not evaluate; on exit neither, if :func:`guard` was called."""
    _guard()
    try:
        yield
    finally:
        if not _for_good:
            forget_in_children(guard)
            for name in READERS:
                forget_import(name)
                if name in sys.modules:
                    vars(sys.modules[name]).pop("eval", None)


def _guard() -> None:
    for name, reader in READERS.items():
        if name in sys.modules:
            vars(sys.modules[name])["eval"] = reader
        on_import(name, _run_and_guard)
    repeat_in_children(guard)


def _run_and_guard(module: ModuleType, run: Callable[[ModuleType], None]) -> None:
    run(module)
    vars(module)["eval"] = READERS[module.__name__]


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
    named = [(f"{where}: {key}", split) for key, split in run_splits(config)]
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


def run_splits(config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The splits of a run that trains, each with its key in the recipe."""
    runner = config.get("runner")
    runner = runner if isinstance(runner, Mapping) else {}
    several = runner.get("eval_dataloaders") or ()
    several = several if isinstance(several, (list, tuple)) else [several]
    train = ("runner.train_dataloader", runner.get("train_dataloader", "train"))
    return [train, *(("runner.eval_dataloaders", split) for split in several)]


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
