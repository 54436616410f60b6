"""The weight files of a Hugging Face model: one file, or an index and its shards."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from ..errors import EkdError
from .text import CONTROL, read_json

# In transformers' order of precedence. An index names the shard of each tensor.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_INDEX = ".index.json"


def main_weights(names: Collection[str]) -> str | None:
    """The file of :data:`WEIGHTS` that is read if a model has the files ``names``; None without."""
    return next((name for name in WEIGHTS if name in names), None)


def shard_names(index: Path, error: type[EkdError]) -> list[str]:
    """The names of the shards in an index, sorted.

    Raises:
        EkdError: of class ``error``: the index is damaged, or names a file of another folder.
    """
    files = read_json(index, "index of weights", error).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise error(f"the index of weights {index} is damaged: it has no weight_map")
    suffix = Path(index.name.removesuffix(_INDEX)).suffix
    for name in files.values():
        plain = isinstance(name, str) and not set("/\\:") & set(name) and not CONTROL.search(name)
        if not plain or not name.endswith(suffix) or name.startswith("."):
            raise error(
                f"the index of weights {index} names the file {str(name)[:100]!r}; expected names "
                f"like {index.name.split('.')[0]}-00001-of-00002{suffix}, in the same folder"
            )
    return sorted(set(files.values()))


def weight_files(folder: Path, error: type[EkdError]) -> list[Path]:
    """The weight files of a folder, all existing; empty if it has none of :data:`WEIGHTS`.

    Raises:
        EkdError: of class ``error``: see :func:`shard_names`, or a shard is missing.
    """
    name = main_weights({name for name in WEIGHTS if (folder / name).is_file()})
    if name is None:
        return []
    if not name.endswith(_INDEX):
        return [folder / name]
    files = [folder / shard for shard in shard_names(folder / name, error)]
    for file in files:
        if not file.is_file():
            raise error(
                f"{folder} lacks {file.name}, which {name} names: the download is incomplete; copy "
                "or download it again"
            )
    return files
