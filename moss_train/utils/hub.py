"""Access to the Hugging Face hub, with time-outs instead of waits."""

import os
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from moss_train.utils.errors import UserError, first_line


def connection_problem(url: str, seconds: float) -> str | None:
    """Return why a server cannot be reached, None if it answers, even with an error; takes at most `seconds`."""
    answers: list[str | None] = []

    def ask() -> None:
        problem = None
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds).close()
        except urllib.error.HTTPError:
            pass
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            if not isinstance(reason, ssl.SSLError):  # it is there; the actual client may know its certificate
                problem = f"{url} cannot be reached ({reason or type(error).__name__})"
        answers.append(problem)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else f"{url} did not answer in {seconds:g} s"


def check_model_name(name: str) -> None:
    """Raise UserError for a model name that is no existing path and cannot be a repository (owner/name).

    A name that is similar to that of an existing folder is refused as mistyped, without asking the network.
    """
    path = Path(name)
    if path.exists():
        return
    where = "" if name.startswith("/") else f" in {Path.cwd()}"
    if name.count("/") != 1 or is_path_like(name):
        raise UserError(
            f"{name} does not exist{where}: give a run, a checkpoint or a model folder, or owner/name of a repository "
            "on the Hugging Face hub"
        )
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    if close := get_close_matches(path.name, siblings, n=1, cutoff=0.8):
        raise UserError(
            f"{name} does not exist{where}: did you mean {path.parent / close[0]}? To take {name} from the Hugging "
            f"Face hub, start in a folder without {path.parent}"
        )


def is_path_like(name: str) -> bool:
    """Return whether a name can only be meant as a path."""
    return name.startswith(("/", ".", "~", "runs/")) or name.count("/") > 1


def from_pretrained(kind: Any, name: str, **options: Any) -> Any:
    """Call `kind.from_pretrained` for a folder or repository; without a network, with what was downloaded earlier.

    Code beside the weights is never run: if that were left open, transformers would ask for permission at a terminal.

    Raises:
        UserError: there is no such folder, or the repository is neither in the cache nor can be downloaded.
    """
    options = {**options, "trust_remote_code": False}
    if is_path_like(name) and not Path(name).exists():
        raise UserError(f"{name} does not exist")
    if not Path(name).exists() and hub_problem() is not None:
        options["local_files_only"] = True
    from transformers import AutoTokenizer, PretrainedConfig

    try:
        if kind is not AutoTokenizer:
            is_local = options.get("local_files_only", False)
            check_no_remote_kernels(PretrainedConfig.get_config_dict(name, local_files_only=is_local)[0], name)
        return kind.from_pretrained(name, **options)
    except OSError as error:
        if "local_files_only" not in options or Path(name).exists():
            raise
        from huggingface_hub import try_to_load_from_cache  # imported here, as everywhere: many commands use no hub

        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            raise UserError(f"{first_line(error)} ({hub_problem()})") from error
        raise UserError(
            f"{name} is neither a folder in {Path.cwd()} nor in the cache of the Hugging Face hub, and {hub_problem()}"
        ) from error


def check_no_remote_kernels(config: Mapping[str, Any], place: str) -> None:
    """Refuse a model's configuration that makes transformers download and run compiled code, or use another loader.

    Raises:
        UserError: an attention or expert implementation from a repository, or a quantization.
    """
    for key, value in config.items():
        texts = value.values() if isinstance(value, Mapping) else [value]
        if str(key).strip("_").startswith(("attn_implementation", "experts_implementation")) and any(
            "/" in str(text) for text in texts
        ):
            raise UserError(f"{place}: {key}={value!r} names code of a repository, which is not run: remove it")
        if key == "quantization_config" and value:
            raise UserError(f"{place}: quantization_config is not supported: give the weights that were not quantized")
        if isinstance(value, Mapping):
            check_no_remote_kernels(value, place)


@cache
def hub_problem() -> str | None:
    """Return why the hub cannot be used, None if it answers."""
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE"):
            return f"{variable} is set"
    return connection_problem(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), seconds=5.0)
