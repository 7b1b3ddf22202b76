"""Evaluate a model, another codec or pairs of files on clips (see configs/evaluate.yaml)."""

import hashlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from moss_train.audio.io import RESAMPLER
from moss_train.batch import ListedClip
from moss_train.config.schema import EvaluateConfig
from moss_train.data.clips import FileClip, ScaledClip, ShardClip, list_sources
from moss_train.evaluation.codecs.base import CatCodec, Codec, OnnxCodec, check_levels
from moss_train.evaluation.codecs.published_table import load_codec
from moss_train.evaluation.metrics.base import Metric, split_available
from moss_train.evaluation.metrics.codes import TextCrossEntropy, text_lm_of_checkpoint
from moss_train.evaluation.metrics.registry import build_metrics
from moss_train.evaluation.metrics.signal import PROFILES
from moss_train.evaluation.reconstruct import CodecReconstructor, PairReconstructor, Reconstructor, find_pairs
from moss_train.evaluation.report.tables import load_evaluation
from moss_train.evaluation.report.write import Evaluation, write_outputs
from moss_train.evaluation.results import Results, all_conditions
from moss_train.evaluation.runner import evaluate
from moss_train.export.load import find_checkpoint, load_tokenizer
from moss_train.export.onnx_runtime import SETTINGS_FILE, Tokenizer
from moss_train.inference.batching import choose_device, use_precision
from moss_train.utils.checkpoint import read_payload
from moss_train.utils.errors import UserError
from moss_train.utils.files import file_lock, printable


