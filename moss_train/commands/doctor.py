"""`doctor`: check machine and installation before a long run, and say what to do about each problem."""

import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moss_train.config.schema import DoctorConfig
from moss_train.utils.errors import first_line
from moss_train.utils.files import package_version
from moss_train.utils.memory import memory

SUMMARY = "Check the environment: versions, devices, memory, disk, audio formats."

# Distribution -> module to import. All of them are needed; the order is that of the table.
CORE_PACKAGES = {
    "torch": "torch",
    "torchaudio": "torchaudio",
    "lightning": "lightning",
    "pytorch-lightning": "pytorch_lightning",
    "transformers": "transformers",
    "hydra-core": "hydra",
    "omegaconf": "omegaconf",
    "webdataset": "webdataset",
    "auraloss": "auraloss",
    "safetensors": "safetensors",
    "soundfile": "soundfile",
    "wandb": "wandb",
    "numpy": "numpy",
    "rich": "rich",
}
INSTALL_LOCK = "install the versions of requirements.lock (in a checkout: bash tools/setup.sh)"
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One row of the report; `advice` is one sentence on what to do, `broken` means that nothing works without it."""

    subject: str
    found: str
    advice: str | None = None
    broken: bool = False


def run(config: DoctorConfig) -> int:
    """Print the report and return the exit status: 0 when everything that is needed works, 1 otherwise.

    Args:
        config: `run_dir` (path, need not exist) and `min_free_disk_gb` (10^9 bytes).
    """
    findings = list(examine(Path(config.run_dir), float(config.min_free_disk_gb) * 1e9))
    show(findings, Console())
    return int(any(finding.broken for finding in findings))


def examine(run_directory: Path, min_free_disk_bytes: float) -> Iterator[Finding]:
    """Yield every finding; a package that cannot be imported is a finding, not an error."""
    yield Finding("Python", f"{platform.python_version()} ({sys.executable})")
    yield Finding("platform", platform.platform())
    for distribution, module in CORE_PACKAGES.items():
        yield package_finding(distribution, module)
    yield from device_findings()
    yield Finding("CPU cores", f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}")
    ram = memory()
    yield Finding("memory", f"{ram.available / GIB:.1f} GiB available of {ram.total / GIB:.1f} GiB")
    yield from disk_findings(run_directory, min_free_disk_bytes)
    yield audio_format_finding()
    attention = []
    if not isinstance(try_import("flash_attn"), Exception):
        attention.append(f"flash_attn {package_version('flash-attn')}")
    if hasattr(try_import("torch.nn.attention.varlen"), "varlen_attn"):
        attention.append("built into torch")
    yield Finding("FlashAttention", ", ".join(attention) or "none: attention runs through torch's other kernels")
    for distribution in ("matplotlib", "pystoi"):
        imported = try_import(distribution)
        if isinstance(imported, Exception):
            advice = "install the extra: pip install 'moss_train[eval]'"
            yield Finding(f"{distribution} (eval)", describe(imported), advice)
        else:
            yield Finding(f"{distribution} (eval)", package_version(distribution) or "unknown version")


def show(findings: list[Finding], console: Console) -> None:
    """Print the findings as a table and below it one line for each problem and what to do."""
    table = Table("", "subject", "found", box=None, pad_edge=False)
    for finding in findings:
        mark = "[red]broken[/]" if finding.broken else "[yellow]advice[/]" if finding.advice else "[green]ok[/]"
        table.add_row(mark, escape(finding.subject), escape(finding.found))
    console.print(table)
    for finding in findings:
        if finding.advice is not None:
            console.print(f"{finding.subject}: {finding.advice}", markup=False, highlight=False, soft_wrap=True)
    if not any(finding.broken for finding in findings):
        console.print("Everything that is needed works.")


def try_import(module: str) -> ModuleType | Exception:
    """Import a module; return the exception, of whatever kind, if it cannot be imported.

    A binary package can fail with OSError (a missing library) or RuntimeError (built for another torch) as well as
    with ImportError, and none of them may end the check.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:
        return error


def describe(error: Exception) -> str:
    """Return the kind of an error and the first line of its message."""
    return f"{type(error).__name__}: {first_line(error)}"


