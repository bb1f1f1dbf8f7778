"""An exported folder's way to the hub."""

import os
import shlex
from pathlib import Path

from dpn_cli.errors import DpnError, UsageError

_TRANSPORTS = {"httpx", "httpcore", "requests", "urllib3"}  # packages whose errors say that a connection failed


def check_push(repo_id: str) -> None:
    """Check, before any work, that a folder can be uploaded at the end of it.

    Raises:
        UsageError: if it is not a repository id.
        DpnError: if there is no token, or the hub is switched off.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise UsageError(f"{repo_id!r} is not a repository id: expected NAME or OWNER/NAME") from None
    if constants.HF_HUB_OFFLINE:
        raise DpnError(f"HF_HUB_OFFLINE is set, so nothing can be uploaded to {repo_id}: unset it, or leave --push out")
    if get_token() is None:
        raise DpnError(f"there is no token to upload to {repo_id} with: run `hf auth login`, or set HF_TOKEN")


def push(folder: Path, repo_id: str, private: bool = False) -> str:
    """Upload a folder, complete as it is, to a model repository, which is made if there is none.

    Args:
        folder: a folder that `export` wrote.
        repo_id: the repository, as NAME or OWNER/NAME.
        private: whether a new repository is private.

    Returns:
        The repository's address.

    Raises:
        DpnError: if it cannot be uploaded; the folder stays.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo.repo_id, folder_path=folder, commit_message="Upload a dpn export")
    except Exception as error:
        raise DpnError(
            f"{folder} is complete, but not uploaded: {_reason(error)}; once that is fixed, run  "
            f"{upload_command(folder, repo_id, private)}"
        ) from error
    return str(repo)


def upload_command(folder: Path, repo_id: str, private: bool) -> str:
    """Return the command line that uploads a folder as `push` does."""
    return shlex.join(["hf", "upload", repo_id, os.fspath(folder), *(["--private"] if private else [])])


def _reason(error: Exception) -> str:
    """Say what went wrong without the server's own words, which may be long."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        refused = " (a token that may write there is needed)" if status in (401, 403) else ""
        return f"the hub answered HTTP {status}{refused}"
    name = type(error).__name__
    if isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.split(".")[0] in _TRANSPORTS:
        return f"the hub cannot be reached ({name})"
    return str(error.strerror) if isinstance(error, OSError) and error.strerror else f"the upload failed ({name})"
