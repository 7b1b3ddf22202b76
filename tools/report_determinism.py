"""Report the share of codes that change with precision, batching, padding and streaming, for a model and audio clips.

    python tools/report_determinism.py MODEL CLIP [CLIP ...]

Each line compares with the codes of the clip alone, offline, in the same precision; the precisions are compared with
float32. After the first differing level of a frame, the later levels quantize another residual: `codes` counts all
differing codes, `first` only the first in each frame, `frames` the frames with any. Streams of several clips are
compared with single streams, in chunks of one frame. The lines with `batch_invariant=True` also show its cost.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from moss_train.audio.io import read_audio
from moss_train.export import load_tokenizer
from moss_train.model import MossAudioTokenizerModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="run, checkpoint, folder or repository")
    parser.add_argument("clips", nargs="+", help="audio files")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--padding-seconds", type=float, default=5.0)
    return parser.parse_args()


def separate(model: MossAudioTokenizerModel, clips: list[Tensor], **options: object) -> list[Tensor]:
    """Return the codes [N, frames] of every clip encoded on its own."""
    return [model.encode(clip[None], **options).audio_codes[:, 0].cpu() for clip in clips]


def together(model: MossAudioTokenizerModel, clips: list[Tensor], **options: object) -> list[Tensor]:
    """Return the codes [N, frames] of the clips encoded in one batch."""
    output = model.batch_encode(clips, **options)
    return [output.audio_codes[:, item, :n].cpu() for item, n in enumerate(output.audio_codes_lengths)]


def padded(model: MossAudioTokenizerModel, clips: list[Tensor], seconds: float, **options: object) -> list[Tensor]:
    """Return the codes [N, frames] of every clip encoded on its own, followed by masked silence."""
    codes = []
    for clip in clips:
        longer = torch.nn.functional.pad(clip, (0, round(seconds * model.sampling_rate)))
        mask = torch.arange(longer.shape[1])[None] < clip.shape[1]
        output = model.encode(longer[None], mask, **options)
        codes.append(output.audio_codes[:, 0, : output.audio_codes_lengths[0]].cpu())
    return codes


def streamed(model: MossAudioTokenizerModel, clips: list[Tensor], invariant: bool = False) -> list[Tensor]:
    """Return the codes [N, frames] of the clips' whole frames, streamed together in chunks of one frame."""
    hop = model.config.downsample_rate
    frames = [clip.shape[1] // hop for clip in clips]
    together = torch.stack(
        [torch.nn.functional.pad(clip, (0, max(frames) * hop))[:, : max(frames) * hop] for clip in clips]
    )
    stream = model.stream(len(clips), chunk_frames=1, batch_invariant=invariant)
    codes = []
    for frame, chunk in enumerate(together.split(hop, dim=2)):
        lengths = torch.tensor([hop if frame < own else 0 for own in frames])
        codes.append(stream.encode(chunk, lengths)[0])
    return [torch.cat(codes, dim=2)[:, item, :own].cpu() for item, own in enumerate(frames)]


def line(name: str, codes: list[Tensor], expected: list[Tensor]) -> str:
    differs = torch.cat([(a != b) for a, b in zip(codes, expected, strict=True)], dim=1)
    first = (differs.cumsum(dim=0) == 1) & differs
    frames = differs.any(dim=0).double().mean()
    return (
        f"{name:36} codes {differs.double().mean():9.3%}   first {first.double().mean():9.4%}   frames {frames:8.2%}"
        f"   of {differs.numel()} codes"
    )


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def report(model: MossAudioTokenizerModel, clips: list[Tensor], name: str, seconds: float) -> list[Tensor]:
    """Print the lines of one precision; returns its reference codes, those of each clip alone."""
    alone = separate(model, clips)
    frame = 1 / model.config.frame_rate
    print(line(f"{name}: batched", together(model, clips), alone))
    print(line(f"{name}: padded", padded(model, clips, seconds), alone))
    print(line(f"{name}: streamed, 1 frame", separate(model, clips, chunk_duration=frame), alone))
    streamed_alone = [codes for clip in clips for codes in streamed(model, [clip])]
    print(line(f"{name}: streamed together", streamed(model, clips), streamed_alone))
    invariant = together(model, clips, batch_invariant=True)
    print(line(f"{name}: batched, batch_invariant", invariant, alone))
    print(line(f"{name}: padded, batch_invariant", padded(model, clips, seconds, batch_invariant=True), alone))
    print(line(f"{name}: streams, batch_invariant", streamed(model, clips, invariant=True), streamed_alone))
    for kind, call, option in (("batch", together, "batch_invariant"), ("streams", streamed, "invariant")):
        plain = timed(lambda call=call: call(model, clips))
        cost = timed(lambda call=call, option=option: call(model, clips, **{option: True})) / plain
        print(f"{name}: batch_invariant takes {cost:.2f} times as long for {len(clips)} {kind}")
    return alone


def main() -> None:
    options = arguments()
    model = load_tokenizer(options.model).to(options.device)
    config = model.config
    clips = []
    for path in options.clips:
        audio, _ = read_audio(path, sampling_rate=config.sampling_rate, num_channels=config.number_channels)
        clips.append(audio.to(options.device))
    codes = {}
    for name, dtype in DTYPES.items():
        codes[name] = report(model.to(dtype), clips, name, options.padding_seconds)
    print(line("bfloat16 against float32", codes["bfloat16"], codes["float32"]))


if __name__ == "__main__":
    main()
