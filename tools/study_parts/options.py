"""What was typed, checked before anything is run."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

from s3prl_ekd.errors import ConfigError, SetupError

from .design import ENSEMBLE, NONE, Setting, Size, resolved

TEACHERS = ("tiny_hubert", "tiny_robust_hubert", "tiny_wavlm")
SIZES = ("small=128,192,1", "large=128,192,3")  # of the tiny teachers' width
STEPS = {"pr": 1000, "asr": 400, "sid": 240, "er": 160}  # as the tiny teachers' cards have


def require_packages() -> None:
    """Raise SetupError where a package of the extra is missing."""
    for name in ("scipy", "matplotlib"):
        if find_spec(name) is None:
            raise SetupError(f"the study needs {name}; type: pip install 's3prl_ekd[analysis]'")


def setting_of(args: argparse.Namespace) -> Setting:
    """What was typed, checked.

    Raises:
        ConfigError: an option makes no sense.
        SetupError: a teacher's file is not there.
    """
    teachers = {}
    for text in args.teacher or TEACHERS:
        name, equals, source = text.partition("=")
        _new("--teacher", name, teachers)
        teachers[name] = source if equals else name
    sizes = {}
    for text in args.size or SIZES:
        name, _, numbers = text.partition("=")
        _new("--size", name, sizes)
        try:
            sizes[name] = Size(*map(int, numbers.split(",")))
        except (TypeError, ValueError):
            raise ConfigError(f"--size {text}: NAME=CHANNELS,WIDTH,LAYERS is expected") from None
    steps = {task: STEPS[task] for task in STEPS if task in args.tasks}
    for text in args.task_steps:
        task, _, number = text.partition("=")
        if task not in STEPS or not number.isdigit() or int(number) < 4:
            raise ConfigError(
                f"--task-steps {text}: TASK=N is expected, of {', '.join(STEPS)}, N 4 or more"
            )
        if task in steps:
            steps[task] = int(number)
    return resolved(
        Setting(
            teachers=teachers,
            layers=tuple(args.layers),
            init=_init(args.init, teachers),
            sizes=sizes,
            seeds=tuple(args.seeds),
            steps=args.steps,
            batch=args.batch,
            seconds=args.seconds,
            lr=args.lr,
            tasks=steps,
            snr=args.snr,
            sid_seconds=args.sid_seconds,
            all_folds=args.all_folds,
        )
    )


def _init(text: str | None, teachers) -> str | None:
    if text is None:
        return next(iter(teachers))
    return None if text == NONE else text


def _new(option: str, name: str, taken) -> None:
    if not name.replace("_", "").isalnum() or name in (*ENSEMBLE, NONE):
        raise ConfigError(f"{option} {name!r}: a name of letters, digits and _ is expected")
    if name in taken:
        raise ConfigError(f"{option} {name} is there twice")


def check_inputs(setting: Setting, speech: Path, noise: Path, args: argparse.Namespace) -> None:
    """Say what is missing before anything is run.

    Raises:
        SetupError: naming the file or folder.
    """
    for path in args.reference:
        if not path.is_dir():
            raise SetupError(f"--reference {path}: there is no such folder")
    if args.report_only:
        return
    wanted = [f"{name}.tsv" for name in ("unlabeled", *setting.tasks)]
    wanted += ["lexicon.txt"] if "pr" in setting.tasks else []
    for name in wanted:
        if not (speech / name).is_file():
            raise SetupError(f"{speech} has no {name}; name the folder with the manifests")
    if args.noise is None:
        raise SetupError(
            "--noise: name a folder of noises that no teacher was trained on; tiny_robust_hubert "
            "heard folds 1 and 2 of ESC-10"
        )
    if not noise.is_dir():
        raise SetupError(f"{noise}: there is no such folder of noises; name one with --noise")
