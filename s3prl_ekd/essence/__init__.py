"""Essence knowledge distillation and discrete units: targets are classes, not features."""

from __future__ import annotations
