"""The installed distribution that the module ``s3prl`` comes from.

``espnet-s3prl``, which ESPnet requires, installs a module ``s3prl`` too. pip does not notice: it
writes one over the other. This package runs on both.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import logging
import multiprocessing
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from ..errors import SetupError

logger = logging.getLogger(__name__)

MODULE = "s3prl"
_FILE = "s3prl/__init__.py"


@dataclass(frozen=True)
class Claim:
    """An installed distribution that has the module ``s3prl``.

    Attributes:
        name: as on PyPI, such as ``espnet-s3prl``.
        version: of the distribution.
        folder: where its module is, or would be if it is installed in another way (editable).
    """

    name: str
    version: str
    folder: Path

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


@dataclass(frozen=True)
class Installation:
    """The module ``s3prl`` and the distributions that have it.

    Attributes:
        folder: of the module that Python imports; None if there is none.
        claims: sorted by name.
    """

    folder: Path | None
    claims: tuple[Claim, ...]

    def __str__(self) -> str:
        """The distribution or checkout, and its folder."""
        if self.folder is None:
            return "not installed"
        here = [claim for claim in self.claims if claim.folder == self.folder]
        if here:
            return f"{' and '.join(map(str, here))} ({self.folder})"
        if len(self.claims) == 1:  # an editable installation, or a checkout before it on the path
            (claim,) = self.claims
            return f"{claim.name} {_version(self.folder) or claim.version} ({self.folder})"
        return f"{_version(self.folder) or 'unknown version'} (checkout, {self.folder})"

    @property
    def problem(self) -> str:
        """What is wrong, and what to type; empty if there is one module and one distribution."""
        if len(self.claims) > 1:
            names = " and ".join(map(str, self.claims))
            kept = _kept(self.claims)
            others = [claim.name for claim in self.claims if claim != kept]
            files = "".join(
                f"; {count} files of {claim.name} are not its own"
                for claim in self.claims
                if (count := len(replaced_files(claim)))
            )
            return (
                f"{len(self.claims)} distributions claim the module s3prl: {names}{files}; to keep "
                f"{kept.name}, type: pip uninstall -y {' '.join(others)} && {_reinstall(kept)}"
            )
        if self.folder is not None:
            return ""
        if self.claims:
            (claim,) = self.claims
            return f"the files of {claim} are missing; type: {_reinstall(claim)}"
        if _is_installed("espnet"):
            return "s3prl is not installed; type: pip install --no-deps espnet-s3prl"
        return "s3prl is not installed; type: pip install s3prl"


def installation() -> Installation:
    """Find the module and its distributions, without importing it."""
    claims: dict[str, Claim] = {}
    for distribution in metadata.distributions():
        if _has_module(distribution):
            name = distribution.metadata["Name"]
            folder = Path(str(distribution.locate_file(MODULE))).resolve()
            key = name.lower().replace("_", "-")  # the first one on Python's path counts
            claims.setdefault(key, Claim(name, distribution.version, folder))
    return Installation(_module_folder(), tuple(claims[name] for name in sorted(claims)))


def missing_s3prl() -> str:
    """What to type if there is no module ``s3prl``; empty if there is one."""
    return "" if _module_folder() else installation().problem


def require_s3prl() -> None:
    """Raise SetupError if there is no module ``s3prl``; its message says what to type."""
    if problem := missing_s3prl():
        raise SetupError(problem)


_announced = False


def announce_s3prl() -> None:
    """Log the distribution behind ``s3prl``, and warn if several claim it; once a process.

    Raises:
        SetupError: see :func:`require_s3prl`.
    """
    global _announced
    if _announced:
        return
    require_s3prl()
    _announced = True
    if multiprocessing.parent_process() is None:  # a child's parent has logged it
        found = installation()
        logger.info("s3prl: %s", found)
        if found.problem:
            logger.warning("%s", found.problem)


def replaced_files(claim: Claim) -> list[str]:
    """The modules of a distribution that are missing or were overwritten, by their hashes."""
    files = metadata.distribution(claim.name).files or []
    return [
        str(file)
        for file in files
        if file.parts[0] == MODULE
        and file.suffix == ".py"
        and file.hash is not None
        and file.hash.mode == "sha256"
        and _sha256(Path(str(file.locate()))) != file.hash.value
    ]


def _has_module(distribution: metadata.Distribution) -> bool:
    """``metadata.packages_distributions`` without its 0.4 s: most lists of files are not read."""
    names = distribution.read_text("top_level.txt")
    if names is not None:
        return MODULE in names.split()
    return f"{_FILE}," in (distribution.read_text("RECORD") or "")


def _module_folder() -> Path | None:
    spec = importlib.util.find_spec(MODULE)
    # without an origin it is a folder of this name without __init__.py, such as s3prl's repository
    return None if spec is None or spec.origin is None else Path(spec.origin).parent.resolve()


def _version(folder: Path) -> str:
    try:
        return (folder / "version.txt").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _kept(claims: tuple[Claim, ...]) -> Claim:
    """The distribution to keep: a fork, because another package needs it."""
    return next((claim for claim in claims if claim.name != MODULE), claims[0])


def _reinstall(claim: Claim) -> str:
    return f"pip install --force-reinstall --no-deps {claim.name}=={claim.version}"


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _sha256(path: Path) -> str:
    """As in a RECORD file; empty if there is no such file."""
    try:
        digest = hashlib.sha256(path.read_bytes()).digest()
    except OSError:
        return ""
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
