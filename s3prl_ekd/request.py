"""What ``run_pretrain.py`` and ``run_downstream.py`` are asked for, and the run that it names.

A command is parsed once into a :class:`PretrainRequest` or :class:`DownstreamRequest`. Checks and
guards read the request; :meth:`Request.argv` writes it as the arguments of s3prl's script. Options
of s3prl on which nothing here depends pass through as typed.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from .compat import no_eval
from .compat.replaced import replaced
from .errors import CheckpointError, SetupError
from .files import trust
from .files.atomic import patch_torch_save, make_folder
from .files.config import argument_overrides, escape_equals
from .files.renamed_keys import rename_overrides
from .system import torchrun
from .system.lock import NAME, FolderLock

logger = logging.getLogger(__name__)

R = TypeVar("R", bound="Request")
INIT_HINT = "type: s3prl-ekd init ."


def _option(letter: str = "", default: Any = None, kind: Any = str) -> Any:
    """A field that is an option of s3prl's script, ``--NAME`` and ``-letter``."""
    return field(default=default, metadata={"letter": letter, "kind": kind})


@dataclass(frozen=True)
class Request:
    """The options that both of s3prl's scripts have, under s3prl's names; None: not given.

    Attributes:
        override: as s3prl splits it, see :func:`plain_override`.
        past_exp: a checkpoint or a folder; after :meth:`resumed` the checkpoint, or None.
        auto_resume: False after :meth:`resumed`.
        others: s3prl's other options, as typed.
    """

    SCRIPT: ClassVar[str]
    ROOT: ClassVar[str]  # s3prl's folder of runs
    SAVES_DEVICE: ClassVar[bool] = False  # a resumed run is on the device in its checkpoint

    upstream: str | None = _option("u")
    past_exp: str | None = _option("e")
    config: str | None = _option("c")
    expname: str | None = _option("n")
    expdir: str | None = _option("p")
    seed: int | None = _option(kind=int)
    override: str | None = _option("o")
    auto_resume: bool = _option("a", False, bool)
    device: str | None = _option()
    others: tuple[str, ...] = ()

    @classmethod
    def parse(cls: type[R], argv: Sequence[str]) -> R:
        """Read the arguments of a command.

        Raises:
            SetupError: an option has no value, or one of another kind.
            ConfigError: ``-o`` is not of the form that is expected.
        """
        return cls(**cls._read(argv))

    @classmethod
    def _read(
        cls, argv: Sequence[str], ours: Sequence[str] = (), **defaults: Any
    ) -> dict[str, Any]:
        parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
        for name in ours:
            parser.add_argument(name, nargs="?", const="")
        for each in fields(cls):
            if not each.metadata:
                continue
            letter, kind = each.metadata["letter"], each.metadata["kind"]
            names = [*([f"-{letter}"] if letter else []), f"--{each.name}"]
            if each.name == "local_rank":
                names.append("--local-rank")  # as torch.distributed.launch has it
            reading = {"action": "store_true"} if kind is bool else {"type": kind}
            default = defaults.get(each.name, each.default)
            parser.add_argument(*names, dest=each.name, default=default, **reading)
        try:
            found, others = parser.parse_known_args(list(argv))
        except argparse.ArgumentError as error:
            raise SetupError(f"the arguments cannot be read: {error}") from None
        override = plain_override(found.override)
        return {**vars(found), "override": override, "others": tuple(others)}

    def argv(self) -> list[str]:
        """The arguments of s3prl's script."""
        shared = len(fields(Request))
        argv: list[str] = []
        for each in (*fields(self)[shared:], *fields(self)[:shared]):  # -m comes first
            value = getattr(self, each.name)
            if not each.metadata or value is None or value == each.default:
                continue
            name = f"-{each.metadata['letter']}" if each.metadata["letter"] else f"--{each.name}"
            argv += [name] if value is True else _typed(name, f"--{each.name}", value)
        return [*argv, *self.others]

    def command(self) -> list[str]:
        """The whole command, as typed."""
        return [self.SCRIPT, *self.argv(), *trust.trust_argv()]

    @property
    def named_folder(self) -> Path | None:
        """The folder of ``-o "args.expdir='FOLDER'"``, else of ``-p``, else of ``-n``."""
        folder = argument_overrides(self.override).get("expdir") or self.expdir
        if folder:
            return Path(str(folder))
        return Path(self.ROOT) / self.expname if self.expname else None

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint of ``-e``; once :meth:`resumed` is done, that of ``-a`` too."""
        return Path(self.past_exp) if self.past_exp else None

    @property
    def folder(self) -> Path | None:
        """The folder that the run writes to, whatever folder is recorded in the checkpoint."""
        return self.named_folder or (self.checkpoint.parent if self.checkpoint else None)

    def resumed(self: R) -> R:
        """The request with the file of the checkpoint that ``-a`` or ``-e`` asks for, if any.

        As with s3prl, ``-a`` comes before ``-e`` where the run's folder has checkpoints.

        Raises:
            CheckpointError: there is no such checkpoint.
        """
        if not (self.auto_resume or self.past_exp):
            return self
        from .files.run_checkpoints import newest  # which imports torch

        folder = self.named_folder if self.auto_resume else None
        path = newest(folder) if folder is not None and folder.is_dir() else None
        if path is None and self.past_exp:
            path = Path(self.past_exp)
            path = newest(path) if path.is_dir() else path
            if path is None or not path.is_file():
                raise CheckpointError(
                    f"-e {self.past_exp}: there is no such checkpoint (states-*.ckpt)"
                )
        return replace(self, auto_resume=False, past_exp=None if path is None else str(path))


def plain_override(text: str | None) -> str | None:
    """The value of ``-o`` with ``=`` signs written so that s3prl's script takes them.

    None where nothing is overridden: s3prl takes "None" for that too.

    Raises:
        ConfigError: it is not of the form that is expected.
    """
    if not text or text.lower() == "none":
        return None
    return text if text.count("=") == text.count(",,") + 1 else escape_equals(text)


def _typed(name: str, long: str, value: Any) -> list[str]:
    """An option and its value; joined by ``=`` where the value begins with a dash."""
    return [f"{long}={value}"] if str(value).startswith("-") else [name, str(value)]


@dataclass(frozen=True)
class PretrainRequest(Request):
    """``run_pretrain.py``."""

    SCRIPT = "run_pretrain.py"
    ROOT = "result/pretrain"
    SAVES_DEVICE = True

    upstream_config: str | None = _option("g")

    @classmethod
    def parse(cls, argv: Sequence[str]) -> PretrainRequest:
        """See :meth:`Request.parse`. s3prl wants ``-n`` beside ``-p``: the folder's name."""
        request = super().parse(argv)
        if request.is_ekd and request.override:
            request = replace(request, override=rename_overrides(request.override))
        if request.is_ekd and request.expdir and not request.expname:
            return replace(request, expname=Path(request.expdir).name)
        return request

    @property
    def is_ekd(self) -> bool:
        """Whether ours is the method; a run that is resumed need not name it."""
        return self.upstream in (None, "ekd")


