"""The arguments of ``run_pretrain.py`` and ``run_downstream.py`` as a typed request.

A command is parsed once into a :class:`PretrainRequest` or :class:`DownstreamRequest`, which is
passed to checks and guards. :meth:`Request.argv` converts it to the arguments of s3prl's script.
Other options of s3prl are passed on unchanged.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from .compat import no_eval
from .compat.replaced import replaced
from .compat.source import script_options
from .errors import CheckpointError, SetupError
from .files import trust
from .files.atomic import make_folder, patch_torch_save
from .files.config import argument_overrides, escape_equals
from .files.renamed_keys import rename_overrides
from .files.run_checkpoints import newest_checkpoint, read_checkpoint, run_checkpoints
from .system import torchrun
from .system.devices import choose_device
from .system.lock import LOCK_FILE, FolderLock
from .system.seeds import seed_number

logger = logging.getLogger(__name__)

RequestT = TypeVar("RequestT", bound="Request")
INIT_HINT = "type: s3prl-ekd init ."


def _option(letter: str = "", default: Any = None, kind: Any = str) -> Any:
    """A dataclass field for an option of s3prl's script, ``--NAME`` and ``-letter``."""
    return field(default=default, metadata={"letter": letter, "kind": kind})


@dataclass(frozen=True)
class Request:
    """The options common to both scripts, under s3prl's names; None if not given.

    Attributes:
        override: the value of ``-o``, see :func:`escape_override`.
        past_exp: a checkpoint or a run's folder; after :meth:`resumed` the checkpoint, or None.
        auto_resume: False after :meth:`resumed`.
        passthrough: s3prl's other options, unchanged.
    """

    SCRIPT: ClassVar[str]
    ROOT: ClassVar[str]  # s3prl's folder of runs
    OWN_OPTIONS: ClassVar[tuple[str, ...]] = ()  # beside s3prl's
    RESTORES_DEVICE: ClassVar[bool] = False  # whether a resumed run uses its checkpoint's device

    upstream: str | None = _option("u")
    past_exp: str | None = _option("e")
    config: str | None = _option("c")
    expname: str | None = _option("n")
    expdir: str | None = _option("p")
    seed: int | None = _option(kind=seed_number)
    override: str | None = _option("o")
    auto_resume: bool = _option("a", False, bool)
    device: str | None = _option()
    passthrough: tuple[str, ...] = ()

    @classmethod
    def parse(cls: type[RequestT], argv: Sequence[str]) -> RequestT:
        """Parse the arguments of a command.

        Raises SetupError for an option without a value or with one of the wrong type, ConfigError
        for an invalid ``-o``.
        """
        return cls(**cls._parse_options(argv))

    @classmethod
    def _parse_options(
        cls, argv: Sequence[str], extra_options: Sequence[str] = ()
    ) -> dict[str, Any]:
        parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
        for name in extra_options:
            parser.add_argument(name, nargs="?", const="")
        for option in fields(cls):
            if not option.metadata:
                continue
            letter, kind = option.metadata["letter"], option.metadata["kind"]
            names = [f"-{letter}"] if letter else []
            value_type = {"action": "store_true"} if kind is bool else {"type": kind}
            parser.add_argument(*names, f"--{option.name}", default=option.default, **value_type)
        try:
            options, passthrough = parser.parse_known_args(list(argv))
        except argparse.ArgumentError as error:
            raise SetupError(f"cannot parse the arguments: {error}") from None
        override = escape_override(options.override)
        return {**vars(options), "override": override, "passthrough": tuple(passthrough)}

    def argv(self) -> list[str]:
        """The arguments for s3prl's script."""
        shared = len(fields(Request))
        argv: list[str] = []
        for option in (*fields(self)[shared:], *fields(self)[:shared]):  # -m comes first
            value = getattr(self, option.name)
            if not option.metadata or value is None or value == option.default:
                continue
            name, letter = f"--{option.name}", option.metadata["letter"]
            flag = [f"-{letter}" if letter else name]
            argv += flag if value is True else _option_argv(name, value, letter)
        return [*argv, *self.passthrough]

    def command(self) -> list[str]:
        """The complete command to type, with our own options."""
        return [self.SCRIPT, *self.argv(), *trust.trust_argv()]

    @property
    def named_folder(self) -> Path | None:
        """The folder that the options name: ``-o args.expdir``, else ``-p``, else ``-n``."""
        folder = argument_overrides(self.override).get("expdir") or self.expdir
        if folder:
            return Path(str(folder))
        return Path(self.ROOT) / self.expname if self.expname else None

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint of ``-e``; after :meth:`resumed`, that of ``-a`` too."""
        return Path(self.past_exp) if self.past_exp else None

    @property
    def folder(self) -> Path | None:
        """The folder that the run writes to, which may differ from the one in its checkpoint."""
        return self.named_folder or (self.checkpoint.parent if self.checkpoint else None)

    def resumed(self: RequestT) -> RequestT:
        """A copy in which ``-a`` or ``-e`` is replaced by the path of its checkpoint, if any.

        As in s3prl, ``-a`` takes precedence over ``-e`` if the run's folder has checkpoints. Raises
        CheckpointError if there is no such checkpoint.
        """
        if not (self.auto_resume or self.past_exp):
            return self
        folder = self.named_folder if self.auto_resume else None
        path = newest_checkpoint(folder) if folder else None
        if path is None and self.past_exp:
            path = Path(self.past_exp)
            path = newest_checkpoint(path) if path.is_dir() else path
            if path is None or not path.is_file():
                raise CheckpointError(f"-e {self.past_exp}: no such checkpoint (states-*.ckpt)")
        return replace(self, auto_resume=False, past_exp=None if path is None else str(path))


def escape_override(text: str | None) -> str | None:
    """Escape ``=`` signs within the values of ``-o``, for s3prl's script.

    Returns None for no override, which s3prl also writes as "None". Raises ConfigError if ``-o`` is
    invalid.
    """
    if not text or text.lower() == "none":
        return None
    return text if text.count("=") == text.count(",,") + 1 else escape_equals(text)


def _option_argv(name: str, value: Any, letter: str = "") -> list[str]:
    """An option and its value, as ``--option=value`` if this is text that begins with a dash."""
    if isinstance(value, str) and value.startswith("-"):
        return [f"{name}={value}"]
    return [f"-{letter}" if letter else name, str(value)]


@dataclass(frozen=True)
class PretrainRequest(Request):
    """The options of ``run_pretrain.py``."""

    SCRIPT = "run_pretrain.py"
    ROOT = "result/pretrain"
    RESTORES_DEVICE = True

    upstream_config: str | None = _option("g")

    @classmethod
    def parse(cls, argv: Sequence[str]) -> PretrainRequest:
        """See :meth:`Request.parse`. Sets ``-n`` from ``-p``, since s3prl requires both."""
        request = super().parse(argv)
        if request.is_ekd and request.override:
            request = replace(request, override=rename_overrides(request.override))
        if request.is_ekd and request.expdir and not request.expname:
            return replace(request, expname=Path(request.expdir).name)
        return request

    @property
    def is_ekd(self) -> bool:
        """Whether the upstream is ``ekd``; a resumed run need not name it."""
        return self.upstream in (None, "ekd")


def condition_name(noise: str | Path, snr: float) -> str:
    """Name a test condition by its noise (folder or manifest) and SNR in dB: ``babble_snr5``."""
    return f"{Path(os.path.abspath(noise)).stem}_snr{snr:g}"


@dataclass(frozen=True)
class NoisyTest:
    """Noise added to the test set: ``--noise``, ``--snr``, ``--noise_seed``."""

    noise: str
    snr: float  # dB
    seed: int = 0

    @property
    def name(self) -> str:
        """Folder name: ``NAME_snr5``, or ``NAME_snr5_seed1`` if the seed is not 0."""
        return condition_name(self.noise, self.snr) + (f"_seed{self.seed}" if self.seed else "")

    def argv(self) -> list[str]:
        """The options as arguments."""
        argv = _option_argv("--noise", self.noise)
        argv += _option_argv("--snr", repr(self.snr).removesuffix(".0"))
        return argv + _option_argv("--noise_seed", self.seed) if self.seed else argv


CACHE, CACHE_GB = "--cache-features", "--cache-features-gb"
LIMIT_GB = 50.0


@dataclass(frozen=True)
class CacheOptions:
    """The feature cache: ``--cache-features`` (its folder), ``--cache-features-gb`` (its limit)."""

    folder: str
    limit_gb: float = LIMIT_GB

    def argv(self) -> list[str]:
        """The options as arguments."""
        argv = _option_argv(CACHE, self.folder)
        return argv if self.limit_gb == LIMIT_GB else [*argv, CACHE_GB, f"{self.limit_gb!r}"]


DOWNSTREAM_HELP = """\
Options of s3prl_ekd (s3prl's own follow below). Evaluate with added noise (-m evaluate; predictions
go to EXPDIR/noisy/NAME_snrDB):
  --noise DIR       noises to add: a folder of audio, or the test split of a manifest (TSV)
  --snr DB          signal-to-noise ratio over each utterance
  --noise_seed N    seed for the choice of noises and their start times (default: 0)
  e.g. run_downstream.py -m evaluate -t test -e CKPT --noise data/noise --snr 5

