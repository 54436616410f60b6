"""Run jobs of a study in parallel, in processes that end with it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any

from tqdm import tqdm

from s3prl_ekd.system.jobs import PARENT, end_with_parent


def process_pool(jobs: int) -> ProcessPoolExecutor:
    """Processes that end, with the commands they run, when this one has ended."""
    return ProcessPoolExecutor(
        jobs, get_context("spawn"), initializer=_start_process, initargs=(os.getpid(),)
    )


def _start_process(parent: int) -> None:
    os.environ[PARENT] = str(parent)
    end_with_parent()


def run_jobs(jobs: int, function: Callable[..., Any], arguments: Sequence[Sequence[Any]]) -> None:
    """Call a function for each tuple of arguments, ``jobs`` at a time; print each result."""
    with process_pool(jobs) as pool:
        futures = [pool.submit(function, *own) for own in arguments]
        for future in tqdm(as_completed(futures), total=len(futures), unit="run"):
            print(json.dumps(future.result()), flush=True)
