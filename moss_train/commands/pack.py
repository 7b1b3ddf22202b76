"""`pack`: turn audio files into shards."""

import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moss_train.config.schema import PackConfig
from moss_train.data.pack.list_formats import MANIFEST_SUFFIXES
from moss_train.data.pack.manifest import how_to_convert, list_clips, read_drop_list
from moss_train.data.pack.pack import PackReport, check_target, pack
from moss_train.data.pack.preprocess import SILENT
from moss_train.data.pack.resume import JOURNAL_FILE, unfinished_folder
from moss_train.utils.errors import count_faults
from moss_train.utils.files import pluralize, printable
from moss_train.utils.progress import progress

SUMMARY = (
    "Pack a folder of audio, a manifest, a Kaldi folder or a saved dataset into shards for training and evaluation."
)

_REASONS = {
    "too short": "shorter than min_seconds",
    "too long": "longer than max_seconds",
    "silent": "quieter than min_level_db",
    "dropped": "named in the drop list",
}


def run(config: PackConfig) -> int:
    """Pack `input` into `out`, show progress and print what was packed."""
    target = Path(config.out)
    check_target(target, config.overwrite)
    drop = read_drop_list(Path(config.drop)) if config.drop else frozenset()
    sources = list_clips(Path(config.input), config.domain)
    seconds_done, begin = 0.0, time.monotonic()
    try:
        with progress("packing", total=len(sources.clips)) as bar:

            def on_clip(seconds: float) -> None:
                nonlocal seconds_done
                seconds_done += seconds
                speed = seconds_done / max(time.monotonic() - begin, 1e-3)
                bar.advance(note=f"{seconds_done / 3600:.2f} h of audio, {speed / 3600:.3f} h/s")

            report = pack(sources, config, drop=drop, on_clip=on_clip)
    except BaseException:
        folder = unfinished_folder(target)
        if (folder / JOURNAL_FILE).exists():
            print(f"finished shards are kept in {folder}; the same command resumes after them", file=sys.stderr)
        raise
    _print_report(report, config.out)
    if (missing := len(drop) - report.skipped.get("dropped", 0)) > 0:
        print(printable(f"drop={config.drop}: {missing} ids are not in {config.input}"))
    return 0


def _print_report(report: PackReport, out: str) -> None:
    console = Console()
    console.print(_totals_table(report.index["totals"]))
    num_bytes = sum(shard["bytes"] for shard in report.index["shards"])
    clips, shards = pluralize(report.index["num_samples"], "clip"), pluralize(len(report.index["shards"]), "shard")
    notes = [f"{out}: {clips} in {shards}, {num_bytes:,} bytes"]
    if report.num_resumed:
        notes.append(f"reused from an earlier attempt: {pluralize(report.num_resumed, 'shard')}")
    notes += [f"skipped: {pluralize(count, 'clip')} {_REASONS[kind]}" for kind, count in sorted(report.skipped.items())]
    if report.invalid:
        number, kinds = pluralize(len(report.invalid), "clip"), count_faults(report.invalid)
        notes.append(f"skipped: {number} that cannot be used ({kinds}), among them:")
        notes += [f"  {bad.reason}" for bad in report.invalid[:5]]
    notes += [f"packed: {pluralize(count, 'clip')} {remark}" for remark, count in sorted(report.remarks.items())]
    if report.remarks.get(SILENT) == report.index["num_samples"]:
        notes.append("warning: every clip is digital silence; nothing can be learned from them")
    if report.ignored:
        ignored = ", ".join(f"{name} ({count})" for name, count in sorted(report.ignored.items()))
        notes.append(f"without effect (file suffixes or manifest keys): {ignored}")
    if advice := how_to_convert(report.ignored):
        notes.append(f"phone and browser formats are not read{advice}")
    if any(suffix in report.ignored for suffix in MANIFEST_SUFFIXES):
        notes.append("texts and other labels are read of a manifest only: give it as input instead of its folder")
    console.print(printable("\n".join(notes)), markup=False, highlight=False, soft_wrap=True)


def _totals_table(totals: dict) -> Table:
    table = Table("", "", "clips", "with text", "hours")
    for kind, groups in totals.items():
        if kind != "domain" and set(groups) == {"none"}:
            continue
        for number, (name, group) in enumerate(groups.items()):
            figures = (f"{group['clips']:,}", f"{group['with_text']:,}", f"{group['hours']:.3f}")
            table.add_row("" if number else kind, Text(printable(name)), *figures)
        table.add_section()
    return table
