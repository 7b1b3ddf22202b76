"""The tables of a run, thinned for a picture: few points however long the run was."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from moss_train.evaluation.curves import Curve, Panel

POINTS = 400
LOSSES = ("loss/reconstruction", "loss/semantic", "loss/codebook")  # the commitment term has the codebook term's value
ADVERSARIAL = ("loss/discriminators", "loss/adversarial", "loss/feature")
VERDICTS = ("discriminator/real", "discriminator/generated")
NORMS = ("gradient_norm/generator", "gradient_norm/discriminators")
TIMES = ("update_seconds", "data_wait_seconds", "other_seconds", "checkpoint_seconds", "audio_seconds")


@dataclass
class Course:
    """Means over stretches of updates, and sums over the whole run."""

    num_updates: int = 0
    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    stages: dict[str, int] = field(default_factory=dict)  # name -> first update
    bins: dict[str, dict[int, tuple[float, int]]] = field(default_factory=lambda: defaultdict(dict))
    stretch: int = 1

    def curves(self, names: Iterable[str]) -> list[Curve]:
        """The named columns, those without any value left out."""
        curves = []
        for name in names:
            points = self.bins.get(name, {})
            places = [(number + 0.5) * self.stretch for number in points]
            if points:
                curves.append(Curve(name.partition("/")[2], places, [total / n for total, n in points.values()]))
        return curves


def follow(rows: Iterable[Mapping[str, str]], updates: int) -> Course:
    """Read the rows of `metrics.csv` of a run of so many updates, one at a time."""
    course = Course(stretch=max(1, updates // POINTS))
    columns = (*LOSSES, *ADVERSARIAL, *VERDICTS, *NORMS)
    for row in rows:
        update = int(row["update"])
        course.num_updates = update
        course.stages.setdefault(row["stage"], update)
        for name in columns:
            if row.get(name):
                total, count = course.bins[name].get(update // course.stretch, (0.0, 0))
                course.bins[name][update // course.stretch] = (total + float(row[name]), count + 1)
        for name in TIMES:
            course.sums[name] += float(row.get(name) or 0)
    return course


def panels(
    course: Course, validation: Sequence[Mapping[str, str]], codebooks: Sequence[Mapping[str, str]]
) -> list[Panel]:
    """What a person wants to see of a run first; subjects without values are left out."""
    depths = [name for name in (validation[0] if validation else ()) if is_depth(name)]
    mel = [held_out_curve(validation, name, depth_label(name)) for name in depths]
    text = [
        held_out_curve(validation, name, label)
        for name, label in (("text_nats", "hearing the clip"), ("text_nats_blind", "not hearing it"))
        if validation and validation[0].get(name)
    ]
    use = [held_out_curve(codebooks, "mean_usage", "codes in use")] if codebooks else []
    wanted = [
        Panel("training losses", course.curves(LOSSES), logarithmic=True),
        Panel("held out: mel distance", mel, dots=True),
        Panel("adversarial losses", course.curves(ADVERSARIAL)),
        Panel("held out: LM cross entropy (nats per token)", text, dots=True),
        Panel("mean verdict of the discriminators", course.curves(VERDICTS)),
        Panel("gradient norms before clipping", course.curves(NORMS), logarithmic=True),
        Panel("use of the codebooks, mean over levels", use, dots=len(codebooks) < 40),
    ]
    return [panel for panel in wanted if panel.curves]


def is_depth(name: str) -> bool:
    """Whether a column of `validation.csv` is the mel distance of a depth, all domains together."""
    return name.startswith("mel_distance/") and name.rpartition("/")[0] == "mel_distance"


def depth_label(name: str) -> str:
    """Such a column in words."""
    count = name.rpartition("/")[2]
    return f"{count} level" if count == "1" else f"{count} levels"


def held_out_curve(rows: Sequence[Mapping[str, str]], name: str, label: str) -> Curve:
    """One column of a table as a curve."""
    kept = [row for row in rows if row.get(name)]
    return Curve(label, [int(row["update"]) for row in kept], [float(row[name]) for row in kept])
