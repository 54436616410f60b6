"""The process that a package is run in, started by :mod:`.sandbox`.

It answers requests, one message (:mod:`.messages`) for each, with what the package gives: outputs,
counts, the text of an exception. What that means for a check is decided by who asks. No name of
ours is importable once the package is.
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
from .isolation import Watch, force_data_only
from .messages import BadMessage, describe, receive, send

_MANY = 20  # names that are listed at most


def main(offline: bool) -> None:
    """Answer on what is standard output now what standard input asks, until that ends.

    Args:
        offline: whether :func:`.isolation.leave_network` has worked.
    """
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)  # what the package prints is no answer
    os.close(nothing)
    plan, _ = receive(requests)
    server = Server(Path(plan["folder"]), plan["lengths"], plan["tasks"])
    server.watch.block()
    force_data_only(torch)
    torch.manual_seed(0)
    send(answers, {"offline": offline})
    while True:
        try:
            request, waves = receive(requests)
        except EOFError:
            return
        try:
            send(answers, *server.answer(request, waves))
        except BadMessage as error:
            send(answers, {"error": str(error), "type": "BadMessage"})
        except BaseException as error:  # SystemExit of an expert.py, too
            facts = {"error": told(error, server.folder), "type": type(error).__name__}
            if isinstance(error, ModuleNotFoundError):
                facts["module"] = str(error.name or "").split(".")[0]
            send(answers, facts)


class Server:
    """A package: its class and its model, once they are asked for.

    Args:
        folder: of the package.
        lengths: of the utterances that MACs are counted over, by bucket.
        tasks: whose hidden states count as outputs.
    """

    def __init__(self, folder: Path, lengths: Mapping[str, Sequence[int]], tasks: Sequence[str]):
        self.folder, self.lengths, self.tasks = folder, lengths, tasks
        self.watch = Watch()
        self.expert: Any = None
        self.model: Any = None

    def answer(self, request: Mapping[str, Any], waves: list) -> tuple[dict[str, Any], list]:
        """Facts and tensors that answer a request."""
        do = request["do"]
        if do == "forward":
            return self._forward(waves, request["train"], request["device"])
        if do == "build":
            return self._build(request["keywords"]), []
        if do == "rate":
            return self._rate(request["task"]), []
        return {
            "weights": self._weights,
            "import": self._import,
            "cuda": self._cuda,
            "cost": self._cost,
            "refused": self._refused,
        }[do](), []

    def _weights(self) -> dict[str, Any]:
        try:
            saved = torch.load(self.folder / "model.pt", map_location="cpu", weights_only=True)
        except Exception as error:  # of many kinds, for a damaged file
            lines = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line]
            return {"problem": lines[0] if lines else told(error, self.folder)}
        keys = [str(key) for key in saved][:_MANY] if isinstance(saved, dict) else None
        return {"type": type(saved).__name__, "keys": keys}

    def _import(self) -> dict[str, Any]:
        """As s3prl's Runner imports it: the folder at the end of the path."""
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
        whole = isinstance(rate, int) and not isinstance(rate, bool)
        return {
            "rate": int(rate) if whole else None,
            "type": type(rate).__name__,
            "text": repr(rate)[:100],
        }

    def _cuda(self) -> dict[str, Any]:
        return {"name": torch.cuda.get_device_name() if torch.cuda.is_available() else None}

    def _cost(self) -> dict[str, Any]:
        return measure_cost(self.model, self.lengths, self.tasks, progress=lambda work, **_: work)

    def _refused(self) -> dict[str, Any]:
        hosts, packages = list(self.watch.hosts)[:_MANY], list(self.watch.packages)[:_MANY]
        return {"hosts": hosts, "packages": packages}


def told(error: BaseException, folder: Path) -> str:
    """An exception of the package as one line, with the place in its own code."""
    first = (str(error).strip().splitlines() or [""])[0][:300]
    line = f"{type(error).__name__}: {first}" if first else type(error).__name__
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if folder in path.parents:
            return f"{line} ({path.relative_to(folder)} line {frame.lineno})"
    return line
