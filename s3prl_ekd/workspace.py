"""What s3prl reads from the working folder: written once, never overwritten."""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Iterator, Mapping
from importlib import resources
from pathlib import Path

from .errors import SetupError
from .files.atomic import whole_file

# The adapter that s3prl imports as pretrain.ekd.pretrain_expert. The hook is for runs started by
# s3prl's plain script, which would show a user's mistake as a traceback.
ADAPTER = '''\
"""s3prl looks here for the method; it lives in the installed package s3prl_ekd."""

from s3prl_ekd.errors import install_excepthook

install_excepthook()

from s3prl_ekd.pretrain.expert import UpstreamPretrainExpert  # noqa: E402, F401
'''


EXPERIMENTS = ("experiments", "tiny")  # folders of configs that are written when asked for


def files(chosen: Collection[str] = ()) -> Iterator[tuple[str, bytes]]:
    """Relative path and contents of each file of a workspace.

    Args:
        chosen: experiments to write beside the default one, as :func:`experiments` names them.
    """
    yield "pretrain/ekd/pretrain_expert.py", ADAPTER.encode()
    for path, data in _tree("s3prl_ekd.pretrain_configs", "pretrain/ekd"):
        name = path.removeprefix("pretrain/ekd/").removesuffix(".yaml")
        if not name.startswith(tuple(f"{folder}/" for folder in EXPERIMENTS)) or name in chosen:
            yield path, data
    yield from _tree("s3prl_ekd.downstream_recipes", "downstream")


def experiments() -> dict[str, str]:
    """Name (``experiments/three_average``, ``tiny/…``) -> what the file says of itself."""
    found = {}
    for folder in EXPERIMENTS:
        for path, data in _tree(f"s3prl_ekd.pretrain_configs.{folder}", folder):
            comment = data.decode().split("\n#\n")[0]
            about = " ".join(line.lstrip("# ") for line in comment.splitlines())
            found[path.removesuffix(".yaml")] = about
    return dict(sorted(found.items()))


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
    values: Mapping[str, Mapping[str, str | list[str]]] | None = None,
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
            from .yaml_edit import put

            data = put(data.decode(), values[name]).encode()
        try:
            if os.path.lexists(path) and (path.is_symlink() or path.stat().st_size):
                done.append(("kept", path))
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as file:  # also over an empty one, which a full disk left
                file.write(data)
            done.append(("created", path))
        except OSError as error:
            raise SetupError(f"cannot write {path}: {error.strerror}") from None
    return done
