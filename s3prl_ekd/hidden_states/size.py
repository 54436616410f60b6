"""How large a folder is."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def folder_size(folder: Path) -> int:
    """Bytes of all files below ``folder``."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # another process renames and removes
                total += os.stat(os.path.join(path, name)).st_size
    return total
