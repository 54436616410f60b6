"""The commands ``run_pretrain.py`` and ``run_downstream.py``: s3prl's own scripts, unmodified.

Each applies :mod:`.compat`, registers ``ekd_student``, checks what the user typed, and calls the
script's ``main()``. A script in the working folder (an s3prl checkout) wins over the installed one.
Scripts are imported and called rather than run as ``__main__``, so that worker processes started by
spawning can import what they need.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from .errors import CheckpointError, ConfigError, EkdError, SetupError, exit_with
from .quiet import quiet_s3prl

logger = logging.getLogger(__name__)

INIT_HINT = "type: s3prl-ekd init ."


def run_pretrain() -> int:
    """Entry point of the command ``run_pretrain.py``."""
    return _launch("run_pretrain", _prepare_pretrain, _main_pretrain)


def run_downstream() -> int:
    """Entry point of the command ``run_downstream.py``."""
    return _launch("run_downstream", prepare_downstream, lambda script, argv: script.main())


SCRIPTS = {"run_pretrain.py": run_pretrain, "run_downstream.py": run_downstream}


def _launch(
    script: str,
    prepare: Callable[[list[str]], list[str]],
    main: Callable[[ModuleType, list[str]], None],
) -> int:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    quiet_s3prl()
    argv = sys.argv[1:]
    try:
        hide_cuda_from_cpu_runs(argv)
        wants_help = "-h" in argv or "--help" in argv
        with contextlib.ExitStack() as stack:
            if wants_help:
                stack.enter_context(_somewhere_set_up())
            else:
                argv = prepare(argv)
            module = import_script(script)
            sys.argv = [f"{script}.py", *argv]
            from .atomic import atomic_saves

            with atomic_saves():
                main(module, argv)
    except EkdError as error:
        exit_with(error)
    except KeyboardInterrupt:
        print("\nstopped by Ctrl-C; add -a to the same command to go on", file=sys.stderr)
        return 130
    return 0


def import_script(script: str) -> ModuleType:
    """s3prl's module of that name, from the checkout we stand in or from the installed package."""
    from . import compat, plugin

    compat.apply()
    here = Path.cwd()
    if (here / f"{script}.py").is_file() and (here / "hub.py").is_file():
        sys.path.insert(0, str(here))  # what `python run_pretrain.py` would do
        plugin.register()
        return importlib.import_module(script)
    if script == "run_pretrain":
        plugin.open_pretrain(here)  # it needs nothing of s3prl.hub, which takes seconds to import
    else:
        plugin.register()
    return importlib.import_module(f"s3prl.{script}")


# run_pretrain.py


