"""The working folder of ``s3prl-ekd init``: the expert that s3prl imports, configs and recipes.

Existing files are never overwritten. Paths of corpora are checked and replace the default paths in
the YAML files.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from .errors import ConfigError, DataError, SetupError
from .files.atomic import atomic_file, explain_write_errors
from .files.config import value_at
from .files.text import parse_yaml

# s3prl imports this module as pretrain.ekd.pretrain_expert. The hook is for runs that s3prl's own
# script starts: without it, a user error is printed as a traceback.
ADAPTER = '''\
"""s3prl imports the method from here. The code is in the installed package s3prl_ekd."""

from s3prl_ekd.errors import install_excepthook

install_excepthook()

from s3prl_ekd.pretrain_expert import UpstreamPretrainExpert  # noqa: E402, F401
'''


# The option for what s3prl_runner.yaml has and tiny_runner.yaml lacks.
TINY_S3PRL = "-o \"config.optimizer.name='AdamW_with_schedule',,config.runner.precision='float32'\""
# A tiny experiment is a full one with another first comment and these replacements. The teachers of
# tiny_model.yaml have 6 layers of width 192, those of config_model.yaml 12 of 768. A tiny run has
# 600 steps, in which gates close only with a higher learning rate.
TINY_CHANGES = (
    ("../config_model.yaml", "../tiny_model.yaml"),
    ("[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]", "[1, 2], [3, 4], [5, 6]"),
    ("[0, 4, 8, 12]", "[0, 2, 4, 6]"),
    ("sparsity: 0.75", "sparsity: 0.5"),
    ("reach_at: 5000", "reach_at: 300"),
    ("lr: 0.02", "lr: 0.1"),
    ("encoder_layers: 12", "encoder_layers: 6"),
    ("encoder_embed_dim: 384", "encoder_embed_dim: 96"),
    ("encoder_ffn_embed_dim: 1536", "encoder_ffn_embed_dim: 384"),
    ("encoder_attention_heads: 6", "encoder_attention_heads: 2"),
    ("[8]", "[4]"),
    ("--layer 8", "--layer 4"),
    ("--clusters 500", "--clusters 100"),
    ("--data data/LibriSpeech", "--data data/corpus"),
    ("fit-units pretrain/ekd/config_model.yaml", "fit-units pretrain/ekd/tiny_model.yaml"),
    ("units/", "units/tiny_"),
)

SECOND_STEP_TITLE = "# The second distillation of a pruned student (DPHuBERT, arXiv 2305.17651)."
SECOND_STEP_HEAD = f"""\
{SECOND_STEP_TITLE}
# The settings of the first one, without pruning, for the student that was cut. RUNNER.yaml stands
# for the runner config of the first one.
# Half as many steps as in the first, at half its learning rate, are DPHuBERT's.
#
#   {{command}}

"""


def workspace_files(selected: Collection[str] = ()) -> Iterator[tuple[str, bytes]]:
    """Yield relative path and contents of each file of a working folder.

    Args:
        selected: experiments to add to the default one, by the names of :func:`experiments`.
    """
    yield "pretrain/ekd/pretrain_expert.py", ADAPTER.encode()
    for path, data in _tree("s3prl_ekd.pretrain_configs", "pretrain/ekd"):
        if not path.startswith("pretrain/ekd/experiments/"):
            yield path, data
    for name, text in experiments().items():
        if name in selected:
            yield f"pretrain/ekd/{name}.yaml", text.encode()
    yield from _tree("s3prl_ekd.downstream_recipes", "downstream")


def experiments() -> dict[str, str]:
    """Map names (``experiments/NAME``, then ``tiny/NAME``) to the YAML of all experiments."""
    full, tiny = {}, {}
    for path, data in _tree("s3prl_ekd.pretrain_configs.experiments", "experiments"):
        name, text = path.removesuffix(".yaml"), data.decode()
        full[name] = text
        name = name.removeprefix("experiments/")
        tiny[f"tiny/{name}"] = tiny_experiment(name, text)
    return {**full, **tiny}


def tiny_experiment(name: str, text: str) -> str:
    """Convert an experiment's YAML to its tiny version, see :data:`TINY_CHANGES`."""
    text = text.partition("\n\n")[2]
    for full, tiny in TINY_CHANGES:
        text = text.replace(full, tiny)
    experiment = Experiment(f"tiny/{name}", text)
    run = " \\\n#       ".join(experiment.run())
    after = f"#   {experiment.after()}\n" if experiment.is_pruned else ""
    head = f"# A tiny version of experiments/{name}.yaml, for a laptop.\n#\n#   {run}\n{after}"
    return f"{head}\n{text}"


