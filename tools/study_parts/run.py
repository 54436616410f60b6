"""Run what is not finished, some parts at a time, with a bar and an estimate of the time left."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from tqdm import tqdm

from .children import Child, check_none_left, end, note
from .design import Setting
from .folder import Folder
from .parts import GUESS, Part, finished_runs, is_done

PAUSE = 0.2  # seconds between two looks at what runs


@dataclass
class Outcome:
    """How it ended.

    Attributes:
        failed: part -> why.
        stopped: it was asked to stop before all was tried.
    """

    failed: dict[str, str] = field(default_factory=dict)
    stopped: bool = False


def run_all(
    parts: Sequence[Part],
    setting: Setting,
    folder: Folder,
    jobs: int,
    stop: Callable[[], bool],
    restrict: Callable[[Part, list], tuple[str, ...]],
) -> Outcome:
    """Run every part that is not done and whose needs have ended.

    Args:
        jobs: parts at a time.
        stop: asked again and again; True ends what runs, which saves, and leaves.
        restrict: the command of an evaluation over some of its students.

    Raises:
        SetupError: commands of an earlier, killed start are still running.
    """
    running_file = folder.root / "running.json"
    check_none_left(running_file)
    outcome, running = Outcome(), {}
    waiting = [part for part in parts if not is_done(folder, part)]
    ended = {part.name for part in parts} - {part.name for part in waiting}
    progress = Progress(parts, setting, folder, jobs)
    try:
        with progress:
            while waiting or running:
                if stop():
                    outcome.stopped = True
                    break
                changed = False
                for part in list(waiting):
                    if not set(part.needs) <= ended:
                        continue
                    alone = part.whole or any(other.whole for other in running)
                    if len(running) >= jobs or (running and alone):
                        break  # what comes first goes first
                    waiting.remove(part)
                    changed = True
                    reason = _begin(part, folder, running, outcome, restrict)
                    if reason:
                        outcome.failed[part.name] = reason
                        ended.add(part.name)
                for part, child in list(running.items()):
                    code = child.poll()
                    if code is None:
                        continue
                    changed = True
                    del running[part]
                    ended.add(part.name)
                    if code:
                        reason = f"{child.said} (see {child.log})"
                        outcome.failed[part.name] = reason
                        tqdm.write(f"failed: {part.name}: {reason}")
                    elif part.name not in outcome.failed:
                        folder.finish(part.name, child.spent)
                if changed:
                    note(list(running.values()), running_file)
                progress.show(running)
                time.sleep(PAUSE)
    finally:
        end(list(running.values()))
        running_file.unlink(missing_ok=True)
    return outcome


def _begin(part: Part, folder: Folder, running: dict, outcome: Outcome, restrict) -> str:
    """Start a part; "" or the reason why not."""
    lacking = [name for name in part.needs if name in outcome.failed]
    if part.kind == "evaluate":
        there = [s for s in part.of if folder.student(s.name).is_file()]
        if not there or any(name.startswith(("prepare", "init")) for name in lacking):
            return f"it needs {', '.join(lacking)}"
        if len(there) < len(part.of):
            outcome.failed[part.name] = f"without the students of {', '.join(lacking)}"
            part = replace(part, commands=(restrict(part, there),))
    elif lacking:
        return f"it needs {', '.join(lacking)}"
    running[part] = Child(part.commands, folder.root, folder.log(part.name))
    return ""


class Progress:
    """A bar over students and downstream runs, with the time that is left.

    The estimate takes the mean of finished parts of a kind, and a guess before there is one.
    """

    def __init__(self, parts: Sequence[Part], setting: Setting, folder: Folder, jobs: int):
        self.parts, self.setting, self.folder, self.jobs = parts, setting, folder, jobs
        self.total = sum(self._units(part) for part in parts)
        self.looked = float("-inf")
        self.bar = tqdm(total=self.total, unit=" parts", desc="study", dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.show({}, always=True)
        self.bar.close()

    def _units(self, part: Part) -> int:
        return len(part.of) * len(self.setting.tasks) if part.kind == "evaluate" else 1

    def show(self, running: dict, always: bool = False) -> None:
        """Look at what is finished, every few seconds."""
        now = time.monotonic()
        if not always and now - self.looked < 5:
            return
        self.looked = now
        done, seconds_left = 0, 0.0
        kinds: dict[str, list[float]] = {}
        left: dict[str, int] = {}
        for part in self.parts:
            spent = self.folder.spent(part.name)
            if part.kind != "evaluate":
                if is_done(self.folder, part):
                    done += 1
                    kinds.setdefault(part.kind, []).append(spent.seconds)
                else:
                    left[part.kind] = left.get(part.kind, 0) + 1
                continue
            finished = finished_runs(self.folder, part, self.setting)
            done += len(finished)
            for (_, task), seconds in finished.items():
                kinds.setdefault(task, []).append(seconds)
            for task in self.setting.tasks:
                missing = len(part.of) - sum(1 for _, t in finished if t == task)
                left[task] = left.get(task, 0) + missing
        for kind, count in left.items():
            each = statistics.fmean(kinds[kind]) if kind in kinds else GUESS[kind]
            seconds_left += count * each / (1 if kind == "cache" else self.jobs)
        self.bar.n = done
        names = ", ".join(part.name for part in running)
        self.bar.set_postfix_str(f"about {seconds_left / 60:.0f} min left; {names}", refresh=False)
        self.bar.refresh()
