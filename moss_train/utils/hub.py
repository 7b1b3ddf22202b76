"""Access to the Hugging Face hub, with time-outs instead of waits."""

import os
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from moss_train.utils.errors import UserError


def in_time(question: Callable[[], str | None], seconds: float, otherwise: str) -> str | None:
    """The answer to a question, or `otherwise` after so many seconds."""
    answers: list[str | None] = []
    thread = threading.Thread(target=lambda: answers.append(question()), daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else otherwise


def why_unreachable(url: str, seconds: float) -> str | None:
    """Why a server does not answer, None when it does, whatever it says; known after so many seconds at most."""
    return in_time(lambda: _ask(url, seconds), seconds, f"{url} did not answer in {seconds:g} s")


def _ask(url: str, seconds: float) -> str | None:
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds).close()
    except urllib.error.HTTPError:
        return None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        if isinstance(reason, ssl.SSLError):
            return None  # it is there; whoever asks in earnest may know its certificate
        return f"{url} cannot be reached ({reason or type(error).__name__})"
    return None


HUB_SECONDS = 5.0


def refuse_missing_model(name: str) -> None:
    """Raise UserError for a tokenizer that is not here and cannot be a repository, which is called owner/name."""
    if Path(name).exists() or (name.count("/") == 1 and not looks_local(name)):
        return
    where = "" if name.startswith("/") else f" in {Path.cwd()}"
    raise UserError(
        f"{name} does not exist{where}: give a run, a checkpoint or a model folder, or owner/name of a repository on "
        "the Hugging Face hub"
    )


def looks_local(name: str) -> bool:
    """Whether a name can only be meant as a path."""
    return name.startswith(("/", ".", "~", "runs/")) or name.count("/") > 1


def from_pretrained(kind: Any, name: str, **options: Any) -> Any:
    """`kind.from_pretrained` of a folder or a repository; without a network, of what was downloaded earlier.

    Raises:
        UserError: there is no such folder, or a repository that is neither at hand nor can be fetched.
    """
    if Path(name).exists():
        return kind.from_pretrained(name, **options)
    if looks_local(name):
        raise UserError(f"{name} does not exist")
    if (problem := why_no_hub()) is None:
        return kind.from_pretrained(name, **options)
    try:
        return kind.from_pretrained(name, local_files_only=True, **options)
    except OSError as error:
        raise UserError(
            f"{name} is neither a folder in {Path.cwd()} nor in the cache of the Hugging Face hub, and {problem}"
        ) from error


@cache
def why_no_hub() -> str | None:
    """Why the hub is not asked, None when it answers."""
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE"):
            return f"{variable} is set"
    return why_unreachable(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), HUB_SECONDS)