def condition_name(noise: str | Path, snr: float) -> str:
    """A folder or manifest and a ratio in dB as the name of a test condition: ``babble_snr5``."""
    return f"{Path(os.path.abspath(noise)).stem}_snr{snr:g}"


@dataclass(frozen=True)
class NoisyTest:
    """``--noise``, ``--snr``, ``--noise_seed``: what is added to the test set."""

    noise: str
    snr: float  # dB
    seed: int = 0

    @property
    def name(self) -> str:
        """A folder's name: ``NAME_snr5``, and ``NAME_snr5_seed1`` for other seeds than 0."""
        return condition_name(self.noise, self.snr) + (f"_seed{self.seed}" if self.seed else "")

    def argv(self) -> list[str]:
        """As typed."""
        argv = [("--noise", self.noise), ("--snr", f"{self.snr!r}".removesuffix(".0"))]
        argv += [("--noise_seed", str(self.seed))] if self.seed else []
        return [word for name, value in argv for word in _typed(name, name, value)]


CACHE, CACHE_GB = "--cache-features", "--cache-features-gb"
LIMIT_GB = 50.0


@dataclass(frozen=True)
class CacheOptions:
    """``--cache-features``, ``--cache-features-gb``: a folder of hidden states, and its limit."""

    folder: str
    limit_gb: float = LIMIT_GB

    def argv(self) -> list[str]:
        """As typed."""
        argv = _typed(CACHE, CACHE, self.folder)
        return argv if self.limit_gb == LIMIT_GB else [*argv, CACHE_GB, f"{self.limit_gb!r}"]