@dataclass(frozen=True)
class Experiment:
    """An experiment in a working folder, and its commands.

    Attributes:
        name: ``experiments/NAME`` or ``tiny/NAME``.
        text: its YAML.
    """

    name: str
    text: str

    @property
    def run_name(self) -> str:
        return self.name.rpartition("/")[2]

    @property
    def is_pruned(self) -> bool:
        return "\npruning:" in self.text

    @property
    def runner(self) -> str:
        """The name of its runner config."""
        if self.name.startswith("tiny/"):
            return "tiny_pruning_runner" if self.is_pruned else "tiny_runner"
        if self.is_pruned:
            return "pruning_runner"
        return "s3prl_runner" if self._is_s3prl else "config_runner"

    @property
    def _is_s3prl(self) -> bool:
        return "\nstudent_backend: s3prl" in self.text

    def run(self) -> list[str]:
        """The command that trains it, in parts, each with its options."""
        command = f"run_pretrain.py -u ekd -n {self.run_name}"
        if self.runner != "config_runner":  # the default
            command += f" -c pretrain/ekd/{self.runner}.yaml"
        parts = [command, f"-g pretrain/ekd/{self.name}.yaml"]
        return [*parts, TINY_S3PRL] if self._is_s3prl and self.runner == "tiny_runner" else parts

    def after(self) -> str:
        """The command after the training: prune, or export the student."""
        folder = f"result/pretrain/{self.run_name}"
        if self.is_pruned:
            return f"s3prl-ekd prune {folder} -o {self.run_name}.pt"
        return f"s3prl-ekd export student {folder} -o {self.run_name}.safetensors"


