"""The model card (README.md) of a hidden-set package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...student_file import LoadedStudent
from ..model_card import how_made

_CARD = """\
# {name}

A small speech model for SUPERB: waveforms at 16 kHz in, a list of hidden states out. It was
distilled with s3prl_ekd (Ensemble Knowledge Distillation of self-supervised speech models,
[arXiv 2302.12757](https://arxiv.org/abs/2302.12757)).

| | |
|---|---|
| parameters | {parameters:,}{unused} |
| MACs | {macs:.3f} G over SUPERB's 32 utterances: short {short:.3f}, medium {medium:.3f}, long {long:.3f}, longer {longer:.3f} |
| architecture | {conv} conv layers, {layers} transformer layer{plural} of width {width} |
| frame | {stride} samples ({milliseconds:g} ms) |
| hidden states | {states} |

## Use

```python
import torch
from expert import UpstreamExpert

model = UpstreamExpert("model.pt").eval()
states = model([torch.rand(16000), torch.rand(8000)])["hidden_states"]  # [batch, frame, dim] each
```

`expert.py` needs torch 1.13 or later and nothing else; `python cli.py FILE.wav` runs it on a file.
With s3prl and a huggingface_hub below 1.0, `run_downstream.py --hub huggingface -u NAME` loads it
from a repository.

## Hidden states

- 0: the projected features of the conv extractor
- 1 to {layers}: the output of each transformer layer{before_norm}
{heads}
Padded frames at the end of a batch carry no information.{padding}

## How it was made

{made}
{fine_tuning}
"""  # noqa: E501 (a table's row is one line)

_GROUP_NORM = """ The first conv layer normalises over time, padding
included: an utterance alone and the same in a padded batch differ a little."""


def model_card(
    loaded: LoadedStudent,
    heads: Mapping[str, Any],
    cost: Mapping[str, Any],
    name: str,
    data: str = "",
) -> str:
    """The card's text.

    Args:
        loaded: the student; its ``about`` says how it was made.
        heads: those that are kept, as in the package's ``config``.
        cost: as :func:`...superb.cost.measure_cost` returns it.
        name: the card's title.
        data: what it was trained on, in the place of what the student's file says of it.
    """
    settings = loaded.student.settings
    buckets = {bucket: macs / 1e9 for bucket, macs in cost["macs_buckets"].items()}
    states = settings.encoder_layers + 1
    kept = sum(head["layers"] * len(head["parts"]) for head in heads.values())
    return _CARD.format(
        name=name,
        parameters=cost["parameters"],
        unused=f" ({cost['unused']:,} of them unused)" if cost["unused"] else "",
        macs=cost["macs"] / 1e9,
        **buckets,
        conv=len(settings.conv_layers),
        layers=settings.encoder_layers,
        plural="" if settings.encoder_layers == 1 else "s",
        width=settings.encoder_embed_dim,
        stride=settings.stride,
        milliseconds=settings.stride / 16,
        states=f"{states + kept}: {states} of the student, {kept} of its heads" if kept else states,
        before_norm=", before the last layer norm" if settings.layer_norm_first else "",
        heads=_heads(heads, settings.encoder_layers + 1),
        padding=_GROUP_NORM if settings.extractor_mode == "default" else "",
        made=how_made(loaded.about, data),
        fine_tuning=_gradient(settings.feature_grad_mult),
    )


def _heads(heads: Mapping[str, Any], first: int) -> str:
    """The lines of the heads' hidden states, numbered from ``first``."""
    lines = []
    for name, head in heads.items():
        count = head["layers"] * len(head["parts"])
        span = f"{first}" if count == 1 else f"{first} to {first + count - 1}"
        lines.append(f"- {span}: what the head `{name}` predicts of its teacher's layers\n")
        first += count
    return "".join(lines)


def _gradient(scale: float) -> str:
    """A difference to ``ekd_student`` that no output shows."""
    if scale == 1:
        return ""
    what = "was not trained" if scale == 0 else f"was trained with its gradient times {scale:g}"
    return f"\nThe conv extractor {what}; this package does not scale gradients when fine-tuned.\n"
