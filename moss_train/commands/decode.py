"""`decode`: turn codes into audio files."""

from collections import Counter
from pathlib import Path

from moss_train.config.schema import DecodeConfig
from moss_train.data.shards.codes import is_code_folder
from moss_train.inference.batching import choose_device, load_model
from moss_train.inference.decode import Decoder, decode_files
from moss_train.inference.files import Report, find_codes, print_report
from moss_train.inference.shards import decode_shards
from moss_train.utils.errors import UserError

SUMMARY = "Turn codes back into audio files."
EXAMPLES = (
    "python -m moss_train decode model=my-tokenizer input=/my/codes out=/my/decoded",
    "python -m moss_train decode model=runs/x input=codes out=decoded format=flac num_quantizers=4",
)


def run(config: DecodeConfig) -> int:
    """Decode files and folders of codes; the exit status is 1 when some files could not be used.

    With several inputs, the clips of a folder of shards go to a folder of its name.
    """
    batch_seconds = config.batch_seconds
    out = Path(config.out)
    suffix = f".{config.format}"
    folders = {text: out / Path(text).resolve().name for text in config.input if is_code_folder(Path(text))}
    files = [text for text in config.input if text not in folders]
    if len(config.input) == 1:
        folders = dict.fromkeys(folders, out)
    if twice := next((target for target, count in Counter(folders.values()).items() if count > 1), None):
        raise UserError(f"two folders of codes would become {twice}; rename one or give them in separate runs")
    works = find_codes(files, out, suffix)
    model, chunk_duration = load_model(config, choose_device(config.device))
    decoder = Decoder(model, config.num_quantizers, chunk_duration, config.batch_invariant)
    reports = [decode_shards(decoder, Path(text), target, suffix, batch_seconds) for text, target in folders.items()]
    if works:
        reports.append(decode_files(decoder, works, batch_seconds))
    written, present = sum(report.num_written for report in reports), sum(report.num_present for report in reports)
    failures = [failure for report in reports for failure in report.failures]
    return print_report(Report(written, present, failures), out, "decode")
