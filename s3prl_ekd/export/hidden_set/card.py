"""The model card (README.md) of a hidden-set package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...student_file import LoadedStudent
from ..model_card import how_made

_CARD = """\
# {name}

A small speech model for SUPERB: waveforms at 16 kHz in, a list of hidden states out. It was
exported with s3prl_ekd, which implements Ensemble Knowledge Distillation of self-supervised speech
models ([arXiv 2302.12757](https://arxiv.org/abs/2302.12757)).

This card reports no scores; evaluate the model on your task before you rely on it.

| | |
|---|---|
| parameters | {parameters:,}{unused} |
| MACs | {macs:.3f} G over SUPERB's 32 utterances: short {short:.3f}, medium {medium:.3f}, long {long:.3f}, longer {longer:.3f} |
| architecture | {conv} conv layers, {layers} transformer layer{plural} of width {width} |
| frame | {stride} samples ({milliseconds:g} ms) |
| hidden states | {states} |

## Use

In this folder, with torch 1.13 or later and no other package:

```python
import torch
from expert import UpstreamExpert

model = UpstreamExpert("model.pt").eval()
waves = [torch.rand(16000), torch.rand(8000)]  # put your audio here: 16 kHz, mono
states = model(waves)["hidden_states"]  # [batch, frame, dim] each
```

`python cli.py` runs it on noise; `python cli.py --help` shows how to run it on audio files.
s3prl can load it from the Hugging Face Hub (`run_downstream.py --hub huggingface`, with the name of
the repository after `-u`), but only with an old huggingface_hub that still has `HfApi.login`.

## Hidden states

- 0: the projected features of the conv extractor
- 1 to {layers}: the output of each transformer layer{before_norm}
{heads}
In a batch, frames beyond the end of an utterance are padding; ignore them.{padding}

## How it was made

{made}
{fine_tuning}
"""  # noqa: E501 (a table's row is one line)

_GROUP_NORM = """ The first conv
layer normalises over time, padding included, so the hidden states of an utterance change with the
amount of padding; run utterances one by one to avoid this."""


def package_card(
    loaded: LoadedStudent,
    heads: Mapping[str, Any],
    cost: Mapping[str, Any],
    name: str,
    data: str = "",
) -> str:
    """Text of the card.

    Args:
        loaded: the student; its ``about`` records how it was trained.
        heads: the heads in the package, as in its ``config``.
        cost: from :func:`...superb.cost.measure_cost`.
        name: title of the card.
        data: description of the training data; replaces the one in the student file.
    """
    settings = loaded.student.settings
    buckets = {bucket: macs / 1e9 for bucket, macs in cost["macs_buckets"].items()}
    states = settings.encoder_layers + 1
    head_states = sum(head["layers"] * len(head["parts"]) for head in heads.values())
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
        states=(
            f"{states + head_states}: {states} of the student, {head_states} of its heads"
            if head_states
            else states
        ),
        before_norm=", before the last layer norm" if settings.layer_norm_first else "",
        heads=_head_lines(heads, settings.encoder_layers + 1),
        padding=_GROUP_NORM if settings.extractor_mode == "default" else "",
        made=how_made(loaded.about, data),
        fine_tuning=_gradient_note(settings.feature_grad_mult),
    )


def _head_lines(heads: Mapping[str, Any], start: int) -> str:
    """List the hidden states of the heads, numbered from ``start``."""
    lines = []
    for name, head in heads.items():
        count = head["layers"] * len(head["parts"])
        span = f"{start}" if count == 1 else f"{start} to {start + count - 1}"
        lines.append(f"- {span}: the teacher layers that the head `{name}` predicts\n")
        start += count
    return "".join(lines)


def _gradient_note(scale: float) -> str:
    """A note that, unlike ``ekd_student``, the package does not scale the extractor's gradient."""
    if scale == 1:
        return ""
    note = "was not trained" if scale == 0 else f"was trained with its gradient times {scale:g}"
    return f"\nThe conv extractor {note}; in fine-tuning, this package does not scale gradients.\n"
