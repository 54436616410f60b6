"""How large a student is before it is built: a slip in a YAML file must not ask for terabytes."""

from __future__ import annotations

from .settings import StudentSettings

# Far above any student: HuBERT X-Large, a teacher, has 48 layers and 960 million parameters.
MAX_LAYERS, MAX_PARAMETERS = 256, 1_000_000_000


def matrix_parameters(settings: StudentSettings) -> int:
    """Parameters in convolutions and matrices: all but biases and norms."""
    width, inner = settings.encoder_embed_dim, settings.encoder_ffn_embed_dim
    total, before = 0, 1
    for channels, kernel, _ in settings.conv_layers:
        total += before * channels * kernel
        before = channels
    total += before * width if before != width else 0  # the feature projection
    total += width * (width // settings.conv_pos_groups) * settings.conv_pos
    return total + settings.encoder_layers * (4 * width * width + 2 * width * inner)


def check_size(settings: StudentSettings) -> None:
    """Raise ValueError where a student has more than the bounds above."""
    if settings.encoder_layers > MAX_LAYERS:
        raise ValueError(
            f"encoder_layers is {settings.encoder_layers}; up to {MAX_LAYERS} is allowed"
        )
    count = matrix_parameters(settings)
    if count > MAX_PARAMETERS:
        raise ValueError(
            f"a student of this size has {count:,} parameters; up to {MAX_PARAMETERS:,} is allowed"
        )
