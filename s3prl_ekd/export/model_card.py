"""Model cards (README.md): of a Hugging Face folder, and of a package for SUPERB's hidden set."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PureWindowsPath
from typing import Any

from ..distill.student_settings import Architecture, PrunedSettings
from ..errors import printable
from ..files.hub import parse_hub_id
from ..student_file import LoadedStudent
from ..system.tables import markdown_table
from .card_data import CardFacts, front_matter, score_rows

_HF_CARD = """\
---
{front_matter}
---

# {name}

A small speech model: conv extractor, {layers} transformer layer{plural} of width {width},
{parameters:,} parameters. It is {architecture}.
It was exported with s3prl_ekd, which implements Ensemble Knowledge Distillation of self-supervised
speech models ([arXiv 2302.12757](https://arxiv.org/abs/2302.12757)).

{scores}
{sizes}
## Use

Install `torch`, `transformers` and `safetensors`. If the example stops with an error of torchaudio,
the installed torchaudio is not for the installed torch; the model does not need it: `pip uninstall
torchaudio`.{where}

```python
import numpy as np
from transformers import AutoFeatureExtractor, AutoModel

extractor = AutoFeatureExtractor.from_pretrained("{address}")
model = AutoModel.from_pretrained("{address}").eval()
waves = [0.1 * np.random.randn(16000), 0.1 * np.random.randn(8000)]  # put your audio here
batch = extractor(waves, sampling_rate=16000, padding=True, return_tensors="pt")
states = model(**batch, output_hidden_states=True).hidden_states  # [batch, frame, dim] each
```

- Waveforms are 16 kHz, mono, {normalised}, and at least {min_samples} samples long.
  A frame is {stride} samples ({milliseconds:g} ms).
- Pass the attention mask with a padded batch, as above.{padding}
- A `{model}` has no prediction heads; those of the student are left out.{in_s3prl}

## Hidden states

| in this model | in `ekd_student` of s3prl_ekd |
|---|---|
{states}
Both were compared in float32 on {compared} of noise when this folder was written. The
largest difference was {error:.1e} (allowed: {tolerance:.0e}, relative to a layer's largest value if
that is above 1).

## How it was made

{made}
"""  # noqa: E501 (a table's row is one line)

_PACKAGE_CARD = """\
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
{sizes}| frame | {stride} samples ({milliseconds:g} ms) |
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

`python cli.py validate` makes the checks of SUPERB's organisers. To submit the model, make a
repository on the Hugging Face Hub, clone it, and copy these files into the clone. There, `python
cli.py upload "my first model"` validates, commits and pushes them, and `python cli.py info` prints
the address and the commit that the submission form asks for.
s3prl can load it from the Hugging Face Hub (`run_downstream.py --hub huggingface`, with the name of
the repository after `-u`), but only with an old huggingface_hub that still has `HfApi.login`.

## Hidden states

- 0: {first_state}
- 1 to {layers}: the output of each transformer layer{norm_of_states}
{heads}
In a batch, frames beyond the end of an utterance are padding; ignore them.{padding}

## How it was made

{made}
{fine_tuning}
"""  # noqa: E501 (a table's row is one line)

_IN_S3PRL = """
- In s3prl with s3prl_ekd: `run_downstream.py -m train -u ekd_student -k {address} -d asr -n asr`"""

_NO_SCORES = "This card reports no scores; evaluate the model on your task before you rely on it."

_SCORES = """\
## Results

Test sets of SUPERB's tasks, with the hidden states of the frozen student as input of s3prl's
recipes: weighted and summed, for QBE one layer. Intervals are bootstrap intervals over what the
column "test set" counts. Results are comparable only if recipe and corpus are the same.

{table}
"""

_STATES = """\
| `model.feature_projection(model.feature_extractor(batch["input_values"]).transpose(1, 2))` | `hidden_states[0]`, where padded frames are zero |
| `hidden_states[0]`: the input of the first layer, after the positional convolution{norm} | none |
| `hidden_states[n]`, n = 1 to {layers}: the output of layer n | `hidden_states[n]` |
"""  # noqa: E501

_COPY_STATES = """\
| `hidden_states[0]`: the input of the first layer, after the positional convolution{norm} | `hidden_states[0]` |
| `hidden_states[n]`, n = 1 to {before_last}: the output of layer n | `hidden_states[n]` |
| `last_hidden_state`: the output of layer {layers}{last_norm} | `hidden_states[{layers}]` |
"""  # noqa: E501

_PADDING = """
## Sizes

The student has {own:,} parameters in layers of different sizes. Here it is padded with zeros to
layers of one size, which transformers needs; its hidden states are the same.

| of the student | |
|---|---|
{sizes}"""

_NORMALISED = """\
normalised by the extractor above (which adds
  1e-7 to the variance; the student adds 1e-5)"""

_GROUP_NORM = """
The first conv layer normalises over time, padding included, so the hidden states of an utterance
change with the amount of padding; run utterances one by one to avoid this."""

_UNMASKED = """
The student normalises over valid frames only (`masked_norm`). transformers has no such norm, so
this model's hidden states of padded batches differ from the student's. A student loaded from this
folder has `masked_norm: false`."""

_MASKED_NORM = """
The first conv layer normalises over the valid frames of each utterance, so the hidden states of an
utterance are the same alone and in any batch."""


def hf_card(
    loaded: LoadedStudent,
    name: str,
    parameters: int,
    error: float,
    tolerance: float,
    facts: CardFacts = CardFacts(),  # noqa: B008 (frozen)
) -> str:
    """Text of the card of a Hugging Face folder.

    Args:
        loaded: the student; its ``about`` records how it was trained.
        name: title of the card.
        parameters: parameter count of the Hugging Face model.
        error: largest difference between the two models, as measured.
        tolerance: largest allowed difference.
        facts: license, data, language and results.
    """
    settings = loaded.student.settings
    copied = isinstance(settings, PrunedSettings)
    model = "WavLMModel" if settings.position_buckets else "HubertModel"
    last = (
        "| `last_hidden_state`: after the final layer norm; transformers 4 returns it as "
        f"`hidden_states[{settings.encoder_layers}]` too | the input of the prediction heads |\n"
    )
    states = (_COPY_STATES if copied else _STATES).format(
        layers=settings.encoder_layers,
        before_last=settings.encoder_layers - 1,
        norm="" if settings.layer_norm_first else " and a layer norm",
        last_norm=", after the final layer norm" if settings.layer_norm_first else "",
    )
    own = sum(parameter.numel() for parameter in loaded.student.parameters())
    fields = _facts(settings)
    if settings.masked_norm:
        fields["padding"] = _GROUP_NORM + _UNMASKED
    if copied:
        padding = _PADDING.format(own=own, sizes=fields["sizes"])
        fields["sizes"] = padding if parameters > own else ""
    model_type = model.removesuffix("Model").lower()
    return _HF_CARD.format(
        **fields,
        front_matter=front_matter(loaded.about, name, model_type, facts),
        scores=_scores(facts),
        where="" if facts.repository else " In the folder of this card:",
        address=facts.repository or ".",
        in_s3prl=_IN_S3PRL.format(address=facts.repository) if facts.repository else "",
        name=name,
        model=model,
        architecture=(
            f"a `{model}` of transformers"
            + ("" if copied else " with `feat_proj_layer_norm: false`,\nas DistilHuBERT is")
        ),
        parameters=parameters,
        min_samples=settings.min_samples,
        normalised=_NORMALISED if settings.normalize_waveforms else "not normalised",
        states=states + (last if settings.layer_norm_first and not copied else ""),
        compared="single utterances" if settings.masked_norm else "a padded batch",
        tolerance=tolerance,
        error=error,
        made=how_made(loaded.about),
    )


def _scores(facts: CardFacts) -> str:
    """The table of results, or that there is none."""
    if not facts.metrics:
        return _NO_SCORES
    return _SCORES.format(table=markdown_table(score_rows(facts.metrics)))


def package_card(
    loaded: LoadedStudent,
    heads: Mapping[str, Any],
    cost: Mapping[str, Any],
    name: str,
    data: str,
) -> str:
    """Text of the card of a package.

    Args:
        loaded: the student; its ``about`` records how it was trained.
        heads: the heads in the package, as in its ``config``.
        cost: from :func:`..superb.cost.measure_cost`.
        name: title of the card.
        data: description of the training data; replaces the one in the student file.
    """
    settings = loaded.student.settings
    copied = isinstance(settings, PrunedSettings)
    states, lines = settings.encoder_layers + 1, []
    for head_name, head in heads.items():
        count = head["layers"] * len(head["parts"])
        span = f"{states}" if count == 1 else f"{states} to {states + count - 1}"
        lines.append(f"- {span}: the teacher layers that the head `{head_name}` predicts\n")
        states += count
    of_student = settings.encoder_layers + 1
    scale = settings.feature_grad_mult
    scaled = "was not trained" if scale == 0 else f"was trained with its gradient times {scale:g}"
    note = (
        f"\nThe conv extractor {scaled}; in fine-tuning, this package does not scale gradients.\n"
    )
    return _PACKAGE_CARD.format(
        **_facts(settings),
        **{bucket: macs / 1e9 for bucket, macs in cost["macs_buckets"].items()},
        name=name,
        parameters=cost["parameters"],
        unused=f" ({cost['unused']:,} of them unused)" if cost["unused"] else "",
        macs=cost["macs"] / 1e9,
        conv=len(settings.conv_layers),
        states=(
            f"{states}: {of_student} of the student, {states - of_student} of its heads"
            if heads
            else states
        ),
        first_state=(
            "the input of the first transformer layer"
            if copied
            else "the projected features of the conv extractor"
        ),
        norm_of_states=_norm_of_states(settings),
        heads="".join(lines),
        made=how_made(loaded.about, data),
        fine_tuning="" if scale == 1 else note,
    )


def _norm_of_states(settings: Architecture) -> str:
    """Which hidden states of a pre-norm student are normalised."""
    if not settings.layer_norm_first:
        return ""
    if isinstance(settings, PrunedSettings):
        return ", the last one after the last layer norm"
    return ", before the last layer norm"


def _sizes(settings: Architecture) -> str:
    """Rows of a Markdown table: the sizes of a copied student's layers; else empty."""
    if not isinstance(settings, PrunedSettings):
        return ""
    rows = {
        "conv channels": [channels for channels, _, _ in settings.conv_layers],
        f"attention heads, of {settings.encoder_attention_heads}": map(len, settings.heads),
        "feed-forward units": settings.ffn_dims,
    }
    return "".join(
        f"| {name}, by layer | {', '.join(map(str, sizes))} |\n" for name, sizes in rows.items()
    )


def _facts(settings: Architecture) -> dict[str, Any]:
    """The student's architecture, for both cards."""
    group_norm = _MASKED_NORM if settings.masked_norm else _GROUP_NORM
    return {
        "layers": settings.encoder_layers,
        "plural": "" if settings.encoder_layers == 1 else "s",
        "width": settings.encoder_embed_dim,
        "stride": settings.stride,
        "milliseconds": settings.stride / 16,
        "sizes": _sizes(settings),
        "padding": group_norm if settings.extractor_mode == "default" else "",
    }


def how_made(about: Mapping[str, Any], data: str = "") -> str:
    """A Markdown list of how the student was trained; missing facts are left out.

    Args:
        about: ``about`` of a :class:`..student_file.LoadedStudent`.
        data: description of the training data; replaces the one in ``about``.
    """
    # texts from the file must become neither HTML nor further lines of the card
    lines = [printable(line).replace("<", "&lt;") for line in _how_made(about, data)]
    return "\n".join(lines) or "The student file does not record it."


def _how_made(about: Mapping[str, Any], data: str = "") -> list[str]:
    """The lines of :func:`how_made`."""
    config = about.get("config")
    config = config if isinstance(config, Mapping) else {}
    lines = _how_merged(about)
    for name, teacher in _mapping(config, "teachers").items():
        if isinstance(teacher, Mapping):
            layers = teacher.get("groups") or teacher.get("layers")
            # a name, a pinned id of the Hugging Face Hub, or the last part of a path: folders of
            # the user's machine stay private
            model = str(teacher.get("model"))
            hub_id = parse_hub_id(model)
            if hub_id is None or not hub_id.is_pinned:
                model = PureWindowsPath(model).name  # splits at both / and \
            lines.append(f"- teacher `{name}`: `{model}`, layers {layers}")
    if "aggregation" in config:
        lines.append(f"- aggregation of the teachers: {config['aggregation']}")
    student, pruning = _mapping(config, "student"), _mapping(config, "pruning")
    if student.get("kind") == "copy":
        lines.append(f"- first weights: a copy of the teacher `{student.get('of')}`")
    elif student.get("kind") == "file":
        file = PureWindowsPath(str(student.get("file"))).name
        lines.append(f"- first weights: the student file `{file}`")
    elif config:
        init = _mapping(config, "init")
        average = init.get("average")
        source = ", ".join(map(str, average)) if isinstance(average, list) else ""
        source = init.get("teacher") or source or "random weights"
        lines.append(f"- first weights: {source}")
    pruned = _mapping(about, "pruned")
    if pruned:
        by = ""
        if "sparsity" in pruned:
            by = f" (target: {pruned['sparsity']} of the {pruned.get('by')})"
        lines.append(
            f"- pruned: a copy of the teacher `{pruned.get('of')}`, from {pruned.get('from')} to "
            f"{pruned.get('to')} parameters{by}"
        )
    elif pruning:
        lines.append(
            f"- pruned in training: target sparsity {pruning.get('sparsity')} of the "
            f"{pruning.get('by')}"
        )
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
    return lines


def _how_merged(about: Mapping[str, Any]) -> list[str]:
    """How the students were trained whose average this is; empty for other students."""
    members = about.get("merged")
    members = members if isinstance(members, list) else []
    lines = []
    if members:
        lines = [f"- the weighted average of {len(members)} students (arXiv 2505.13270)"]
    for member in members:
        if isinstance(member, Mapping):
            file = PureWindowsPath(str(member.get("file"))).name
            weight = member.get("weight")
            share = f"{weight:.3g}" if isinstance(weight, float) else weight
            lines.append(f"  - `{file}`, weight {share}")
            lines += [f"    {line}" for line in _how_made(_mapping(member, "about"))]
    return lines


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
