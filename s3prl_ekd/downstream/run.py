"""``run_downstream.py``: check the request, then call s3prl's script inside guards."""

from __future__ import annotations

import builtins
import contextlib
import difflib
import inspect
import logging
import os
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from ..compat import checkpoint_globals, dtw_pool, voxceleb1_cache
from ..compat.no_eval import check_fold, check_splits, reject_code
from ..compat.replaced import replaced
from ..compat.source import may_be_upstream, own_upstream_names, upstream_names
from ..errors import CheckpointError, ConfigError, DataError, SetupError
from ..files import trust
from ..files.atomic import make_folder
from ..files.config import apply_overrides, argument_overrides, override_value, read_yaml
from ..files.config_diff import MISSING, check_config_file, config_differences
from ..files.formats import check_part_versions
from ..files.hub import same_model
from ..files.run_checkpoints import RECORD
from ..files.text import read_json
from ..request import (
    CACHE,
    INIT_HINT,
    DownstreamRequest,
    check_and_resume,
    check_device,
    check_run_folder,
    check_seed,
    log_moved,
    script_guards,
)
from ..system import torchrun
from ..system.lock import LOCK_FILE
from ..teachers.student_source import check_student, contents_sha256, find_student, pin_student
from .tasks import TASKS, task_of
from .tasks.lookup import check_override_keys

logger = logging.getLogger(__name__)

MODES = ("train", "evaluate", "inference")
WITH_HEADS = "hidden_states_and_heads"
NOISY = "noisy"  # subfolder of a run with the predictions of evaluations under noise
# What s3prl takes from the checkpoint of a resumed run, whatever the command says.
KEPT_OPTIONS = {
    "downstream": "-d",
    "downstream_variant": "-v",
    "upstream": "-u",
    "upstream_ckpt": "-k",
    "upstream_model_config": "-g",
    "upstream_feature_selection": "-s",
    "upstream_layer_selection": "-l",
    "upstream_feature_normalize": "--upstream_feature_normalize",
    "upstream_trainable": "-f",
}
FRAME_SHIFT = "downstream_expert.datarc.frame_shift"  # SD: s3prl sets it from the upstream
ESSENCE = "essence"  # settings of `essence asr` in a checkpoint's Config, which its YAML lacks
TIME_WARP = "specaug.apply_time_warp"  # `essence asr` sets it to False


def prepare(argv: Sequence[str], *, by_superb: bool = False) -> DownstreamRequest:
    """Parse and check a command's arguments; see :func:`check_request`.

    ``by_superb``: whether it is one of ``superb``, which may write into the folders of its runs.
    """
    checks = () if by_superb else (check_superb_folder,)
    return check_request(
        DownstreamRequest.parse(trust.read_option(argv)), *checks, check_not_essence
    )


def check_request(
    request: DownstreamRequest, *more_checks: Callable[[DownstreamRequest, Mapping[str, Any]], None]
) -> DownstreamRequest:
    """Check a request and complete it: checkpoint to resume from, device, folder."""
    request = check_and_resume(request, OPTION_CHECKS, (*RUN_CHECKS, *more_checks))
    return in_noisy_folder(with_pinned_student(request))


# Checks of the options; cheap ones come first


def check_mode(request: DownstreamRequest) -> None:
    """Check the mode, that ``--noise`` has ``-m evaluate``, and that the feature cache is not used
    under torchrun."""
    if request.noise is not None and request.mode != "evaluate":
        raise SetupError(
            f"--noise needs -m evaluate, got {request.mode or 'no -m'}: it evaluates a model "
            "trained without noise"
        )
    if request.mode not in MODES:
        missing = "-m (or --mode, in full) is missing"
        given = missing if request.mode is None else f"-m {request.mode}: no such mode"
        raise SetupError(f"{given}; add -m train or -m evaluate")
    if request.cache is not None and request.local_rank is not None:
        raise SetupError(
            f"{CACHE} works in one process only, not under torchrun; remove it, or train on one GPU"
        )


def check_upstream_name(request: DownstreamRequest) -> None:
    """Check that s3prl's hub can have the upstream; :func:`run` checks it when it is imported."""
    name, hub = request.upstream, sys.modules.get("s3prl.hub")
    if name and not may_be_upstream(name) and not hasattr(hub, name):
        raise _no_such_upstream(name)


