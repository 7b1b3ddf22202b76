"""Draw the figures of the guides: the architecture of an experiment, and a batch's path from shard to checkpoint.

    python tools/draw_figures.py [--experiment cat_1b6] [--out recipes/guides]

`architecture.svg` takes widths, layers, rates and loss weights from the experiment's configuration. `batch.svg` takes
every name from the code: the script fails if a name no longer exists, so the figure cannot become outdated.
"""

import argparse
import importlib
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
FONT = "font-family='Helvetica, Arial, sans-serif'"
INK, LINE, PAPER = "#1f2933", "#52606d", "#ffffff"
ENCODER, QUANTIZER, DECODER, TEXT, DISCRIMINATOR, LOSS = (
    "#d9e8fb",
    "#fde8c8",
    "#d8f0dd",
    "#eadcf5",
    "#f9d9d6",
    "#f1f3f5",
)


@dataclass(frozen=True)
class Box:
    """A rounded box with a title and lines of small text below it; x, y is its upper left corner."""

    x: float
    y: float
    width: float
    height: float
    title: str
    lines: tuple[str, ...] = ()
    fill: str = LOSS

    @property
    def left(self) -> tuple[float, float]:
        return self.x, self.y + self.height / 2

    @property
    def right(self) -> tuple[float, float]:
        return self.x + self.width, self.y + self.height / 2

    @property
    def top(self) -> tuple[float, float]:
        return self.x + self.width / 2, self.y

    @property
    def bottom(self) -> tuple[float, float]:
        return self.x + self.width / 2, self.y + self.height

    def svg(self) -> str:
        x, y = self.x + self.width / 2, self.y + self.height / 2 - 7 * len(self.lines) + 4
        text = [
            f"<text x='{x}' y='{y}' text-anchor='middle' font-size='13' font-weight='bold'>{escape(self.title)}</text>"
        ]
        for number, line in enumerate(self.lines, 1):
            text.append(
                f"<text x='{x}' y='{y + 15 * number}' text-anchor='middle' font-size='11'>{escape(line)}</text>"
            )
        frame = f"<rect x='{self.x}' y='{self.y}' width='{self.width}' height='{self.height}' rx='7'"
        return f"{frame} fill='{self.fill}' stroke='{LINE}'/>" + "".join(text)


def arrow(start: tuple[float, float], end: tuple[float, float], dashed: bool = False) -> str:
    """Return a line with an arrowhead from one point to another."""
    style = " stroke-dasharray='5 4'" if dashed else ""
    (x1, y1), (x2, y2) = start, end
    ends = f"x1='{x1}' y1='{y1}' x2='{x2}' y2='{y2}'"
    return f"<line {ends} stroke='{LINE}' stroke-width='1.4' marker-end='url(#head)'{style}/>"


def label(x: float, y: float, text: str, size: int = 11, anchor: str = "middle", bold: bool = False) -> str:
    """Return one line of text."""
    weight = " font-weight='bold'" if bold else ""
    return f"<text x='{x}' y='{y}' text-anchor='{anchor}' font-size='{size}'{weight}>{escape(text)}</text>"


def page(width: float, height: float, parts: list[str]) -> str:
    """Return a complete SVG file with a white background, readable in a dark theme too."""
    head = (
        "<defs><marker id='head' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='7' markerHeight='7' orient='auto'>"
        f"<path d='M0,0 L8,4 L0,8 z' fill='{LINE}'/></marker></defs>"
    )
    frame = f"<rect width='{width}' height='{height}' rx='10' fill='{PAPER}'/>"
    opening = f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' {FONT} fill='{INK}'>"
    return "\n".join([opening, head, frame, *parts, "</svg>\n"])


