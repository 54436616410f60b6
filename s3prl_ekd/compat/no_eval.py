"""Keep s3prl from running text of a checkpoint, config or command line as code.

s3prl passes such text to ``eval`` in three places:

- The conv layers of a checkpoint or config, and ``-o``. :func:`block_eval` replaces ``eval`` in
  those modules of s3prl by a function that parses the expected kind of value.
- Class names such as ``optimizer.name`` and ``modelrc.select``. :func:`reject_code` accepts
  only identifiers that are not Python builtins.
- The names of splits in the recipes of SID and ER (``eval(f'self.get_{split}_dataloader')``).
  :func:`check_splits` rejects splits that the recipe does not have.
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

# The keys whose value s3prl 0.4.18 passes to eval, at any depth of a recipe.
EVALUATED = {"select", "module", "pooling", "agg_module", "model_type", "metric", "unk_weight"}
EVALUATED |= {"feat_type", "utter_module", "ObjectiveLoss"}
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ALLOWED_EXPRESSIONS = {"-math.inf", "math.inf"}  # for unk_weight in s3prl's ASR recipe


def reject_code(config: Any, location: str) -> None:
    """Raise ConfigError if a value that s3prl passes to ``eval`` could run code.

    Args:
        config: a parsed YAML file or the config in a checkpoint.
        location: the file; starts the message.
    """
    for path, value in _evaluated_values(config, ()):
        if isinstance(value, str) and not _is_allowed(value):
            raise ConfigError(
                f"{location}: {'.'.join(path)} must be an identifier and not a Python builtin, "
                f"because s3prl runs it as code; got {value[:60]!r}"
            )


def _is_allowed(text: str) -> bool:
    if hasattr(builtins, text):  # exec, open, exit, ...: s3prl has no class of these names
        return False
    return bool(_NAME.fullmatch(text)) or text in _ALLOWED_EXPRESSIONS


def _evaluated_values(config: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Path and value of each key that s3prl evaluates; of a list, each item."""
    if isinstance(config, dict):
        for key, value in config.items():
            key_path = (*path, str(key))
            class_name = key == "name" and path and path[-1] in ("optimizer", "scheduler")
            if key in EVALUATED or class_name:
                items = value if isinstance(value, (list, tuple)) else [value]
                yield from ((key_path, item) for item in items)
            yield from _evaluated_values(value, key_path)
    elif isinstance(config, (list, tuple)):
        for i, value in enumerate(config):
            yield from _evaluated_values(value, (*path, str(i)))


def read_conv_layers(text: Any) -> list[tuple[int, int, int]]:
    """Parse conv layers. Raises ConfigError if ``text`` is anything else."""
    return list(parse_conv_layers(text))


def read_layers(text: Any) -> Any:
    """Parse conv layers or a list of integers. Raises ConfigError if ``text`` is neither."""
    with contextlib.suppress(ValueError):
        value = read_value(text)
        if isinstance(value, (list, tuple)) and all(type(item) is int for item in value):
            return value
    return read_conv_layers(text)


def read_value(text: str) -> Any:
    """Parse a value of ``-o`` as a Python literal; raises ValueError: s3prl then uses the text."""
    try:
        return ast.literal_eval(text)
    except Exception:  # literal_eval documents five exception classes
        raise ValueError("not a Python literal") from None


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
# Also under the names without `s3prl.`, which s3prl's checkout and its pretraining code import.
READERS = {f"{root}{name}": reader for name, reader in _READERS.items() for root in ("s3prl.", "")}


_permanent = False  # set by :func:`block_eval`


def block_eval() -> None:
    """Replace ``eval`` in the modules of :data:`READERS`, here and in child processes.

    It applies to modules that are imported already and to later imports. Further calls change
    nothing.
    """
    global _permanent
    _permanent = True
    _install_readers()


@contextlib.contextmanager
def eval_blocked() -> Iterator[None]:
    """:func:`block_eval` for a ``with`` block; undone on exit, unless it was called before."""
    _install_readers()
    try:
        yield
    finally:
        if not _permanent:
            forget_in_children(block_eval)
            for name in READERS:
                forget_import(name)
                if name in sys.modules:
                    vars(sys.modules[name]).pop("eval", None)