Cache a frozen upstream's hidden states on disk, computed once for each utterance, without padding:
  --cache-features DIR     the cache, shared by epochs, evaluations, seeds and tasks
  --cache-features-gb N    stop writing when DIR has N GB (default: 50)
  Size in float16: hidden states x width x 100 bytes per second of speech: 1 MB for a base model
  (13 x 768), a tenth of that for a tiny one (7 x 192)

"""


@dataclass(frozen=True)
class DownstreamRequest(Request):
    """The options of ``run_downstream.py``.

    Attributes:
        local_rank: torchrun sets it as an environment variable, s3prl's script expects an argument.
        noise, cache: our own options.
    """

    SCRIPT = "run_downstream.py"
    ROOT = "result/downstream"
    OWN_OPTIONS = ("--noise", "--snr", "--noise_seed", CACHE, CACHE_GB)

    mode: str | None = _option("m")
    evaluate_split: str | None = _option("t")
    downstream: str | None = _option("d")
    downstream_variant: str | None = _option("v")
    upstream_ckpt: str | None = _option("k")
    upstream_model_config: str | None = _option("g")
    upstream_feature_selection: str | None = _option("s")
    upstream_layer_selection: int | None = _option("l", kind=int)
    upstream_feature_normalize: bool = _option(default=False, kind=bool)
    upstream_trainable: bool = _option("f", False, bool)
    upstream_refresh: bool = _option("r", False, bool)
    init_ckpt: str | None = _option("i")
    cache_dir: str | None = _option()
    local_rank: int | None = _option(kind=int)
    noise: NoisyTest | None = None
    cache: CacheOptions | None = None

    @classmethod
    def parse(cls, argv: Sequence[str]) -> DownstreamRequest:
        """See :meth:`Request.parse`."""
        # torch.distributed.launch spells it with a dash
        argv = [re.sub("^--local-rank", "--local_rank", argument) for argument in argv]
        if "LOCAL_RANK" in os.environ:
            argv = ["--local_rank", os.environ["LOCAL_RANK"], *argv]
        values = cls._parse_options(argv, cls.OWN_OPTIONS)
        noise = parse_noise_options(*map(values.pop, ("noise", "snr", "noise_seed")))
        cache = parse_cache_options(*map(values.pop, ("cache_features", "cache_features_gb")))
        return cls(**values, noise=noise, cache=cache)

    def command(self) -> list[str]:
        """See :meth:`Request.command`."""
        noise = self.noise.argv() if self.noise is not None else []
        cache = self.cache.argv() if self.cache is not None else []
        return [*super().command(), *noise, *cache]

    @property
    def split(self) -> str | None:
        """The split to evaluate; None unless ``-m evaluate``."""
        return (self.evaluate_split or "test") if self.mode == "evaluate" else None


def parse_noise_options(noise: str | None, snr: str | None, seed: str | None) -> NoisyTest | None:
    """Parse the options of a test with added noise; None if none is given."""
    if noise is None and snr is None and seed is None:
        return None
    if not noise:
        raise SetupError("--noise is missing: add --noise DIR, a folder of audio or a TSV manifest")
    if not snr:
        raise SetupError("--snr is missing: add the signal-to-noise ratio in dB, such as --snr 5")
    decibels = _number(snr)
    if not math.isfinite(decibels):
        raise SetupError(f"--snr must be a number of dB, such as 5 or -2.5, got {snr}")
    try:
        return NoisyTest(noise, decibels, int(seed or 0))
    except ValueError:
        raise SetupError(f"--noise_seed must be a whole number, got {seed}") from None


def parse_cache_options(folder: str | None, limit_gb: str | None) -> CacheOptions | None:
    """Parse the options of the feature cache; None if none is given."""
    if folder is None and limit_gb is None:
        return None
    if not folder:
        raise SetupError(f"{CACHE} needs a folder, such as {CACHE} result/features")
    limit = LIMIT_GB if limit_gb is None else _number(limit_gb)
    if not 0 < limit < math.inf:
        raise SetupError(f"{CACHE_GB} must be a number of gigabytes above 0, got {limit_gb}")
    if Path(folder).exists() and not Path(folder).is_dir():
        raise SetupError(f"{CACHE} must be a folder, got a file: {folder}")
    return CacheOptions(folder, limit)


def _number(text: str) -> float:
    """``float(text)``; NaN if it is not a number."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def check_and_resume(
    request: RequestT,
    option_checks: Iterable[Callable[[RequestT], None]],
    run_checks: Iterable[Callable[[RequestT, Mapping[str, Any]], None]],
) -> RequestT:
    """Run the checks, find the checkpoint to resume from, and choose the device.

    Args:
        request: as parsed.
        option_checks: checks of the options alone, before torch is imported.
        run_checks: checks of the resumed request and its checkpoint's contents, which are empty for
            a new run.

    Returns:
        The resumed request, with ``--device cpu`` if there is no CUDA device.
    """
    # Hide the GPUs: with one, s3prl's downstream Runner calls torch.cuda.device("cpu") and fails.
    if request.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    check_passthrough(request)
    check_name(request)
    for check in option_checks:
        check(request)
    request = request.resumed()
    states: Mapping[str, Any] = {}
    if request.past_exp:
        states = read_checkpoint(request.past_exp)
    for check_run in run_checks:
        check_run(request, states)
    import torch

    from .files.torch_load import restrict_torch

    restrict_torch()
    saved_args = states.get("Args") if request.RESTORES_DEVICE else None
    on_cuda = str(getattr(saved_args, "device", "cuda")).startswith("cuda")
    if request.device or not on_cuda or torch.cuda.is_available():
        return request
    logger.info("no CUDA device: running with --device cpu")
    return replace(request, device="cpu")


