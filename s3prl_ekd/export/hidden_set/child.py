"""The process in which a package runs, started by :mod:`.sandbox`.

It replies to each request with one message (:mod:`.messages`): outputs, counts or the text of an
exception. The parent process checks them. The package cannot import s3prl_ekd.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...superb.cost import measure_cost
from .isolation import AccessBlocker, force_data_only
from .messages import BadMessage, Message, describe, receive, send

_MAX_NAMES = 20  # in a list of a reply


def main(offline: bool) -> None:
    """Read requests from standard input and reply on standard output until the input ends.

    Args:
        offline: result of :func:`.isolation.leave_network`.
    """
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    devnull = os.open(os.devnull, os.O_RDONLY)
    os.dup2(devnull, 0)
    os.dup2(2, 1)  # what the package prints must not mix with replies
    os.close(devnull)
    setup, _ = receive(requests)
    server = PackageServer(Path(setup["folder"]), setup["lengths"], setup["tasks"])
    server.blocker.block()
    force_data_only(torch)
    torch.manual_seed(0)
    send(replies, {"offline": offline})
    while True:
        try:
            request, waves = receive(requests)
        except EOFError:
            return
        try:
            send(replies, *server.reply(request, waves))
        except BadMessage as error:
            send(replies, {"error": str(error), "type": "BadMessage"})
        except BaseException as error:  # also SystemExit raised by expert.py
            facts = {"error": exception_line(error, server.folder), "type": type(error).__name__}
            if isinstance(error, ModuleNotFoundError):
                facts["module"] = str(error.name or "").split(".")[0]
            send(replies, facts)


class PackageServer:
    """Runs a package on request: ``{"do": "build", ...}`` calls ``do_build(...)``.

    Args:
        folder: folder of the package.
        lengths: lengths (samples) of the utterances for counting MACs, by bucket.
        tasks: tasks whose hidden states count as outputs.
    """

    def __init__(self, folder: Path, lengths: Mapping[str, Sequence[int]], tasks: Sequence[str]):
        self.folder, self.lengths, self.tasks = folder, lengths, tasks
        self.blocker = AccessBlocker()
        self.expert: Any = None
        self.model: Any = None

    def reply(self, request: dict[str, Any], waves: list[Tensor]) -> Message:
        """Run a request."""
        action = getattr(self, f"do_{request.pop('do')}")
        return action(waves, **request) if waves else (action(**request), [])

    def do_weights(self) -> dict[str, Any]:
        try:
            saved = torch.load(self.folder / "model.pt", map_location="cpu", weights_only=True)
        except Exception as error:  # damaged files raise exceptions of many classes
            lines = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line]
            return {"problem": lines[0] if lines else exception_line(error, self.folder)}
        keys = [str(key) for key in saved][:_MAX_NAMES] if isinstance(saved, dict) else None
        return {"type": type(saved).__name__, "keys": keys}

    def do_import(self) -> dict[str, Any]:
        """Import as s3prl's Runner does, with the folder at the end of ``sys.path``."""
        sys.path.append(str(self.folder))
        from expert import UpstreamExpert

        self.expert = UpstreamExpert
        return {"file": str(getattr(sys.modules.get("expert"), "__file__", None) or "")}

    def do_build(self, keywords: Mapping[str, Any]) -> dict[str, Any]:
        model = self.expert(ckpt=str(self.folder / "model.pt"), **keywords)
        if self.model is None and isinstance(model, torch.nn.Module):
            self.model = model.to("cpu").eval()
        return {"type": type(model).__name__, "module": isinstance(model, torch.nn.Module)}

    def do_forward(self, waves: list[Tensor], train: bool, device: str) -> Message:
        """Return the waveforms after the forward, then the tensors of its result."""
        self.model.to(device).train(train)
        try:
            waves = [wave.to(device) for wave in waves]
            with torch.no_grad():
                result = self.model(list(waves))
        finally:
            self.model.to("cpu").eval()
        tensors = list(waves)
        facts = {"result": describe(result, tensors)}
        return {**facts, "devices": [str(tensor.device) for tensor in tensors]}, tensors

    def do_rate(self, task: str) -> dict[str, Any]:
        rate = self.model.get_downsample_rates(task)
        is_int = isinstance(rate, int) and not isinstance(rate, bool)
        return {"rate": int(rate) if is_int else None, "text": f"{rate!r:.100}"}

    def do_cuda(self) -> dict[str, Any]:
        return {"name": torch.cuda.get_device_name() if torch.cuda.is_available() else None}

    def do_cost(self) -> dict[str, Any]:
        return measure_cost(self.model, self.lengths, self.tasks)

    def do_blocked(self) -> dict[str, Any]:
        blocked = {"hosts": self.blocker.hosts, "packages": self.blocker.packages}
        return {kind: list(names)[:_MAX_NAMES] for kind, names in blocked.items()}


def exception_line(error: BaseException, folder: Path) -> str:
    """An exception as one line, with its location in the package's code."""
    message = (str(error).strip().splitlines() or [""])[0][:300]
    line = f"{type(error).__name__}: {message}" if message else type(error).__name__
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if folder in path.parents:
            return f"{line} ({path.relative_to(folder)} line {frame.lineno})"
    return line