def package_finding(distribution: str, module: str) -> Finding:
    """Check that a core package can be imported and that its version is one that moss_train declares."""
    imported = try_import(module)
    version = package_version(distribution)
    if isinstance(imported, ModuleNotFoundError) and version is None:
        return Finding(distribution, "not installed", INSTALL_LOCK, broken=True)
    if isinstance(imported, Exception):
        advice = INSTALL_LOCK
        if distribution == "torchaudio":
            advice = (
                f"torch {package_version('torch')} and torchaudio {version} do not fit together, most likely because "
                f"they are built for different CUDA releases: {INSTALL_LOCK}"
            )
        elif distribution == "soundfile":
            advice = f"libsndfile cannot be loaded; the soundfile wheel brings it: {INSTALL_LOCK}"
        return Finding(distribution, f"{version}: {describe(imported)}", advice, broken=True)
    wanted = declared_versions(distribution)
    if wanted is not None and version is not None and not wanted.contains(version, prereleases=True):
        return Finding(distribution, version, f"moss_train needs {distribution}{wanted}: {INSTALL_LOCK}", broken=True)
    return Finding(distribution, version or "unknown version")


def declared_versions(distribution: str) -> Any:
    """Return the versions (a SpecifierSet) that moss_train's own metadata allows, None where it does not say."""
    from packaging.requirements import Requirement

    try:
        declared = importlib.metadata.requires("moss_train") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    requirements = (Requirement(text) for text in declared)
    return next((r.specifier for r in requirements if r.name == distribution and r.marker is None), None)


def device_findings() -> Iterator[Finding]:
    """Report the CUDA release that torch is built for and the capability and memory of each device it can use."""
    torch = try_import("torch")
    if isinstance(torch, Exception):
        return
    cuda = torch.version.cuda
    build = f"CUDA {cuda}" if cuda else "CPU only"
    if not torch.cuda.is_available():
        advice = None
        if Path("/proc/driver/nvidia/version").exists():
            advice = (
                f"torch cannot use the NVIDIA driver: update it to one for CUDA {cuda}, or see nvidia-smi"
                if cuda
                else "this machine has an NVIDIA driver and this torch is built without CUDA: install the torch build "
                "for CUDA"
            )
        yield Finding("torch build", f"{build}; no CUDA device, so everything runs on the CPU", advice)
        return
    yield Finding("torch build", build)
    for device in range(torch.cuda.device_count()):
        subject = f"cuda:{device}"
        try:
            major, minor = torch.cuda.get_device_capability(device)
            available, total = torch.cuda.mem_get_info(device)  # other processes' use included
        except RuntimeError as error:
            advice = "the device does not answer: look at nvidia-smi"
            yield Finding(subject, describe(error), advice, broken=True)
            continue
        sizes = f"{available / GIB:.1f} GiB free of {total / GIB:.1f} GiB"
        yield Finding(subject, f"{torch.cuda.get_device_name(device)}, capability {major}.{minor}, {sizes}")


def disk_findings(run_directory: Path, min_free_bytes: float) -> Iterator[Finding]:
    """Report the free disk for runs and for temporary files, and whether these are on one file system."""

    def free_disk(subject: str, directory: Path, remedy: str, note: str = "") -> Finding:
        free = shutil.disk_usage(directory).free
        advice = f"less than {min_free_bytes / 1e9:.0f} GB free: {remedy}" if free < min_free_bytes else None
        return Finding(subject, f"{directory}: {free / 1e9:.0f} GB free{note}", advice)

    runs, temporary = nearest_directory(run_directory), Path(tempfile.gettempdir())
    if not os.access(runs, os.W_OK | os.X_OK):
        advice = "no permission to write there: name another one, run_dir=PATH"
        yield Finding("run directory", str(runs), advice, broken=True)
    else:
        yield free_disk("run directory", runs, "name a larger disk, run_dir=PATH")
    same = os.stat(runs).st_dev == os.stat(temporary).st_dev
    note = f", {'the same' if same else 'another'} file system as the run directory"
    yield free_disk("temporary files", temporary, "set TMPDIR to a larger disk", note)


def nearest_directory(path: Path) -> Path:
    """Return the path itself or the closest directory above it that exists."""
    path = path.absolute()
    return next(directory for directory in (path, *path.parents) if directory.is_dir())


def audio_format_finding() -> Finding:
    """Report libsndfile's version and whether it reads FLAC, Opus and MP3."""
    soundfile = try_import("soundfile")
    if isinstance(soundfile, Exception):
        return Finding("audio formats", "unknown, as soundfile cannot be imported")
    formats = soundfile.available_formats()
    supported = {
        "FLAC": "FLAC" in formats,
        "Opus": "OGG" in formats and "OPUS" in soundfile.available_subtypes("OGG"),
        "MP3": "MP3" in formats,
    }
    readable = ["WAV", *(name for name, there in supported.items() if there)]
    missing = [name for name, there in supported.items() if not there]
    advice = f"no {' and '.join(missing)}: install libsndfile 1.1 or newer" if missing else None
    return Finding("audio formats", f"libsndfile {soundfile.__libsndfile_version__}: {', '.join(readable)}", advice)
