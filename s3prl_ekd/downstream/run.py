"""``run_downstream.py``: the request checked, and s3prl's script called within guards."""

from __future__ import annotations

import builtins
import contextlib
import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from ..compat import checkpoint_globals, voxceleb1_cache
from ..compat.no_eval import check_fold, check_names, check_splits
from ..compat.replaced import replaced
from ..errors import CheckpointError, ConfigError, SetupError
from ..files import trust
from ..files.atomic import make_folder
from ..files.config import apply_overrides, argument_overrides, literal, read_yaml
from ..files.formats import refuse_newer_parts
from ..request import (
    CACHE,
    INIT_HINT,
    DownstreamRequest,
    check_device,
    check_run_folder,
    completed,
    log_moved,
    script_guards,
)
from ..system.lock import NAME
from .corpus_check import check_corpus
from .tasks import missing_paths, task_of

WITH_HEADS = "hidden_states_and_heads"
NOISY = "noisy"  # below the run's folder: predictions of tests under noise


def prepare(argv: Sequence[str]) -> DownstreamRequest:
    """Read and check the arguments of a command; see :func:`checked`."""
    return checked(DownstreamRequest.parse(trust.take(argv)))


def checked(request: DownstreamRequest) -> DownstreamRequest:
    """The request with its checkpoint found, its device and its folder set.

    Raises:
        EkdError: one sentence for what the user can mend.
    """
    return in_noisy_folder(completed(request, OPTION_CHECKS, RUN_CHECKS))


# Checks of what was typed; the cheap ones come first


def check_mode(request: DownstreamRequest) -> None:
    """``--noise`` only evaluates, ``--cache-features`` is for one process."""
    mode = f"-m {request.mode}" if request.mode else "no -m"
    if request.noise is not None and request.mode != "evaluate":
        raise SetupError(
            f"--noise goes with -m evaluate only, not with {mode}: it tests a model that was "
            "trained without it"
        )
    if request.cache is not None and request.local_rank is not None:
        raise SetupError(
            f"{CACHE} is for one process and not for torchrun; leave it out, or train on one GPU"
        )


def check_files(request: DownstreamRequest) -> None:
    """The files after ``-i`` and ``-k`` are there."""
    if request.init_ckpt and not Path(request.init_ckpt).is_file():
        raise CheckpointError(f"-i {request.init_ckpt}: there is no such checkpoint")
    student = _student(request)
    if student and not Path(student).is_file():
        raise CheckpointError(
            f"-k {student}: there is no such file; a checkpoint of run_pretrain.py or an exported "
            "student is expected"
        )


def check_noises(request: DownstreamRequest) -> None:
    """There are noises after ``--noise``."""
    if request.noise is not None:
        from .noise import find_noises

        find_noises(request.noise.noise)


def check_init(request: DownstreamRequest) -> None:
    """The checkpoint after ``-i`` is data, and of no newer version."""
    if request.init_ckpt:
        from ..files.torch_load import safe_load

        states = safe_load(request.init_ckpt, "checkpoint", allow=checkpoint_globals())
        refuse_newer_parts(states, request.init_ckpt)


def check_heads(request: DownstreamRequest) -> None:
    """The student has what ``-s`` selects: s3prl would take the plain hidden states instead, with
    a warning among many lines."""
    student = _student(request)
    if student and request.upstream_feature_selection == WITH_HEADS:
        from ..student_file import heads_problem, load_student

        problem = heads_problem(load_student(student))
        if problem:
            raise CheckpointError(f"-s {WITH_HEADS}: {student} has none, {problem}")


def _student(request: DownstreamRequest) -> str | None:
    """The student file after ``-k``; None for a URL and for other upstreams."""
    path = request.upstream_ckpt
    if not (request.upstream or "").startswith("ekd_student") or not path:
        return None
    return None if path.startswith(("http://", "https://")) else path


OPTION_CHECKS = (check_mode, check_files, check_noises, check_init, check_heads)

# Checks of the run, with the contents of its checkpoint, which are empty for a new one


def check_new(request: DownstreamRequest, states: Mapping[str, Any]) -> None:
    """A new run has a task, a name, and a YAML whose paths are there; with one that is not, s3prl
    would end in a traceback, minutes later."""
    if states or request.mode is None:
        return
    if not request.downstream:
        raise SetupError("name the task: add -d asr (or ctc, voxceleb1, emotion)")
    if not (request.expdir or request.expname):
        raise SetupError("name the run: add -n NAME (or -p FOLDER)")
    task = task_of(request.downstream)
    path = request.config or f"downstream/{request.downstream}/config.yaml"
    if not Path(path).is_file():
        hint = "" if request.config else f"; {INIT_HINT}"
        if not request.config and task is not None and Path(task.full).is_file():
            hint = f"; add -c {task.full}"  # s3prl keeps the recipes of -d ctc by corpus
        raise ConfigError(f"there is no configuration {path} in this folder{hint}")
    config = read_yaml(path)
    if request.override:
        config = apply_overrides(config, request.override)
    check_names(config, path)
    check_splits(request.downstream, config, path, request.split)
    if task is not None:
        for key, missing in missing_paths(config, task.paths, Path.cwd()):
            raise ConfigError(
                f"{path}: {key} is {missing}, which is not there; edit it or add "
                f"-o \"config.{key}='PATH'\""
            )
    check_upstream(request.upstream, request.upstream_ckpt, request.upstream_model_config)
    fold = request.downstream_variant
    check_corpus(request.downstream, config, path, request.split, fold=fold)


