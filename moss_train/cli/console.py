"""What `encode` and `decode` share: their inputs and the lines at their end."""

import sys
from pathlib import Path

from moss_train.inference.files import Report
from moss_train.utils.files import pluralize

_SHOWN_FAILURES = 20


def print_report(report: Report, out: Path, verb: str, unit: str = "file") -> int:
    """Print the failures to stderr and the counts to stdout. Returns the exit status: 1 when anything failed.

    `unit` is what was written; what fails are clips.
    """
    for path, reason in report.failures[:_SHOWN_FAILURES]:
        text = reason if str(path) in reason else f"{path}: {reason}"
        print(f"moss_train {verb}: passed over: {text}", file=sys.stderr)
    if len(report.failures) > _SHOWN_FAILURES:
        print(f"moss_train {verb}: and {len(report.failures) - _SHOWN_FAILURES} more", file=sys.stderr)
    written, failed = pluralize(report.num_written, unit), pluralize(len(report.failures), "clip")
    print(f"{verb}: {written} written to {out}, {report.num_present} were there, {failed} failed")
    return 1 if report.failures else 0
