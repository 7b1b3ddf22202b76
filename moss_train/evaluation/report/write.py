"""Write tables, codebook statistics, comparisons and the report from the rows of an evaluation."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from moss_train.evaluation.codecs.base import Codec
from moss_train.evaluation.metrics.base import SPEECH, Column, Metric, columns_of
from moss_train.evaluation.metrics.codes import (
    RELIABLE_FRAMES,
    CodebookUsage,
    codebook_usage,
    count_codes,
    effective_bitrate,
)
from moss_train.evaluation.metrics.signal import Profile
from moss_train.evaluation.reconstruct import ANCHORS, Condition
from moss_train.evaluation.report.html import write_report
from moss_train.evaluation.report.tables import (
    Table,
    codebook_csv,
    comma_separated,
    compare,
    load_evaluation,
    markdown,
)
from moss_train.evaluation.results import ClipRow, Results
from moss_train.evaluation.statistics import summarize
from moss_train.utils.files import atomic_write, package_version


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation."""

    rows: tuple[ClipRow, ...]
    conditions: tuple[Condition, ...]
    metrics: Mapping[str, Metric]
    missing: Mapping[str, str]  # metrics that were asked for and are not available, with the reason
    results: Results
    profile: Profile
    codec: Codec | None = None

    @property
    def columns(self) -> tuple[Column, ...]:
        """Columns of the table."""
        return columns_of(self.metrics)

    def codebook_usage(self) -> list[CodebookUsage]:
        """Return the statistics of the codebooks over all clips; empty without a codec."""
        if self.codec is None:
            return []
        codes = (codes for row in self.rows if (codes := self.results.codes(row)) is not None)
        return codebook_usage(count_codes(codes, self.codec.codebook_sizes))


def write_outputs(evaluation: Evaluation, policy: str, seed: int, others: Sequence[str]) -> str:
    """Write every output of an evaluation beside its rows; returns the table as Markdown."""
    folder = evaluation.results.folder
    levels = evaluation.codebook_usage()
    table = make_table(evaluation, levels, policy, seed)
    loaded = [load_evaluation(Path(other).expanduser()) for other in others]
    comparisons = [compare(evaluation.rows, evaluation.conditions, evaluation.metrics, other) for other in loaded]
    text = markdown(table) + "".join(comparison.markdown() for comparison in comparisons)
    files = {"table.md": text, "table.csv": comma_separated(table)}
    if levels:
        files["codebook.csv"] = codebook_csv(levels)
    results = {
        "schema_version": 1,
        "title": table.title,
        "profile": asdict(evaluation.profile),
        "versions": {name: package_version(name) for name in ("moss_train", "torch", "torchaudio")},
        "metrics": {name: metric.description for name, metric in evaluation.metrics.items()},
        "missing": dict(evaluation.missing),
        "conditions": [asdict(condition) for condition in evaluation.conditions],
        "effective_bitrates": table.effective_bitrates,
        "rows": [asdict(row) for row in table.rows],
        "codebooks": [asdict(level) for level in levels],
        "comparisons": [asdict(comparison) for comparison in comparisons],
        "footnotes": table.footnotes,
        "times": asdict(evaluation.results.times),
    }
    files["results.json"] = json.dumps(results, indent=1) + "\n"
    for name, content in files.items():
        with atomic_write(folder / name) as path:
            path.write_text(content, encoding="utf-8")
    write_report(folder, table, evaluation.rows, levels, comparisons)
    return text


def make_table(evaluation: Evaluation, levels: Sequence[CodebookUsage], policy: str, seed: int) -> Table:
    """Return the table with effective bitrates, real-time factors and the footnotes that its numbers need."""
    conditions = evaluation.conditions
    rows = summarize(evaluation.rows, conditions, evaluation.columns, policy, seed)
    depths = [condition.num_quantizers for condition in conditions if condition.num_quantizers is not None]
    effective, speeds, name = {}, {}, evaluation.results.folder.name
    if (codec := evaluation.codec) is not None:
        name = codec.name
        effective = {depth: effective_bitrate(levels, codec.frame_rate, depth) for depth in depths}
        factors = {depth: evaluation.results.times.factor(depth) for depth in depths}
        speeds = {depth: factor for depth, factor in factors.items() if factor is not None}
    title = f"{name}, {evaluation.profile.name} profile"
    notes = tuple(footnotes(evaluation, levels, policy))
    return Table(title, evaluation.columns, tuple(rows), effective, speeds, notes)


def footnotes(evaluation: Evaluation, levels: Sequence[CodebookUsage], policy: str) -> list[str]:
    """Return what a reader has to know about the numbers: definitions, missing metrics, failures, too little data."""
    notes = [
        "Means over clips, every clip counted once; 95 % bootstrap intervals are in table.csv. "
        "References and reconstructions are 16-bit audio.",
        *(
            f"{', '.join(c.title for c in metric.columns)}: {metric.description}."
            for metric in evaluation.metrics.values()
        ),
        *(f"Not available: {name}: {reason}." for name, reason in evaluation.missing.items()),
    ]
    if evaluation.rows and all(row.domain != SPEECH for row in evaluation.rows):
        without = ", ".join(column.title for column in evaluation.columns if column.is_speech_only)
        if without:
            notes.append(f"{without}: only of clips of the domain {SPEECH}, of which there are none here.")
    if any(condition.system in ANCHORS for condition in evaluation.conditions):
        cut = " (WER orig. of the cut original)" if "recognition" in evaluation.metrics else ""
        notes.append(
            "resample-only: the originals at the codec's rate; mismatched: other clips of the domain, both cut to the "
            f"shorter{cut}."
        )
    unread = sum(row.failure is not None for row in evaluation.rows)
    counted = "left out of the means" if policy == "exclude" else "counted as the released evaluation code does"
    notes.append(
        f"valid/total: clips with every value, of all. Values that are missing are {counted}; {unread} clips not read."
    )
    frames = max((level.num_frames for level in levels), default=0)
    if levels and frames < RELIABLE_FRAMES:
        notes.append(f"Effective bitrates rest on {frames} frames; below {RELIABLE_FRAMES} they are too low.")
    return notes
