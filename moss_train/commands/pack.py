"""`pack`: audio files into shards."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from moss_train.data.manifest import list_clips
from moss_train.data.packing import PackOptions, PackReport, check_target, pack
from moss_train.utils.progress import progress

SUMMARY = "Pack a folder of audio or a JSONL manifest into shards for training and evaluation"

_NUM_BAD_SHOWN = 5


def run(config: dict) -> int:
    """Pack `input` into `out`, show progress and print what was packed."""
    names = ("sampling_rate", "num_channels", "min_seconds", "shard_bytes", "max_bad_share")
    options = PackOptions(**{name: config[name] for name in names})
    target = Path(config["out"]).expanduser()
    check_target(target, config["overwrite"])
    sources = list_clips(Path(config["input"]).expanduser(), config["domain"])
    seconds_done = 0.0
    with progress("packing", total=len(sources.clips)) as bar:

        def on_clip(seconds: float) -> None:
            nonlocal seconds_done
            seconds_done += seconds
            bar.advance(note=f"{seconds_done / 3600:.2f} h of audio")

        report = pack(sources, target, options, overwrite=config["overwrite"], on_clip=on_clip)
    _print_report(report, config["out"])
    return 0


def _print_report(report: PackReport, out: str) -> None:
    console = Console()
    console.print(_totals_table(report.index["totals"]))
    num_bytes = sum(shard["bytes"] for shard in report.index["shards"])
    notes = [f"{out}: {report.index['num_samples']} clips in {len(report.index['shards'])} shards, {num_bytes:,} bytes"]
    if report.too_short:
        notes.append(f"left out: {report.too_short} clips shorter than min_seconds")
    if report.bad:
        notes.append(f"left out: {len(report.bad)} files that could not be read, among them:")
        notes += [f"  {reason}" for _, reason in report.bad[:_NUM_BAD_SHOWN]]
    if report.ignored:
        ignored = ", ".join(f"{name} ({count})" for name, count in sorted(report.ignored.items()))
        notes.append(f"without effect (file suffixes or manifest keys): {ignored}")
    console.print("\n".join(notes), markup=False, highlight=False, soft_wrap=True)


def _totals_table(totals: dict) -> Table:
    table = Table("", "", "clips", "with text", "hours")
    for kind, groups in totals.items():
        for name, group in groups.items():
            table.add_row(kind, name, f"{group['clips']:,}", f"{group['with_text']:,}", f"{group['hours']:.3f}")
        table.add_section()
    return table
