"""The working folder that ``s3prl-ekd init`` writes: s3prl's entry, configs and recipes.

Files are written once and never overwritten. The paths of a user's corpora are checked and put into
the configs and recipes; comments and layout of the YAML files stay as they are.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from .errors import ConfigError, DataError, SetupError
from .files.atomic import atomic_file
from .files.text import BoundedLoader, parse_yaml

# The adapter that s3prl imports as pretrain.ekd.pretrain_expert. The hook is for runs started by
# s3prl's plain script, which would show a user's mistake as a traceback.
ADAPTER = '''\
"""s3prl looks here for the method; it lives in the installed package s3prl_ekd."""

from s3prl_ekd.errors import install_excepthook

install_excepthook()

from s3prl_ekd.pretrain_expert import UpstreamPretrainExpert  # noqa: E402, F401
'''


# What a tiny experiment has in place of a shipped one's first comment, base and groups of layers:
# the teachers of tiny_model.yaml have 6 layers, those of config_model.yaml 12.
TINY_HEAD = """\
# The tiny twin of experiments/{name}.yaml, for a laptop.
#
#   run_pretrain.py -u ekd -n {name} -c pretrain/ekd/tiny_runner.yaml \\
#       -g pretrain/ekd/tiny/{name}.yaml

"""
TINY_CHANGES = (
    ("../config_model.yaml", "../tiny_model.yaml"),
    ("[[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]", "[[1, 2], [3, 4], [5, 6]]"),
)


def files(chosen: Collection[str] = ()) -> Iterator[tuple[str, bytes]]:
    """Relative path and contents of each file of a workspace.

    Args:
        chosen: experiments to write beside the default one, as :func:`experiments` names them.
    """
    yield "pretrain/ekd/pretrain_expert.py", ADAPTER.encode()
    for path, data in _tree("s3prl_ekd.pretrain_configs", "pretrain/ekd"):
        if not path.startswith("pretrain/ekd/experiments/"):
            yield path, data
    for name, text in experiments().items():
        if name in chosen:
            yield f"pretrain/ekd/{name}.yaml", text.encode()
    yield from _tree("s3prl_ekd.downstream_recipes", "downstream")


def experiments() -> dict[str, str]:
    """Name -> YAML: ``experiments/three_average`` and so on, and ``tiny/...`` of each."""
    full, tiny = {}, {}
    for path, data in _tree("s3prl_ekd.pretrain_configs.experiments", "experiments"):
        name, text = path.removesuffix(".yaml"), data.decode()
        full[name] = text
        name = name.removeprefix("experiments/")
        tiny[f"tiny/{name}"] = tiny_experiment(name, text)
    return {**full, **tiny}


def tiny_experiment(name: str, text: str) -> str:
    """An experiment's YAML with its first comment and its base replaced by the tiny ones."""
    text = text.partition("\n\n")[2]
    for full, tiny in TINY_CHANGES:
        text = text.replace(full, tiny)
    return TINY_HEAD.format(name=name) + text


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
    root: Path,
    chosen: Collection[str] = (),
    values: Mapping[str, Mapping[str, Value]] | None = None,
) -> list[tuple[str, Path]]:
    """Write what is not there yet, with the ``chosen`` experiments.

    Args:
        root: the working folder, made if it is not there.
        chosen: see :func:`files`.
        values: file below ``root`` -> dotted key -> what it gets instead of our default.

    Returns:
        ``("created" | "kept", path)`` of each file.

    Raises:
        SetupError: the folder cannot be written, or there is no such experiment.
    """
    known = experiments()
    for name in chosen:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            guess = f" (did you mean {close[0]}?)" if close else ""
            raise SetupError(
                f"there is no experiment {name!r}{guess}; see them with: s3prl-ekd init --list"
            )
    done = []
    for name, data in files(chosen):
        path = root / name
        if values and name in values:
            data = put(data.decode(), values[name]).encode()
        try:
            if os.path.lexists(path) and (path.is_symlink() or path.stat().st_size):
                done.append(("kept", path))
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as file:  # also over an empty one, which a full disk left
                file.write(data)
            done.append(("created", path))
        except OSError as error:
            raise SetupError(f"cannot write {path}: {error.strerror}") from None
    return done


Value = str | Sequence[str]
_AWKWARD = re.compile(r"""['"$`\\!=]|,,""")
PREPARED = "data/librispeech"  # what the recipes call it: `prepare librispeech DIR -o` this


