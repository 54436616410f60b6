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
{parameters:,} parameters.
It was distilled with s3prl_ekd (Ensemble Knowledge Distillation of self-supervised speech models,
[arXiv 2302.12757](https://arxiv.org/abs/2302.12757)) and is a `HubertModel` of transformers with
`feat_proj_layer_norm: false`, as DistilHuBERT is.

## Use

```python
from transformers import AutoFeatureExtractor, AutoModel

prepare = AutoFeatureExtractor.from_pretrained("FOLDER")
model = AutoModel.from_pretrained("FOLDER").eval()
batch = prepare([wave_a, wave_b], sampling_rate=16000, padding=True, return_tensors="pt")
states = model(**batch, output_hidden_states=True).hidden_states
```

- Waveforms are 16 kHz, mono, not normalised, and at least {min_samples} samples long.
  A frame is {stride} samples ({milliseconds:g} ms).
- Give the attention mask with a padded batch.{padding}
- Prediction heads are not part of a `HubertModel` and are left out.

## Hidden states

| here | in `ekd_student` of s3prl_ekd |
|---|---|
| `model.feature_projection(model.feature_extractor(waves).transpose(1, 2))` | `hidden_states[0]`, where padded frames are zero |
| `hidden_states[0]`: the input of the first layer, behind the positional convolution{norm} | none |
| `hidden_states[n]`, n = 1 to {layers}: the output of layer n | `hidden_states[n]` |
{last}
The two agree to {tolerance:.0e} in float32 on a padded batch; this was checked when the folder was
written (largest difference {error:.1e}).

## How it was made

{made}
"""  # noqa: E501 (a table's row is one line)

_GROUP_NORM = """
  The first conv layer normalises over time, padding included: an utterance alone and the same in a
  padded batch differ a little, here and in s3prl."""


def model_card(
    loaded: LoadedStudent, name: str, parameters: int, error: float, tolerance: float
) -> str:
    """The card's text.

    Args:
        loaded: the student; its ``about`` says how it was made.
        name: the card's title.
        parameters: of the Hugging Face model.
        error: the largest difference that was found between the two models.
        tolerance: the difference that is allowed.
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
        "| `last_hidden_state`: behind the final layer norm; transformers 4 has it in the place of "
        f"`hidden_states[{settings.encoder_layers}]` | what the prediction heads read |\n"
    )


def how_made(about: Mapping[str, Any], data: str = "") -> str:
    """How it was made, as a Markdown list; what is not known is left out.

    Args:
        about: of a :class:`..student_file.LoadedStudent`.
        data: what it was trained on, in the place of what ``about`` says of it.
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
    # what a file says of itself is text, and neither HTML nor lines of the card
    lines = [printable(line).replace("<", "&lt;") for line in lines]
    return "\n".join(lines) or "The student file does not say."


def _data(about: Mapping[str, Any]) -> str:
    """The tables and batches of a run; nothing where a file does not say."""
    data = _mapping(about, "data")
    sets, size = data.get("sets"), data.get("train_batch_size")
    if not isinstance(sets, list) or not sets or not isinstance(size, int):
        return ""
    most = "at most " if data.get("max_seconds") else ""
    return f"{', '.join(map(str, sets))} (batches of {most}{size} utterances)"


def _mapping(config: Mapping, key: str) -> Mapping:
    value = config.get(key)
    return value if isinstance(value, Mapping) else {}


def _model(model: Any) -> str:
    """A hub name as it is; of a path the last part: folders of a machine are nobody's business."""
    return f"`{PurePath(str(model).replace(chr(92), '/')).name}`"
