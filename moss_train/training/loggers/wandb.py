"""Log a run to Weights & Biases, online or offline."""

import json
import netrc
import os
import re
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from moss_train.training.loggers.base import ClipSample, Row, Writer
from moss_train.utils.errors import first_line
from moss_train.utils.files import read_json, warn

PUBLIC_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")  # older and newer name of the public server
ID_FILE = "wandb.json"
INIT_SECONDS = 20.0
"""Longest wait for the server; after it the run is logged offline."""
FINISH_SECONDS = 60.0
"""Longest wait for pending uploads; after it they stay in the run directory, and `wandb sync` uploads them."""


def has_key(base_url: str) -> bool:
    """Return whether a server's API key is in the environment or in the netrc file, where `wandb login` puts it."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    default = Path("~/.netrc").expanduser()
    path = Path(os.environ.get("NETRC", default if default.exists() else Path("~/_netrc").expanduser()))
    try:
        hosts = netrc.netrc(path).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    host = urlsplit(base_url).netloc
    return any(name in hosts for name in (PUBLIC_HOSTS if host in PUBLIC_HOSTS else (host,)))


class WandbWriter(Writer):
    """Logs the run of a directory under an id that stays the same when it resumes.

    Args:
        directory: run directory; the run is named after it and its parent folder.
        mode: online, offline or auto, which is online when there is a key and the server answers, else offline; `wandb
            sync --append <directory>/wandb/offline-run-*` uploads an offline run later.
        every_updates: updates between two logged rows of the metrics table; other tables are logged completely.
        config: configuration of the run, shown with it.
    """

    def __init__(self, directory: Path, mode: str, every_updates: int, config: dict[str, Any]) -> None:
        self.directory = directory
        self.mode = mode
        self.every_updates = every_updates
        self.config = config
        self.run: Any = None

    def start(self, update: int) -> None:
        """Open or continue the run of this directory."""
        self._attempt(self._open)

    def _open(self) -> None:
        # Imported here: it takes half a second.
        import wandb

        wanted = os.environ.get("WANDB_MODE", "auto") if self.mode == "auto" else self.mode
        if wanted == "disabled":
            return
        if wanted in ("auto", "online"):
            if has_key(wandb.Settings().base_url):
                try:
                    self._start_run("online")
                    print(f"wandb: {self.run.url}", file=sys.stderr)
                    return
                except wandb.Error as error:
                    warn(f"wandb is offline: {first_line(error)}")
                    wandb.teardown()  # otherwise the id would still be in use
            elif wanted == "online":  # in auto mode, most people without a key do not want a warning in every run
                warn("wandb is offline: no API key (wandb login, or WANDB_API_KEY)")
        self._start_run("offline")

    def _start_run(self, mode: Any) -> None:
        import wandb

        settings = wandb.Settings(
            console="off", silent=True, init_timeout=INIT_SECONDS, finish_timeout=FINISH_SECONDS, disable_code=True
        )
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "moss_train"),
            group=self.directory.parent.name,
            name=f"{self.directory.parent.name}-{self.directory.name}",
            id=run_id(self.directory),
            resume="allow",
            mode=mode,
            dir=str(self.directory),
            config=without_credentials(self.config),
            settings=settings,
        )
        # The x-axis is the update, not the number of calls: a resumed run logs some updates a second time.
        self.run.define_metric("update")
        self.run.define_metric("*", step_metric="update")

    def write(self, table: str, row: Row) -> None:
        """Log one row; columns of tables other than `metrics` are prefixed with the name of their table."""
        if self.run is None or (table == "metrics" and row["update"] % self.every_updates):
            return
        prefix = "" if table == "metrics" else f"{table}/"
        values = {name if name == "update" else prefix + name: value for name, value in row.items()}
        self._attempt(lambda: self.run.log(values))

    def show(self, samples: Sequence[ClipSample]) -> None:
        """Log audio and spectrograms."""
        if self.run is not None:
            self._attempt(lambda: self.run.log(as_media(samples)))

    def close(self) -> None:
        if self.run is not None:
            self._attempt(self.run.finish)
            self.run = None

    def _attempt(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:
            self.run = None
            reason = first_line(error)
            warn(f"wandb is off from here on: {reason}")


def as_media(samples: Sequence[ClipSample]) -> dict[str, Any]:
    """Return the samples as wandb media objects, by the key under which they are logged."""
    import wandb

    values: dict[str, Any] = {"update": samples[0].update} if samples else {}
    for sample in samples:
        for label, path in sample.audio.items():
            values[f"samples/{sample.name}/{label}"] = wandb.Audio(str(path), caption=sample.texts.get(label))
        if sample.picture is not None:
            values[f"samples/{sample.name}/spectrograms"] = wandb.Image(str(sample.picture))
    return values


def without_credentials(node: Any) -> Any:
    """Return plain data in which URLs have no user, password or query, because a query can hold a signature."""
    if isinstance(node, Mapping):
        return {key: without_credentials(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [without_credentials(value) for value in node]
    if isinstance(node, str) and "://" in node:
        return re.sub(r"(?<=://)[^/@\s]+@", "", node).partition("?")[0]
    return node


def run_id(directory: Path) -> str:
    """Return the id of a run directory. It is drawn once: a new run under an old name must not continue the old one."""
    path = directory / ID_FILE
    try:
        found = read_json(path)["id"]
        if not re.fullmatch("[A-Za-z0-9_-]{1,64}", found):
            raise ValueError(f"{found!r} is not an id")
        return found
    except (OSError, ValueError, KeyError, TypeError):
        drawn = secrets.token_hex(4)
        path.write_text(json.dumps({"id": drawn}) + "\n")
        return drawn
