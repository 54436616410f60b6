"""Essence knowledge distillation and discrete units: targets are classes, not features."""
