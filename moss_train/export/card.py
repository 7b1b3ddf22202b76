"""Write the model card: what the model is, what it expects, how it was trained, and what was measured."""

import csv
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moss_train.config.old_names import present_column
from moss_train.export.load import find_checkpoint
from moss_train.model import MossAudioTokenizerConfig, MossAudioTokenizerModel
from moss_train.utils.errors import UserError
from moss_train.utils.files import markdown_table, read_json, read_yaml

TESTED_VERSIONS = ("4.57.1", "5.0.0", "5.17.0", "5.23.0", "5.24.0")
"""Versions of transformers in which tests/export/test_transformers_versions.py passed."""

TEXT = """
# {name}

A Cat audio tokenizer (causal audio tokenizer with transformer, arXiv 2602.10934) trained with moss_train{half}.

{facts}

```python
import soundfile
from transformers import AutoModel

model = AutoModel.from_pretrained("{name}", trust_remote_code=True).eval()
samples, rate = soundfile.read("speech.wav", dtype="float32", always_2d=True)  # at {sampling_rate} Hz
{usage}
```

`AutoFeatureExtractor` pads lists of clips of different lengths (`input_values`, `padding_mask`), and
`pipeline("feature-extraction", model="{name}", trust_remote_code=True)` turns arrays into codes.
`from_pretrained(..., part="encoder")` or `"decoder"` loads half of the weights. `python verify.py` in this folder
checks an installation against stored codes and audio, `python verify.py --codes port.safetensors` the codes of another
implementation. The code needs torch and transformers only; it was tested with transformers {versions}.
{sections}"""


@dataclass(frozen=True)
class CardInfo:
    """Facts for the model card that the model itself does not contain.

    Attributes:
        licence: identifier of the licence, "" when it was not stated.
        language: codes of the languages in the training data.
        data: what the model was trained on, in a sentence.
        level_db: RMS level of the training data in dB relative to full scale.
        evaluation: a folder that `evaluate` wrote.
        repository: name on the Hugging Face Hub that the folder is uploaded to.
    """

    licence: str = ""
    language: Sequence[str] = ()
    data: str = ""
    level_db: float | None = None
    evaluation: str | None = None
    repository: str = ""
    precision: str = ""  # of the weights, where it is not float32
    training: Mapping[str, str] = field(default_factory=dict)


def check_licence(licence: str) -> str:
    """Return an identifier of a licence in the Hub's form, in lower case.

    Raises:
        UserError: `licence` is not an identifier such as apache-2.0.
    """
    if licence and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", licence.lower()):
        raise UserError(f"licence={licence!r} is not an identifier such as apache-2.0, cc-by-4.0 or other")
    return licence.lower()


