"""The `export` command."""

from pathlib import Path
from typing import Any

from moss_train.config.schema import ExportConfig
from moss_train.export import export
from moss_train.export.card import CardInfo, check_licence, data_licences, evaluation_rows, licence_of_data
from moss_train.export.load import find_checkpoint, moving_average
from moss_train.export.onnx import export_onnx
from moss_train.export.write import check_target, push
from moss_train.utils.checkpoint import best_checkpoint, read_payload
from moss_train.utils.errors import UserError
from moss_train.utils.files import printable

SUMMARY = "Write a trained tokenizer as a Hugging Face model folder, or as ONNX graphs."


def run(config: ExportConfig) -> int:
    """Export and print where the result is. Returns 0."""
    check_target(config.out)
    source = config.checkpoint
    if config.select == "best":
        best = best_checkpoint(Path(source) / "checkpoints")
        if best is None:
            raise UserError(
                f"{source} has no best checkpoint: select=best needs a run with validation.data, or use select=newest"
            )
        source = str(best)
    stated = data_licences(source)
    licence = check_licence(config.licence or "") or licence_of_data(stated)
    if config.push and not licence:
        raise UserError("push needs licence=..., for example licence=cc-by-4.0: what others may do with the model")
    info = CardInfo(
        licence=licence,
        language=config.language or (),
        data=config.data or "",
        level_db=config.level_db,
        evaluation=config.evaluation,
        repository=config.push or "",
    )
    if info.evaluation is not None:
        evaluation_rows(info.evaluation)
    checkpoint = find_checkpoint(Path(source))
    has_average = checkpoint is not None and bool(moving_average(read_payload(checkpoint, mmap=True)))
    exported = f"{checkpoint or source}{' (moving average)' if has_average and config.ema is not False else ''}"
    common: dict[str, Any] = {"ema": config.ema, "part": config.part, "heldout": config.heldout}
    if config.format == "onnx":
        if config.dtype != "float32" or config.with_training_state:
            raise UserError("format=onnx takes neither dtype nor with_training_state: its weights are float32 or int8")
        options: dict[str, Any] = {"weights": config.weights, "chunk_frames": config.chunk_frames}
        folder = export_onnx(source, config.out, info=info, **options, **common)
        line = f"wrote {folder} of {exported}: README.md says how to use it, `python {folder}/runtime.py` checks it"
    else:
        if config.weights != "float32":
            raise UserError(f"weights={config.weights} needs format=onnx; a Hugging Face folder has dtype=")
        state = config.with_training_state
        folder = export(source, config.out, config.dtype, info=info, with_training_state=state, **common)
        line = f"wrote {folder} of {exported}: AutoModel.from_pretrained('{folder}', trust_remote_code=True) loads it"
    print(printable(line))
    if not licence:
        found = ", ".join(f"{name} ({count} clips)" for name, count in sorted(stated.items()))
        reason = f" (the data state: {found})" if set(stated) - {"none"} else ""
        print(printable(f"The card states no licence{reason}: give licence=..., for example licence=cc-by-4.0"))
    elif not config.licence:
        print(printable(f"licence {licence}: all manifests of the training data state it"))
    if config.push:
        print(f"uploaded: {push(folder, config.push, private=config.private)}")
    return 0
