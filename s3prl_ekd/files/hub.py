"""Models on the Hugging Face Hub: ids, and download into huggingface_hub's cache.

An id is ``ORG/NAME`` or ``ORG/NAME@REVISION``, where REVISION is a branch, a tag or a commit. It is
pinned if REVISION is a full commit hash: then it always means the same files, and a copy in the
cache is used without a request. ``HF_HUB_OFFLINE``, ``HF_HOME``, ``HF_ENDPOINT`` and the login are
huggingface_hub's own.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from ..errors import EkdError, SetupError, first_line

logger = logging.getLogger(__name__)

# Files of a repository that are read, besides the weights. An adapter is downloaded to refuse it.
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
SETTINGS = ("config.json", *_PROCESSORS, "adapter_config.json")
TIMEOUT = 20.0  # seconds for the answer to a request about a repository
_NAME = r"[\w-][\w.-]*"  # as a part of a path in the cache, too
_ID = re.compile(rf"(?P<repo>{_NAME}/{_NAME})(@(?P<revision>{_NAME}(/{_NAME})*))?", re.ASCII)
_LONGEST = 250  # characters; huggingface_hub allows 96 without the revision
_COMMIT = re.compile(r"[0-9a-f]{40}")
# Suffixes of files: a name with one of them is a path.
_FILES = {".pt", ".pth", ".th", ".ckpt", ".bin", ".safetensors", ".onnx", ".zip", ".tar", ".json"}
_LOGIN = "type: hf auth login"


@dataclass(frozen=True)
class HubId:
    """The id of a model on the Hub; see the docstring of the module."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit."""
        return _COMMIT.fullmatch(self.revision or "") is not None


@dataclass(frozen=True)
class HubModel:
    """A downloaded model: its pinned id, and the folder in the cache."""

    id: HubId
    folder: Path


def parse_hub_id(text: str) -> HubId | None:
    """Parse an id; None if the text is none, or is the path of something that exists.

    Names of files (``students/a.pt``) and paths that begin with ``.``, ``/`` or ``~`` are no ids.
    """
    match = _ID.fullmatch(text)
    if match is None or len(text) > _LONGEST or Path(text).exists():
        return None
    if match["revision"] is None and PurePath(text).suffix in _FILES:
        return None
    repo = parse_repository(match["repo"])
    return None if repo is None else HubId(repo, match["revision"])


def parse_repository(text: str) -> str | None:
    """``ORG/NAME`` without a revision; None if the text is not of this form."""
    match = _ID.fullmatch(text)
    if match is None or match["revision"] is not None:
        return None
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(text)
    except HFValidationError:
        return None
    return text


def same_model(first: str, second: str) -> bool:
    """Whether two ids may mean the same files: equal, or one repository of which one revision is no
    commit, so that it cannot be compared without the Hub."""
    if first == second:
        return True
    a, b = parse_hub_id(first), parse_hub_id(second)
    return (
        a is not None and b is not None and a.repo == b.repo and not (a.is_pinned and b.is_pinned)
    )


def may_be_same(first: str, second: str) -> bool:
    """Whether two sources of a teacher may be one model: paths may differ in the folder."""
    return Path(first).name == Path(second).name or same_model(first, second)


def pin(hub_id: HubId, location: str, error: type[EkdError]) -> HubId:
    """The id with the commit that its revision is at now; offline, at which it is in the cache.

    Args:
        location: starts messages.

    Raises:
        EkdError: of class ``error``: see :func:`fetch`.
    """
    if hub_id.is_pinned:
        return hub_id
    cached = _offline_copy(hub_id, location, error)
    return cached.id if cached else _look_up(hub_id, location, error)[0].id


def fetch(hub_id: HubId, location: str, error: type[EkdError]) -> HubModel:
    """Download the settings and weights of a model, unless they are in the cache.

    Of several formats of the weights only one is downloaded, safetensors if there are any. If the
    Hub cannot be reached, a complete copy in the cache is used, with a warning.

    Args:
        location: starts messages.

    Raises:
        EkdError: of class ``error``: no such repository or revision, no access to it, no network,
            no weights, a damaged index, or a full disk.
        SetupError: huggingface_hub is not installed.
    """
    from .hf_weights import main_weights, shard_names

    cached = _offline_copy(hub_id, location, error) or (
        _cached(hub_id) if hub_id.is_pinned else None
    )
    # transformers' own downloads lack these
    if cached and (is_offline() or any((cached.folder / name).is_file() for name in _PROCESSORS)):
        return cached
    model, names = _look_up(hub_id, location, error)
    if not names:  # the Hub cannot be reached
        return model
    weights = main_weights(names)
    if weights is None:
        raise error(
            f"{location}: {hub_id.repo} on the Hugging Face Hub has no model.safetensors or "
            "pytorch_model.bin"
        )
    logger.info("%s: %s from the Hugging Face Hub", location, model.id)
    with _explained(model.id, location, error):
        for name in SETTINGS:
            if name in names:
                _download(model.id, name)
        path = _download(model.id, weights)
        for shard in shard_names(path, error) if path.suffix == ".json" else ():
            if shard not in names:
                raise error(f"{location}: {hub_id.repo} has no {shard}, which {weights} names")
            _download(model.id, shard)
    return model