def draw_architecture(experiment: str) -> str:
    """Return the figure of an experiment's networks and losses."""
    config = yaml.safe_load((ROOT / "configs" / "experiment" / f"{experiment}.yaml").read_text("utf-8"))
    defaults = yaml.safe_load((ROOT / "configs" / "fit.yaml").read_text("utf-8"))
    weights = {**defaults["objective"]["weights"], **config.get("objective", {}).get("weights", {})}
    tokenizer, quantizer = config["tokenizer"], config["tokenizer"]["quantizer"]
    boxes, parts, rate = [], [], float(tokenizer["sampling_rate"])
    rates = []
    for stage in tokenizer["stages"]:
        rate /= stage["patch_size"]
        rates.append(rate)

    def stage_box(x: float, y: float, stage: dict[str, Any], rate: float, fill: str) -> Box:
        lines = (f"{stage['num_layers']} layers, width {stage['d_model']}", f"patch {stage['patch_size']}")
        return Box(x, y, 116, 62, f"{rate:g} Hz", lines, fill)

    x = 112.0
    encoder = []
    for stage, rate in zip(tokenizer["stages"], rates, strict=True):
        encoder.append(stage_box(x, 60, stage, rate, ENCODER))
        x += 132
    bits = rates[-1] * (quantizer["codebook_size"] - 1).bit_length()
    levels = quantizer["num_quantizers"]
    rvq_lines = (f"{levels} levels of {quantizer['codebook_size']}", f"{bits:g} to {bits * levels:g} bit/s")
    rvq = Box(x + 6, 120, 128, 70, "residual VQ", rvq_lines, QUANTIZER)
    decoder = []
    for stage, rate in zip(reversed(tokenizer["stages"]), reversed(rates), strict=True):
        x -= 132
        decoder.append(stage_box(x, 190, stage, rate, DECODER))
    audio_in = Box(14, 66, 82, 50, "audio", (f"{tokenizer['sampling_rate'] / 1000:g} kHz",))
    audio_out = Box(14, 196, 82, 50, "audio", ("reconstructed",))
    chain = [audio_in, *encoder]
    parts += [arrow(a.right, b.left) for a, b in pairwise(chain)]
    parts.append(arrow(encoder[-1].right, (rvq.top[0], rvq.top[1] - 1)))
    parts.append(arrow(rvq.bottom, (decoder[0].right[0] + 1, decoder[0].right[1])))
    back = [*decoder, audio_out]
    parts += [arrow(a.left, b.right) for a, b in pairwise(back)]
    boxes += [audio_in, audio_out, rvq, *encoder, *decoder]

    adversaries = tuple(
        node["_target_"].rpartition(".")[2].removesuffix("Discriminator") for node in config["discriminators"]
    )
    discriminators = Box(14, 300, 190, 66, "discriminators", adversaries, DISCRIMINATOR)
    mel = Box(250, 300, 170, 66, "multi-scale mel", ("spectrograms of both",), LOSS)
    text_lm = Box(rvq.x - 30, 300, 190, 66, "text LM", ("reads the quantized states,", "predicts the text"), TEXT)
    parts.append(arrow(audio_out.bottom, (55, 299)))
    parts.append(arrow((audio_out.right[0] - 8, 247), (300, 299), dashed=True))
    parts.append(arrow((rvq.right[0] - 14, rvq.bottom[1]), (rvq.right[0] - 14, 299)))
    boxes += [discriminators, mel, text_lm]
    parts.append(
        label(109, 386, f"adversarial × {weights['adversarial']:g}, feature matching × {weights['feature']:g}")
    )
    parts.append(label(335, 386, f"reconstruction × {weights['reconstruction']:g}"))
    parts.append(label(text_lm.x + 95, 386, f"semantic × {weights['semantic']:g}"))
    parts.append(label(rvq.right[0] + 8, 150, f"commitment × {weights['commitment']:g}", anchor="start"))
    parts.append(label(rvq.right[0] + 8, 166, f"codebook × {weights['codebook']:g}", anchor="start"))
    parts.append(
        label(14, 34, f"{experiment}: encoder (blue), residual vector quantizer, decoder (green)", 14, "start")
    )
    return page(rvq.right[0] + 130, 404, [*parts, *(box.svg() for box in boxes)])


# The path of a batch: package, what happens, and the names in the code that do it.
WALK = (
    ("data.shards", "shards on disk", ("data.shards.index.ShardIndex", "data.shards.reader.ShardFiles")),
    ("data.stream", "which clips, in which order", ("data.stream.corpus.Corpus", "data.stream.stream.AudioStream")),
    ("data.stream", "read, check, pad", ("data.stream.loader.make_loader", "data.stream.loader.collate")),
    ("training", "one update", ("training.module.CatModule.training_step",)),
    ("training.step", "losses, gradients, optimizer step", ("training.step.update.run_update",)),
    ("model", "encode, quantize, decode", ("model.MossAudioTokenizerModel",)),
    ("training.callbacks", "log, validate, watch", ("training.callbacks.metrics.UpdateMetrics",)),
    ("utils", "checkpoint", ("utils.checkpoint.write_checkpoint",)),
)


def check_name(name: str) -> None:
    """Import `module.Class.method` below moss_train; raises AttributeError or ImportError if it no longer exists."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(["moss_train", *parts[:length]]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[length:]:
            found = getattr(found, attribute)
        return
    raise ImportError(f"moss_train.{name} does not exist")


def draw_batch() -> str:
    """Return the figure of one batch on its path from shard to checkpoint."""
    fills = {"data": ENCODER, "model": DECODER, "training": QUANTIZER, "utils": TEXT}
    parts, boxes = [], []
    for number, (package, what, names) in enumerate(WALK):
        for name in names:
            check_name(name)
        row, column = divmod(number, 4)
        column = column if row == 0 else 3 - column
        lines = (what, *(name.removeprefix(package + ".") for name in names))
        box = Box(
            14 + column * 236, 44 + row * 128, 212, 92, f"moss_train.{package}", lines, fills[package.split(".")[0]]
        )
        if boxes:
            last = boxes[-1]
            if last.y == box.y:
                parts.append(arrow(last.right, box.left) if row == 0 else arrow(last.left, box.right))
            else:
                parts.append(arrow(last.bottom, box.top))
        boxes.append(box)
    parts.append(label(14, 28, "One batch, from shard to checkpoint", 14, "start"))
    return page(14 + 4 * 236, 278, [*parts, *(box.svg() for box in boxes)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experiment", default="cat_1b6")
    parser.add_argument("--out", type=Path, default=ROOT / "recipes" / "guides")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, text in (("architecture.svg", draw_architecture(arguments.experiment)), ("batch.svg", draw_batch())):
        (arguments.out / name).write_text(text, "utf-8")
        print(arguments.out / name)


if __name__ == "__main__":
    main()
