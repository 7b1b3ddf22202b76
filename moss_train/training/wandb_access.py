"""Can Weights & Biases be reached? Found out once, in bounded time, without a question at the keyboard.

Its own online start waits for the network, retries, and asks for a key when there is a terminal.
"""

import base64
import json
import netrc
import os
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from moss_train.utils.network import in_time

CHECK_SECONDS = 10.0
PUBLIC_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")  # older and newer name of the public server
QUERY = json.dumps({"query": "query Viewer { viewer { id } }"}).encode()


def why_offline(base_url: str, seconds: float = CHECK_SECONDS) -> str | None:
    """Why logging cannot be online, None when the server took our key.

    Args:
        base_url: of the server.
        seconds: how long the whole check may take.
    """
    if os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return None  # exchanged by wandb itself
    key = find_key(base_url)
    if key is None:
        return "no API key (wandb login, or WANDB_API_KEY)"
    return in_time(lambda: ask_server(base_url, key, seconds), seconds, f"{base_url} did not answer in {seconds:g} s")


def find_key(base_url: str) -> str | None:
    """The API key of the environment or of the netrc file, where `wandb login` puts it."""
    if key := os.environ.get("WANDB_API_KEY"):
        return key
    default = Path("~/.netrc").expanduser()
    path = Path(os.environ.get("NETRC", default if default.exists() else Path("~/_netrc").expanduser()))
    try:
        entries = netrc.netrc(path)
    except (OSError, netrc.NetrcParseError):
        return None
    host = urlsplit(base_url).netloc
    hosts = PUBLIC_HOSTS if host in PUBLIC_HOSTS else (host,)
    found = [entry[2] for name in hosts if (entry := entries.hosts.get(name)) is not None]
    return found[0] if found else None


def ask_server(base_url: str, key: str, seconds: float) -> str | None:
    """Ask the server whose key this is; why it cannot be used, None when it can."""
    credentials = base64.b64encode(f"api:{key}".encode()).decode()
    headers = {"Content-Type": "application/json", "Authorization": f"Basic {credentials}"}
    request = urllib.request.Request(f"{base_url.rstrip('/')}/graphql", QUERY, headers)
    try:
        with urllib.request.urlopen(request, timeout=seconds) as answer:
            viewer = json.loads(answer.read(2**20))["data"]["viewer"]
    except urllib.error.HTTPError as error:
        return f"{base_url} refused the API key ({error.code})" if error.code in (401, 403) else f"{base_url}: {error}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{base_url} cannot be reached ({getattr(error, 'reason', None) or error or type(error).__name__})"
    return None if viewer else f"{base_url} does not know the API key"
