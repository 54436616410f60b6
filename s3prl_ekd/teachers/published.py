"""Published teachers: parameter counts, and names on the Hugging Face Hub."""

from __future__ import annotations

from ..files.hub import parse_hub_id

_HUBERT_BASE, _WAVLM_BASE, _WAVLM_LARGE = 94_371_712, 94_381_936, 315_453_120

# Source -> parameters of the upstream that s3prl or transformers builds. s3prl's HuBERT has the
# head of its masked prediction (final_proj and label_embs_concat, 325,888), as in fairseq.
PARAMETERS = {
    **dict.fromkeys(("hubert", "hubert_base"), _HUBERT_BASE + 325_888),
    **dict.fromkeys(("wavlm", "wavlm_base", "wavlm_base_plus"), _WAVLM_BASE),
    "wavlm_large": _WAVLM_LARGE,
    "facebook/hubert-base-ls960": _HUBERT_BASE,
    "facebook/hubert-large-ll60k": 315_438_720,
    "facebook/wav2vec2-base": _HUBERT_BASE,
    "facebook/wav2vec2-large-xlsr-53": 315_438_720,
    "facebook/data2vec-audio-base": 93_164_288,
    "microsoft/wavlm-base": _WAVLM_BASE,
    "microsoft/wavlm-base-plus": _WAVLM_BASE,
    "microsoft/wavlm-large": _WAVLM_LARGE,
}
# Hub name of s3prl -> the same model on the Hugging Face Hub.
_ON_HUB = {
    **dict.fromkeys(("hubert", "hubert_base"), "facebook/hubert-base-ls960"),
    "hubert_large_ll60k": "facebook/hubert-large-ll60k",
    "wavlm_base": "microsoft/wavlm-base",
    **dict.fromkeys(("wavlm", "wavlm_base_plus"), "microsoft/wavlm-base-plus"),
    "wavlm_large": "microsoft/wavlm-large",
    "wav2vec2_base_960": "facebook/wav2vec2-base",
    "xlsr_53": "facebook/wav2vec2-large-xlsr-53",
    "distilhubert": "ntu-spml/distilhubert",
}


def published_parameters(model: str) -> int | None:
    """The parameter count of a teacher as a config names it; None if it is not known."""
    hub_id = parse_hub_id(model)
    return PARAMETERS.get(model if hub_id is None else hub_id.repo)


def hub_repository(model: str) -> str | None:
    """The repository on the Hugging Face Hub of a teacher as a run's record names it; None if it is
    not known. An id without a commit may be the path of a folder on another machine."""
    hub_id = parse_hub_id(model)
    return hub_id.repo if hub_id is not None and hub_id.is_pinned else _ON_HUB.get(model)