DOWNSTREAM_HELP = """\
Ours, beside s3prl's options below: -m evaluate under noise (predictions: EXPDIR/noisy/NAME_snrDB)
  --noise DIR       noises to add: a folder of audio, or a manifest (TSV), of which the test split
  --snr DB          signal-to-noise ratio over each utterance
  --noise_seed N    other draws of noises and starts (default: 0)
  e.g. run_downstream.py -m evaluate -t test -e CKPT --noise data/noise --snr 5

Ours too: a frozen upstream's hidden states, computed once for each waveform (each utterance alone)
  --cache-features DIR     keep them there, for other epochs, evaluations, seeds and tasks
  --cache-features-gb N    write no more once DIR has so many GB (default: 50)
  float16; layers x width x 100 bytes for a second of speech: 1 MB for a model of the base size (13
  x 768), a tenth of that for a tiny one (5 x 192)

"""


@dataclass(frozen=True)
class DownstreamRequest(Request):
    """``run_downstream.py``.

    Attributes:
        local_rank: the number of this process under torchrun, which tells it by the environment;
            s3prl's script reads it from its arguments.
        noise, cache: options of ours.
    """

    SCRIPT = "run_downstream.py"
    ROOT = "result/downstream"

    mode: str | None = _option("m")
    evaluate_split: str | None = _option("t")
    downstream: str | None = _option("d")
    downstream_variant: str | None = _option("v")
    upstream_ckpt: str | None = _option("k")
    upstream_model_config: str | None = _option("g")
    upstream_feature_selection: str = _option("s", "hidden_states")
    init_ckpt: str | None = _option("i")
    cache_dir: str | None = _option()
    local_rank: int | None = _option(kind=int)
    noise: NoisyTest | None = None
    cache: CacheOptions | None = None

    @classmethod
    def parse(cls, argv: Sequence[str]) -> DownstreamRequest:
        """See :meth:`Request.parse`."""
        ours = ("--noise", "--snr", "--noise_seed", CACHE, CACHE_GB)
        values = cls._read(argv, ours, local_rank=os.environ.get("LOCAL_RANK"))
        noise = read_noise(*map(values.pop, ("noise", "snr", "noise_seed")))
        cache = read_cache(*map(values.pop, ("cache_features", "cache_features_gb")))
        return cls(**values, noise=noise, cache=cache)

    def command(self) -> list[str]:
        """The whole command, as typed."""
        ours = (part.argv() for part in (self.noise, self.cache) if part is not None)
        return [*super().command(), *(word for argv in ours for word in argv)]

    @property
    def split(self) -> str | None:
        """The split to evaluate, of a run that only evaluates."""
        return (self.evaluate_split or "test") if self.mode == "evaluate" else None


def read_noise(noise: str | None, snr: str | None, seed: str | None) -> NoisyTest | None:
    """The options of a test under noise; None where none was given.

    Raises:
        SetupError: one is missing or no number.
    """
    if noise is None and snr is None and seed is None:
        return None
    if not noise:
        raise SetupError("name the noises: --noise DIR, a folder of audio or a manifest (TSV)")
    if not snr:
        raise SetupError("name the signal-to-noise ratio in dB: --snr 5")
    decibels = _number(snr)
    if not math.isfinite(decibels):
        raise SetupError(f"--snr {snr}: a number of dB is needed, such as 5 or -2.5")
    try:
        return NoisyTest(noise, decibels, int(seed or 0))
    except ValueError:
        raise SetupError(f"--noise_seed {seed}: a whole number is needed") from None


def read_cache(folder: str | None, limit_gb: str | None) -> CacheOptions | None:
    """The options of cached features; None where none was given.

    Raises:
        SetupError: the folder is missing or a file, or the limit is no number above 0.
    """
    if folder is None and limit_gb is None:
        return None
    if not folder:
        raise SetupError(f"name the folder of the hidden states: {CACHE} result/features")
    limit = LIMIT_GB if limit_gb is None else _number(limit_gb)
    if not 0 < limit < math.inf:
        raise SetupError(f"{CACHE_GB} {limit_gb}: a number of gigabytes above 0 is needed")
    if Path(folder).exists() and not Path(folder).is_dir():
        raise SetupError(f"{CACHE} {folder}: this is a file; a folder for hidden states is needed")
    return CacheOptions(folder, limit)


