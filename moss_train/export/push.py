"""Upload an exported folder to a repository of the Hugging Face Hub."""

import sys
from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from moss_train.utils.errors import UserError


def describe_upload(folder: Path, repository: str) -> str:
    """Return what would be uploaded where: every file with its size, and the sum."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"  {path.stat().st_size:>13,}  {path.relative_to(folder)}" for path in files]
    total = sum(path.stat().st_size for path in files)
    return "\n".join([f"to {repository}: {len(files)} files, {total:,} bytes", *lines])


def push(folder: Path, repository: str, *, private: bool = True) -> str:
    """Show what goes, create the repository if it is missing, and upload every file in one commit.

    The token is the one that `hf auth login` or HF_TOKEN gave; it is never shown.

    Returns:
        The address of the commit.

    Raises:
        UserError: no token, no network, no permission, or a name that is no repository.
    """
    print(describe_upload(folder, repository), file=sys.stderr)
    api = HfApi()
    try:
        if get_token() is None:
            raise UserError(
                f"push={repository} needs a token of the Hugging Face Hub: run `hf auth login` or set HF_TOKEN"
            )
        api.create_repo(repository, private=private, exist_ok=True)
        return api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Export by moss_train"
        ).commit_url
    except HFValidationError as error:
        raise UserError(f"push={repository} is not the name of a repository, owner/name: {_line(error)}") from None
    except LocalTokenNotFoundError:
        raise UserError(f"push={repository} needs a token of the Hugging Face Hub: run `hf auth login`") from None
    except HfHubHTTPError as error:
        status: Any = getattr(error.response, "status_code", "no")
        reason = {401: "the token is not valid", 403: "the token may not write there", 404: "no such owner"}
        raise UserError(
            f"push={repository}: {reason.get(status, _line(error))} (status {status}); {folder} is complete"
        ) from None
    except (OSError, httpx.HTTPError) as error:  # connections that fail
        raise UserError(
            f"push={repository}: the Hub cannot be reached ({type(error).__name__}); {folder} is complete"
        ) from None


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