# Checks of both commands


def check_passthrough(request: Request) -> None:
    """Raise SetupError for an option that s3prl's script does not have."""
    options = script_options(request.SCRIPT)
    for argument in request.passthrough if options else ():
        name = argument.split("=")[0]
        if not re.match("--?[A-Za-z]", name):  # a value, such as -1
            continue
        # argparse accepts --see for --seed, and -l1 for -l 1
        if not any(option.startswith(name) for option in options) and name[:2] not in options:
            close = difflib.get_close_matches(
                name, [*options, *request.OWN_OPTIONS, trust.OPTION], n=1
            )
            guess = f"did you mean {close[0]}?" if close else f"see {request.SCRIPT} -h"
            raise SetupError(f"unknown option {name}; {guess}")


def check_name(request: Request) -> None:
    """Raise SetupError for ``-o args.expname``, which comes too late to name a folder."""
    if "expname" in argument_overrides(request.override):
        raise SetupError("-o args.expname has no effect; name the run with -n, or a folder with -p")


def check_seed(request: Request, states: Mapping[str, Any]) -> None:
    """Raise SetupError for another ``--seed`` than that of the checkpoint, which s3prl uses."""
    seed = getattr(states.get("Args"), "seed", None)
    if None not in (seed, request.seed) and seed != request.seed:
        raise SetupError(
            f"--seed {request.seed}: the run of {request.past_exp} has the seed {seed}; leave it "
            "out, or start another run"
        )


