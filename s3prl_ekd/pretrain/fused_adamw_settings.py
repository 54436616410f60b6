"""``optimizer: {name: FusedAdamW, ...}``, checked without loading torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FUSED_ADAMW = "FusedAdamW"
KEYS = ("name", "lr", "weight_decay", "betas", "eps", "warmup_proportion")


def check_fused_adamw(config: Mapping[str, Any]) -> None:
    """Refuse what is no setting of it.

    Raises:
        ValueError: naming the key.
    """
    for key, value in config.items():
        if key not in KEYS:
            raise ValueError(
                f"optimizer.{key}: {FUSED_ADAMW} has no such setting; use {', '.join(KEYS[1:])}"
            )
        if key == "betas":
            known = isinstance(value, list) and len(value) == 2
            if not known or not all(type(b) in (int, float) and 0 <= b < 1 for b in value):
                raise ValueError(
                    f"optimizer.betas is {value!r}; two numbers from 0 to 1 are needed"
                )
        elif key not in ("name", "lr"):
            if type(value) not in (int, float) or value < 0:
                raise ValueError(f"optimizer.{key} is {value!r}; a number of 0 or more is expected")
    if config.get("warmup_proportion", 0) > 1:
        raise ValueError("optimizer.warmup_proportion is more than 1, which is all of the steps")
