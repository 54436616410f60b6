"""What a file holds, in a few letters: the same wherever it lies and whatever it is called."""

from __future__ import annotations

import hashlib
from pathlib import Path


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal; the file is not read as a whole.

    Raises:
        OSError: it cannot be read.
    """
    total = hashlib.sha256()  # hashlib.file_digest came with Python 3.11
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()
