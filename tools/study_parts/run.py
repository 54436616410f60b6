"""Run the unfinished jobs in parallel, with a progress bar and an estimate of the time left."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from tqdm import tqdm

from .children import JobProcess, check_no_leftovers, terminate, write_running
from .design import StudySetting
from .folder import StudyFolder
from .parts import GUESSED_SECONDS, Job, finished_runs, is_done

POLL_SECONDS = 0.2  # seconds between two polls of the running jobs


@dataclass
class StudyOutcome:
    """Outcome of :func:`run_jobs`.

    Attributes:
        failed: job -> reason.
        stopped: stopped before all jobs had ended.
    """

    failed: dict[str, str] = field(default_factory=dict)
    stopped: bool = False


def run_jobs(
    jobs: Sequence[Job],
    setting: StudySetting,
    folder: StudyFolder,
    parallel: int,
    stop: Callable[[], bool],
    command_for: Callable[[list], tuple[str, ...]],
) -> StudyOutcome:
    """Run all unfinished jobs, each after the jobs that it needs.

    Args:
        parallel: number of jobs to run in parallel.
        stop: called repeatedly; once it is True, running jobs are terminated (they save).
        command_for: command that evaluates the given students.

    Raises:
        SetupError: commands of an earlier, killed start are still running.
    """
    running_file = folder.root / "running.json"
    check_no_leftovers(running_file)
    outcome, running = StudyOutcome(), {}
    waiting = [job for job in jobs if not is_done(folder, job)]
    ended = {job.name for job in jobs} - {job.name for job in waiting}
    progress = ProgressBar(jobs, setting, folder, parallel)
    try:
        with progress:
            while waiting or running:
                if stop():
                    outcome.stopped = True
                    break
                changed = False
                for job in list(waiting):
                    if not set(job.needs) <= ended:
                        continue
                    exclusive = job.exclusive or any(active.exclusive for active in running)
                    if len(running) >= parallel or (running and exclusive):
                        break  # start jobs in order
                    waiting.remove(job)
                    changed = True
                    reason = _start_job(job, folder, running, outcome, command_for)
                    if reason:
                        outcome.failed[job.name] = reason
                        ended.add(job.name)
                for job, child in list(running.items()):
                    code = child.poll()
                    if code is None:
                        continue
                    changed = True
                    del running[job]
                    ended.add(job.name)
                    if code:
                        reason = f"{child.error_message} (see {child.log})"
                        outcome.failed[job.name] = reason
                        tqdm.write(f"failed: {job.name}: {reason}")
                    elif job.name not in outcome.failed:
                        folder.mark_done(job.name, child.spent)
                if changed:
                    write_running(list(running.values()), running_file)
                progress.show(running)
                time.sleep(POLL_SECONDS)
    finally:
        terminate(list(running.values()))
        running_file.unlink(missing_ok=True)
    return outcome


def _start_job(
    job: Job, folder: StudyFolder, running: dict, outcome: StudyOutcome, command_for
) -> str:
    """Start a job; return "" or the reason why it cannot start."""
    failed = [name for name in job.needs if name in outcome.failed]
    if job.kind == "evaluate":
        available = [s for s in job.students if folder.student_path(s.name).is_file()]
        if not available or any(name.startswith(("prepare", "init")) for name in failed):
            return f"not started, since these failed: {', '.join(failed)}"
        if len(available) < len(job.students):
            outcome.failed[job.name] = f"students of failed jobs are missing: {', '.join(failed)}"
            job = replace(job, commands=(command_for(available),))
    elif failed:
        return f"not started, since these failed: {', '.join(failed)}"
    running[job] = JobProcess(job.commands, folder.root, folder.log_path(job.name))
    return ""


class ProgressBar:
    """Progress bar over jobs and downstream runs, with the time left.

    The estimate is the mean of the finished jobs of a kind, or else :data:`GUESSED_SECONDS`.
    """

    def __init__(
        self, jobs: Sequence[Job], setting: StudySetting, folder: StudyFolder, parallel: int
    ):
        self.jobs, self.setting, self.folder, self.parallel = jobs, setting, folder, parallel
        self.total = sum(self._units(job) for job in jobs)
        self.last_refresh = float("-inf")
        self.bar = tqdm(total=self.total, unit=" runs", desc="study", dynamic_ncols=True)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *exception: object) -> None:
        self.show({}, always=True)
        self.bar.close()

    def _units(self, job: Job) -> int:
        return len(job.students) * len(self.setting.tasks) if job.kind == "evaluate" else 1

    def show(self, running: dict, always: bool = False) -> None:
        """Update the bar, at most every 5 seconds unless ``always``."""
        now = time.monotonic()
        if not always and now - self.last_refresh < 5:
            return
        self.last_refresh = now
        finished_count, seconds_left = 0, 0.0
        kinds: dict[str, list[float]] = {}
        remaining: dict[str, int] = {}
        for job in self.jobs:
            spent = self.folder.time_spent(job.name)
            if job.kind != "evaluate":
                if is_done(self.folder, job):
                    finished_count += 1
                    kinds.setdefault(job.kind, []).append(spent.seconds)
                else:
                    remaining[job.kind] = remaining.get(job.kind, 0) + 1
                continue
            finished = finished_runs(self.folder, job, self.setting)
            finished_count += len(finished)
            for (_, task), seconds in finished.items():
                kinds.setdefault(task, []).append(seconds)
            for task in self.setting.tasks:
                missing = len(job.students) - sum(1 for _, t in finished if t == task)
                remaining[task] = remaining.get(task, 0) + missing
        for kind, count in remaining.items():
            mean = statistics.fmean(kinds[kind]) if kind in kinds else GUESSED_SECONDS[kind]
            seconds_left += count * mean / (1 if kind == "cache" else self.parallel)
        self.bar.n = finished_count
        names = ", ".join(job.name for job in running)
        self.bar.set_postfix_str(f"about {seconds_left / 60:.0f} min left; {names}", refresh=False)
        self.bar.refresh()
