"""``run_downstream.py``: its arguments, checked and completed before s3prl's script sees them."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ..compat import checkpoint_globals, no_eval, voxceleb1_cache
from ..compat.isinstance import isinstance_kept
from ..compat.no_eval import check_fold, check_names, check_splits
from ..errors import CheckpointError, ConfigError, SetupError
from ..files import trust
from ..files.atomic import make_folder
from ..files.config import apply_overrides, read_yaml
from ..files.formats import refuse_newer_parts
from ..files.run_checkpoints import read_run
from ..files.torch_load import restrict_torch, safe_load
from ..system import torchrun
from ..system.lock import NAME, FolderLock
from . import arguments as cache_arguments
from . import noise as noisy_run
from .checkpoint_args import replaced_arguments, say_moved
from .corpus_check import check_corpus
from .recipes import RECIPES, missing_paths
from .script_args import (
    INIT_HINT,
    check_run_folder,
    options,
    override_text,
    resume_from,
    run_folder,
    with_device,
    with_plain_overrides,
    without,
    write_folder,
)

logger = logging.getLogger(__name__)

ROOT = "result/downstream"  # s3prl's folder of runs
WITH_HEADS = "hidden_states_and_heads"


def prepare_downstream(argv: list[str]) -> list[str]:
    """Check the arguments of a downstream run and complete them.

    Returns:
        What :func:`main` takes: s3prl's arguments, with ours (:mod:`.noise`,
        :mod:`.`) behind them.

    Raises:
        EkdError: one sentence for what the user can mend.
    """
    argv = [
        word.replace("--local-rank", "--local_rank", 1) if word.startswith("--local-rank") else word
        for word in argv
    ]
    noise, argv = noisy_run.split_arguments(trust.take(argv))
    cache, argv = cache_arguments.split_arguments(argv)
    argv = with_plain_overrides(argv)
    no_eval.guard()
    restrict_torch()
    args = options(argv, "mtoeicdvuknpas", flags="a", long=("device", "local_rank"))
    if noise is not None:
        noisy_run.check(noise, args.m)
    if cache is not None:
        cache_arguments.check_run(args.local_rank)
    voxceleb1_cache.guard()  # whatever -d says: with -e the task is in the checkpoint
    if args.i and not Path(args.i).is_file():
        raise CheckpointError(f"-i {args.i}: there is no such checkpoint")
    if args.i:
        states = safe_load(args.i, "checkpoint", allow=checkpoint_globals())
        refuse_newer_parts(states, args.i)
    _check_student(args)
    resume = resume_from(args, ROOT)
    folder = write_folder(args, ROOT, resume)
    if resume:
        _check_run(resume, folder, override_text(args), _asked_split(args))
        _check_folder(args, resume, folder)
        argv = without(argv, ("-e", "--past_exp"), ("-a", "--auto_resume"))
        argv += ["-e", str(resume)]
    elif args.m is not None:
        _check_new(args, _model_config(argv))
    if noise is not None:
        argv = noisy_run.with_folder(argv, noise, folder, override_text(args)) + noise.words
    if cache is not None:
        argv = [*argv, *cache.words]
    # torchrun tells the rank by the environment, s3prl's script reads it from the arguments.
    if "LOCAL_RANK" in os.environ and args.local_rank is None:
        argv = [*argv, f"--local_rank={os.environ['LOCAL_RANK']}"]
    return with_device(argv, args.device)


def main(script: ModuleType, argv: list[str]) -> None:
    """Call s3prl's script, if the upstream is one that the hub has by now.

    Raises:
        SetupError: it has not.
    """
    from s3prl import hub

    noise, argv = noisy_run.split_arguments(argv)
    cache, argv = cache_arguments.split_arguments(argv)
    sys.argv[1:] = argv
    if "-h" in argv or "--help" in argv:
        print(f"{noisy_run.HELP}\n{cache_arguments.HELP}")
    name = options(argv, "u").u
    if name and not hasattr(hub, name):
        close = difflib.get_close_matches(name, hub.options(), n=3)
        raise SetupError(
            f"-u {name}: s3prl has no such upstream; "
            + (f"did you mean {' or '.join(close)}?" if close else "see run_downstream.py -h")
        )
    from ..data.loader import workers_end
    from .resume import exact

    runner = script.Runner
    script.Runner = exact(runner)
    say_counts = None
    if cache is not None:
        from .feature_cache import cached

        script.Runner = cached(script.Runner, cache)
        say_counts = script.Runner.say_counts
    if noise is not None:  # outermost: noisy waveforms have hidden states of their own
        script.Runner = noisy_run.noisy(script.Runner, noise)
    try:
        with own_folder(argv), isinstance_kept(), workers_end():
            script.main()
    finally:
        script.Runner = runner  # one process may run several
        if say_counts is not None:
            say_counts()


@contextlib.contextmanager
def own_folder(argv: Sequence[str]) -> Iterator[None]:
    """Within it, s3prl's script writes to the folder that the command names, and alone there.

    Several may evaluate in one folder at a time, a split each, also while it trains.

    Args:
        argv: complete: the checkpoint to resume from or to evaluate stands after ``-e``.

    Raises:
        SetupError: another process writes there.
    """
    args = options(argv, "mtoenp", long=("cache_dir",))
    checkpoint = Path(args.e) if args.e else None
    folder = write_folder(args, ROOT, checkpoint)
    with contextlib.ExitStack() as stack:
        if folder is not None and torchrun.rank() == 0:
            make_folder(folder, SetupError)
            split = _asked_split(args)
            name = NAME if split is None else f".{re.sub(r'[^A-Za-z0-9_-]', '_', split)}{NAME}"
            stack.enter_context(FolderLock(folder, name))
        if checkpoint is not None:
            values = {"expdir": str(folder), "expname": args.n or folder.name}
            values["cache_dir"] = args.cache_dir  # downloads go there
            stack.enter_context(replaced_arguments(args.e, values))
        yield


def _check_folder(args: argparse.Namespace, checkpoint: Path, folder: Path) -> None:
    """Raise SetupError where a run that goes on would write into another run's folder, or cannot
    write."""
    if args.m == "train":
        check_run_folder(folder, checkpoint)
    if folder.is_dir() and not os.access(folder, os.W_OK):
        raise SetupError(f"{folder} cannot be written; name another folder with -p")


def _check_student(args: argparse.Namespace) -> None:
    """A student that is there, and that has what ``-s`` selects: s3prl would take the plain hidden
    states instead, with a warning among many lines."""
    if not (args.u or "").startswith("ekd_student") or not args.k:
        return
    if args.k.startswith(("http://", "https://")):
        return
    if not Path(args.k).is_file():
        raise CheckpointError(
            f"-k {args.k}: there is no such file; a checkpoint of run_pretrain.py or an exported "
            "student is expected"
        )
    if args.s == WITH_HEADS:
        from ..student_file import heads_problem, load_student

        problem = heads_problem(load_student(args.k))
        if problem:
            raise CheckpointError(f"-s {WITH_HEADS}: {args.k} has none, {problem}")


def _check_upstream(name: Any, checkpoint: Any, config: Any) -> None:
    """The files that s3prl is about to make the upstream of: data, and nothing that would run."""
    for path in (checkpoint, config):
        if path is not None and not isinstance(path, str):
            raise CheckpointError(f"the upstream {str(name)[:60]!r} has no path but {path!r:.60}")
    if config and Path(config).exists():
        check_names(read_yaml(config), config)
    if not checkpoint or not Path(checkpoint).exists() or Path(checkpoint).is_dir():
        return  # s3prl's business: a URL, an identifier, a folder
    from ..teachers.checkpoint import check_upstream_file

    check_upstream_file(Path(checkpoint), str(name))


def _model_config(argv: list[str]) -> str | None:
    """What ``-g`` says, which has another long name here than in run_pretrain.py."""
    args = options(argv, "g", long=("upstream_model_config",))
    return args.g or args.upstream_model_config


def _asked_split(args: argparse.Namespace) -> str | None:
    """What is evaluated, of a run that only evaluates."""
    return (args.t or "test") if args.m == "evaluate" else None


def _check_run(path: Path, folder: Path, override: str | None, split: str | None) -> None:
    """Check a checkpoint that s3prl is about to read and to build a model from.

    Args:
        folder: where this command writes.
    """
    states = read_run(path)
    if "Downstream" not in states:
        raise CheckpointError(f"-e {path} is no checkpoint of run_downstream.py")
    args = states["Args"]
    say_moved(path, getattr(args, "expdir", None), folder)
    for name, plain in (("hub", "torch"), ("from_hf_hub", False), ("push_to_hf_hub", False)):
        # s3prl would take these from the file, run code of the hub, and upload the run.
        if getattr(args, name, plain) not in (plain, str(plain)) and not trust.trusted():
            raise CheckpointError(
                f"-e {path} is of a run with --{name} {str(getattr(args, name))[:40]!r}; if you "
                f"trust who made it, add {trust.OPTION}"
            )
    _check_upstream(
        getattr(args, "upstream", None),
        getattr(args, "upstream_ckpt", None),
        getattr(args, "upstream_model_config", None),
    )
    config = apply_overrides(states["Config"], override) if override else states["Config"]
    check_names(config, f"the config in {path}")
    check_splits(getattr(args, "downstream", None), config, f"the config in {path}", split)
    fold = getattr(args, "downstream_variant", None)
    check_fold(fold, f"-e {path}: downstream_variant")
    check_corpus(
        getattr(args, "downstream", None), config, f"the config in {path}", split, fold=fold
    )


def _check_new(args: argparse.Namespace, model_config: str | None) -> None:
    """The recipe's YAML, with ``-o`` put in, and the paths that it names; the upstream's files.

    Raises:
        SetupError: an argument is missing.
        ConfigError: a path is not there; s3prl would end in a traceback, minutes later.
    """
    if not args.d:
        raise SetupError("name the task: add -d asr (or ctc, voxceleb1, emotion)")
    if run_folder(args, ROOT) is None:
        raise SetupError("name the run: add -n NAME (or -p FOLDER)")
    folder = write_folder(args, ROOT, None)
    recipe = next((recipe for recipe in RECIPES if recipe.downstream == args.d), None)
    path = args.c or f"downstream/{args.d}/config.yaml"
    if not Path(path).is_file():
        hint = "" if args.c else f"; {INIT_HINT}"
        if not args.c and recipe is not None and Path(recipe.config).is_file():
            hint = f"; add -c {recipe.config}"  # s3prl keeps the recipes of -d ctc by corpus
        raise ConfigError(f"there is no configuration {path} in this folder{hint}")
    config = read_yaml(path)
    if override_text(args):
        config = apply_overrides(config, args.o)
    check_names(config, path)
    check_splits(args.d, config, path, _asked_split(args))
    if recipe is not None:
        for key, missing in missing_paths(config, recipe.files + recipe.data, Path.cwd()):
            raise ConfigError(
                f"{path}: {key} is {missing}, which is not there; edit it or add "
                f"-o \"config.{key}='PATH'\""
            )
    _check_upstream(args.u, args.k, model_config)
    check_corpus(args.d, config, path, _asked_split(args), fold=args.v)
    if args.m == "train":
        check_run_folder(folder, None)
    make_folder(folder, SetupError)
