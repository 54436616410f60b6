"""The checks' names and descriptions, and the outcome of a check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["pass", "fail", "warn", "skip"]

# Name -> what is checked, in the order of the report. SUPERB's own checks:
OFFICIAL = {
    "files": "expert.py and model.pt exist",
    "build": "UpstreamExpert is built on the CPU from model.pt",
    "forward": "forward on waveforms of 2, 1.8 and 3.7 s returns a dict",
    "lists": "each task has a list of tensors [batch, frame, dim] of the same shape",
    "rates": "get_downsample_rates returns an int for each task",
    "frames": "the frame count matches that rate for the longest waveform, within 4 frames",
}
STATIC_CHECKS = {  # without running the package
    "files": OFFICIAL["files"],
    "submission": "requirements.txt, README.md, LICENSE and cli.py exist",
    "syntax": "every .py is valid in Python 3.8",
    "torch 1.13": "no function of a later torch is used",
    "requirements": "requirements.txt names what expert.py imports",
}
RUNTIME_CHECKS = {  # in a separate process
    "weights": "model.pt loads as data (weights_only=True)",
    "import": "from expert import UpstreamExpert, without s3prl, fairseq and s3prl_ekd",
    "build": OFFICIAL["build"],
    "keywords": "s3prl's and unknown keyword arguments are accepted",
    "forward": OFFICIAL["forward"],
    "lists": OFFICIAL["lists"],
    "rates": OFFICIAL["rates"],
    "frames": OFFICIAL["frames"],
    "values": "hidden states are finite float32",
    "device": "hidden states are on the device of the waveforms",
    "gpu": "hidden states on a GPU agree with those on the CPU",
    "inputs": "forward does not change the waveforms",
    "repeat": "two forwards in eval mode are identical",
    "modes": "the same number of layers in train and eval mode",
    "order": "the order of the batch does not change hidden states",
    "batching": "hidden states of an utterance alone and in a batch (information only)",
    "0.05 s": "forward on a waveform of 0.05 s",
    "1 s": "forward on a waveform of 1 s",
    "35 s": "forward on a waveform of 35 s",
    "network": "no network access",
    "parameters": "parameter count, and how many are unused",
    "macs": "MACs over SUPERB's 32 utterances",
}


@dataclass(frozen=True)
class CheckOutcome:
    """The outcome of one check; ``reason`` is one line."""

    name: str
    status: Status
    reason: str

    @property
    def official(self) -> bool:
        """Whether it is one of SUPERB's own checks."""
        return self.name in OFFICIAL


class CheckFailed(Exception):
    """A check failed; the message is the reason."""


class CheckWarning(Exception):
    """A check found something that may be a fault; the message is the reason."""


class CheckSkipped(Exception):
    """A check could not run; the message is the reason."""
