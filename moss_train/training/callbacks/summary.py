"""Write `summary.md`: a one-page overview of the run with its curves."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from moss_train.data.stream.sample_reader import StreamCounter
from moss_train.plotting import Curve, Panel, save_curves
from moss_train.training.callbacks.run_records import ENVIRONMENT_FILE, SKIPPED_FILE
from moss_train.training.loggers.base import clock, iterate_table, read_table
from moss_train.training.module import CatModule, cat_module
from moss_train.training.step.objective import SCORES
from moss_train.utils.checkpoint import read_best
from moss_train.utils.files import atomic_write, markdown_table, parse_json, read_json, warn

POINTS = 400
NOT_SHOWN = ("loss/generator", "loss/commitment")  # the sum; the commitment term has the codebook term's value
ADVERSARIAL = ("loss/discriminators", "loss/adversarial", "loss/feature")
NORMS = ("gradient_norm/generator", "gradient_norm/discriminators")
TIMES = ("update_seconds", "data_wait_seconds", "callback_seconds", "checkpoint_seconds", "audio_seconds")


@dataclass
class TrainingHistory:
    """Means over ranges of updates, and sums over the whole run."""

    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    stages: dict[str, int] = field(default_factory=dict)  # name -> first update
    bins: dict[str, dict[int, tuple[float, int]]] = field(default_factory=lambda: defaultdict(dict))
    bin_size: int = 1

    def curves(self, names: Iterable[str]) -> list[Curve]:
        """Return the named columns as curves; columns without values are dropped."""
        curves = []
        for name in names:
            points = self.bins.get(name, {})
            places = [(number + 0.5) * self.bin_size for number in points]
            if points:
                curves.append(Curve(name.partition("/")[2], places, [total / n for total, n in points.values()]))
        return curves


def read_history(rows: Iterable[Mapping[str, str]], updates: int) -> TrainingHistory:
    """Read the rows of `metrics.csv`, one at a time, of a run that has done `updates` updates."""
    history = TrainingHistory(bin_size=max(1, updates // POINTS))
    for row in rows:
        losses = [name for name in row if name.startswith("loss/") and name not in NOT_SHOWN]
        update = int(row["update"])
        history.stages.setdefault(row["stage"], update)
        for name in (*losses, *SCORES, *NORMS):
            if row.get(name):
                total, count = history.bins[name].get(update // history.bin_size, (0.0, 0))
                history.bins[name][update // history.bin_size] = (total + float(row[name]), count + 1)
        for name in TIMES:
            history.sums[name] += float(row.get(name) or 0)
    return history


def panels(
    history: TrainingHistory, validation: Sequence[Mapping[str, str]], codebooks: Sequence[Mapping[str, str]]
) -> list[Panel]:
    """Return the panels that give a first overview of a run; those without values are dropped."""
    mel = [held_out_curve(validation, name, label) for name, label in depth_labels(validation).items()]
    text = [
        held_out_curve(validation, name, label)
        for name, label in (("text_lm_loss", "given the audio"), ("text_lm_loss_no_audio", "without the audio"))
        if validation and validation[0].get(name)
    ]
    use = [held_out_curve(codebooks, "mean_usage", "codes in use")] if codebooks else []
    losses = [name for name in history.bins if name.startswith("loss/") and name not in ADVERSARIAL]
    wanted = [
        Panel("training losses", history.curves(losses), logarithmic=True),
        Panel("held out: mel distance", mel, dots=True),
        Panel("adversarial losses", history.curves(ADVERSARIAL)),
        Panel("held out: LM cross entropy (nats per token)", text, dots=True),
        Panel("mean score of the discriminators", history.curves(SCORES)),
        Panel("gradient norms before clipping", history.curves(NORMS), logarithmic=True),
        Panel("use of the codebooks, mean over levels", use, dots=len(codebooks) < 40),
    ]
    return [panel for panel in wanted if panel.curves]


def depth_labels(rows: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Map the columns of `validation.csv` with the mel distance at a depth, over all domains, to labels of curves."""
    columns = [name.rpartition("/") for name in (rows[0] if rows else ())]
    counts = [count for group, _, count in columns if group == "mel_distance"]
    return {f"mel_distance/{count}": f"{count} level" if count == "1" else f"{count} levels" for count in counts}


def held_out_curve(rows: Sequence[Mapping[str, str]], name: str, label: str) -> Curve:
    """Return one column of a table as a curve."""
    kept = [row for row in rows if row.get(name)]
    return Curve(label, [int(row["update"]) for row in kept], [float(row[name]) for row in kept])


SUMMARY_FILE = "summary.md"
PICTURE_FILE = "summary.png"


class Summary(Callback):
    """Writes the summary whenever training ends, finished or stopped."""

    def __init__(self, directory: Path, counter: StreamCounter) -> None:
        self.directory = directory
        self.counter = counter

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        try:
            write_summary(self.directory, cat_module(pl_module), self.counter.hours)
        except Exception as error:  # not fatal: the checkpoint exists, and a job may still have to be requeued
            warn(f"{SUMMARY_FILE} could not be written: {type(error).__name__}: {error}")