@dataclass(frozen=True)
class Corpora:
    """Absolute paths; None or nothing where the user named none."""

    librispeech: Path | None = None
    voxceleb1: Path | None = None
    iemocap: Path | None = None
    lexicon: Sequence[Path] = ()

    def __bool__(self) -> bool:
        return bool(self.librispeech or self.voxceleb1 or self.iemocap or self.lexicon)

    def check(self) -> None:
        """Raise DataError, with the option's name, where one is not what it should be."""
        from .prepare import er, librispeech, sid
        from .prepare.lexicon import read_lexicon

        checks: tuple[tuple[str, Any, Callable[[Any], object]], ...] = (
            ("librispeech", self.librispeech, librispeech.check_shape),
            ("voxceleb1", self.voxceleb1, sid.check_shape),
            ("iemocap", self.iemocap, er.check_shape),
            ("lexicon", self.lexicon or None, lambda paths: read_lexicon(paths, ())),
        )
        for option, path, look in checks:
            if path is not None:
                try:
                    look(path)
                except DataError as error:
                    raise DataError(f"--{option}: {error}") from None

    def values(self) -> dict[str, dict[str, Value]]:
        """File below the working folder -> dotted key -> what belongs there."""
        found: dict[str, dict[str, Value]] = {}

        def put(file: str, key: str, value: Value) -> None:
            found.setdefault(file, {})[key] = value

        if self.librispeech:
            root = str(self.librispeech)
            put("pretrain/ekd/config_runner.yaml", "pretrain_expert.datarc.libri_root", root)
            tables = f"./{PREPARED}/len_for_bucket"
            put("pretrain/ekd/config_runner.yaml", "pretrain_expert.datarc.file_path", tables)
            put("downstream/asr/config.yaml", "downstream_expert.datarc.libri_root", root)
            put("downstream/ctc/libriphone.yaml", "downstream_expert.corpus.path", root)
        if self.lexicon:
            files = [str(path) for path in self.lexicon]
            put("downstream/ctc/libriphone.yaml", "downstream_expert.corpus.lexicon", files)
        if self.voxceleb1:
            root = str(self.voxceleb1)
            put("downstream/voxceleb1/config.yaml", "downstream_expert.datarc.file_path", root)
        if self.iemocap:
            root = str(self.iemocap)
            put("downstream/emotion/config.yaml", "downstream_expert.datarc.root", root)
        return found

    def commands(self) -> list[str]:
        """What to type next, for each corpus."""
        lines = []
        if self.librispeech:
            words = ["librispeech", str(self.librispeech), "-o", PREPARED]
            lines.append(
                [*words, *([] if self.lexicon else ["--lexicon", "cmudict.dict", "--g2p"])]
            )
        if self.voxceleb1:
            words = [str(self.voxceleb1), "iden_split.txt"]
            lines.append(["voxceleb1", *words, "-o", "data/voxceleb1"])
        if self.iemocap:
            lines.append(["iemocap", str(self.iemocap), "-o", "data/iemocap"])
        return [shlex.join(["s3prl-ekd", "prepare", *words]) for words in lines]


def absolute(path: Path) -> Path:
    """As the user means it, from the folder in which the command is typed."""
    return Path(os.path.abspath(path.expanduser()))


def other_values(root: Path, corpora: Corpora) -> list[str]:
    """A line for each key of a file in ``root`` that says something else than ``corpora``."""
    lines = []
    for file, wanted in corpora.values().items():
        for key, value in wanted.items():
            try:
                there = get((root / file).read_text(encoding="utf-8"), key)
            except (ConfigError, OSError, UnicodeDecodeError) as error:
                lines.append(f"{file} cannot be read ({error}); {key} belongs there")
                continue
            if there != value:
                lines.append(f"{file} was kept and has {key}: {there}; {_remedy(key, value)}")
    return lines


def _remedy(key: str, value: Value) -> str:
    text = f'-o "config.{key}={value!r}"'
    if _AWKWARD.search(str(value) if isinstance(value, str) else "".join(value)):
        return f"it should be {value}"  # a shell or s3prl would read something else
    return f"edit it, or add to the command {text}"


def put(text: str, values: Mapping[str, Value]) -> str:
    """``text`` with other values under dotted keys.

    Args:
        text: YAML, a mapping.
        values: key -> a text, or a list of texts for a key that has a list.

    Raises:
        ConfigError: it is not YAML, a key is not there, or it has a value of another kind.
    """
    for key, value in values.items():
        start, end, new = _replacement(text, key, value)
        text = text[:start] + new + text[end:]
    return text


def _replacement(text: str, key: str, value: Value) -> tuple[int, int, str]:
    """From where to where, and by what."""
    parse_yaml(text, "the file")  # or nothing is put into it
    node = yaml.compose(text, Loader=BoundedLoader)
    for part in key.split("."):
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        node = next((below for name, below in pairs if name.value == part), None)
    start, end = (node.start_mark.index, node.end_mark.index) if node else (0, 0)
    if isinstance(node, yaml.ScalarNode) and isinstance(value, str):
        return start, end, quoted(value)
    if isinstance(node, yaml.SequenceNode) and not isinstance(value, str):
        if node.flow_style:
            return start, end, f"[{', '.join(map(quoted, value))}]"
        # A block's own end lies behind the comments that follow it.
        dash = "\n" + " " * node.start_mark.column + "- "
        end = node.value[-1].end_mark.index
        return node.value[0].start_mark.index, end, dash.join(map(quoted, value))
    raise ConfigError(f"the key {key} is not there, or holds something else than a path")


def get(text: str, key: str) -> Value | None:
    """What a YAML text has under a dotted key; None where there is no such key.

    Raises:
        ConfigError: it is not YAML.
    """
    value = parse_yaml(text, "the file")
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def quoted(text: str) -> str:
    """In single quotes, in which YAML takes every character as it is."""
    return "'" + text.replace("'", "''") + "'"