def check_device(request: Request, states: Mapping[str, Any]) -> None:
    """Raise ConfigError unless torch can allocate a tensor on the device of ``--device``."""
    if request.device is not None:
        choose_device(request.device)


def check_run_folder(request: Request, states: Mapping[str, Any]) -> None:
    """Raise SetupError if the run would write into the folder of another run."""
    folder, checkpoint = request.folder, request.checkpoint
    if folder is None or not run_checkpoints(folder):
        return
    if checkpoint is None:
        raise SetupError(f"{folder} already has a run: add -a to resume it, or name another folder")
    if folder.resolve() != checkpoint.parent.resolve():
        raise SetupError(
            f"{folder} has a run, but not that of {checkpoint}: name a new folder, or resume in "
            f"{checkpoint.parent} without -n and -p"
        )


def log_moved(request: Request, recorded: Any) -> None:
    """Log the folder that a run writes to if its checkpoint records another one."""
    folder = request.folder
    if folder and isinstance(recorded, str) and Path(recorded).resolve() == folder.resolve():
        return
    text = "%s records the folder %.200r; this run writes to %s"
    logger.info(text, request.checkpoint, recorded, folder)


# Guards of both commands around s3prl's script


@contextlib.contextmanager
def script_guards(request: Request, lock: str = LOCK_FILE, **arguments: Any) -> Iterator[None]:
    """Context in which s3prl's script is called for ``request``; all patches are undone on exit.

    ``sys.argv`` comes from the request, ``eval`` is restricted, ``torch.save`` is atomic, the run's
    folder is locked (by a file named ``lock``), and a checkpoint cannot change the folder, nor the
    given arguments of s3prl. Raises SetupError if another process writes to the folder.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(sys, "argv", [request.SCRIPT, *request.argv()]))
        stack.enter_context(no_eval.eval_blocked())
        stack.enter_context(patch_torch_save())
        if request.folder is not None and torchrun.rank() == 0:
            make_folder(request.folder, SetupError)
            stack.enter_context(FolderLock(request.folder, lock))  # before s3prl writes there
        if request.past_exp:
            stack.enter_context(_checkpoint_arguments(request, arguments))
        yield


def _checkpoint_arguments(
    request: Request, arguments: dict[str, Any]
) -> contextlib.AbstractContextManager[None]:
    """Patch ``torch.load`` to replace arguments in the checkpoint's ``Args``; undone on exit.

    In s3prl the arguments in the checkpoint override those of the command, including the folders of
    the run and its downloads. With a copied, renamed or untrusted checkpoint, this command would
    write elsewhere.
    """
    import torch

    load, folder = torch.load, str(request.folder)
    values = {"expdir": folder, "expname": request.expname or Path(folder).name, **arguments}

    def load_with_values(f: Any, *args: Any, **kwargs: Any) -> Any:
        states = load(f, *args, **kwargs)
        recorded = states.get("Args") if isinstance(states, dict) else None
        if str(f) == request.past_exp and isinstance(recorded, argparse.Namespace):
            vars(recorded).update(values)
        return states

    return replaced(torch, "load", load_with_values)