def _no_such_upstream(name: str) -> SetupError:
    names = sorted(upstream_names() | own_upstream_names())
    close = difflib.get_close_matches(name, names, n=3)
    guess = f"did you mean {' or '.join(close)}?" if close else "see run_downstream.py -h"
    return SetupError(f"-u {name}: no such upstream in s3prl; {guess}")


def check_files(request: DownstreamRequest) -> None:
    """Check that the files after ``-i`` and ``-k`` exist, and that ``-i`` is not ignored."""
    if request.init_ckpt and request.past_exp and not request.auto_resume:
        raise SetupError(f"-i {request.init_ckpt} has no effect with -e; leave one of them out")
    if request.init_ckpt and not Path(request.init_ckpt).is_file():
        raise CheckpointError(f"-i {request.init_ckpt}: no such checkpoint")
    student = _student(request)
    if student:
        check_student(student, f"-k {student}")


def check_noises(request: DownstreamRequest) -> None:
    """Check that ``--noise`` is a folder or manifest with audio."""
    if request.noise is not None:
        from .noise import find_noises

        find_noises(request.noise.noise)


def check_init(request: DownstreamRequest) -> None:
    """Check that the checkpoint after ``-i`` contains no code and has a supported version."""
    if request.init_ckpt:
        from ..files.torch_load import safe_load

        states = safe_load(request.init_ckpt, "checkpoint", allow=checkpoint_globals())
        check_part_versions(states, request.init_ckpt)


def check_heads(request: DownstreamRequest) -> None:
    """Check that the student has the heads that ``-s`` selects.

    s3prl would use the hidden states without heads instead, with an easily overlooked warning.
    """
    student = _student(request)
    if student and request.upstream_feature_selection == WITH_HEADS:
        from ..student_file import heads_problem

        problem = heads_problem(find_student(student, f"-k {student}").load())
        if problem:
            raise CheckpointError(f"-s {WITH_HEADS}: {student} has no heads, {problem}")


def _student(request: DownstreamRequest) -> str | None:
    """The student after ``-k``; None for a URL or another upstream."""
    path = request.upstream_ckpt or ""
    local = path and not path.startswith(("http://", "https://"))
    return path if local and (request.upstream or "").startswith("ekd_student") else None


OPTION_CHECKS = (
    check_mode,
    check_upstream_name,
    check_files,
    check_noises,
    check_init,
    check_heads,
)

# Checks of the run; ``states`` are the contents of its checkpoint, empty for a new run


def check_new_downstream(request: DownstreamRequest, states: Mapping[str, Any]) -> None:
    """Check that a new run has a task, a name, and a YAML whose paths exist.

    With a missing path s3prl would fail minutes later, with a traceback.
    """
    if states:
        return
    if not request.downstream:
        names = dict.fromkeys(task.downstream for task in TASKS.values())
        raise SetupError(f"name the task: add -d asr, or another of {', '.join(names)}")
    arguments = argument_overrides(request.override)  # which s3prl applies
    if not request.upstream and "upstream" not in arguments:
        raise SetupError("name the upstream: add -u ekd_student -k STUDENT (or -u hubert_base)")
    if not (request.expdir or request.expname):
        raise SetupError("name the run: add -n NAME (or -p FOLDER)")
    path = request.config or f"downstream/{request.downstream}/config.yaml"
    if not Path(path).is_file():
        hint = "" if request.config else f"; {INIT_HINT}"
        recipes = [t.full for t in TASKS.values() if t.downstream == request.downstream]
        if not request.config and any(map(os.path.isfile, recipes)):
            hint = f"; add -c {' or '.join(filter(os.path.isfile, recipes))}"  # one for each corpus
        raise ConfigError(f"no such config in this folder: {path}{hint}")
    config = _overridden_config(request, read_yaml(path), path)
    task = task_of(request.downstream, config)
    if task is not None and not task.trained and request.mode == "train":
        raise SetupError(
            f"-d {request.downstream} trains nothing; use -m evaluate -t {task.split} -l LAYER"
        )
    has_checkpoint = request.upstream_ckpt or arguments.keys() & {"upstream", "upstream_ckpt"}
    if (request.upstream or "").startswith("ekd_student") and not has_checkpoint:
        raise CheckpointError(
            f"-u {request.upstream} needs a checkpoint: add -k STUDENT (a student file, a run's "
            "folder or an id of the Hugging Face Hub)"
        )
    check_upstream_paths(request.upstream, request.upstream_ckpt, request.upstream_model_config)
    _check_data(request.downstream, config, path, request.split, request.downstream_variant)


