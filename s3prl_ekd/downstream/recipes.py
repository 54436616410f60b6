"""What the four SUPERB recipes need of the machine and of the working folder."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import logging
import shlex
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..compat import voxceleb1_cache
from ..errors import ConfigError, SetupError
from ..files.text import read_text
from .corpus_check import check_corpus
from .ctc_corpus import provide_ctc_corpus

# import name -> what to type, where it is not `pip install NAME`
INSTALL = {"yaml": "pip install pyyaml", "sklearn": "pip install scikit-learn"}

# what pretraining imports: student, optimizer, log, and the families of the usual teachers
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
class Problem:
    """Why something cannot run, and what to type about it (empty if nothing helps)."""

    reason: str
    remedy: str = ""


@dataclass(frozen=True)
class Recipe:
    """One SUPERB task as ``run_downstream.py`` runs it.

    Attributes:
        task: its name in SUPERB.
        downstream: the name after ``-d``.
        config: the YAML below the working folder.
        files: YAML keys, dotted, of the files and folders that come with a recipe.
        data: YAML keys, dotted, of the corpus: the user's to set.
        modules: what it imports only once it runs, beside the expert.
    """

    task: str
    downstream: str
    config: str
    files: tuple[str, ...]
    data: tuple[str, ...]
    modules: tuple[str, ...] = ()


RECIPES = (
    Recipe(
        "PR",
        "ctc",
        "downstream/ctc/libriphone.yaml",
        ("downstream_expert.text.vocab_file",),
        ("downstream_expert.corpus.path", "downstream_expert.corpus.lexicon"),
        # s3prl imports it with the first data loader; provide_ctc_corpus sees to it
        ("s3prl.downstream.ctc.corpus.libriphone",),
    ),
    Recipe(
        "SID",
        "voxceleb1",
        "downstream/voxceleb1/config.yaml",
        (),
        ("downstream_expert.datarc.file_path", "downstream_expert.datarc.meta_data"),
    ),
    Recipe(
        "ER",
        "emotion",
        "downstream/emotion/config.yaml",
        (),
        ("downstream_expert.datarc.root", "downstream_expert.datarc.meta_data"),
    ),
    Recipe(
        "ASR",
        "asr",
        "downstream/asr/config.yaml",
        ("downstream_expert.datarc.dict_path",),
        ("downstream_expert.datarc.libri_root", "downstream_expert.datarc.bucket_file"),
    ),
)


@dataclass
class State:
    """Whether a recipe could run: the modules import, and its files are there."""

    modules: list[Problem] = field(default_factory=list)
    files: list[Problem] = field(default_factory=list)
    note: str = ""

    @property
    def ready(self) -> bool:
        return not self.modules and not self.files


def init_command(folder: Path) -> str:
    """What writes the configs and dictionaries into ``folder``."""
    return f"s3prl-ekd init {shlex.quote(str(folder))}"


def check_modules(names: tuple[str, ...]) -> list[Problem]:
    """Import each module by name, silently; the problems met, none twice."""
    problems = []
    for name in names:
        problem = _import_problem(name)
        if problem and problem not in problems:
            problems.append(problem)
    return problems


def check_recipe(recipe: Recipe, folder: Path) -> State:
    """What stands between ``recipe`` and a run in ``folder``."""
    modules = (
        "s3prl.run_downstream",
        f"s3prl.downstream.{recipe.downstream}.expert",
        *recipe.modules,
    )
    if recipe.downstream == "ctc":
        with contextlib.suppress(ImportError):  # the check below says what is not installed
            provide_ctc_corpus(folder)
    if recipe.downstream == "voxceleb1":
        with contextlib.suppress(SetupError):  # without torch there is nothing to guard
            voxceleb1_cache.guard()  # and with it, an import that is never used need not succeed
    state = State(modules=check_modules(modules))
    config = _read_yaml(folder / recipe.config, init_command(folder))
    if isinstance(config, Problem):
        state.files.append(config)
        return state
    for key, path in missing_paths(config, recipe.files, folder):
        state.files.append(Problem(f"{path} ({key}) is not there", init_command(folder)))
    for key, path in missing_paths(config, recipe.data, folder):
        state.note = f"set the corpus: -o \"config.{key}='...'\" (now {path}, not there)"
        break
    else:
        try:
            check_corpus(recipe.downstream, config, recipe.config, folder=folder)
        except ConfigError as error:
            state.note = str(error)
    return state


def missing_paths(config: dict, keys: tuple[str, ...], folder: Path) -> Iterator[tuple[str, str]]:
    """``(key, path)`` of each path that ``config`` has under ``keys`` and ``folder`` has not."""
    for key in keys:
        for path in recipe_paths(config, (key,)):
            if not (folder / path).exists():
                yield key, path


def _import_problem(name: str) -> Problem | None:
    with _silence():
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            return _missing_module(error.name or name)
        except Exception as error:  # any failure while importing is the answer, not ours
            return Problem(f"{name} does not import: {type(error).__name__}: {error}")
    return None


def _missing_module(name: str) -> Problem:
    package = name.partition(".")[0]
    if importlib.util.find_spec(package) is not None:
        return Problem(f"module {name} is missing from {package}")
    return Problem(f"{package} is not installed", INSTALL.get(package, f"pip install {package}"))


def _read_yaml(path: Path, remedy: str) -> dict | Problem:
    if not path.is_file():
        return Problem(f"{path} is not there", remedy)
    try:
        from ..files.text import MAX_YAML, parse_yaml
    except ImportError:
        return _missing_module("yaml")
    try:
        content = parse_yaml(read_text(path, "recipe", ConfigError, MAX_YAML), "it")
    except ConfigError as error:
        return Problem(f"{path} is not YAML: {error}")
    return content if isinstance(content, dict) else Problem(f"{path} is not a YAML mapping")


def recipe_paths(config: dict, keys: tuple[str, ...]) -> list[str]:
    """The paths under dotted keys; none where a key is not set."""
    found: list[str] = []
    for key in keys:
        value = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            found += map(str, value if isinstance(value, list) else [value])
    return found


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep what modules print, log and warn while they are imported out of a report."""
    logged = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logged)
