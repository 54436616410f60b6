"""The model card (README.md) of a student in a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from ..distill.settings import StudentSettings
from ..errors import printable
from ..student_file import LoadedStudent

_CARD = """\
---
library_name: transformers
tags:
- speech
- hubert
- distillation
---

# {name}

A small speech model: conv extractor, {layers} transformer layer{plural} of width {width},
{parameters:,} parameters. It is a `HubertModel` of transformers with `feat_proj_layer_norm: false`,
as DistilHuBERT is. It was exported with s3prl_ekd, which implements Ensemble Knowledge Distillation
of self-supervised speech models ([arXiv 2302.12757](https://arxiv.org/abs/2302.12757)).

This card reports no scores; evaluate the model on your task before you rely on it.

## Use

Install `torch`, `transformers` and `safetensors`. In the folder of this card:

```python
import numpy as np
from transformers import AutoFeatureExtractor, AutoModel

extractor = AutoFeatureExtractor.from_pretrained(".")
model = AutoModel.from_pretrained(".").eval()
waves = [0.1 * np.random.randn(16000), 0.1 * np.random.randn(8000)]  # put your audio here
batch = extractor(waves, sampling_rate=16000, padding=True, return_tensors="pt")
states = model(**batch, output_hidden_states=True).hidden_states  # [batch, frame, dim] each
```

- Waveforms are 16 kHz, mono, not normalised, and at least {min_samples} samples long.
  A frame is {stride} samples ({milliseconds:g} ms).
- Pass the attention mask with a padded batch, as above.{padding}
- A `HubertModel` has no prediction heads; those of the student are left out.

## Hidden states

| in this model | in `ekd_student` of s3prl_ekd |
|---|---|
| `model.feature_projection(model.feature_extractor(batch["input_values"]).transpose(1, 2))` | `hidden_states[0]`, where padded frames are zero |
| `hidden_states[0]`: the input of the first layer, after the positional convolution{norm} | none |
| `hidden_states[n]`, n = 1 to {layers}: the output of layer n | `hidden_states[n]` |
{last}
Both were compared in float32 on a padded batch of noise when this folder was written. The largest
difference was {error:.1e} (allowed: {tolerance:.0e}, relative to a layer's largest value if that is
above 1).

## How it was made

{made}
"""  # noqa: E501 (a table's row is one line)

_GROUP_NORM = """
  The first conv layer normalises over time, padding included, so the hidden states of an utterance
  change with the amount of padding, here as in s3prl; run utterances one by one to avoid this."""


def hf_card(
    loaded: LoadedStudent, name: str, parameters: int, error: float, tolerance: float
) -> str:
    """Text of the card.

    Args:
        loaded: the student; its ``about`` records how it was trained.
        name: title of the card.
        parameters: parameter count of the Hugging Face model.
        error: largest difference between the two models, as measured.
        tolerance: largest allowed difference.
    """
    settings = loaded.student.settings
    return _CARD.format(
        name=name,
        layers=settings.encoder_layers,
        plural="" if settings.encoder_layers == 1 else "s",
        width=settings.encoder_embed_dim,
        parameters=parameters,
        min_samples=settings.min_samples,
        stride=settings.stride,
        milliseconds=settings.stride / 16,
        padding=_GROUP_NORM if settings.extractor_mode == "default" else "",
        norm="" if settings.layer_norm_first else " and a layer norm",
        last=_last_row(settings),
        tolerance=tolerance,
        error=error,
        made=how_made(loaded.about),
    )


def _last_row(settings: StudentSettings) -> str:
    if not settings.layer_norm_first:
        return ""
    return (
        "| `last_hidden_state`: after the final layer norm; transformers 4 returns it as "
        f"`hidden_states[{settings.encoder_layers}]` too | the input of the prediction heads |\n"
    )


def how_made(about: Mapping[str, Any], data: str = "") -> str:
    """A Markdown list of how the student was trained; missing facts are left out.

    Args:
        about: ``about`` of a :class:`..student_file.LoadedStudent`.
        data: description of the training data; replaces the one in ``about``.
    """
    config = about.get("config")
    config = config if isinstance(config, Mapping) else {}
    lines = []
    for name, teacher in _mapping(config, "teachers").items():
        if isinstance(teacher, Mapping):
            layers = teacher.get("groups") or teacher.get("layers")
            lines.append(f"- teacher `{name}`: {_model(teacher.get('model'))}, layers {layers}")
    if "aggregation" in config:
        lines.append(f"- aggregation of the teachers: {config['aggregation']}")
    init = _mapping(config, "init")
    if config:
        source = init.get("teacher") or ", ".join(init.get("average") or ()) or "random weights"
        lines.append(f"- first weights: {source}")
    loss = _mapping(config, "loss")
    if loss:
        lines.append(
            f"- loss: {loss.get('reconstruction')} + {loss.get('cosine_weight')} · "
            f"{loss.get('cosine')} cosine"
        )
    if about.get("step") is not None:
        lines.append(f"- updates: {about['step']}")
    data = data or _data(about)
    if data:
        lines.append(f"- data: {data}")
    if about.get("source"):
        lines.append(f"- taken from: {about['source']}")
    if about.get("made_by"):
        lines.append(f"- made by: {about['made_by']}")
    # texts from the file must become neither HTML nor further lines of the card
    lines = [printable(line).replace("<", "&lt;") for line in lines]
    return "\n".join(lines) or "The student file does not record it."


def _data(about: Mapping[str, Any]) -> str:
    """Length tables and batch size of a run; empty if the file does not record them."""
    data = _mapping(about, "data")
    sets, size = data.get("sets"), data.get("train_batch_size")
    if not isinstance(sets, list) or not sets or not isinstance(size, int):
        return ""
    limit = "at most " if data.get("max_seconds") else ""
    return f"{', '.join(map(str, sets))} (batches of {limit}{size} utterances)"


def _mapping(config: Mapping, key: str) -> Mapping:
    value = config.get(key)
    return value if isinstance(value, Mapping) else {}


def _model(model: Any) -> str:
    """A hub name, or the last part of a path: folders of the user's machine stay private."""
    return f"`{PurePath(str(model).replace(chr(92), '/')).name}`"