def data_licences(source: str | Path) -> dict[str, int]:
    """Return the number of training clips of a run by the licence that the manifests state, "none" without one.

    Empty if that is not known: there is no run, its shards are not here, or it was initialised from another model.
    """
    checkpoint = find_checkpoint(Path(source))
    if checkpoint is None:
        return {}
    run = checkpoint.parent.parent
    found: Counter[str] = Counter()
    try:
        config = read_yaml(run / "config.yaml")
        if config.get("init"):
            return {}
        packed = [read_json(run / "packed.json")["train"]] if config["data"].get("path") else config["data"]["train"]
        for folder in [packed] if isinstance(packed, str) else packed:
            totals = read_json(Path(folder) / "index.json")["totals"]
            groups = totals.get("licence") or {"none": {"clips": sum(g["clips"] for g in totals["domain"].values())}}
            found.update({name: int(group["clips"]) for name, group in groups.items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return dict(found)


def licence_of_data(licences: Mapping[str, int]) -> str:
    """Return the licence when all clips state the same one and it is an identifier, else "": it is never guessed."""
    if len(licences) != 1 or "none" in licences:
        return ""
    try:
        return check_licence(next(iter(licences)))
    except UserError:
        return ""


def training_facts(source: str | Path) -> dict[str, str]:
    """Return how a run trained its model: update, hours of audio by domain, commit; empty where there is no run."""
    checkpoint = find_checkpoint(Path(source))
    if checkpoint is None:
        return {}
    facts = {"checkpoint": checkpoint.name}
    run = checkpoint.parent.parent
    try:
        with (run / "audio_hours.csv").open(newline="", encoding="utf-8") as file:
            *_, last = csv.DictReader(file)
        hours = {key.removesuffix("_hours"): float(last[key] or 0) for key in last if key not in ("update", "time")}
        if used := [f"{domain} {value:.2f} h" for domain, value in hours.items() if value > 0]:
            facts["audio used"] = ", ".join(used)
    except (OSError, ValueError, TypeError, AttributeError):
        pass  # a run of another version; the card then says less
    try:
        start = json.loads((run / "environment.json").read_text("utf-8"))["starts"][-1]
        facts["command"] = " ".join(["moss_train", *map(str, start["command"][1:])])
        facts["versions"] = ", ".join(f"{name} {start['versions'][name]}" for name in ("moss_train", "torch"))
        if start.get("git"):
            facts["commit"] = start["git"]["commit"] + (" with changes" if start["git"]["changed"] else "")
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        pass
    # Paths of the machine are private.
    return {name: re.sub(r"(?<![\w.])/[\w./-]+/", "", value) for name, value in facts.items()}


def evaluation_rows(folder: str | Path) -> list[dict[str, Any]]:
    """Return the measured values of an evaluation: domain, levels, metric, value, number of clips.

    Raises:
        UserError: the folder holds no table that `evaluate` wrote.
    """
    try:
        with (Path(folder) / "table.csv").open(newline="", encoding="utf-8") as file:
            table = list(csv.DictReader(file))
        measured = []
        for row in table:
            if not row["num_quantizers"]:
                continue  # an anchor or a reference, not the model
            for name in (key.removesuffix("_clips") for key in row if key.endswith("_clips")):
                if int(row[f"{name}_clips"]) and row[name]:
                    where = {"domain": row["domain"], "levels": int(row["num_quantizers"]), "bps": float(row["bps"])}
                    metric = present_column(name).removesuffix("_errors")  # as wer_errors, whose value is a rate
                    measured.append({**where, "metric": metric, "value": float(row[name])})
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"evaluation={folder} has no table.csv that `evaluate` wrote ({error})") from error
    if not measured:
        raise UserError(f"evaluation={folder} has no measured values")
    return measured


def model_card(name: str, model: MossAudioTokenizerModel, info: CardInfo) -> str:
    """Return the README of an exported folder, with the metadata that the Hub reads."""
    config = model.config
    bitrate = config.frame_rate * (config.quantizer_kwargs["codebook_size"] - 1).bit_length()
    level = level_fact(info)
    if info.level_db is not None:
        level += "; `encode(..., loudness=...)` sets it"
    own = {
        "bitrate": f"{bitrate:g} bit/s per level, {bitrate * config.num_quantizers:g} bit/s in all",
        "parameters": f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        "level of the training data": level,
    }
    sections = ""
    if info.training:
        sections += "\n## Training\n\n" + fact_table(info.training) + "\n"
    measured = [] if info.evaluation is None else evaluation_rows(info.evaluation)
    sections += evaluation_section(measured)
    usage = []
    if model.part != "decoder":
        usage.append("codes = model.encode(samples.T[None]).audio_codes  # [levels, batch, frames]")
    if model.part != "encoder":
        usage.append("restored = model.decode(codes).audio  # any prefix codes[:n] decodes too")
    if model.part is None:
        usage.append(f"streamed = model.encode(samples.T[None], chunk_duration={1 / config.frame_rate:g}).audio_codes")
    body = TEXT.format(
        name=name,
        half="" if model.part is None else f"; this folder holds its {model.part} and quantizer only",
        facts=fact_table(model_facts(config, info, own)),
        sampling_rate=config.sampling_rate,
        usage="\n".join(usage),
        versions=", ".join(TESTED_VERSIONS),
        sections=sections,
    )
    return f"---\n{metadata(name, info, measured)}---\n{body}"


def evaluation_section(measured: Sequence[Mapping[str, Any]]) -> str:
    """Return the section of a card with the values of `evaluation_rows`; "" when there are none."""
    if not measured:
        return ""
    rows = [(m["domain"], m["levels"], f"{m['bps']:g}", m["metric"], f"{m['value']:.4g}") for m in measured]
    return "\n".join(["\n## Evaluation\n", *markdown_table(("domain", "levels", "bit/s", "metric", "value"), rows), ""])


def level_fact(info: CardInfo) -> str:
    """Return the level of the training data in words."""
    return "not recorded" if info.level_db is None else f"about {info.level_db:g} dB RMS relative to full scale"


def model_facts(config: MossAudioTokenizerConfig, info: CardInfo, own: Mapping[str, str]) -> dict[str, str]:
    """Return the facts that every card states, with a card's `own` facts between architecture and training."""
    rates = f"{config.sampling_rate} Hz"
    if config.output_ratio > 1:
        rates += f" in, {config.output_sampling_rate} Hz out"
    return {
        "sampling rate": f"{rates}, {config.number_channels} channel{'s' if config.number_channels > 1 else ''}",
        "frame rate": f"{config.frame_rate:g} frames per second",
        "levels": f"{config.num_quantizers} x {config.quantizer_kwargs['codebook_size']} codes",
        **own,
        "licence": info.licence or "not stated",
        "training data": info.data or "not stated",
        **({"precision": info.precision} if info.precision else {}),
    }


def fact_table(facts: Mapping[str, str]) -> str:
    """Return facts by name as a Markdown table."""
    return "\n".join(markdown_table(("", ""), facts.items()))


def metadata(name: str, info: CardInfo, measured: Sequence[Mapping[str, Any]]) -> str:
    """Return the YAML front matter; its values are written as JSON, which is valid YAML and quotes untrusted text."""
    entries: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "feature-extraction",
        "tags": ["audio", "audio-tokenizer", "neural-codec"],
    }
    if info.licence:
        entries["license"] = info.licence
    if info.language:
        entries["language"] = list(info.language)
    if measured:
        results = [
            {
                "task": {"type": "audio-to-audio", "name": f"Reconstruction, {m['levels']} levels, {m['bps']:g} bit/s"},
                "dataset": {"type": "held-out", "name": m["domain"] or "all"},
                "metrics": [{"type": m["metric"], "value": m["value"]}],
            }
            for m in measured
        ]
        entries["model-index"] = [{"name": name, "results": results}]
    return "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in entries.items())