def check_resumed(request: DownstreamRequest, states: Mapping[str, Any]) -> None:
    """A checkpoint that s3prl is about to read and to build a model from."""
    if not states:
        return
    path = request.past_exp
    if "Downstream" not in states:
        raise CheckpointError(f"-e {path} is no checkpoint of run_downstream.py")
    args = vars(states["Args"])
    log_moved(request, args.get("expdir"))
    for name, plain in (("hub", "torch"), ("from_hf_hub", False), ("push_to_hf_hub", False)):
        # s3prl would take these from the file, run code of the hub, and upload the run.
        if args.get(name, plain) not in (plain, str(plain)) and not trust.trusted():
            raise CheckpointError(
                f"-e {path} is of a run with --{name} {str(args[name])[:40]!r}; if you trust who "
                f"made it, add {trust.OPTION}"
            )
    check_upstream(
        args.get("upstream"), args.get("upstream_ckpt"), args.get("upstream_model_config")
    )
    config, where = states["Config"], f"the config in {path}"
    if request.override:
        config = apply_overrides(config, request.override)
    check_names(config, where)
    downstream, fold = args.get("downstream"), args.get("downstream_variant")
    check_splits(downstream, config, where, request.split)
    check_fold(fold, f"-e {path}: downstream_variant")
    check_corpus(downstream, config, where, request.split, fold=fold)


def check_upstream(name: Any, checkpoint: Any, config: Any) -> None:
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


def check_folder(request: DownstreamRequest, states: Mapping[str, Any]) -> None:
    """The run's folder can be written, and a training finds no other run there."""
    folder = request.folder
    if folder is None or (not states and request.mode is None):
        return
    if request.mode == "train":
        check_run_folder(request, states)
    if not states:
        make_folder(folder, SetupError)
    elif folder.is_dir() and not os.access(folder, os.W_OK):
        raise SetupError(f"{folder} cannot be written; name another folder with -p")


RUN_CHECKS = (check_new, check_resumed, check_device, check_folder)


def in_noisy_folder(request: DownstreamRequest) -> DownstreamRequest:
    """A test under noise writes to a folder of its own, unless ``-o`` has put it elsewhere."""
    if request.noise is None or request.folder is None:
        return request
    if "expdir" in argument_overrides(request.override):
        return request
    folder = request.folder / NOISY / request.noise.name
    make_folder(folder, SetupError)
    text = f"args.expdir={literal(str(folder))}"
    return replace(request, override=f"{request.override},,{text}" if request.override else text)


def run(script: ModuleType, request: DownstreamRequest) -> None:
    """Call s3prl's script for a request that has been checked.

    Raises:
        SetupError: s3prl's hub has no such upstream.
    """
    from s3prl import hub

    from .resume import exact

    name = request.upstream
    if name and not hasattr(hub, name):
        close = difflib.get_close_matches(name, hub.options(), n=3)
        guess = f"did you mean {' or '.join(close)}?" if close else "see run_downstream.py -h"
        raise SetupError(f"-u {name}: s3prl has no such upstream; {guess}")
    with contextlib.ExitStack() as stack:
        stack.enter_context(downstream_guards(request))
        stack.enter_context(replaced(script, "Runner", exact(script.Runner)))
        if request.cache is not None:
            from .feature_cache import cached_features

            stack.enter_context(cached_features(script, request.cache))
        if request.noise is not None:  # outermost: noisy waveforms have their own hidden states
            from .noise import noisy

            stack.enter_context(replaced(script, "Runner", noisy(script.Runner, request.noise)))
        script.main()


@contextlib.contextmanager
def downstream_guards(request: DownstreamRequest) -> Iterator[None]:
    """Within it s3prl's script may be called for ``request``; see :func:`..request.script_guards`.

    It searches SID's lists of files anew. Its workers end with it, and so does its own
    ``isinstance``, which it puts into the whole process: each run in a process would make all that
    follows slower, ten times after some dozens. Several processes may evaluate in one folder at a
    time, a split each, also while another trains.
    """
    from ..data.loader import workers_end

    split = request.split
    lock = NAME if split is None else f".{re.sub(r'[^A-Za-z0-9_-]', '_', split)}{NAME}"
    with (
        script_guards(request, lock, cache_dir=request.cache_dir),  # downloads go there
        voxceleb1_cache.guarded(),  # whatever -d says: with -e the task is in the checkpoint
        replaced(builtins, "isinstance", isinstance),
        workers_end(),
    ):
        yield