def _look_up(hub_id: HubId, location: str, error: type[EkdError]) -> tuple[HubModel, set[str]]:
    """A model at its newest commit, of which only ``config.json`` is downloaded, and the names of
    its files; if the Hub cannot be reached, a complete copy in the cache and no names."""
    hub = _huggingface_hub()
    try:
        # without the retries of hf_hub_download, which take half a minute
        info = hub.HfApi().model_info(hub_id.repo, revision=hub_id.revision, timeout=TIMEOUT)
    except Exception as failure:
        cached = _cached(hub_id) if is_connection_error(failure) else None
        if cached is None:
            with _explained(hub_id, location, error):
                raise
        logger.warning(
            "%s: the Hugging Face Hub cannot be reached; using the copy of %s in the cache",
            location,
            cached.id,
        )
        return cached, set()
    names = {sibling.rfilename for sibling in info.siblings or ()}
    if "config.json" not in names:
        raise error(f"{location}: {hub_id.repo} on the Hugging Face Hub has no config.json")
    with _explained(hub_id, location, error):
        # by the revision as given, which huggingface_hub then finds in the cache, too
        folder = _download(hub_id, "config.json").parent
    return HubModel(HubId(hub_id.repo, folder.name), folder), names


def _download(hub_id: HubId, name: str) -> Path:
    """A file of a repository, in the cache."""
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(hub_id.repo, name, revision=hub_id.revision))


def _cached(hub_id: HubId) -> HubModel | None:
    """The complete copy of a model in the cache; None without."""
    from .hf_weights import weight_files

    hub = _huggingface_hub()
    try:
        folder = hub.snapshot_download(hub_id.repo, revision=hub_id.revision, local_files_only=True)
        complete = Path(folder, "config.json").is_file() and weight_files(Path(folder), SetupError)
    except (OSError, SetupError):  # not in the cache, or not all of it
        return None
    return HubModel(HubId(hub_id.repo, Path(folder).name), Path(folder)) if complete else None


def _offline_copy(hub_id: HubId, location: str, error: type[EkdError]) -> HubModel | None:
    """In offline mode, the copy in the cache; else None."""
    if not is_offline():
        return None
    if cached := _cached(hub_id):
        return cached
    hub = _huggingface_hub()
    revision = "" if hub_id.revision is None else f" --revision {hub_id.revision}"
    raise error(
        f"{location}: HF_HUB_OFFLINE is set, and the cache {hub.constants.HF_HUB_CACHE} has no "
        f"complete copy of {hub_id}; with a network, type: HF_HUB_OFFLINE=0 hf download "
        f"{hub_id.repo}{revision}"
    )


@contextmanager
def _explained(hub_id: HubId, location: str, error: type[EkdError]) -> Iterator[None]:
    """Turn errors of huggingface_hub into ``error``, in a sentence that says what to type."""
    try:
        yield
    except EkdError as problem:
        if str(problem).startswith(location):
            raise
        raise error(f"{location}: {problem}") from None  # of a damaged index
    except Exception as failure:
        reason = _reason(hub_id, failure)
        if reason is None:
            raise
        raise error(f"{location}: {reason}") from None


def _reason(hub_id: HubId, failure: Exception) -> str | None:
    """Why a download failed, and what to type; None for an exception that is a bug."""
    from huggingface_hub import utils as errors  # in versions before 0.25, .errors lacks some

    if isinstance(failure, errors.GatedRepoError):
        return (
            f"{hub_id.repo} is gated: accept its terms on its page of the Hugging Face Hub, then "
            f"{_LOGIN}"
        )
    if isinstance(failure, errors.RepositoryNotFoundError):
        return (
            f"no such file or folder {hub_id.repo}, and no such model on the Hugging Face Hub; "
            f"check the name, or if it is private, {_LOGIN}"
        )
    if isinstance(failure, errors.RevisionNotFoundError):
        return (
            f"{hub_id.repo} on the Hugging Face Hub has no branch, tag or commit "
            f"{hub_id.revision}; for its newest version, give {hub_id.repo}"
        )
    if is_connection_error(failure):
        return (
            f"no such file or folder {hub_id}, and the Hugging Face Hub cannot be reached "
            f"({type(failure).__name__}); check the network, or on another machine type: hf "
            f"download {hub_id.repo} --local-dir FOLDER, and give that folder"
        )
    if isinstance(failure, (OSError, errors.HfHubHTTPError)):
        return f"cannot download {hub_id} from the Hugging Face Hub: {first_line(failure)}"
    return None


def is_connection_error(failure: BaseException) -> bool:
    """Whether no answer came. huggingface_hub has used requests, httpx and httpx2, whose classes
    have these names; LocalEntryNotFoundError is what it raises after some retries."""
    names = {cls.__name__ for cls in type(failure).__mro__}
    return bool(names & {"TransportError", "ConnectionError", "Timeout", "LocalEntryNotFoundError"})


def is_offline() -> bool:
    """Whether ``HF_HUB_OFFLINE`` is set."""
    return bool(_huggingface_hub().constants.HF_HUB_OFFLINE)


def _huggingface_hub() -> Any:
    try:
        import huggingface_hub.constants
    except ImportError:
        raise SetupError(
            "huggingface_hub is not installed; type: pip install transformers"
        ) from None
    return huggingface_hub
