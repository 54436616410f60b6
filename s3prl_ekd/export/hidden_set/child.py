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

from ...superb.cost import measure_cost
from .isolation import AccessBlocker, force_data_only
from .messages import BadMessage, describe, receive, send

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
    """Runs a package on request.

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

    def reply(self, request: Mapping[str, Any], waves: list) -> tuple[dict[str, Any], list]:
        """Run a request; return facts and tensors."""
        action = request["do"]
        if action == "forward":
            return self._forward(waves, request["train"], request["device"])
        if action == "build":
            return self._build(request["keywords"]), []
        if action == "rate":
            return self._rate(request["task"]), []
        return {
            "weights": self._weights,
            "import": self._import,
            "cuda": self._cuda,
            "cost": self._cost,
            "blocked": self._blocked,
        }[action](), []

    def _weights(self) -> dict[str, Any]:
        try:
            saved = torch.load(self.folder / "model.pt", map_location="cpu", weights_only=True)
        except Exception as error:  # damaged files raise exceptions of many classes
            lines = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line]
            return {"problem": lines[0] if lines else exception_line(error, self.folder)}
        keys = [str(key) for key in saved][:_MAX_NAMES] if isinstance(saved, dict) else None
        return {"type": type(saved).__name__, "keys": keys}

    def _import(self) -> dict[str, Any]:
        """Import as s3prl's Runner does, with the folder at the end of ``sys.path``."""
        sys.path.append(str(self.folder))
        from expert import UpstreamExpert

        self.expert = UpstreamExpert
        return {"file": str(getattr(sys.modules.get("expert"), "__file__", None) or "")}

    def _build(self, keywords: Mapping[str, Any]) -> dict[str, Any]:
        model = self.expert(ckpt=str(self.folder / "model.pt"), **keywords)
        if self.model is None and isinstance(model, torch.nn.Module):
            self.model = model.to("cpu").eval()
        return {"type": type(model).__name__, "module": isinstance(model, torch.nn.Module)}

    def _forward(self, waves: list, train: bool, device: str) -> tuple[dict[str, Any], list]:
        self.model.train(train)
        try:
            if device != "cpu":
                self.model.to(device)
            waves = [wave.to(device) for wave in waves]
            with torch.no_grad():
                result = self.model(list(waves))
        finally:
            self.model.eval()
            if device != "cpu":
                self.model.to("cpu")
        tensors: list = []
        facts = {"waves": describe(waves, tensors), "result": describe(result, tensors)}
        return facts, tensors

    def _rate(self, task: str) -> dict[str, Any]:
        rate = self.model.get_downsample_rates(task)
        is_int = isinstance(rate, int) and not isinstance(rate, bool)
        return {
            "rate": int(rate) if is_int else None,
            "type": type(rate).__name__,
            "text": repr(rate)[:100],
        }

    def _cuda(self) -> dict[str, Any]:
        return {"name": torch.cuda.get_device_name() if torch.cuda.is_available() else None}

    def _cost(self) -> dict[str, Any]:
        return measure_cost(self.model, self.lengths, self.tasks)

    def _blocked(self) -> dict[str, Any]:
        hosts, packages = (
            list(self.blocker.hosts)[:_MAX_NAMES],
            list(self.blocker.packages)[:_MAX_NAMES],
        )
        return {"hosts": hosts, "packages": packages}


def exception_line(error: BaseException, folder: Path) -> str:
    """An exception as one line, with its location in the package's code."""
    message = (str(error).strip().splitlines() or [""])[0][:300]
    line = f"{type(error).__name__}: {message}" if message else type(error).__name__
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if folder in path.parents:
            return f"{line} ({path.relative_to(folder)} line {frame.lineno})"
    return line
