"""``run_pretrain.py``: check the request, call s3prl's script with :class:`.trainer.Trainer`."""

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

from ..compat.no_eval import reject_code
from ..compat.replaced import replaced
from ..data.shar.shards import shar_shards
from ..errors import CheckpointError, DataError, SetupError
from ..files import trust
from ..files.atomic import make_folder
from ..files.config import apply_overrides, overridden, read_yaml
from ..request import (
    INIT_HINT,
    PretrainRequest,
    check_and_resume,
    check_device,
    check_run_folder,
    check_seed,
    script_guards,
)
from ..system import torchrun
from ..teachers.names import check_teacher_sources
from .settings import (
    ModelFile,
    RunnerFile,
    check_activation_checkpointing,
    check_pruning_run,
    load_model_config,
    load_runner_config,
)

logger = logging.getLogger(__name__)


def prepare(argv: Sequence[str]) -> PretrainRequest:
    """Parse and check the arguments of a command; the options before torch is imported."""
    request = PretrainRequest.parse(trust.read_option(argv))
    return check_and_resume(request, OPTION_CHECKS, RUN_CHECKS)


# Checks of the arguments


def check_workspace(request: PretrainRequest) -> None:
    """Check that ``s3prl-ekd init`` has set up the working folder, and that it has ``-u``."""
    names = sorted(path.name for path in Path("pretrain").glob("*") if path.is_dir())
    if not names or (request.upstream == "ekd" and "ekd" not in names):
        raise SetupError(f"no pretrain/ekd in this folder; {INIT_HINT}")
    if request.upstream not in (None, *names):
        raise SetupError(
            f"-u {request.upstream}: no such folder in pretrain/: use {', '.join(names)}"
        )


def check_single_process(request: PretrainRequest) -> None:
    """Reject several processes for an upstream other than ekd."""
    if torchrun.is_distributed() and not request.is_ekd:
        raise SetupError(
            f"-u {request.upstream} uses s3prl's own Runner, which cannot train in several "
            "processes; start it without torchrun"
        )


# Checks of the run; ``states`` is the contents of its checkpoint, empty for a new run


def check_settings(request: PretrainRequest, states: Mapping[str, Any]) -> None:
    """Check the configs of a new run, the checkpoint of another, or those of another upstream."""
    if not request.is_ekd:
        check_other_upstream(request, states)
    elif states:
        check_checkpoint(str(request.past_exp), states)
    elif request.upstream is None:
        raise SetupError("-u is missing; type: run_pretrain.py -u ekd -n NAME")
    elif not (request.expdir or request.expname):
        raise SetupError("the run has no name; add -n NAME (or -p FOLDER)")
    else:
        run = load_runner_config(
            request.config or "pretrain/ekd/config_runner.yaml", request.override
        )
        model = load_model_config(request.upstream_config or "pretrain/ekd/config_model.yaml")
        check_pruning_run(model, run)
        check_activation_checkpointing(model, run.runner)
        check_sources(model, run)


def check_sources(model: ModelFile, run: RunnerFile) -> None:
    """Check that the teachers, units, audio folder and length tables of a new run exist.

    The expert checks them again, after torch and s3prl are imported.
    """
    check_teacher_sources(model.teachers)
    for unit_loss in model.unit_loss:
        if not Path(unit_loss.file).is_file():
            from ..essence.units import load_units

            load_units(unit_loss.file)  # raises CheckpointError
    data = run.pretrain_expert.datarc
    if not Path(data.libri_root).is_dir():
        raise DataError(f"pretrain_expert.datarc.libri_root: no such folder: {data.libri_root}")
    shards = shar_shards(data.file_path, data.sets)
    for name in (*(() if shards else data.sets), *data.dev_sets):
        path = Path(data.file_path) / f"{name}.csv"
        if not path.exists():
            from ..data.tables import read_table

            read_table(path)  # raises DataError


def check_other_upstream(request: PretrainRequest, states: Mapping[str, Any]) -> None:
    """Check that the config of another upstream holds no code that s3prl would evaluate."""
    config = {}
    for path in filter(None, (request.upstream_config, request.config)):
        config = read_yaml(path)
    config = states.get("Config", config)
    config = apply_overrides(config, request.override)
    reject_code(config, str(request.past_exp or request.config))


def check_checkpoint(path: str, states: Mapping[str, Any]) -> None:
    """Check that a checkpoint is complete, and of a run with ``-u ekd``."""
    from ..files.run_checkpoints import verify_checksums

    if "Upstream_Config" not in states:
        raise CheckpointError(f"{path} is not a checkpoint of run_pretrain.py -u ekd")
    if getattr(states["Args"], "upstream", None) != "ekd":
        raise CheckpointError(f"{path} is a checkpoint of a run with another upstream than ekd")
    verify_checksums(path)


def check_output_folder(request: PretrainRequest, states: Mapping[str, Any]) -> None:
    """Check that the run's folder holds no other run; make it for a new run."""
    if not request.is_ekd or request.folder is None:
        return
    check_run_folder(request, states)
    if not states:
        make_folder(request.folder, SetupError)


def check_resumed_config(request: PretrainRequest, states: Mapping[str, Any]) -> None:
    """Check that a resumed run keeps its config, except for changes by ``-o``; log these."""
    if states and request.is_ekd:
        from .resumed_config import check

        check(request, states)


def check_training_device(request: PretrainRequest, states: Mapping[str, Any]) -> None:
    """Check ``--device``: MPS has no float64, in which parts of a training are computed."""
    check_device(request, states)
    if request.is_ekd and request.device == "mps":
        raise SetupError("--device mps: training needs float64, which MPS lacks; use --device cpu")


OPTION_CHECKS = (check_workspace, check_single_process)
RUN_CHECKS = (
    check_settings,
    check_seed,
    check_training_device,
    check_output_folder,
    check_resumed_config,
)


def run(script: ModuleType, request: PretrainRequest) -> None:
    """Call s3prl's script for a checked request; for ekd with :class:`.trainer.Trainer`.

    On resume ``-o`` and ``--device`` of this command take priority over those in the checkpoint.
    s3prl intends this for ``-o``, but overwrites all arguments with the checkpoint's.
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
            # s3prl's copies of the YAML files lack -o; the trainer writes the settings of the run
            stack.enter_context(replaced(script, "copyfile", lambda source, target: target))
        if torchrun.rank():  # only the main process shows what s3prl's script prints
            devnull = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(devnull))
        script.main()
    from .distributed import leave_process_group

    leave_process_group()
    if request.is_ekd and request.folder and torchrun.rank() == 0:
        print(f"\ndone: the student is in {request.folder}; next:\n{next_commands(request.folder)}")


def next_commands(folder: Path) -> str:
    """The commands for the student of a finished run, one a line."""
    config, quoted = folder / "config_model.yaml", shlex.quote(str(folder))
    if config.is_file() and read_yaml(config).get("pruning") is not None:
        return f"  s3prl-ekd prune {quoted} -o pruned.pt"
    return (
        f"  s3prl-ekd export student {quoted} -o student.safetensors\n"
        "  run_downstream.py -m train -u ekd_student -k student.safetensors -d asr -n my_asr"
    )