def _overridden_config(
    request: DownstreamRequest, config: dict[str, Any], source: str
) -> dict[str, Any]:
    """Apply ``-o`` to a config from ``source``, and check both."""
    check_override_keys(config, request.override, source)
    config = apply_overrides(config, request.override)
    reject_code(config, source)
    return config


def _check_data(
    downstream: str, config: dict[str, Any], source: str, split: str | None, fold: str | None
) -> None:
    """Check the splits of a config and the corpus that it names."""
    from .tasks.corpus_check import check_corpus

    check_splits(downstream, config, source, split)
    check_corpus(downstream, config, source, split, fold=fold)


def check_resumed_downstream(request: DownstreamRequest, states: Mapping[str, Any]) -> None:
    """Check a checkpoint from which s3prl will build a model."""
    if not states:
        return
    path = request.past_exp
    if "Downstream" not in states:
        raise CheckpointError(f"-e {path} is not a checkpoint of run_downstream.py")
    args = vars(states["Args"])
    log_moved(request, args.get("expdir"))
    for name, default in (("hub", "torch"), ("from_hf_hub", False), ("push_to_hf_hub", False)):
        # With these arguments in the checkpoint, s3prl would run code from a hub or upload the run.
        if args.get(name, default) not in (default, str(default)) and not trust.trusted():
            raise CheckpointError(
                f"-e {path}: the run was started with --{name} {str(args[name])[:40]!r}; if you "
                f"trust its author, add {trust.OPTION}"
            )
    check_upstream_paths(
        args.get("upstream"), args.get("upstream_ckpt"), args.get("upstream_model_config")
    )
    from .resume import check_upstream_unchanged  # which imports torch

    check_upstream_unchanged(states, f"-e {path}", argument_overrides(request.override))
    downstream, fold = args.get("downstream"), args.get("downstream_variant")
    check_fold(fold, f"-e {path}: downstream_variant")
    source = f"the config in {path}"
    config = _overridden_config(request, states["Config"], source)
    _check_data(str(downstream), config, source, request.split, fold)
    if request.mode == "train":
        _check_processes(path, states)


def _check_processes(path: str | None, states: Mapping[str, Any]) -> None:
    """Raise CheckpointError if a training was begun by another number of processes."""
    saved = states.get("WorldSize")  # only of a run by torchrun
    begun = saved if type(saved) is int else 1
    processes = torchrun.processes()
    if begun != processes:
        start = "without torchrun" if begun == 1 else f"with torchrun --nproc_per_node {begun}"
        raise CheckpointError(
            f"-e {path}: the training has {begun} processes, and cannot be resumed with "
            f"{processes}; start it {start}"
        )


def check_same_options(request: DownstreamRequest, states: Mapping[str, Any]) -> None:
    """Raise SetupError for an option that differs from the checkpoint's, which s3prl uses."""
    args = vars(states["Args"]) if states else {}
    for name in (argument.split("=")[0] for argument in request.passthrough if args):
        if len(name) > 2 and any(f"--{option}".startswith(name) for option in KEPT_OPTIONS):
            raise SetupError(
                f"{name}: write the option in full; it is compared with that of {request.past_exp}"
            )
    for name in (args.keys() & KEPT_OPTIONS.keys()) - argument_overrides(request.override).keys():
        value, recorded, option = getattr(request, name), args[name], KEPT_OPTIONS[name]
        if value is None or value is False or value == recorded:
            continue
        if option in ("-k", "-g") and recorded and _same_source(str(value), str(recorded)):
            logger.info("%s %s: using %s, as the checkpoint records", option, value, recorded)
            continue
        given = option if value is True else f"{option} {value}"
        has = f"has {option} {recorded}" if recorded not in (None, False) else f"has no {option}"
        raise SetupError(
            f"{given}: the run of {request.past_exp} {has}; leave it out, or start another run"
        )


