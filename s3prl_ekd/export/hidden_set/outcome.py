"""The outcome of a check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

Status = Literal["pass", "fail", "warn", "skip"]
OFFICIAL = ("files", "build", "forward", "lists", "rates", "frames")  # SUPERB's own checks


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


class NotPassed(Exception):
    """A check did not pass; the message is the reason."""

    status: ClassVar[Status]


class CheckFailed(NotPassed):
    """A check failed."""

    status = "fail"


class CheckWarning(NotPassed):
    """A check found something that may be a fault."""

    status = "warn"


class CheckSkipped(NotPassed):
    """A check could not run."""

    status = "skip"


def run_check(name: str, check: Callable[..., str], *args: object) -> CheckOutcome:
    """Run a check, which returns its reason for passing or raises :class:`NotPassed`."""
    try:
        return CheckOutcome(name, "pass", check(*args))
    except NotPassed as error:
        return CheckOutcome(name, error.status, str(error))
