"""Reading and completing the arguments of s3prl's two scripts."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from ..errors import CheckpointError, SetupError
from ..files.config import argument_overrides, escape_equals

logger = logging.getLogger(__name__)

INIT_HINT = "type: s3prl-ekd init ."

_LONG = {
    "a": "auto_resume",
    "c": "config",
    "d": "downstream",
    "e": "past_exp",
    "g": "upstream_config",
    "i": "init_ckpt",
    "k": "upstream_ckpt",
    "m": "mode",
    "n": "expname",
    "o": "override",
    "p": "expdir",
    "s": "upstream_feature_selection",
    "t": "evaluate_split",
    "u": "upstream",
    "v": "downstream_variant",
}


def options(
    argv: Sequence[str], letters: str, flags: str = "", long: Sequence[str] = ()
) -> argparse.Namespace:
    """Read the options named, by s3prl's names, and leave all judgement to s3prl's own parser.

    Raises:
        SetupError: a flag was given a value.
    """
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    for letter in letters:
        action = {"action": "store_true"} if letter in flags else {"nargs": "?"}
        parser.add_argument(f"-{letter}", f"--{_LONG[letter]}", dest=letter, **action)
    for name in long:
        parser.add_argument(f"--{name}", nargs="?")
    try:
        return parser.parse_known_args(list(argv))[0]
    except argparse.ArgumentError as error:
        raise SetupError(f"the arguments cannot be read: {error}") from None


def without(argv: Sequence[str], *pairs: tuple[str, str]) -> list[str]:
    """``argv`` less some options and their values (``-a`` has none)."""
    kept: list[str] = []
    names = {name for pair in pairs for name in pair}
    skip = False
    for word in argv:
        if skip:
            skip = False
        elif word in names:
            skip = word not in ("-a", "--auto_resume")
        elif not word.startswith(tuple(f"{name}=" for name in names)):
            kept.append(word)
    return kept


def override_text(args: argparse.Namespace) -> str | None:
    """What ``-o`` says; None where nothing is overridden (s3prl takes "None" for that too)."""
    return args.o if args.o and args.o.lower() != "none" else None


def with_plain_overrides(argv: Sequence[str]) -> list[str]:
    """``argv`` with ``=`` signs in the values of ``-o`` written so that s3prl's script takes them.

    Raises:
        ConfigError: ``-o`` is not of the form that is expected.
    """
    text = override_text(options(argv, "o"))
    if text is None or text.count("=") == text.count(",,") + 1:
        return list(argv)
    return [*without(argv, ("-o", "--override")), "-o", escape_equals(text)]


def run_folder(args: argparse.Namespace, root: str) -> Path | None:
    """Where s3prl writes the run: ``-p``, or ``ROOT/NAME`` of ``-n``."""
    if args.p:
        return Path(args.p)
    return Path(root) / args.n if args.n else None


def write_folder(args: argparse.Namespace, root: str, checkpoint: Path | None) -> Path | None:
    """The folder that a run writes to. The command alone decides it.

    ``-o "args.expdir='FOLDER'"``, else ``-p`` or ``-n``, else the folder in which the checkpoint
    of ``-e`` lies, whatever folder is recorded in it.
    """
    folder = argument_overrides(override_text(args)).get("expdir")
    if folder is not None:
        return Path(str(folder))
    return run_folder(args, root) or (checkpoint.parent if checkpoint else None)


def check_run_folder(folder: Path, checkpoint: Path | None) -> None:
    """Refuse to train in a folder that holds another run.

    Args:
        checkpoint: that the run goes on from; None: it is new.

    Raises:
        SetupError: naming the folder.
    """
    from ..files.run_checkpoints import run_checkpoints  # which imports torch

    if checkpoint is not None and folder.resolve() == checkpoint.parent.resolve():
        return
    if not run_checkpoints(folder):
        return
    if checkpoint is None:
        raise SetupError(
            f"{folder} holds a run already: add -a to go on with it, or take another name"
        )
    raise SetupError(
        f"{folder} holds another run than {checkpoint}; name a new folder, or leave -n and -p out "
        f"to go on in {checkpoint.parent}"
    )


def resume_from(args: argparse.Namespace, root: str) -> Path | None:
    """The checkpoint that -a or -e asks for, as a file; None for a new run.

    As with s3prl, ``-a`` comes before ``-e`` where the run's folder has checkpoints.

    Raises:
        CheckpointError: there is no such checkpoint.
    """
    from ..files.run_checkpoints import newest  # which imports torch: --help does without

    folder = write_folder(args, root, None)
    if args.a and folder is not None and folder.is_dir():
        found = newest(folder)
        if found is not None:
            return found
    if args.e:
        path = Path(args.e)
        found = newest(path) if path.is_dir() else path
        if found is None or not found.is_file():
            raise CheckpointError(f"-e {args.e}: there is no such checkpoint (states-*.ckpt)")
        return found
    return None


def with_device(argv: Sequence[str], device: str | None) -> list[str]:
    """Choose the device that is there and say so; an explicit one wins. s3prl's default is cuda.

    Raises:
        SetupError: the explicit one is not there.
    """
    import torch

    if device is not None:
        check_device(device)
        return list(argv)
    if torch.cuda.is_available():
        return list(argv)
    logger.info("no CUDA device here: running with --device cpu")
    return [*argv, "--device", "cpu"]


def check_device(device: str) -> None:
    """Raise SetupError unless torch can put something there."""
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).strip().splitlines()[0]
        raise SetupError(f"--device {device} cannot be used here: {first}") from None
