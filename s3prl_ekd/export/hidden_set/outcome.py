"""The checks by name, and what came out of one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["pass", "fail", "warn", "skip"]

# Name -> what it is about, in the order of the report.
OFFICIAL = {
    "files": "expert.py and model.pt are there",
    "build": "UpstreamExpert is built on the CPU from model.pt",
    "forward": "one forward on waveforms of 2, 1.8 and 3.7 s gives a dict",
    "lists": "for each task a list of tensors [batch, frame, dim] of one shape",
    "rates": "get_downsample_rates gives an int for each task",
    "frames": "as many frames as the longest waveform has by that rate, give or take 4",
}
READ = {  # by us, without running anything
    "files": OFFICIAL["files"],
    "submission": "requirements.txt, README.md, LICENSE and cli.py are there",
    "syntax": "Python 3.8 understands every .py",
    "torch 1.13": "no function of a later torch is named",
    "requirements": "requirements.txt has what expert.py imports",
}
RUN = {  # in a process of its own
    "weights": "model.pt loads as data (weights_only=True)",
    "import": "from expert import UpstreamExpert, without s3prl, fairseq and s3prl_ekd",
    "build": OFFICIAL["build"],
    "keywords": "s3prl's and unknown keyword arguments are accepted",
    "forward": OFFICIAL["forward"],
    "lists": OFFICIAL["lists"],
    "rates": OFFICIAL["rates"],
    "frames": OFFICIAL["frames"],
    "values": "finite float32",
    "device": "outputs are on the waveforms' device",
    "gpu": "runs on a GPU and gives the same",
    "inputs": "the waveforms are left as they were",
    "repeat": "two passes in eval mode are identical",
    "modes": "as many layers in train mode as in eval mode",
    "order": "the order of a batch changes nothing",
    "batching": "an utterance alone and in a batch",
    "0.05 s": "a waveform of 0.05 s",
    "1 s": "a waveform of 1 s",
    "35 s": "a waveform of 35 s",
    "network": "nothing is fetched",
    "parameters": "how many, and how many unused",
    "macs": "MACs over SUPERB's 32 utterances",
}


@dataclass(frozen=True)
class Outcome:
    """What one check said; ``reason`` is one line."""

    name: str
    status: Status
    reason: str

    @property
    def official(self) -> bool:
        """Whether SUPERB's own check has it too."""
        return self.name in OFFICIAL


class Failed(Exception):
    """A check failed; the message is its reason."""


class Warned(Exception):
    """A check has something to say that need not be a fault."""


class Skipped(Exception):
    """A check could not run; the message says why."""