def _same_source(given: str, recorded: str) -> bool:
    """Whether a path or id means the file, or the pinned student, that a checkpoint records."""
    if same_model(given, recorded):
        return True
    path, other = Path(given), Path(recorded)
    if path.resolve() in (other.resolve(), other.resolve().parent):  # a run's folder
        return True
    if not (path.is_file() and other.is_file()):
        return False
    return contents_sha256(path) == contents_sha256(other)


def check_same_config(request: DownstreamRequest, states: Mapping[str, Any]) -> None:
    """Raise CheckpointError if ``-c`` differs from the config in the checkpoint, which s3prl uses.

    Both are compared with ``-o`` applied, so the command that started the run may be repeated.
    """
    if not states or request.config is None:
        return
    in_file, saved = read_yaml(request.config), states["Config"]
    if request.override:
        in_file, saved = (apply_overrides(data, request.override) for data in (in_file, saved))
    changes = config_differences(saved, in_file)
    if changes.get(FRAME_SHIFT, ("", ""))[1] in (None, MISSING):
        del changes[FRAME_SHIFT]
    if ESSENCE in saved:
        changes = {key: pair for key, pair in changes.items() if key != TIME_WARP}
        changes = {key: pair for key, pair in changes.items() if key.split(".")[0] != ESSENCE}
    check_config_file(request.config, changes, str(request.past_exp), "-c")


def check_upstream_paths(name: Any, checkpoint: Any, config: Any) -> None:
    """Check that the files from which s3prl builds the upstream contain no code."""
    for path in (checkpoint, config):
        if path is not None and not isinstance(path, str):
            raise CheckpointError(f"upstream {str(name)[:60]!r}: expected a path, got {path!r:.60}")
    if config and Path(config).exists():
        reject_code(read_yaml(config), config)
    if not checkpoint or not Path(checkpoint).exists() or Path(checkpoint).is_dir():
        return  # a URL, an identifier or a folder: checked by s3prl
    from ..teachers.checkpoint import check_upstream_file

    check_upstream_file(Path(checkpoint), str(name))


def check_downstream_folder(request: DownstreamRequest, states: Mapping[str, Any]) -> None:
    """Check that the run's folder is writable and, for training, contains no other run."""
    folder = request.folder
    if folder is None:
        return
    if request.mode == "train":
        check_run_folder(request, states)
    if not states:
        make_folder(folder, SetupError)
    elif folder.is_dir() and not os.access(folder, os.W_OK):
        raise SetupError(f"cannot write to {folder}; choose another folder with -p")


def check_superb_folder(request: DownstreamRequest, states: Mapping[str, Any]) -> None:
    """Check that predictions and checkpoints that ``report`` relies on are not overwritten.

    A run that ``superb`` has not trained yet can be trained.
    """
    if request.folder is None:
        return
    folder = request.folder.resolve()
    for run in (folder, *folder.parents[:2]):  # noisy/CONDITION, layer0_dev, states-20
        record = run / RECORD
        if record.is_file() and (
            request.mode != "train" or read_json(record, "record", DataError).get("seconds")
        ):
            raise SetupError(
                f"{run} is a run of s3prl-ekd superb, and s3prl-ekd report reads its predictions; "
                "to write elsewhere, add -p FOLDER"
            )


def check_not_essence(request: DownstreamRequest, states: Mapping[str, Any]) -> None:
    """Raise SetupError if a run of ``essence asr`` would be continued without its teachers."""
    if states and ESSENCE in states["Config"] and request.mode == "train":
        raise SetupError(
            f"{request.past_exp} is a checkpoint of essence asr, whose teachers run_downstream.py "
            "would leave out; resume it with the command that started it and -a"
        )


RUN_CHECKS = (
    check_new_downstream,
    check_resumed_downstream,
    check_same_options,
    check_same_config,
    check_seed,
    check_device,
    check_downstream_folder,
)


def with_pinned_student(request: DownstreamRequest) -> DownstreamRequest:
    """Name the checkpoint or commit that a new run uses, for a run's folder or an id after ``-k``.

    s3prl stores it in the run's checkpoints, so that evaluations use the same student.
    """
    student = _student(request)
    if student is None or request.past_exp:
        return request
    return replace(request, upstream_ckpt=pin_student(student, f"-k {student}"))


