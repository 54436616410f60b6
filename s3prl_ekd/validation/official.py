"""What SUPERB's own check does, one function a check; and what comes before it can."""

from __future__ import annotations

import sys
import time

import torch
from torch import nn

from .model import SECONDS, TASKS, Package, check_frames, import_expert, noise, told
from .outcome import Failed, Skipped


def weights(package: Package) -> str:
    try:
        saved = torch.load(package.checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, for a damaged file
        lines = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line]
        what = lines[0] if lines else told(error, package.folder)
        raise Failed(f"model.pt is not plain data, and nothing is built from it: {what}") from None
    package.waves = noise(*SECONDS)
    kind = type(saved).__name__
    return f"a {kind} with {', '.join(map(str, saved))}" if isinstance(saved, dict) else f"a {kind}"


def import_(package: Package) -> str:
    if not package.waves:
        raise Skipped("model.pt is not plain data, so nothing of the package is run")
    try:
        expert = import_expert(package.folder)
    except ModuleNotFoundError as error:
        top = (error.name or "").split(".")[0]
        if top in package.watch.packages:
            raise Failed(f"it needs {top}: {told(error, package.folder)}") from None
        hint = f"{top} is not installed here; pip install -r requirements.txt"
        raise Failed(f"{told(error, package.folder)}; {hint}") from None
    where = getattr(sys.modules.get("expert"), "__file__", None) or ""
    if not where.startswith(str(package.folder)):
        raise Failed(f"another module of the name expert is in the way: {where}")
    package.expert = expert
    refused = ", ".join(package.watch.packages)
    return f"without {refused}, which it asked for" if refused else "asks for none of them"


def build(package: Package) -> str:
    if package.expert is None:
        raise Skipped("there is no UpstreamExpert: see import")
    start = time.perf_counter()
    model = package.expert(ckpt=package.checkpoint)
    if not isinstance(model, nn.Module):
        raise Failed(f"UpstreamExpert gives a {type(model).__name__}, no torch.nn.Module")
    package.built = model.to("cpu").eval()
    return f"in {time.perf_counter() - start:.1f} s, from a folder elsewhere"


def keywords(package: Package) -> str:
    if package.expert is None:
        raise Skipped("there is no UpstreamExpert: see import")
    try:
        model = package.expert(
            ckpt=package.checkpoint, model_config=None, refresh=False, of_a_later_s3prl=1
        )
    except TypeError as error:
        raise Failed(f"add **kwargs to __init__: {told(error, package.folder)}") from None
    if package.built is None and isinstance(model, nn.Module):
        package.built = model.to("cpu").eval()
    return "model_config, refresh and one that there is not"


def forward(package: Package) -> str:
    model = package.model
    with torch.no_grad():
        package.result = model([wave.clone() for wave in package.waves])
    if not isinstance(package.result, dict):
        raise Failed(f"forward gives a {type(package.result).__name__}, not a dict")
    return "a dict with " + ", ".join(map(str, package.result))


def lists(package: Package) -> str:
    result = _result(package)
    if "hidden_states" not in result:
        raise Failed("there is no hidden_states in what forward gives")
    for task in TASKS:
        states = result.get(task, result["hidden_states"])
        name = task if task in result else "hidden_states"
        if not isinstance(states, list):
            raise Failed(f"{name} is a {type(states).__name__}, not a list")
        if not states:
            raise Failed(f"{name} is an empty list")
        for i, state in enumerate(states):
            if not isinstance(state, torch.Tensor):
                raise Failed(f"{name}[{i}] is a {type(state).__name__}, not a tensor")
            if state.dim() != 3:
                raise Failed(
                    f"{name}[{i}] has {state.dim()} dimensions, {list(state.shape)}; "
                    "[batch, frame, dim] are needed"
                )
            if state.shape != states[0].shape:
                raise Failed(
                    f"{name}[{i}] is {list(state.shape)} and {name}[0] is {list(states[0].shape)}; "
                    "one shape is needed"
                )
        if len(states[0]) != len(package.waves):
            raise Failed(f"{name} has {len(states[0])} rows for {len(package.waves)} waveforms")
    states = result["hidden_states"]
    own = [task for task in TASKS if task in result]
    return f"{len(states)} of {list(states[0].shape)}" + (f", own for {own}" if own else "")


def rates(package: Package) -> str:
    found = {}
    for task in TASKS:
        rate = package.model.get_downsample_rates(task)
        if not isinstance(rate, int) or isinstance(rate, bool):
            raise Failed(f"for {task} it gives {rate!r}, a {type(rate).__name__}; an int is needed")
        if rate <= 0:
            raise Failed(f"for {task} it gives {rate}")
        found[rate] = task
    return " and ".join(f"{rate} samples a frame" for rate in found)


def frames(package: Package) -> str:
    result = _result(package)
    samples = max(len(wave) for wave in package.waves)
    for task in TASKS:
        states = result.get(task, result.get("hidden_states"))
        if not isinstance(states, (list, tuple)) or not states:
            raise Skipped("there is no list of hidden states: see lists")
        if not isinstance(states[0], torch.Tensor) or states[0].dim() < 2:
            raise Skipped("hidden states have no frames: see lists")
        check_frames(states[0].shape[1], samples, package.rate(task))
    return f"{states[0].shape[1]} for {samples} samples"


def _result(package: Package) -> dict:
    if not isinstance(package.result, dict):
        raise Skipped("forward gave no dict: see forward")
    return package.result