def cut_clips(clips: Sequence[ListedClip], seconds: float) -> Iterator[ListedClip]:
    """Yield pieces of equal length without overlap; the rest of a clip is dropped, and its text: it no longer fits."""
    for clip in clips:
        if not isinstance(clip.read, FileClip | ShardClip):
            yield clip  # reading it will fail, and then it is counted
            continue
        try:
            num_samples, rate = clip.read.length()
        except UserError:
            yield clip  # likewise
            continue
        length = round(seconds * rate)
        labels = {key: value for key, value in clip.labels.items() if key not in ("text", "task")}
        for index in range(num_samples // length):
            read = replace(clip.read, start=index * length, num_samples=length)
            yield ListedClip(f"{clip.id}@{index * seconds:g}s", clip.domain, read, labels)


def choose_clips(clips: Sequence[ListedClip], per_domain: int | None, seed: int) -> list[ListedClip]:
    """Return at most `per_domain` clips of every domain, in their order; the choice depends on ids and seed only."""
    if per_domain is None:
        return list(clips)
    kept: set[str] = set()
    for domain in {clip.domain for clip in clips}:
        members = [clip.id for clip in clips if clip.domain == domain]
        kept |= set(sorted(members, key=lambda id: hashlib.sha256(f"{seed} {id}".encode()).digest())[:per_domain])
    return [clip for clip in clips if clip.id in kept]


SUMMARY = "Measure a codec at every bitrate: the columns of the paper's table, with a report."
EXAMPLES = (
    "python -m moss_train evaluate model=runs/x data=heldout.jsonl out=evaluation",
    "python -m moss_train evaluate model=my-tokenizer data=/shards/test num_quantizers=[8,32] out=scores num_workers=4",
    "python -m moss_train evaluate codec=mimi weights=/models/mimi data=heldout.jsonl out=mimi compare=[evaluation]",
    "python -m moss_train evaluate pairs=/other/codec out=scores",
)


@dataclass(frozen=True)
class EvaluationTarget:
    """What is evaluated on which clips, and the values that identify it."""

    reconstructor: Reconstructor
    clips: Sequence[ListedClip]
    identity: dict[str, Any]
    codec: Codec | None = None
    code_metrics: dict[str, Metric] = field(default_factory=dict)  # measured on the codes, during reconstruction


def run(config: EvaluateConfig) -> int:
    """Evaluate and write tables and report; the exit status is 1 when some clips could not be read."""
    for other in config.compare:
        load_evaluation(Path(other))  # before hours of work, not after
    metrics, missing = split_available(
        build_metrics(
            config.metrics,
            profile=config.profile,
            speaker_model=config.speaker_model,
            recognition=config.recognition,
            recognition_model=config.recognition_model,
        )
    )
    if missing and config.strict:
        raise UserError("; ".join(f"metric {name}: {reason}" for name, reason in missing.items()))
    target = _pairs(config) if config.pairs is not None else _codec(config)
    report_ids = _report_clip_ids(target.clips, config.report_clips)
    out = Path(config.out)
    all_metrics = metrics | target.code_metrics
    if config.model is not None and "text_model" in config.metrics and not target.code_metrics:
        missing["text_model"] = "the model is no run or checkpoint with a text LM"
    # Everything that a row depends on besides the clip.
    descriptions = {name: metric.description for name, metric in all_metrics.items()}
    out.mkdir(parents=True, exist_ok=True)
    with file_lock(out, str(out), 0.0):  # the one that ends last would write the rows without those of the other
        results = Results(out, {**target.identity, "metrics": descriptions, "resampler": RESAMPLER})
        rows = evaluate(
            target.clips,
            target.reconstructor,
            metrics,
            results,
            num_workers=config.num_workers,
            keep_audio_of=report_ids,
        )
        evaluation = Evaluation(
            tuple(rows),
            all_conditions(target.reconstructor.conditions, rows),
            all_metrics,
            missing,
            results,
            PROFILES[config.profile],
            target.codec,
        )
        print(printable(write_outputs(evaluation, config.missing_values, config.seed, config.compare)))
    failed = [row for row in rows if row.failure is not None]
    for row in failed[:20]:
        print(printable(f"moss_train evaluate: skipped: {row.failure}"), file=sys.stderr)
    print(printable(f"evaluate: {len(rows) - len(failed)} of {len(rows)} clips; {out / 'report.html'}"))
    return 1 if failed else 0


def _codec(config: EvaluateConfig) -> EvaluationTarget:
    """Load a tokenizer, the graphs of an export or a published codec, and for a run or checkpoint its text LM."""
    device = choose_device(config.device)
    codec: Codec
    text_model: TextCrossEntropy | None = None
    folder = Path(str(config.model))
    if config.model is not None and (folder / SETTINGS_FILE).is_file():
        if config.precision == "bf16":
            raise UserError(
                f"precision=bf16 has no effect on the graphs of model={folder}; export them with weights=int8"
            )
        try:
            codec = OnnxCodec(Tokenizer(folder, threads=torch.get_num_threads()), folder.name)
        except ValueError as error:
            raise UserError(f"model={folder}: {error}") from None
    elif config.model is not None:
        model = use_precision(load_tokenizer(config.model), config.precision, device)
        codec = CatCodec(model.to(device), Path(str(config.model)).name)  # type: ignore[arg-type]
        checkpoint = find_checkpoint(Path(config.model)) if "text_model" in config.metrics else None
        if checkpoint is not None:
            latent_dim = model.config.quantizer_kwargs["output_dim"]
            text_lm = text_lm_of_checkpoint(read_payload(checkpoint, mmap=True), latent_dim)
            text_model = None if text_lm is None else TextCrossEntropy(model, text_lm.to(device))
    else:
        assert config.codec is not None  # or there would be pairs instead
        codec = load_codec(config.codec, config.weights, device, config.code_dir)
    levels = check_levels(codec, config.num_quantizers)
    clips = list_sources(config.data or [], config.domain)
    if config.clip_seconds is not None:
        clips = list(cut_clips(clips, config.clip_seconds))
    if config.peak is not None:
        clips = [replace(clip, read=ScaledClip(clip.read, config.peak)) for clip in clips]
    clips = choose_clips(clips, config.max_clips, config.seed)
    if not clips:
        raise UserError(f"no clip of data={config.data} is clip_seconds={config.clip_seconds} long")
    measure = None if text_model is None else text_model.measure
    reconstructor = CodecReconstructor(codec, levels, clips, config.anchors, measure)
    identity = {"codec": codec.name, "fingerprint": codec.fingerprint, "anchors": config.anchors}
    if config.peak is not None:
        identity["peak"] = config.peak
    return EvaluationTarget(
        reconstructor, clips, identity, codec, {} if text_model is None else {"text_model": text_model}
    )


def _pairs(config: EvaluateConfig) -> EvaluationTarget:
    root = Path(config.pairs or "")
    reconstructor = PairReconstructor(find_pairs(root, config.domain, config.bits_per_level), config.domain)
    clips = choose_clips(reconstructor.clips(), config.max_clips, config.seed)
    identity = {"pairs": str(root.resolve()), "bits_per_level": config.bits_per_level}
    return EvaluationTarget(reconstructor, clips, identity)


def _report_clip_ids(clips: Sequence[ListedClip], wanted: int | list[str]) -> frozenset[str]:
    """Return the ids of the clips that the report plays: the first ones of every domain, or those that are named."""
    if isinstance(wanted, list):
        if unknown := [name for name in wanted if all(clip.id != name for clip in clips)]:
            raise UserError(f"report_clips={wanted}: there is no clip {unknown[0]!r}, such as {clips[0].id!r}")
        return frozenset(wanted)
    chosen: list[str] = []
    for domain in sorted({clip.domain for clip in clips}):
        chosen += sorted(clip.id for clip in clips if clip.domain == domain)[:wanted]
    return frozenset(chosen)
