"""Warn when a run goes wrong, once per occurrence, and say what to do."""

import statistics
from collections import defaultdict, deque
from pathlib import Path

from moss_train.config.fit_schema import HealthConfig
from moss_train.training.loggers.base import Row, Writer
from moss_train.utils.files import atomic_write, warn

SHARE = "gradient_share/"
MEASURED_SHARES = 5  # consecutive measurements that all have to be too small
CALM = 10
"""Number of checks in which a condition has to be false before it can cause another warning (hysteresis)."""


class HealthMonitor(Writer):
    """Checks log rows as they are written; prints warnings and appends them to `warnings.txt` in the run directory."""

    def __init__(self, directory: Path, limits: HealthConfig, codebook_size: int) -> None:
        self.path = directory / "warnings.txt"
        self.limits = limits
        self.codebook_size = codebook_size
        self.calm: dict[str, int] = {}  # condition that was true -> checks since then
        self.rows: deque[Row] = deque(maxlen=limits.window_updates)
        self.interval: dict[str, float] = defaultdict(float)  # updates and seconds since the last checked checkpoint
        self.shares: deque[Row] = deque(maxlen=MEASURED_SHARES)

    def start(self, update: int) -> None:
        """Delete the warnings about updates that are about to be repeated."""
        if self.path.exists():
            kept = []
            for line in self.path.read_text("utf-8", errors="replace").splitlines():
                number = line.removeprefix("update ").partition(":")[0]
                if not number.isdigit() or int(number) <= update:
                    kept.append(f"{line}\n")
            with atomic_write(self.path) as path:
                path.write_text("".join(kept), "utf-8")

    def _check(self, condition: str, is_true: bool, message: str) -> None:
        """Warn when a condition becomes true, and again only after it was false for `CALM` checks."""
        if is_true and self.calm.get(condition, CALM) >= CALM:
            warn(message)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(message + "\n")
        if is_true:
            self.calm[condition] = 0
        elif condition in self.calm:
            self.calm[condition] += 1

    def write(self, table: str, row: Row) -> None:
        """Check a row."""
        if table == "codebooks":
            self._check_codebooks(row)
        if table != "metrics":
            return
        self.rows.append(row)
        if any(name.startswith(SHARE) for name in row):
            self.shares.append(row)
            self._check_shares(row["update"])
        self._check_checkpoints(row)
        if row["update"] % max(1, self.limits.window_updates // 10) == 0 and len(self.rows) == self.rows.maxlen:
            self._check_discriminators(row["update"])
            self._check_gradients(row["update"])
            self._check_data(row["update"])

    def _check_codebooks(self, row: Row) -> None:
        if row["update"] <= self.limits.ignore_first_updates or row.get("frames", 0) < 4 * self.codebook_size:
            return
        least = self.limits.min_codebook_use * self.codebook_size
        levels = {name.partition("/")[2]: row[name] for name in row if name.startswith("perplexity/")}
        poor = {level: value for level, value in levels.items() if value < least}
        named = ", ".join(f"{level} ({value:.1f})" for level, value in list(poor.items())[:8])
        self._check(
            "codebooks",
            bool(poor),
            f"update {row['update']}: the codebooks of {len(poor)} of {len(levels)} levels have collapsed, level "
            f"(perplexity of {self.codebook_size}) {named}: lower the learning rate, raise "
            "objective.weights.codebook, and see whether the training audio is silent (`moss_train inspect`)",
        )

    def _check_discriminators(self, update: int) -> None:
        # Not during their warm-up.
        rows = [row for row in self.rows if "loss/adversarial" in row]
        margins = [row["discriminator_score/real"] - row["discriminator_score/generated"] for row in rows]
        if len(margins) < len(self.rows):
            return
        margin, count = statistics.fmean(margins), len(margins)
        self._check(
            "discriminators win",
            margin > self.limits.max_discriminator_margin,
            f"update {update}: the discriminators tell real from generated audio almost perfectly (mean margin "
            f"{margin:.2f} over {count} updates), which teaches little: lower discriminator_learning_rate, "
            "raise discriminator_every, or raise the weight of `feature` (of the stage, if it sets one)",
        )
        self._check(
            "discriminators lose",
            margin < self.limits.min_discriminator_margin,
            f"update {update}: the discriminators cannot tell real from generated audio (mean margin {margin:.2f} "
            f"over {count} updates), so their losses only add noise: unless it is "
            "set already, train with objective.discriminator_unit_rms=true objective.discriminator_pre_emphasis=0.97, "
            "or give them more channels or a longer objective.discriminator_crop_seconds, or raise "
            "discriminator_learning_rate",
        )

    def _check_shares(self, update: int) -> None:
        """Warn about a term that has a weight but almost no share of the gradient: it trains nothing."""
        names = [name.removeprefix(SHARE) for name in self.shares[-1] if name.startswith(SHARE)]
        for name in names:
            shares = [row.get(SHARE + name, 1.0) for row in self.shares if row.get(f"weighted/{name}")]
            self._check(
                f"share of {name}",
                len(shares) == MEASURED_SHARES and max(shares) < self.limits.min_gradient_share,
                f"update {update}: {name} has {statistics.fmean(shares or [1.0]):.2%} of the gradient at the decoder's "
                f"output, too little to change anything: raise its weight, objective.weights.{name} or "
                "that of the stage if it sets one, or set objective.balance",
            )

    def _check_gradients(self, update: int) -> None:
        quarter = self.limits.window_updates // 4
        rows = list(self.rows)
        for side in ("generator", "discriminators"):
            name = f"gradient_norm/{side}"  # discriminators: only in every n-th row, and none before their stage
            first, earlier, recent = (
                [row[name] for row in part if name in row]
                for part in (rows[:quarter], rows[: len(rows) - quarter], rows[len(rows) - quarter :])
            )
            if not first or not recent:
                continue
            before, now = statistics.median(earlier), statistics.median(recent)
            self._check(
                f"gradients of {side}",
                now > self.limits.max_gradient_growth * before,
                f"update {update}: gradients of the {side} explode, norm {now:.3g} after {before:.3g}: lower the "
                "learning rate, lengthen warmup_updates, or go back to an earlier checkpoint",
            )

    def _check_data(self, update: int) -> None:
        waited = sum(row["data_wait_seconds"] for row in self.rows)
        total = sum(row["update_seconds"] for row in self.rows)
        share = waited / total if total else 0.0
        self._check(
            "data",
            share > self.limits.max_data_wait,
            f"update {update}: {share:.0%} of the time is spent waiting for data: raise data.num_workers, or move "
            "the shards to a faster disk",
        )

    def _check_checkpoints(self, row: Row) -> None:
        seconds, interval = row["checkpoint_seconds"], self.interval
        if interval["updates"]:  # the one at the start has no updates before it
            interval["checkpoint_seconds"] += seconds
        if seconds and interval["updates"] >= self.limits.window_updates:
            share = interval["checkpoint_seconds"] / (interval["checkpoint_seconds"] + interval["update_seconds"])
            self._check(
                "checkpoints",
                share > self.limits.max_checkpoint_time,
                f"update {row['update'] - 1}: {share:.0%} of the time is spent writing checkpoints, {seconds:.1f} "
                "s for the last one: raise checkpoint.every_updates, or put run_dir on a faster disk",
            )
            interval.clear()
        interval["updates"] += 1
        interval["update_seconds"] += row["update_seconds"]
