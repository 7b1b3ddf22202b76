"""Questions to servers, each answered in bounded time: looking up a host's name knows no time limit of its own."""

import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Callable


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
