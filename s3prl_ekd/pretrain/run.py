"""``run_pretrain.py -u ekd``: arguments checked and completed, our trainer in place of s3prl's
Runner."""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from ..compat import no_eval
from ..compat.no_eval import check_names
from ..downstream.checkpoint_args import replaced_arguments, say_moved
from ..downstream.script_args import (
    INIT_HINT,
    check_device,
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
from ..errors import CheckpointError, SetupError
from ..files import trust
from ..files.atomic import make_folder
from ..files.config import apply_overrides, overridden, plain, read_yaml
from ..files.run_checkpoints import check_whole, read_run
from ..system import torchrun
from ..system.lock import FolderLock
from .config_diff import check_changes, check_same, described, differences
from .distributed import leave
from .settings import check_runner_config, load_model_config, load_runner_config

logger = logging.getLogger(__name__)

ROOT = "result/pretrain"  # s3prl's folder of runs


def prepare(argv: list[str]) -> list[str]:
    """Check the arguments of a pretraining run and complete them.

    Raises:
        EkdError: one sentence for what the user can mend, before anything heavy is loaded.
    """
    argv = with_plain_overrides(trust.take(argv))
    no_eval.guard()
    from ..files.torch_load import restrict_torch

    restrict_torch()
    args = options(argv, "euncgpoa", flags="a", long=("device", "multi_gpu"))
    if not Path("pretrain").is_dir():
        raise SetupError(f"nothing is set up in this folder (no pretrain/ekd); {INIT_HINT}")
    if args.u == "ekd" and not Path("pretrain/ekd").is_dir():
        raise SetupError(f"ekd is not set up in this folder (no pretrain/ekd); {INIT_HINT}")
    if args.u not in (None, "ekd"):
        if torchrun.several():
            raise SetupError(
                f"s3prl's own Runner, which -u {args.u} has, does not join processes, each would "
                "train a model of its own; start it without torchrun"
            )
        resume = _check_files(args)
        if resume:
            argv = [
                *without(argv, ("-e", "--past_exp"), ("-a", "--auto_resume")),
                "-e",
                str(resume),
            ]
        return with_device(argv, args.device)
    if args.p and not args.n:
        argv = [*argv, "-n", Path(args.p).name]  # s3prl insists on a name beside a folder
    resume = resume_from(args, ROOT)
    return _resumed(argv, args, resume) if resume else _new(argv, args)


def _check_files(args: argparse.Namespace) -> Path | None:
    """Check the files of another method of s3prl: data, and nothing that would run.

    Returns:
        The checkpoint to resume from, or None.
    """
    config = {}
    for path in filter(None, (args.g, args.c)):
        config = read_yaml(path)
    resume = resume_from(args, ROOT)
    if resume:
        config = read_run(resume)["Config"]
    if override_text(args):
        config = apply_overrides(config, args.o)
    check_names(config, str(resume or args.c))
    return resume


def _new(argv: list[str], args: argparse.Namespace) -> list[str]:
    if args.u is None:
        raise SetupError("name the method: run_pretrain.py -u ekd -n NAME")
    folder = run_folder(args, ROOT)
    if folder is None:
        raise SetupError("name the run: add -n NAME (or -p FOLDER)")
    folder = write_folder(args, ROOT, None)
    load_runner_config(args.c or "pretrain/ekd/config_runner.yaml", override_text(args))
    load_model_config(args.g or "pretrain/ekd/config_model.yaml")
    argv = with_device(argv, args.device)
    check_run_folder(folder, None)
    make_folder(folder, SetupError)
    return argv


def _resumed(argv: list[str], args: argparse.Namespace, path: Path) -> list[str]:
    """The arguments for resuming: the checkpoint by name, and a device that exists."""
    import torch

    states = read_run(path)
    if "Upstream_Config" not in states:
        raise CheckpointError(f"{path} is no checkpoint of run_pretrain.py -u ekd")
    if getattr(states["Args"], "upstream", None) != "ekd":
        raise CheckpointError(f"{path} is of a run with another method than ekd")
    check_whole(path)
    folder = write_folder(args, ROOT, path)
    check_run_folder(folder, path)
    say_moved(path, getattr(states["Args"], "expdir", None), folder)
    logger.info("resume from %s at step %s", path, states["Step"])
    _check_config(args, states, path)
    argv = without(argv, ("-e", "--past_exp"), ("-a", "--auto_resume"))
    saved = str(getattr(states["Args"], "device", "cuda"))
    if args.device is not None:
        check_device(args.device)
    elif saved.startswith("cuda") and not torch.cuda.is_available():
        logger.info("no CUDA device here: going on with --device cpu")
        argv += ["--device", "cpu"]
    return [*argv, "-e", str(path)]


def _check_config(args: argparse.Namespace, states: dict, path: Path) -> None:
    """A resumed run keeps its config; ``-o`` may change some of it, and the log says what.

    Files named by ``-c`` and ``-g`` must say the same, as they do where the command that started
    the run is typed again with ``-a``.

    Raises:
        EkdError: naming the keys that differ.
    """
    text = override_text(args)
    kept = check_runner_config(states["Config"], f"the config in {path}")
    config = apply_overrides(states["Config"], text) if text else states["Config"]
    now = check_runner_config(config, f"the config in {path} with -o")
    changes = differences(plain(kept), plain(now))
    check_changes(changes, str(path))
    if args.c:
        named = differences(plain(now), plain(load_runner_config(args.c, text)))
        check_same(args.c, named, str(path), "-c")
    if args.g:
        model = load_model_config(states["Upstream_Config"])
        named = differences(plain(model), plain(load_model_config(args.g)))
        check_same(args.g, named, str(path), "-g")
    if changes:
        logger.info("changed by -o: %s", described(changes))


def main(script: ModuleType, argv: list[str]) -> None:
    """Call s3prl's script: for ekd with our trainer, and alone in the run's folder.

    On resume what was typed has the last word. s3prl means ``-o`` to be of the highest priority,
    but puts all of the checkpoint's arguments, its ``-o`` and its device among them, over it.
    """
    args = options(argv, "euncgpo", long=("device",))
    checkpoint = Path(args.e) if args.e else None
    folder = write_folder(args, ROOT, checkpoint)
    ekd = args.u in (None, "ekd")
    with contextlib.ExitStack() as stack:
        if folder is not None and torchrun.rank() == 0:
            make_folder(folder, SetupError)
            stack.enter_context(FolderLock(folder))  # before s3prl copies the configs there
        if checkpoint is not None:
            values = {"expdir": str(folder), "expname": args.n or folder.name, "override": args.o}
            if args.device:
                values["device"] = args.device
            stack.enter_context(replaced_arguments(args.e, values))
        if ekd:
            stack.enter_context(_our_trainer(script, override_text(args)))
        if torchrun.rank():  # s3prl's scripts print; one of several processes is enough
            stack.enter_context(
                contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w")))
            )
        script.main()
    leave()
    if ekd and torchrun.rank() == 0:
        print(
            f"\ndone: the student is in {folder}; next:\n"
            f"  s3prl-ekd export student {shlex.quote(str(folder))} -o student.safetensors\n"
            "  run_downstream.py -m train -u ekd_student -k student.safetensors -d asr -n my_asr"
        )


@contextlib.contextmanager
def _our_trainer(script: ModuleType, override: str | None) -> Iterator[None]:
    """Within it, the script's Runner is our trainer."""
    from .trainer import Trainer

    s3prl_runner = script.Runner
    script.Runner = functools.partial(  # type: ignore[attr-defined]
        Trainer, s3prl_runner=s3prl_runner, overridden=overridden(override)
    )
    try:
        yield
    finally:
        script.Runner = s3prl_runner  # type: ignore[attr-defined]
