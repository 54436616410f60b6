"""What SUPERB's own check does, one function a check; and what comes before it can."""

from __future__ import annotations

import time

from torch import Tensor

from .messages import text, texts, type_name
from .outcome import Failed, Skipped
from .runtime_checks import TASKS, Package, PackageError, check_frames


def weights(package: Package) -> str:
    facts = package.facts("weights")
    if "problem" in facts:
        raise Failed(
            f"model.pt is not plain data, and nothing is built from it: {text(facts['problem'])}"
        )
    package.weights_read = True
    kind = f"a {text(facts.get('type'))}"
    return kind if facts.get("keys") is None else f"{kind} with {', '.join(texts(facts['keys']))}"


def import_(package: Package) -> str:
    if not package.weights_read:
        raise Skipped("model.pt is not plain data, so nothing of the package is run")
    try:
        facts = package.facts("import")
    except PackageError as error:
        if not error.module:
            raise
        if error.module in package.refused("packages"):
            raise Failed(f"it needs {error.module}: {error}") from None
        hint = f"{error.module} is not installed here; pip install -r requirements.txt"
        raise Failed(f"{error}; {hint}") from None
    file = facts.get("file")
    if not isinstance(file, str) or not file.startswith(str(package.folder)):
        raise Failed(f"another module of the name expert is in the way: {text(file)}")
    package.imported = True
    refused = ", ".join(package.refused("packages"))
    return f"without {refused}, which it asked for" if refused else "asks for none of them"


def build(package: Package) -> str:
    start = time.perf_counter()
    facts = _build(package, {})
    if facts.get("module") is not True:
        raise Failed(f"UpstreamExpert gives a {text(facts.get('type'))}, no torch.nn.Module")
    return f"in {time.perf_counter() - start:.1f} s, from a folder elsewhere"


def keywords(package: Package) -> str:
    try:
        _build(package, {"model_config": None, "refresh": False, "of_a_later_s3prl": 1})
    except PackageError as error:
        if error.type == "TypeError":
            raise Failed(f"add **kwargs to __init__: {error}") from None
        raise
    return "model_config, refresh and one that there is not"


def _build(package: Package, keywords: dict) -> dict:
    if not package.imported:
        raise Skipped("there is no UpstreamExpert: see import")
    facts = package.facts("build", keywords=keywords)
    package.built = package.built or facts.get("module") is True
    return facts


def forward(package: Package) -> str:
    package.result = package.forward(package.waves).result
    if not isinstance(package.result, dict):
        raise Failed(f"forward gives a {type_name(package.result)}, not a dict")
    return "a dict with " + ", ".join(package.result)


def lists(package: Package) -> str:
    result = _result(package)
    if "hidden_states" not in result:
        raise Failed("there is no hidden_states in what forward gives")
    for task in TASKS:
        states = result.get(task, result["hidden_states"])
        name = task if task in result else "hidden_states"
        if not isinstance(states, list):
            raise Failed(f"{name} is a {type_name(states)}, not a list")
        if not states:
            raise Failed(f"{name} is an empty list")
        for i, state in enumerate(states):
            if not isinstance(state, Tensor):
                raise Failed(f"{name}[{i}] is a {type_name(state)}, not a tensor")
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
        rate, what = package.rate_or_text(task)
        if rate is None:
            raise Failed(f"for {task} it gives {what}; an int is needed")
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
        if not isinstance(states[0], Tensor) or states[0].dim() < 2:
            raise Skipped("hidden states have no frames: see lists")
        check_frames(states[0].shape[1], samples, package.rate(task))
    return f"{states[0].shape[1]} for {samples} samples"


def _result(package: Package) -> dict:
    if not isinstance(package.result, dict):
        raise Skipped("forward gave no dict: see forward")
    return package.result
