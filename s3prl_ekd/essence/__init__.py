"""Essence knowledge distillation and discrete units: targets that are classes, not features."""

from __future__ import annotations