def _number(text: str) -> float:
    """NaN for what is no number."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def completed(
    request: R,
    option_checks: Iterable[Callable[[R], None]],
    run_checks: Iterable[Callable[[R, Mapping[str, Any]], None]],
) -> R:
    """The request with its checkpoint found, and on a device that is there.

    Args:
        option_checks: look at what was typed.
        run_checks: look at the resumed request, and the contents of its checkpoint, empty for a new
            run.

    Raises:
        EkdError: of the first check that fails; one sentence for what the user can mend.
    """
    if request.device == "cpu":  # or s3prl's downstream Runner calls torch.cuda.device("cpu")
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    for check in option_checks:
        check(request)
    request = request.resumed()
    states: Mapping[str, Any] = {}
    if request.past_exp:
        from .files.run_checkpoints import read_run

        states = read_run(request.past_exp)
    for check_run in run_checks:
        check_run(request, states)
    import torch

    from .files.torch_load import restrict_torch

    restrict_torch()
    saved = states.get("Args") if request.SAVES_DEVICE else None
    on_cuda = str(getattr(saved, "device", "cuda")).startswith("cuda")
    if request.device or not on_cuda or torch.cuda.is_available():
        return request
    logger.info("no CUDA device here: running with --device cpu")
    return replace(request, device="cpu")


# Checks that both commands have


def check_device(request: Request, states: Mapping[str, Any]) -> None:
    """Raise SetupError unless torch can put something on the device that is named."""
    if request.device is None:
        return
    import torch

    try:
        torch.empty(1, device=request.device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).strip().splitlines()[0]
        raise SetupError(f"--device {request.device} cannot be used here: {first}") from None


def check_run_folder(request: Request, states: Mapping[str, Any]) -> None:
    """Raise SetupError where the training would write into a folder that holds another run."""
    from .files.run_checkpoints import run_checkpoints  # which imports torch

    folder, checkpoint = request.folder, request.checkpoint
    if folder is None or not run_checkpoints(folder):
        return
    if checkpoint is None:
        raise SetupError(
            f"{folder} holds a run already: add -a to go on with it, or take another name"
        )
    if folder.resolve() != checkpoint.parent.resolve():
        raise SetupError(
            f"{folder} holds another run than {checkpoint}; name a new folder, or leave -n and -p "
            f"out to go on in {checkpoint.parent}"
        )


def log_moved(request: Request, recorded: Any) -> None:
    """Log where a run writes, if its checkpoint has another folder recorded."""
    folder = request.folder
    if folder and isinstance(recorded, str) and Path(recorded).resolve() == folder.resolve():
        return
    logger.info(
        "%s was saved in the folder %.200r; this command writes to %s",
        request.checkpoint,
        recorded,
        folder,
    )


# Guards around s3prl's script that both commands have


@contextlib.contextmanager
def script_guards(request: Request, lock: str = NAME, **arguments: Any) -> Iterator[None]:
    """Within it s3prl's script may be called for ``request``.

    It reads the request as its arguments, evaluates no text, saves whole files, and writes to the
    request's folder, and alone there.

    Args:
        request: checked and resumed.
        lock: name of the folder's lock.
        arguments: s3prl's arguments that the command decides, whatever the checkpoint has.

    Raises:
        SetupError: another process writes to the folder.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(sys, "argv", [request.SCRIPT, *request.argv()]))
        stack.enter_context(no_eval.guarded())
        stack.enter_context(patch_torch_save())
        if request.folder is not None and torchrun.rank() == 0:
            make_folder(request.folder, SetupError)
            stack.enter_context(FolderLock(request.folder, lock))  # before s3prl writes there
        if request.past_exp:
            stack.enter_context(_replaced_arguments(request, arguments))
        yield


def _replaced_arguments(
    request: Request, arguments: dict[str, Any]
) -> contextlib.AbstractContextManager[None]:
    """Within it, ``torch.load`` of the checkpoint gives ``Args`` with what the command decides.

    s3prl lets the arguments in the checkpoint override those of the command. Among them are the
    folder that the run writes to and the one that downloads go to; a file that was copied, renamed
    or made by somebody else would then decide where this command writes.
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