@dataclass(frozen=True)
class Schedule:
    """Steps and learning rate of a run; the defaults are those of ``pruning_runner.yaml``."""

    total_steps: int = 50_000
    save_step: int = 5000
    lr: float = 2e-4

    def second(self) -> dict[str, float]:
        """Dotted keys of the runner config and their values in the second distillation."""
        steps = max(self.total_steps // 2, 2)
        changes: dict[str, float] = {
            "runner.total_steps": steps,
            "optimizer.lr": self.lr / 2,
            "optimizer.warmup_proportion": 0.2,
        }
        if self.save_step >= steps:  # the Runner wants fewer
            changes["runner.save_step"] = steps // 2
        return changes


def second_step(
    config: dict[str, Any], file: str, first: Schedule | None = None, keep_heads: bool = True
) -> tuple[str, str]:
    """The second distillation of a pruned student: its model config as YAML, and its command.

    Args:
        config: the model config of the first distillation, with ``extends`` resolved: ``config`` in
            the ``about`` of its student file.
        file: the pruned student's file; the text is for a file of its name that ends in ``.yaml``.
        first: steps and learning rate of the first distillation.
        keep_heads: whether the file has prediction heads.
    """
    first = first or Schedule()
    student: dict[str, Any] = {"kind": "file", "file": file}
    if not keep_heads:
        student["keep_heads"] = False
    if config.get("student", {}).get("mask") is not None:
        student["mask"] = config["student"]["mask"]
    if config.get("student", {}).get("train_extractor") is False:
        student["train_extractor"] = False
    changed = {**{key: config[key] for key in config if key != "pruning"}, "student": student}
    changes = first.second()
    overrides = ",,".join(f"config.{key}={value}" for key, value in changes.items())
    path = shlex.quote(str(Path(file).with_suffix(".yaml")))
    command = f'run_pretrain.py -u ekd -n NAME -c RUNNER.yaml -g {path} -o "{overrides}"'
    text = yaml.safe_dump(changed, sort_keys=False, allow_unicode=True)
    return SECOND_STEP_HEAD.format(command=command) + text, command


def _tree(package: str, target: str) -> Iterator[tuple[str, bytes]]:
    pending = [(resources.files(package), target)]
    while pending:
        folder, path = pending.pop()
        for item in sorted(folder.iterdir(), key=lambda item: item.name):
            if item.is_dir() and item.name != "__pycache__":
                pending.append((item, f"{path}/{item.name}"))
            elif item.is_file() and not item.name.endswith((".py", ".pyc")):
                yield f"{path}/{item.name}", item.read_bytes()


def write_workspace(
    root: Path, selected: Collection[str] = (), paths: Sequence[CorpusPath] = ()
) -> list[tuple[str, Path]]:
    """Write the files that do not exist yet.

    Args:
        root: the working folder, created if missing.
        selected: see :func:`workspace_files`.
        paths: inserted in place of our defaults.

    Returns:
        ``("created" | "kept", path)`` of each file.

    Raises:
        SetupError: the folder cannot be written, or an experiment does not exist.
    """
    names = experiments()
    for name in selected:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise SetupError(
                f"no such experiment: {name!r}{hint}; list them with: s3prl-ekd init --list"
            )
    results = []
    for name, data in workspace_files(selected):
        path = root / name
        for corpus in paths:
            if corpus.file == name:
                data = data.replace(corpus.default.encode(), corpus.yaml.encode(), 1)
        with explain_write_errors(path):
            if os.path.lexists(path) and (path.is_symlink() or path.stat().st_size):
                results.append(("kept", path))
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as file:  # replaces an empty file, which a full disk may leave
                file.write(data)
            results.append(("created", path))
    return results


_UNSAFE_IN_OVERRIDE = re.compile(r"""['"$`\\!=]|,,""")
PREPARED_LIBRISPEECH = "data/librispeech"  # output of `prepare librispeech` in the recipes


class CorpusPath(NamedTuple):
    """A value in a YAML file of the working folder."""

    file: str  # below the working folder
    key: str  # dotted
    default: str  # the value as our file writes it
    value: str | list[str]

    @property
    def yaml(self) -> str:
        """The value in single quotes, in which no character is special but the quote."""
        values = [self.value] if isinstance(self.value, str) else self.value
        return "\n      - ".join("'" + value.replace("'", "''") + "'" for value in values)


@dataclass(frozen=True)
class CorpusPaths:
    """Absolute paths of the user's corpora; None or empty if not given."""

    librispeech: Path | None = None
    voxceleb1: Path | None = None
    iemocap: Path | None = None
    lexicon: Sequence[Path] = ()

    def __bool__(self) -> bool:
        return bool(self.librispeech or self.voxceleb1 or self.iemocap or self.lexicon)

    def check(self) -> None:
        """Raise DataError, with the option's name, if a corpus or a lexicon is invalid."""
        from .prepare import er, librispeech, sid
        from .prepare.lexicon import read_lexicon

        checks: tuple[tuple[str, Any, Callable[[Any], object]], ...] = (
            ("librispeech", self.librispeech, librispeech.check_librispeech),
            ("voxceleb1", self.voxceleb1, sid.check_voxceleb1),
            ("iemocap", self.iemocap, er.check_iemocap),
            ("lexicon", self.lexicon or None, lambda paths: read_lexicon(paths, ())),
        )
        for option, path, check in checks:
            if path is not None:
                try:
                    check(path)
                except DataError as error:
                    raise DataError(f"--{option}: {error}") from None

    def values(self) -> list[CorpusPath]:
        """The values to insert into the YAML files."""
        phones = "downstream/ctc/libriphone.yaml"
        data, prepared = "downstream_expert.datarc", "'./data/librispeech/LibriSpeech'"
        values = []
        if self.librispeech:
            root, tables = str(self.librispeech), f"./{PREPARED_LIBRISPEECH}/len_for_bucket"
            datarc = "pretrain_expert.datarc"
            for runner in ("config_runner.yaml", "pruning_runner.yaml", "s3prl_runner.yaml"):
                file = f"pretrain/ekd/{runner}"
                values += [
                    CorpusPath(file, f"{datarc}.libri_root", "./data/LibriSpeech", root),
                    CorpusPath(file, f"{datarc}.file_path", "./data/len_for_bucket", tables),
                ]
            values += [
                CorpusPath("downstream/asr/config.yaml", f"{data}.libri_root", prepared, root),
                CorpusPath(phones, "downstream_expert.corpus.path", prepared, root),
            ]
        if self.lexicon:
            files, default = [*map(str, self.lexicon)], "'./data/librispeech/lexicon.txt'"
            values += [CorpusPath(phones, "downstream_expert.corpus.lexicon", default, files)]
        for path, task, key, default in (
            (self.voxceleb1, "voxceleb1", "file_path", "'./data/voxceleb1/audio'"),
            (self.iemocap, "emotion", "root", "'./data/iemocap/audio'"),
        ):
            if path:
                file = f"downstream/{task}/config.yaml"
                values += [CorpusPath(file, f"{data}.{key}", default, str(path))]
        return values

    @property
    def tasks(self) -> list[str]:
        """The tasks whose data is there."""
        corpora = {
            "pr": self.librispeech and self.lexicon,
            "sid": self.voxceleb1,
            "er": self.iemocap,
            "asr": self.librispeech,
        }
        return [task for task, corpus in corpora.items() if corpus]

    def commands(self) -> list[str]:
        """Return the next command for each corpus."""
        lines = []
        if self.librispeech:
            lines.append(["librispeech", str(self.librispeech), "-o", PREPARED_LIBRISPEECH])
        if self.voxceleb1:
            split = self.voxceleb1 / "iden_split.txt"  # is not part of the corpus
            argv = ["voxceleb1", str(self.voxceleb1), str(split if split.is_file() else split.name)]
            lines.append([*argv, "-o", "data/voxceleb1"])
        if self.iemocap:
            lines.append(["iemocap", str(self.iemocap), "-o", "data/iemocap"])
        return [shlex.join(["s3prl-ekd", "prepare", *argv]) for argv in lines]


def absolute_path(path: Path) -> Path:
    """Expand ``~``, and make the path absolute without resolving symlinks."""
    return Path(os.path.abspath(path.expanduser()))


def report_differences(root: Path, paths: Sequence[CorpusPath]) -> list[str]:
    """Return a line for each YAML key in ``root`` whose value differs from that of ``paths``."""
    lines = []
    for file, key, _, value in paths:
        try:
            current = parse_yaml((root / file).read_text(encoding="utf-8"), "the file")
        except (ConfigError, OSError, UnicodeDecodeError) as error:
            lines.append(f"cannot read {file} ({error}); it should have {key}: {value}")
            continue
        current = value_at(current, key)
        if current != value:
            lines.append(f"{file} was kept and has {key}: {current}; {_remedy(key, value)}")
    return lines


def _remedy(key: str, value: str | list[str]) -> str:
    if _UNSAFE_IN_OVERRIDE.search("".join(value)):
        return f"change it to {value}"  # the shell or s3prl would alter the override
    return f'change it there, or add to the command: -o "config.{key}={value!r}"'
