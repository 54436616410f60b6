"""Upload a Hugging Face folder to the Hub, through huggingface_hub's ``HfApi``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import __version__
from ..errors import SetupError, first_line
from ..files.hub import is_connection_error, is_offline


@dataclass(frozen=True)
class Upload:
    """Files to upload to a repository, which is created if it does not exist.

    Attributes:
        repo: ``ORG/NAME``.
        folder: with all ``files``.
        private: make a new repository private, instead of the default of ``ORG``; an existing
            one keeps its visibility.
    """

    repo: str
    folder: Path
    files: Sequence[str]
    private: bool = False

    def describe(self) -> list[str]:
        """The repository and each file with its size, a line each."""
        kind = "private" if self.private else "public, unless its owner's default is private"
        sizes = {name: (self.folder / name).stat().st_size for name in self.files}
        width = max(map(len, sizes))
        lines = [f"  {name.ljust(width)}  {size:>13,} bytes" for name, size in sizes.items()]
        return [f"to {self.repo} on the Hugging Face Hub (if it is new: {kind}):", *lines]

    def run(self) -> str:
        """Upload in one commit, and return its address.

        Raises:
            SetupError: not logged in, no permission, no network, or the Hub refuses the files.
        """
        from huggingface_hub import HfApi

        if is_offline():
            raise SetupError("nothing was uploaded: HF_HUB_OFFLINE is set")
        require_login()
        api = HfApi(library_name="s3prl_ekd", library_version=__version__)
        state = "nothing was uploaded"
        try:
            api.create_repo(self.repo, private=self.private or None, exist_ok=True)
            state = f"{self.repo} exists, but no file was uploaded"
            commit = api.upload_folder(
                repo_id=self.repo,
                folder_path=self.folder,
                allow_patterns=list(self.files),
                commit_message=f"Student exported by s3prl_ekd {__version__}",
            )
        except Exception as failure:
            raise _explained(self.repo, failure, state) from None
        return str(commit.commit_url)


def require_login() -> None:
    """Raise SetupError without a login to the Hub."""
    from huggingface_hub import get_token

    if get_token() is None:
        raise SetupError(
            "nothing was uploaded: you are not logged in to the Hugging Face Hub; type: hf auth "
            "login (with a token that may write), or set HF_TOKEN"
        )


def _explained(repo: str, failure: Exception, state: str) -> Exception:
    """A failed upload as a SetupError; an exception that is a bug, as it is."""
    status = getattr(getattr(failure, "response", None), "status_code", None)
    if status in (401, 403):
        reason = (
            f"your login may not write to {repo}; check the name, or log in with a token that may "
            "write: hf auth login"
        )
    elif is_connection_error(failure):
        reason = (
            f"the Hugging Face Hub cannot be reached ({type(failure).__name__}); check the network "
            "and type the command again"
        )
    elif status is not None or isinstance(failure, OSError):
        reason = f"the Hugging Face Hub refused it: {first_line(failure)}"
    else:
        return failure
    return SetupError(f"{state}: {reason}")
