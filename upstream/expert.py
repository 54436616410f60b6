"""The s3prl upstream ``ekd_student``: hidden states from unpadded waveforms."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from s3prl.upstream.interfaces import UpstreamBase
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from s3prl_ekd.errors import CheckpointError
from s3prl_ekd.student_file import heads_problem, load_student

logger = logging.getLogger(__name__)


class UpstreamExpert(UpstreamBase):
    """A distilled student for s3prl's downstream tasks.

    A student with gates, as in a checkpoint of a pruning run, has fixed gates in eval mode, and is
    refused in training mode.

    Args:
        ckpt: a student file or a checkpoint of ``run_pretrain.py -u ekd``; it has all settings.

    Raises:
        CheckpointError: the file is missing, damaged or of another kind, or its pickle contains
            code.
    """

    def __init__(self, ckpt: str | Path, model_config: object = None, **kwargs: Any):
        super().__init__(**kwargs)
        loaded = load_student(ckpt)
        self.student = loaded.student
        self.heads = loaded.heads
        self.targets = loaded.targets
        self.about = loaded.about
        # Layerdrop would change the number of hidden states during fine-tuning (-f).
        self.student.backbone.encoder.layerdrop = 0.0
        problem = heads_problem(loaded)
        if problem:
            self.heads = None
            logger.info("%s: hidden_states_and_heads is not available: %s", ckpt, problem)

    def get_downsample_rates(self, key: str) -> int:
        """Samples per frame: 320 (20 ms at 16 kHz) for the default conv extractor."""
        return self.student.settings.stride

    def forward(self, wavs: list[Tensor]) -> dict[str, Tensor | list[Tensor]]:
        """Run the student on unpadded waveforms ``[sample]`` at 16 kHz, of any lengths.

        Returns:
            ``hidden_states``: those of :class:`s3prl_ekd.distill.student_forward.StudentOutput`, a
            list of ``[batch, frame, dim]``. ``hidden_states_and_heads``: the same, followed by the
            layers that each head predicts, if the file has heads of the student's width.
            ``last_hidden_state``: the last of ``hidden_states``.
        """
        if self.student.training and not self.student.is_cut:
            raise CheckpointError(
                "the student has gates, which would be drawn at random in fine-tuning (-f); cut it "
                "first: s3prl-ekd prune CKPT -o pruned.pt"
            )
        lengths = torch.tensor([len(wav) for wav in wavs])
        waves = pad_sequence(wavs, batch_first=True)
        min_samples = self.student.settings.min_samples
        if waves.shape[1] < min_samples:  # shorter than one frame
            waves = torch.nn.functional.pad(waves, (0, min_samples - waves.shape[1]))
        out = self.student(waves, lengths.clamp(min=min_samples))
        result: dict[str, Tensor | list[Tensor]] = {
            "hidden_states": out.hidden_states,
            "last_hidden_state": out.hidden_states[-1],
        }
        if self.heads is not None:
            states = list(out.hidden_states)
            for name, prediction in self.heads(out).items():
                # [batch, layer, frame, width] -> slices [batch, frame, dim] of the student's width
                for layer in prediction.unbind(1):
                    states += layer.split(self.targets[name].parts, dim=-1)
            result["hidden_states_and_heads"] = states
        return result
