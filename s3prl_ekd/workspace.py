"""What s3prl reads from the working folder: written once, never overwritten."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from .errors import SetupError

# The adapter that s3prl imports as pretrain.ekd.pretrain_expert. The hook is for runs started by
# s3prl's plain script, which would show a user's mistake as a traceback.
ADAPTER = '''\
"""s3prl looks here for the method; it lives in the installed package s3prl_ekd."""

from s3prl_ekd.errors import install_excepthook

install_excepthook()

from s3prl_ekd.pretrain_expert import UpstreamPretrainExpert  # noqa: E402, F401
'''


def files() -> Iterator[tuple[str, bytes]]:
    """Relative path and contents of each file of a workspace."""
    yield "pretrain/ekd/pretrain_expert.py", ADAPTER.encode()
    yield from _tree("s3prl_ekd.pretrain_configs", "pretrain/ekd")
    yield from _tree("s3prl_ekd.downstream_recipes", "downstream")


def _tree(package: str, target: str) -> Iterator[tuple[str, bytes]]:
    pending = [(resources.files(package), target)]
    while pending:
        folder, path = pending.pop()
        for item in sorted(folder.iterdir(), key=lambda item: item.name):
            if item.is_dir() and item.name != "__pycache__":
                pending.append((item, f"{path}/{item.name}"))
            elif item.is_file() and not item.name.endswith((".py", ".pyc")):
                yield f"{path}/{item.name}", item.read_bytes()


def write_workspace(root: Path) -> list[tuple[str, Path]]:
    """Write what is not there yet.

    Returns:
        ``("created" | "kept", path)`` of each file.

    Raises:
        SetupError: the folder cannot be written.
    """
    done = []
    for name, data in files():
        path = root / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as file:
                file.write(data)
            done.append(("created", path))
        except FileExistsError:
            done.append(("kept", path))
        except OSError as error:
            raise SetupError(f"cannot write {path}: {error.strerror}") from None
    return done