def write_summary(directory: Path, module: CatModule, hours: Mapping[str, float]) -> None:
    """Write `summary.md`, and its figure if matplotlib is installed."""
    updates = module.schedule.updates
    history = read_history(iterate_table(directory / "metrics.csv"), module.update)
    validation, codebooks = (read_table(directory / f"{name}.csv") for name in ("validation", "codebooks"))
    name = f"{directory.parent.name}/{directory.name}"
    picture = (
        'Loss curves: none, matplotlib is not installed (`pip install "moss_train[eval]"`); the numbers are in '
        "metrics.csv."
    )
    if find_spec("matplotlib") is not None and (drawn := panels(history, validation, codebooks)):
        with atomic_write(directory / PICTURE_FILE) as path:
            save_curves(drawn, path, f"{name}, {module.update} updates", history.stages)
        picture = f"![Curves of the run]({PICTURE_FILE})"
    state = "Finished" if module.update >= updates else "Stopped"
    lines = [f"# {name}", "", f"{state} at update {module.update} of {updates}.", ""]
    lines += [*overview_table(directory, history, hours), "", picture, "", *validation_table(validation)]
    lines += [*codebook_lines(codebooks), *warnings_section(directory)]
    with atomic_write(directory / SUMMARY_FILE) as path:
        path.write_text("\n".join(lines).rstrip() + "\n", "utf-8")


def overview_table(directory: Path, history: TrainingHistory, hours: Mapping[str, float]) -> list[str]:
    """Return a table of time, audio, machine and checkpoints."""
    sums = history.sums
    busy = max(sums["update_seconds"], 1e-9)
    stages = ", ".join(f"{name} from {first}" for name, first in history.stages.items())
    audio = ", ".join(f"{domain} {count:.2f} h" for domain, count in hours.items())
    best = read_best(directory / "checkpoints")
    try:  # the last start's hardware and versions
        starts = read_json(directory / ENVIRONMENT_FILE)["starts"]
        last: dict[str, Any] = starts[-1]
        hardware = f"{len(last['gpus'])} x {last['gpus'][0]}" if last["gpus"] else f"{last['cpus']} CPUs, {last['cpu']}"
        versions = ", ".join(f"{name} {last['versions'][name]}" for name in ("torch", "lightning", "moss_train"))
        machine = f"{hardware}; processes: {last['processes']}, starts: {len(starts)}; {versions}"
    except (OSError, ValueError, KeyError):
        machine = "unknown"
    rows = {
        "stages, by their first update": stages or "none",
        "time in updates": f"{clock(busy)} ({busy:.0f} s), {sums['data_wait_seconds'] / busy:.1%} waiting for data",
        "time between updates": f"{sums['callback_seconds']:.0f} s (validation, samples, checkpoints), "
        f"{sums['checkpoint_seconds']:.0f} s of it for checkpoints",
        "audio used": f"{audio}; {sums['audio_seconds'] / busy:.1f} audio-s/s",
        "machine": machine,
        "best checkpoint": "none" if best is None else f"{best.name} ({best.metric} {best.value:.4g})",
    }
    return markdown_table(("", ""), rows.items())


def validation_table(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the scores on held-out audio: at most twelve rows, first and last among them."""
    if not rows:
        return ["No validation: `validation.data` was not set.", ""]
    text = [name for name in ("text_lm_loss", "text_lm_loss_no_audio", "text_accuracy") if rows[0].get(name)]
    depths = depth_labels(rows)
    names = (*depths, *text)
    titles = ["update", *(f"mel, {label}" for label in depths.values()), *(name.replace("_", " ") for name in text)]
    places = sorted({round(i * (len(rows) - 1) / 11) for i in range(12)})
    cells = [
        [rows[place]["update"], *(f"{float(rows[place][name]):.3f}" if rows[place][name] else "" for name in names)]
        for place in places
    ]
    lines = [f"## Held out: {float(rows[-1]['clips']):.0f} clips", "", *markdown_table(titles, cells)]
    if text:
        lines += ["", "text lm loss: cross entropy in nats per text token, given the audio and without it."]
    return [*lines, ""]


def codebook_lines(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Return a line about the use of the codebooks in the last row that has any."""
    rows = [row for row in rows if row["mean_usage"]]  # rows without clips have none
    if not rows:
        return []
    last = rows[-1]
    usage = [float(last[name]) for name in last if name.startswith("usage/")]
    well = sum(value >= 0.8 for value in usage)
    return [
        f"Codebooks at update {last['update']}: {well} of {len(usage)} levels use 80 % of their codes or more; mean "
        f"usage {float(last['mean_usage']):.1%}, mean perplexity {float(last['mean_perplexity']):.1f} over "
        f"{float(last['frames']):.0f} frames.",
        "",
    ]


def warnings_section(directory: Path) -> list[str]:
    """Return the warnings and skipped updates."""
    warnings, skipped = directory / "warnings.txt", directory / SKIPPED_FILE
    found = warnings.read_text("utf-8", errors="replace").splitlines() if warnings.exists() else []
    lines = [f"- {line}" for line in found]
    if skipped.exists():
        numbers = set()
        for line in skipped.read_text("utf-8", errors="replace").splitlines():
            with suppress(ValueError, KeyError, TypeError):  # a full disk may have cut it short
                numbers.add(int(parse_json(line, skipped.name)["update"]))
        lines.append(
            f"- {len(numbers)} updates skipped as not finite, samples in {SKIPPED_FILE}: {sorted(numbers)[:10]}"
        )
    return ["## Warnings", "", *(lines or ["None."])]