def in_noisy_folder(request: DownstreamRequest) -> DownstreamRequest:
    """Give an evaluation under noise its own folder, unless ``-o`` sets ``args.expdir``."""
    own_folder = "expdir" in argument_overrides(request.override)
    if request.noise is None or request.folder is None or own_folder:
        return request
    folder = request.folder / NOISY / request.noise.name
    make_folder(folder, SetupError)
    text = f"args.expdir={override_value(str(folder))}"
    return replace(request, override=f"{request.override},,{text}" if request.override else text)


def run(
    script: ModuleType, request: DownstreamRequest, wrap: Callable[[Any], Any] | None = None
) -> None:
    """Call s3prl's script for a checked request.

    Args:
        script: the module ``run_downstream``.
        wrap: returns what makes the runner, ``(args, config) -> runner``, for the Runner class.
    """
    from s3prl import hub

    from .resume import resumable_runner

    if request.upstream and not inspect.isfunction(getattr(hub, request.upstream, None)):
        raise _no_such_upstream(request.upstream)
    with contextlib.ExitStack() as stack:
        stack.enter_context(downstream_guards(request))
        runner = resumable_runner(task_runner(script.Runner))
        runner = wrap(runner) if wrap else runner
        stack.enter_context(replaced(script, "Runner", runner))
        if request.cache is not None:
            from .feature_cache import cached_features

            stack.enter_context(cached_features(script, request.cache))
        if request.noise is not None:  # outermost, so that the cache gets the noisy waveforms
            from .noise import noisy_runner

            runner = noisy_runner(script.Runner, request.noise)
            stack.enter_context(replaced(script, "Runner", runner))
        script.main()


def task_runner(runner: Any) -> Any:
    """Subclass s3prl's ``Runner`` for what SUPERB's tasks need.

    An evaluation leaves the reference beside the predictions, where s3prl leaves none.

    Raises (when instantiated):
        SetupError: the upstream has no layer ``-l``.
    """

    class TaskRunner(runner):
        def evaluate(self, *args, **kwargs):
            result = super().evaluate(*args, **kwargs)
            task = task_of(self.args.downstream, self.config)
            if self.args.mode == "evaluate" and task is not None and task.write_reference:
                folder = Path(self.args.expdir)
                task.write_reference(self.config, self.args.evaluate_split, folder)
            return result

        def _get_featurizer(self):
            layer = self.args.upstream_layer_selection
            try:
                featurizer = super()._get_featurizer()
            except IndexError:
                if layer is None:
                    raise
            else:
                # where there is one layer, s3prl ignores -l
                if layer in (None, 0, -1) or _has_layers(self.upstream.model, self.args):
                    return featurizer
            raise SetupError(
                f"-l {layer}: the upstream has no such layer; the first one is 0, the last one -1"
            )

    return TaskRunner


def _has_layers(upstream: Any, args: Namespace) -> bool:
    """Whether the features that s3prl selects are those of two layers or more."""
    import torch

    with torch.no_grad():
        features = upstream([torch.zeros(16_000, device=args.device)])
    selected = features.get(args.upstream_feature_selection, features.get("hidden_states"))
    return isinstance(selected, (list, tuple, dict)) and len(selected) > 1


@contextlib.contextmanager
def downstream_guards(request: DownstreamRequest) -> Iterator[None]:
    """Guard a call of s3prl's script for ``request``; see :func:`..request.script_guards`.

    SID's and ASV's file lists are not read from s3prl's caches. If the script fails, the data
    loader's workers are killed, and QbE's processes end. The lock allows several evaluations in one
    folder at the same time, one for each split, also during training.
    """
    from ..data.loader import kill_workers_on_error
    from .speaker_verification import recipe_patched

    split = request.split
    lock = LOCK_FILE if split is None else f".{re.sub(r'[^A-Za-z0-9_-]', '_', split)}{LOCK_FILE}"
    with (
        script_guards(request, lock, cache_dir=request.cache_dir),  # for downloads
        voxceleb1_cache.cache_bypassed(),  # for every -d: with -e the task is in the checkpoint
        recipe_patched(),
        dtw_pool.pool_ends_with_run(),
        # undo s3prl's monkeypatch: it would slow down later runs in this process, tenfold after
        # some dozens
        replaced(builtins, "isinstance", isinstance),
        kill_workers_on_error(),
    ):
        yield
