"""Check the packages and files that the recipes of SUPERB's tasks need."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import logging
import shlex
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from ..compat import voxceleb1_cache
from ..compat.child_processes import repeat_in_children
from ..errors import ConfigError, SetupError
from ..files.config import read_yaml
from ..system import s3prl_distribution
from ..system.packages import install_command
from .tasks import Task, missing_paths
from .tasks.corpus_check import check_corpus

CTC_CORPUS = "s3prl.downstream.ctc.corpus"  # in s3prl's repository but not in its wheel
CTC_MODULES = ("libriphone", "snips")  # of it, and ours of these names

# modules that pretraining imports: student, optimizer, logging, and common teacher families
PRETRAIN_MODULES = (
    "tensorboardX",
    "s3prl.optimizers",
    "s3prl.schedulers",
    "s3prl.upstream.distiller.model",
    *(
        f"s3prl.upstream.{family}.hubconf"
        for family in ("hubert", "wavlm", "wav2vec2", "data2vec", "unispeech_sat")
    ),
)


@dataclass(frozen=True)
class RequirementProblem:
    """What is missing or fails, and the command that fixes it (empty if there is none)."""

    reason: str
    remedy: str = ""


@dataclass
class RecipeStatus:
    """Problems that keep a recipe from running: modules that do not import, missing files."""

    modules: list[RequirementProblem] = field(default_factory=list)
    files: list[RequirementProblem] = field(default_factory=list)
    note: str = ""

    @property
    def ready(self) -> bool:
        return not self.modules and not self.files


def init_command(folder: Path) -> str:
    """The command that writes configs and dictionaries into ``folder``."""
    return f"s3prl-ekd init {shlex.quote(str(folder))}"


def check_modules(names: tuple[str, ...]) -> list[RequirementProblem]:
    """Import each module, suppressing its output; return the distinct problems."""
    return list(dict.fromkeys(filter(None, map(_import_problem, names))))


def check_recipe(task: Task, folder: Path) -> RecipeStatus:
    """Check whether the recipe of ``task`` can run in ``folder``."""
    modules = ("s3prl.run_downstream", f"s3prl.downstream.{task.downstream}.expert", *task.modules)
    with contextlib.ExitStack() as stack:
        if task.downstream == "ctc":
            with contextlib.suppress(ImportError):  # check_modules below reports what is missing
                provide_ctc_corpus(folder)
        if task.downstream == "voxceleb1":
            with contextlib.suppress(SetupError):  # torch is missing: nothing to guard
                # lets SID's modules import without librosa
                stack.enter_context(voxceleb1_cache.cache_bypassed())
        if task.downstream == "sv_voxceleb1":
            with contextlib.suppress(ImportError):  # torch is missing
                from .speaker_verification import recipe_patched

                stack.enter_context(recipe_patched())
        status = RecipeStatus(modules=check_modules(modules))
    try:
        config = read_yaml(folder / task.full)
    except ConfigError as error:
        remedy = "" if (folder / task.full).exists() else init_command(folder)
        status.files.append(RequirementProblem(str(error), remedy))
        return status
    for key, path in missing_paths(config, task.recipe_files, folder):
        status.files.append(
            RequirementProblem(f"{path} ({key}) does not exist", init_command(folder))
        )
    for key, path in missing_paths(config, task.corpus, folder):
        status.note = f"set the corpus: -o \"config.{key}='...'\" ({path} does not exist)"
        break
    else:
        try:
            check_corpus(task.downstream, config, task.full, folder=folder)
        except ConfigError as error:
            status.note = str(error)
    return status


def provide_ctc_corpus(folder: Path) -> None:
    """Make the modules of :data:`CTC_MODULES` importable; safe to call twice.

    Of each, uses the module of the installed s3prl, else that of the checkout at ``folder``, else
    ours.

    Raises:
        ImportError: s3prl or torch is not installed.
    """
    names = {f"{CTC_CORPUS}.{module}": module for module in CTC_MODULES}
    if all(sys.modules.get(name) is not None for name in names):
        return
    repeat_in_children(provide_ctc_corpus, folder.resolve())
    ctc = importlib.import_module("s3prl.downstream.ctc")
    checkout = folder.resolve() / "downstream" / "ctc"
    if (checkout / "corpus").is_dir():
        ctc.__path__.append(str(checkout))  # appended: an installed module has priority
    if importlib.util.find_spec(CTC_CORPUS) is None:
        package = ModuleType(
            CTC_CORPUS, "s3prl_ekd's replacement for a folder missing from this s3prl."
        )
        package.__path__ = []
        package.__spec__ = ModuleSpec(CTC_CORPUS, None, is_package=True)
        sys.modules[CTC_CORPUS] = vars(ctc)["corpus"] = package
    package = importlib.import_module(CTC_CORPUS)
    for name, module in names.items():
        if sys.modules.get(name) is None and importlib.util.find_spec(name) is None:
            own = importlib.import_module(f"s3prl_ekd.downstream.{module}")
            sys.modules[name] = vars(package)[module] = own


def _import_problem(name: str) -> RequirementProblem | None:
    with _silence():
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            return _missing_module(error.name or name)
        except Exception as error:  # a third-party module may raise anything
            return RequirementProblem(f"cannot import {name}: {type(error).__name__}: {error}")
    return None


def _missing_module(name: str) -> RequirementProblem:
    package = name.partition(".")[0]
    if package == s3prl_distribution.MODULE:
        s3prl = s3prl_distribution.installation()
        if s3prl.folder is None:
            return RequirementProblem(s3prl.problem)
    if importlib.util.find_spec(package) is not None:
        return RequirementProblem(f"module {name} is missing from {package}")
    return RequirementProblem(f"{package} is not installed", install_command(package))


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Suppress output, log messages and warnings of modules during import."""
    disabled_level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled_level)