def _install_readers() -> None:
    for name, reader in READERS.items():
        if name in sys.modules:
            vars(sys.modules[name])["eval"] = reader
        on_import(name, _run_and_install_reader)
    repeat_in_children(block_eval)


def _run_and_install_reader(module: ModuleType, run: Callable[[ModuleType], None]) -> None:
    run(module)
    vars(module)["eval"] = READERS[module.__name__]


# s3prl's experts for these have a method for each split.
_METHODS: dict[str, tuple[str, ...]] = dict.fromkeys(
    ("voxceleb1", "emotion", "speech_commands", "fluent_commands", "diarization"),
    ("train", "dev", "test"),
)
_METHODS["sv_voxceleb1"] = ("train", "test")  # its method for dev scores the trials of test
_METHODS["quesst14_dtw"] = ("dev", "test")  # for any other name s3prl evaluates the test set
# Those for ASR and PR read each split's list of data sets from this section of the recipe.
_SECTIONS = {"asr": "datarc", "ctc": "corpus"}
# lists in these sections that are not splits
_NOT_SPLITS = {"lexicon", "train_speakers", "valid_speakers", "test_speakers"}
_SPLIT_NAME = re.compile(r"\w[\w.-]*", re.ASCII)


def check_splits(
    downstream: str | None,
    config: Mapping[str, Any],
    location: str,
    evaluate_split: str | None = None,
) -> None:
    """Reject splits that the recipe does not have.

    Args:
        downstream: the name after ``-d``. For recipes other than SID, ER, ASR and PR, only the
            characters of the split are checked.
        location: the recipe's file; starts the message.
        evaluate_split: the split after ``-t``. None for training, which uses the splits in
            ``runner``.

    Raises:
        ConfigError: names the key or option, and the recipe's splits.
    """
    splits = [(f"{location}: {key}", split) for key, split in run_splits(config)]
    if evaluate_split is not None:
        splits = [("-t", evaluate_split)]
    expert = config.get("downstream_expert")
    datarc = expert.get("datarc") if isinstance(expert, Mapping) else None
    if isinstance(datarc, Mapping):
        check_fold(datarc.get("test_fold"), f"{location}: downstream_expert.datarc.test_fold")
    available = _recipe_splits(downstream, config)
    for key, split in splits:
        if available is None:
            valid = isinstance(split, str) and bool(_SPLIT_NAME.fullmatch(split))
            allowed = "letters, digits, _, - and ."
        else:
            valid = split in available
            allowed = " or ".join(available) or "a recipe that lists its data sets; this has none"
        if not valid:
            raise ConfigError(f"{key}: no such split {split!r:.60}; use {allowed}")


def run_splits(config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The splits that a training run uses, as (key in the recipe, split)."""
    runner = config.get("runner")
    runner = runner if isinstance(runner, Mapping) else {}
    eval_splits = runner.get("eval_dataloaders") or ()
    eval_splits = eval_splits if isinstance(eval_splits, (list, tuple)) else [eval_splits]
    train = ("runner.train_dataloader", runner.get("train_dataloader", "train"))
    return [train, *(("runner.eval_dataloaders", split) for split in eval_splits)]


def check_fold(fold: Any, location: str) -> None:
    """Reject an ER fold with characters that a split cannot have: s3prl uses it in file names.

    Raises:
        ConfigError: starts with ``location``, the file and key.
    """
    if fold is not None and not (isinstance(fold, str) and _SPLIT_NAME.fullmatch(fold)):
        raise ConfigError(f"{location} must be fold1, fold2, ..., got {fold!r:.60}")


def _recipe_splits(downstream: str | None, config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The splits of a recipe; None for a recipe of no known task."""
    if not isinstance(downstream, str):  # it may come from a checkpoint
        return None
    if downstream in _METHODS:
        return _METHODS[downstream]
    expert = config.get("downstream_expert")
    section = expert.get(_SECTIONS.get(downstream)) if isinstance(expert, Mapping) else None
    if not isinstance(section, Mapping):
        return None
    return tuple(
        key for key, sets in section.items() if isinstance(sets, list) and key not in _NOT_SPLITS
    )