def _prepare_pretrain(argv: list[str]) -> list[str]:
    """Check the arguments of a pretraining run and complete them.

    Raises:
        EkdError: one sentence for what the user can mend, before anything heavy is loaded.
    """
    args = _options(argv, "euncgpoa", flags="a", long=("device", "multi_gpu"))
    if not Path("pretrain").is_dir():
        raise SetupError(f"nothing is set up in this folder (no pretrain/ekd); {INIT_HINT}")
    if args.u == "ekd" and not Path("pretrain/ekd").is_dir():
        raise SetupError(f"ekd is not set up in this folder (no pretrain/ekd); {INIT_HINT}")
    if args.u not in (None, "ekd"):
        return _with_device(argv, args.device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SetupError(
            "s3prl's pretraining Runner does not join processes, each would train a student of its "
            "own; start it without torchrun"
        )
    if args.p and not args.n:
        argv = [*argv, "-n", Path(args.p).name]  # s3prl insists on a name beside a folder
    resume = _resume_from(args, "result/pretrain")
    if resume:
        return _resumed_pretrain(argv, args, resume)
    if args.u is None:
        raise SetupError("name the method: run_pretrain.py -u ekd -n NAME")
    if not (args.n or args.p):
        raise SetupError("name the run: add -n NAME (or -p FOLDER)")

    from .config import load_model_config, load_runner_config

    load_runner_config(args.c or "pretrain/ekd/config_runner.yaml", args.o)
    load_model_config(args.g or "pretrain/ekd/config_model.yaml")
    return _with_device(argv, args.device)


def _resume_from(args: argparse.Namespace, default_root: str) -> Path | None:
    """The checkpoint that -e or -a asks for, as a file; None for a new run."""
    from .checkpoints import newest

    if args.e:
        path = Path(args.e)
        found = newest(path) if path.is_dir() else path
        if found is None or not found.is_file():
            raise CheckpointError(f"-e {args.e}: there is no such checkpoint (states-*.ckpt)")
        return found
    if args.a:
        folder = Path(args.p or f"{default_root}/{args.n}")
        return newest(folder) if folder.is_dir() else None
    return None


def _resumed_pretrain(argv: list[str], args: argparse.Namespace, path: Path) -> list[str]:
    """The arguments for resuming: the checkpoint by name, and a device that exists."""
    import torch

    from .checkpoints import read_run
    from .config import apply_overrides

    states = read_run(path)
    logger.info("resume from %s at step %s", path, states["Step"])
    if args.o:
        apply_overrides(states["Config"], args.o)
    argv = _without(argv, ("-e", "--past_exp"), ("-a", "--auto_resume"))
    saved = str(getattr(states["Args"], "device", "cuda"))
    if args.device is None and saved.startswith("cuda") and not torch.cuda.is_available():
        logger.info("no CUDA device here: going on with --device cpu")
        argv += ["--device", "cpu"]
    return [*argv, "-e", str(path)]


def _main_pretrain(script: ModuleType, argv: list[str]) -> None:
    """Call s3prl's script, and let ``-o`` and ``--device`` have the last word on resume.

    s3prl means ``-o`` to be of the highest priority, but puts all of the checkpoint's arguments,
    its ``-o`` and its device among them, over what was typed.
    """
    typed = _options(argv, "eo", flags="", long=("device",))
    get_args = script.get_pretrain_args
    seen = {}

    def get_args_typed_last():
        args, config = get_args()
        if typed.e and typed.o and typed.o.lower() != "none":
            script.override(typed.o, args, config)
        if typed.e and typed.device:
            args.device = typed.device
        seen["args"] = args
        return args, config

    script.get_pretrain_args = get_args_typed_last
    try:
        script.main()
    finally:
        script.get_pretrain_args = get_args
    if seen["args"].upstream == "ekd":
        print(
            f"\ndone: the student is in {seen['args'].expdir}; next:\n"
            f"  s3prl-ekd export student {seen['args'].expdir} -o student.pt\n"
            "  run_downstream.py -m train -u ekd_student -k student.pt -d asr -n my_asr"
        )


# run_downstream.py


def prepare_downstream(argv: list[str]) -> list[str]:
    """Check the arguments of a downstream run and complete them.

    Raises:
        EkdError: one sentence for what the user can mend.
    """
    argv = [
        word.replace("--local-rank", "--local_rank", 1) if word.startswith("--local-rank") else word
        for word in argv
    ]
    args = _options(argv, "mtoeicdvuknpa", flags="a", long=("device", "local_rank"))
    if args.i and not Path(args.i).is_file():
        raise CheckpointError(f"-i {args.i}: there is no such checkpoint")
    local = args.k and not args.k.startswith(("http://", "https://"))
    if (args.u or "").startswith("ekd_student") and local and not Path(args.k).is_file():
        raise CheckpointError(
            f"-k {args.k}: there is no such file; a checkpoint of run_pretrain.py or an exported "
            "student is expected"
        )
    resume = _resume_from(args, "result/downstream")
    if resume:
        argv = _without(argv, ("-e", "--past_exp"), ("-a", "--auto_resume"))
        argv += ["-e", str(resume)]
    elif args.m is not None:
        _check_recipe(args)
    # torchrun tells the rank by the environment, s3prl's script reads it from the arguments.
    if "LOCAL_RANK" in os.environ and args.local_rank is None:
        argv = [*argv, f"--local_rank={os.environ['LOCAL_RANK']}"]
    return _with_device(argv, args.device)


def _check_recipe(args: argparse.Namespace) -> None:
    """The recipe's YAML, with ``-o`` put in, and the paths that it names.

    Raises:
        ConfigError: one of them is not there; s3prl would end in a traceback, minutes later.
    """
    from .config import apply_overrides
    from .recipes import RECIPES, missing_paths
    from .schema import read_yaml

    path = args.c or f"downstream/{args.d}/config.yaml"
    if not Path(path).is_file():
        hint = "" if args.c else f"; {INIT_HINT}"
        raise ConfigError(f"there is no configuration {path} in this folder{hint}")
    recipe = next((recipe for recipe in RECIPES if recipe.downstream == args.d), None)
    if recipe is None:
        return
    config = read_yaml(path)
    if args.o and args.o.lower() != "none":
        config = apply_overrides(config, args.o)
    for key, missing in missing_paths(config, recipe.files + recipe.data, Path.cwd()):
        raise ConfigError(
            f"{path}: {key} is {missing}, which is not there; edit it or add "
            f"-o \"config.{key}='PATH'\""
        )


# Arguments


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
    "t": "evaluate_split",
    "u": "upstream",
    "v": "downstream_variant",
}


def _options(
    argv: Sequence[str], letters: str, flags: str, long: Sequence[str]
) -> argparse.Namespace:
    """Read the options named, by s3prl's names, and leave all judgement to s3prl's own parser."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    for letter in letters:
        action = {"action": "store_true"} if letter in flags else {"nargs": "?"}
        parser.add_argument(f"-{letter}", f"--{_LONG[letter]}", dest=letter, **action)
    for name in long:
        parser.add_argument(f"--{name}", nargs="?")
    return parser.parse_known_args(list(argv))[0]


def _without(argv: Sequence[str], *options: tuple[str, str]) -> list[str]:
    """``argv`` less some options and their values (``-a`` has none)."""
    kept: list[str] = []
    names = {name for pair in options for name in pair}
    skip = False
    for word in argv:
        if skip:
            skip = False
        elif word in names:
            skip = word not in ("-a", "--auto_resume")
        elif not word.startswith(tuple(f"{name}=" for name in names)):
            kept.append(word)
    return kept


def _with_device(argv: Sequence[str], device: str | None) -> list[str]:
    """Choose the device that is there and say so; an explicit one wins. s3prl's default is cuda."""
    import torch

    if device is not None or torch.cuda.is_available():
        return list(argv)
    logger.info("no CUDA device here: running with --device cpu")
    return [*argv, "--device", "cpu"]


def hide_cuda_from_cpu_runs(argv: Sequence[str]) -> None:
    """s3prl's downstream Runner calls ``torch.cuda.device("cpu")`` on a machine with CUDA."""
    if _options(argv, "", "", ("device",)).device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@contextlib.contextmanager
def _somewhere_set_up():
    """A folder where ``-h`` works: s3prl lists ``pretrain/`` while it builds its parser."""
    if Path("pretrain/ekd").is_dir():
        yield
        return
    from .workspace import write_workspace

    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        write_workspace(Path(folder))
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)
            print(f"\nekd is not set up in this folder yet; {INIT_HINT}")
