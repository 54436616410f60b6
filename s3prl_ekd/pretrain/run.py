"""``run_pretrain.py``: the request checked, and s3prl's script called with our trainer."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ..compat.no_eval import check_names
from ..compat.replaced import replaced
from ..errors import CheckpointError, SetupError
from ..files import trust
from ..files.atomic import make_folder
from ..files.config import apply_overrides, overridden, plain, read_yaml
from ..request import (
    INIT_HINT,
    PretrainRequest,
    check_device,
    check_run_folder,
    completed,
    log_moved,
    script_guards,
)
from ..system import torchrun
from .config_diff import check_changes, check_same, described, differences
from .settings import check_runner_config, load_model_config, load_runner_config

logger = logging.getLogger(__name__)


def prepare(argv: Sequence[str]) -> PretrainRequest:
    """Read and check the arguments of a command.

    Raises:
        EkdError: one sentence for what the user can mend, before anything heavy is loaded.
    """
    return completed(PretrainRequest.parse(trust.take(argv)), OPTION_CHECKS, RUN_CHECKS)


# Checks of what was typed


def check_workspace(request: PretrainRequest) -> None:
    """The working folder has been set up."""
    if not Path("pretrain").is_dir():
        raise SetupError(f"nothing is set up in this folder (no pretrain/ekd); {INIT_HINT}")
    if request.upstream == "ekd" and not Path("pretrain/ekd").is_dir():
        raise SetupError(f"ekd is not set up in this folder (no pretrain/ekd); {INIT_HINT}")


def check_processes(request: PretrainRequest) -> None:
    """Another method than ours runs in one process."""
    if torchrun.several() and not request.is_ekd:
        raise SetupError(
            f"s3prl's own Runner, which -u {request.upstream} has, does not join processes, each "
            "would train a model of its own; start it without torchrun"
        )


OPTION_CHECKS = (check_workspace, check_processes)

# Checks of the run, with the contents of its checkpoint, which are empty for a new one


def check_other_method(request: PretrainRequest, states: Mapping[str, Any]) -> None:
    """The config of another method than ours has nothing in it that would run."""
    if request.is_ekd:
        return
    config = {}
    for path in filter(None, (request.upstream_config, request.config)):
        config = read_yaml(path)
    config = states.get("Config", config)
    if request.override:
        config = apply_overrides(config, request.override)
    check_names(config, str(request.past_exp or request.config))


def check_new(request: PretrainRequest, states: Mapping[str, Any]) -> None:
    """A new run has a method, a name and configs that are valid."""
    if states or not request.is_ekd:
        return
    if request.upstream is None:
        raise SetupError("name the method: run_pretrain.py -u ekd -n NAME")
    if not (request.expdir or request.expname):
        raise SetupError("name the run: add -n NAME (or -p FOLDER)")
    load_runner_config(request.config or "pretrain/ekd/config_runner.yaml", request.override)
    load_model_config(request.upstream_config or "pretrain/ekd/config_model.yaml")


def check_resumed(request: PretrainRequest, states: Mapping[str, Any]) -> None:
    """The checkpoint is whole, and of a run of ours."""
    if not states or not request.is_ekd:
        return
    from ..files.run_checkpoints import check_whole

    path = str(request.past_exp)
    if "Upstream_Config" not in states:
        raise CheckpointError(f"{path} is no checkpoint of run_pretrain.py -u ekd")
    if getattr(states["Args"], "upstream", None) != "ekd":
        raise CheckpointError(f"{path} is of a run with another method than ekd")
    check_whole(path)


def check_folder(request: PretrainRequest, states: Mapping[str, Any]) -> None:
    """The run's folder holds no other run, and can be made."""
    if not request.is_ekd or request.folder is None:
        return
    check_run_folder(request, states)
    if not states:
        make_folder(request.folder, SetupError)


def check_config(request: PretrainRequest, states: Mapping[str, Any]) -> None:
    """A resumed run keeps its config; ``-o`` may change some of it, and the log says what.

    Files named by ``-c`` and ``-g`` must say the same, as they do where the command that started
    the run is typed again with ``-a``.
    """
    if not states or not request.is_ekd:
        return
    path, text = str(request.past_exp), request.override
    log_moved(request, getattr(states["Args"], "expdir", None))
    logger.info("resume from %s at step %s", path, states["Step"])
    kept = check_runner_config(states["Config"], f"the config in {path}")
    config = apply_overrides(states["Config"], text) if text else states["Config"]
    now = check_runner_config(config, f"the config in {path} with -o")
    changes = differences(plain(kept), plain(now))
    check_changes(changes, path)
    if request.config:
        named = differences(plain(now), plain(load_runner_config(request.config, text)))
        check_same(request.config, named, path, "-c")
    if request.upstream_config:
        model = load_model_config(states["Upstream_Config"])
        named = differences(plain(model), plain(load_model_config(request.upstream_config)))
        check_same(request.upstream_config, named, path, "-g")
    if changes:
        logger.info("changed by -o: %s", described(changes))


RUN_CHECKS = (
    check_other_method,
    check_new,
    check_resumed,
    check_device,
    check_folder,
    check_config,
)


def run(script: ModuleType, request: PretrainRequest) -> None:
    """Call s3prl's script for a request that has been checked: for ekd with our trainer.

    On resume what was typed has the last word. s3prl means ``-o`` to be of the highest priority,
    but puts all of the checkpoint's arguments, its ``-o`` and its device among them, over it.
    """
    device = {"device": request.device} if request.device else {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(script_guards(request, override=request.override, **device))
        if request.is_ekd:
            from .trainer import Trainer

            trainer = functools.partial(
                Trainer, s3prl_runner=script.Runner, overridden=overridden(request.override)
            )
            stack.enter_context(replaced(script, "Runner", trainer))
        if torchrun.rank():  # s3prl's scripts print; one of several processes is enough
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        script.main()
    from .distributed import leave

    leave()
    if request.is_ekd and torchrun.rank() == 0:
        print(
            f"\ndone: the student is in {request.folder}; next:\n"
            f"  s3prl-ekd export student {shlex.quote(str(request.folder))} -o student.safetensors"
            "\n  run_downstream.py -m train -u ekd_student -k student.safetensors -d asr -n my_asr"
        )
