"""Command-line options as a :class:`StudySetting`, and checks of the input files."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

from s3prl_ekd.errors import ConfigError, SetupError

from .design import ENSEMBLES, NONE, StudentSize, StudySetting, with_absolute_paths

TEACHERS = ("tiny_hubert", "tiny_robust_hubert", "tiny_wavlm")
SIZES = ("small=128,192,1", "large=128,192,3")  # width of the tiny teachers
STEPS = {"pr": 1000, "asr": 400, "sid": 240, "er": 160}  # as in the tiny teachers' cards


def require_packages() -> None:
    """Raise SetupError if a package of the extra ``analysis`` is missing."""
    for name in ("scipy", "matplotlib"):
        if find_spec(name) is None:
            raise SetupError(f"the study needs {name}; type: pip install 's3prl_ekd[analysis]'")


def parse_setting(args: argparse.Namespace) -> StudySetting:
    """Convert and check the options.

    Raises:
        ConfigError: an option is invalid.
        SetupError: no such teacher file.
    """
    teachers = {}
    for text in args.teacher or TEACHERS:
        name, equals, source = text.partition("=")
        _check_name("--teacher", name, teachers)
        teachers[name] = source if equals else name
    sizes = {}
    for text in args.size or SIZES:
        name, _, numbers = text.partition("=")
        _check_name("--size", name, sizes)
        try:
            sizes[name] = StudentSize(*map(int, numbers.split(",")))
        except (TypeError, ValueError):
            raise ConfigError(f"--size: expected NAME=CHANNELS,WIDTH,LAYERS, got {text}") from None
    steps = {task: STEPS[task] for task in STEPS if task in args.tasks}
    for text in args.task_steps:
        task, _, number = text.partition("=")
        if task not in STEPS or not number.isdigit() or int(number) < 4:
            raise ConfigError(
                f"--task-steps: expected TASK=N, TASK one of {', '.join(STEPS)} and N 4 or more; "
                f"got {text}"
            )
        if task in steps:
            steps[task] = int(number)
    return with_absolute_paths(
        StudySetting(
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


def _check_name(option: str, name: str, used) -> None:
    if not name.replace("_", "").isalnum() or name in (*ENSEMBLES, NONE):
        raise ConfigError(
            f"{option}: names have letters, digits and _ and are not "
            f"{', '.join((*ENSEMBLES, NONE))}; got {name!r}"
        )
    if name in used:
        raise ConfigError(f"{option} {name} is given twice")


def check_inputs(
    setting: StudySetting, speech: Path, noise: Path, args: argparse.Namespace
) -> None:
    """Check that the input files and folders exist.

    Raises:
        SetupError: with the missing file or folder.
    """
    for path in args.reference:
        if not path.is_dir():
            raise SetupError(f"--reference {path}: no such folder")
    if args.report_only:
        return
    required = [f"{name}.tsv" for name in ("unlabeled", *setting.tasks)]
    required += ["lexicon.txt"] if "pr" in setting.tasks else []
    for name in required:
        if not (speech / name).is_file():
            raise SetupError(f"no {name} in {speech}; name the folder with the manifests")
    if args.noise is None:
        raise SetupError(
            "--noise is missing: name a folder of noises that no teacher was trained on "
            "(tiny_robust_hubert was trained on folds 1 and 2 of ESC-10)"
        )
    if not noise.is_dir():
        raise SetupError(f"--noise {noise}: no such folder")
