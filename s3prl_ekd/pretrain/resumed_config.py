"""Compare the config of a resumed run with the config files, and with the changes by ``-o``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError
from ..files.config import apply_overrides, to_plain_data
from ..files.config_diff import check_config_file, config_differences, describe_changes
from ..files.hub import same_model
from ..request import PretrainRequest, log_moved
from .settings import (
    check_runner_config,
    load_model_config,
    load_runner_config,
    read_model_yaml,
    saved_runner_config,
)

logger = logging.getLogger(__name__)

# Keys that `-o` cannot change on resume: the saved optimizer state would not fit.
FIXED = ("optimizer.name", "optimizer.torch_optim_name")

Changes = Mapping[str, tuple[Any, Any]]


def check(request: PretrainRequest, states: Mapping[str, Any]) -> None:
    """Check that a run keeps its config, except for changes by ``-o``; log these.

    The files of ``-c`` and ``-g`` must equal the config in the checkpoint. They do if the command
    that started the run is repeated with ``-a``. If they are not given, those of that command are
    compared, and what was edited since is a warning.
    """
    path, text, args = str(request.past_exp), request.override, states["Args"]
    log_moved(request, getattr(args, "expdir", None))
    logger.info("resuming from %s at step %s", path, states["Step"])
    config = saved_runner_config(states["Config"])
    saved = check_runner_config(config, f"the config in {path}")
    config = apply_overrides(config, text)
    current = to_plain_data(check_runner_config(config, f"the config in {path} with -o"))
    changes = config_differences(to_plain_data(saved), current)
    check_changes(changes, path)
    model = to_plain_data(load_model_config(states["Upstream_Config"]))
    edited, keys = [], getattr(args, "overridden", None)
    if keys is not None and not (isinstance(keys, list) and all(type(key) is str for key in keys)):
        raise CheckpointError(f"{path} is damaged: Args.overridden is {keys!r:.40}")
    if request.config:
        check_config_file(request.config, runner_changes(request.config, text, current), path, "-c")
    elif keys is not None:  # a run of version 0.1 does not tell what its -o has set
        edited += describe_edits(
            getattr(args, "config", None), lambda p: runner_changes(p, text, current, keys)
        )
    if request.upstream_config:
        in_file = model_changes(request.upstream_config, model)
        check_config_file(request.upstream_config, in_file, path, "-g")
    else:
        edited += describe_edits(
            getattr(args, "upstream_config", None), lambda p: model_changes(p, model)
        )
    if edited:
        logger.warning(
            "edited since this run began, but a resumed run keeps its config: %s; change the run "
            'with -o "config.KEY=VALUE" (of the runner config), or start a new one under another '
            "name",
            "; ".join(edited),
        )
    if changes:
        logger.info("changed by -o: %s", describe_changes(changes))


def describe_edits(path: Any, changes: Callable[[str], Changes]) -> list[str]:
    """A config file's differences from the run that was started with it, as text; empty without."""
    if not isinstance(path, str) or not Path(path).is_file():
        return []
    try:
        return [f"{path}: {describe_changes(found)}"] if (found := changes(path)) else []
    except ConfigError as error:
        return [str(error)]


def runner_changes(
    path: str, overrides: str | None, current: Mapping[str, Any], without: Collection[str] = ()
) -> Changes:
    """Differences of a runner config from that of the run, without keys that ``-o`` once set."""
    in_file = to_plain_data(load_runner_config(path, overrides))
    recorded = current["runner"]["precision"]  # chosen when the run began
    on_cuda = ("float16", "tf32")  # without CUDA float32
    wanted = in_file["runner"]["precision"]
    if wanted == "auto" or (wanted in on_cuda and recorded == "float32"):
        in_file["runner"]["precision"] = recorded
    changes = config_differences(current, in_file)
    sections = tuple(f"{key}." for key in without)
    return {k: v for k, v in changes.items() if not (k in without or k.startswith(sections))}


def model_changes(path: str, model: Mapping[str, Any]) -> Changes:
    """Differences of a model config from that of the run."""
    in_file = to_plain_data(load_model_config(path))
    if in_file["teacher_precision"] == "auto":
        in_file["teacher_precision"] = model["teacher_precision"]
    for name in model["teachers"].keys() & in_file["teachers"].keys():
        recorded = model["teachers"][name]["model"]  # with the commit, if on the Hub
        if same_model(recorded, in_file["teachers"][name]["model"]):
            in_file["teachers"][name]["model"] = recorded
    if "reduce" not in read_model_yaml(path).get("loss", {}):
        in_file["loss"]["reduce"] = model["loss"]["reduce"]  # version 0.1 had another default
    return config_differences(model, in_file)


def check_changes(changes: Mapping[str, tuple[Any, Any]], checkpoint: str) -> None:
    """Raise CheckpointError if ``-o`` changes the optimizer, which a resumed run does not allow."""
    fixed = {key: change for key, change in changes.items() if key in FIXED}
    if fixed:
        raise CheckpointError(
            f"cannot resume {checkpoint} with {describe_changes(fixed)}: its optimizer state does "
            "not fit another optimizer; start a new run under another name"
        )
