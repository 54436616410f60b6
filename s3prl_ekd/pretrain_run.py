"""``run_pretrain.py -u ekd``: arguments checked and completed before, resuming mended around it."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import yaml

from .arguments import (
    INIT_HINT,
    make_folder,
    options,
    override_text,
    resume_from,
    run_folder,
    with_device,
    without,
)
from .checkpoints import read_run
from .config import apply_overrides, check_runner_config, load_model_config, load_runner_config
from .errors import CheckpointError, SetupError
from .schema import plain, read_yaml

logger = logging.getLogger(__name__)

ROOT = "result/pretrain"  # s3prl's folder of runs


def prepare(argv: list[str]) -> list[str]:
    """Check the arguments of a pretraining run and complete them.

    Raises:
        EkdError: one sentence for what the user can mend, before anything heavy is loaded.
    """
    args = options(argv, "euncgpoa", flags="a", long=("device", "multi_gpu"))
    if not Path("pretrain").is_dir():
        raise SetupError(f"nothing is set up in this folder (no pretrain/ekd); {INIT_HINT}")
    if args.u == "ekd" and not Path("pretrain/ekd").is_dir():
        raise SetupError(f"ekd is not set up in this folder (no pretrain/ekd); {INIT_HINT}")
    if args.u not in (None, "ekd"):
        return with_device(argv, args.device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SetupError(
            "s3prl's pretraining Runner does not join processes, each would train a student of its "
            "own; start it without torchrun"
        )
    if args.p and not args.n:
        argv = [*argv, "-n", Path(args.p).name]  # s3prl insists on a name beside a folder
    resume = resume_from(args, ROOT)
    return _resumed(argv, args, resume) if resume else _new(argv, args)


def _new(argv: list[str], args: argparse.Namespace) -> list[str]:
    if args.u is None:
        raise SetupError("name the method: run_pretrain.py -u ekd -n NAME")
    folder = run_folder(args, ROOT)
    if folder is None:
        raise SetupError("name the run: add -n NAME (or -p FOLDER)")
    load_runner_config(args.c or "pretrain/ekd/config_runner.yaml", override_text(args))
    load_model_config(args.g or "pretrain/ekd/config_model.yaml")
    argv = with_device(argv, args.device)
    if any(folder.glob("states-*.ckpt")):
        raise SetupError(
            f"{folder} holds a run already: add -a to go on with it, or take another name"
        )
    make_folder(folder)
    return argv


def _resumed(argv: list[str], args: argparse.Namespace, path: Path) -> list[str]:
    """The arguments for resuming: the checkpoint by name, and a device that exists."""
    import torch

    states = read_run(path)
    if "Upstream_Config" not in states:
        raise CheckpointError(f"{path} is no checkpoint of run_pretrain.py -u ekd")
    logger.info("resume from %s at step %s", path, states["Step"])
    text = override_text(args)
    config = apply_overrides(states["Config"], text) if text else states["Config"]
    check_runner_config(config, f"the config in {path}")
    for name, value in (("-c", args.c), ("-g", args.g)):
        if value:
            logger.warning("%s %s is not read: a resumed run keeps its config", name, value)
    argv = without(argv, ("-e", "--past_exp"), ("-a", "--auto_resume"))
    saved = str(getattr(states["Args"], "device", "cuda"))
    if args.device is not None:
        argv = with_device(argv, args.device)
    elif saved.startswith("cuda") and not torch.cuda.is_available():
        logger.info("no CUDA device here: going on with --device cpu")
        argv += ["--device", "cpu"]
    return [*argv, "-e", str(path)]


def main(script: ModuleType, argv: list[str]) -> None:
    """Call s3prl's script, and let what was typed have the last word on resume.

    s3prl means ``-o`` to be of the highest priority, but puts all of the checkpoint's arguments,
    its ``-o`` and its device among them, over what was typed, and the optimizer's saved learning
    rate and schedule over the config's.
    """
    typed = options(argv, "eog", long=("device",))
    seen: dict[str, argparse.Namespace] = {}
    with _typed_last(script, typed, seen), _config_rules_the_optimizer(script):
        script.main()
    args = seen["args"]
    if args.upstream == "ekd":
        folder = shlex.quote(str(args.expdir))
        print(
            f"\ndone: the student is in {args.expdir}; next:\n"
            f"  s3prl-ekd export student {folder} -o student.pt\n"
            "  run_downstream.py -m train -u ekd_student -k student.pt -d asr -n my_asr"
        )


@contextlib.contextmanager
def _typed_last(script: ModuleType, typed: argparse.Namespace, seen: dict) -> Iterator[None]:
    get_args, override = script.get_pretrain_args, script.override

    def get_args_typed_last():
        if typed.e:
            # The checkpoint's own -o is in its config already; s3prl would evaluate it once more.
            script.override = lambda text, args, config: None
        try:
            args, config = get_args()
        finally:
            script.override = override
        if typed.e:
            if override_text(typed):
                override(typed.o, args, config)
            if typed.device:
                args.device = typed.device
        elif args.upstream == "ekd":
            _write_whole_config(args)
        args.override = None  # or the next resume would take it for new
        seen["args"] = args
        return args, config

    script.get_pretrain_args = get_args_typed_last
    try:
        yield
    finally:
        script.get_pretrain_args = get_args


def _write_whole_config(args: argparse.Namespace) -> None:
    """s3prl copies the model config into the run's folder; one that extends another would point to
    nothing there, so what it comes to takes its place."""
    if "extends" in read_yaml(args.upstream_config):
        text = yaml.safe_dump(plain(load_model_config(args.upstream_config)), sort_keys=False)
        path = Path(args.expdir) / "config_model.yaml"
        path.write_text(f"# {args.upstream_config} with what it extends\n{text}", encoding="utf-8")


@contextlib.contextmanager
def _config_rules_the_optimizer(script: ModuleType) -> Iterator[None]:
    """On resume the moments come from the checkpoint; learning rate and schedule from the config.

    They are the same unless ``-o`` has changed them: without this a run that is made longer would
    go on at a learning rate of 0, the end of its old schedule.
    """
    runner = script.Runner
    load = runner._get_optimizer

    def get_optimizer(self, model_params):
        optimizer = load(self, model_params)
        if self.init_ckpt:
            kept, self.init_ckpt = self.init_ckpt, {}
            fresh = load(self, model_params)
            self.init_ckpt = kept
            for group, new in zip(optimizer.param_groups, fresh.param_groups, strict=True):
                group.update({key: value for key, value in new.items() if key != "params"})
        return optimizer

    runner._get_optimizer = get_optimizer
    try:
        yield
    finally:
        runner._get_optimizer = load
