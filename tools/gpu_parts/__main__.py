"""Run a part: ``python -m tools.gpu_parts PART RESULT DEVICE [toy]``.

RESULT is a JSON file that is written again after each measurement, so that a part that is stopped
leaves what it has measured.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from s3prl_ekd import compat
from s3prl_ekd.files.atomic import write_text

from . import checks, step_rates

PARTS = {
    "environment": checks.environment,
    "base": step_rates.base,
    "tests": checks.cuda_tests,
    "training": checks.training,
    "torchrun": checks.torchrun,
    "tiny": step_rates.tiny,
}


def main() -> None:
    name, result, device, *more = sys.argv[1:]

    def save(values: dict[str, Any]) -> None:
        write_text(result, json.dumps(values, indent=1))

    compat.apply()
    with tempfile.TemporaryDirectory(prefix=f"gpu_check_{name}_") as folder:
        PARTS[name](Path(folder), device, bool(more), save)


if __name__ == "__main__":
    main()
