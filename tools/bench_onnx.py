"""Compare the ONNX graphs with torch on one thread: processor time by chunk size, and the quality cost of int8 weights.

    OMP_NUM_THREADS=1 python tools/bench_onnx.py --model recipes/cat_mini
    OMP_NUM_THREADS=1 python tools/bench_onnx.py --experiment cat_nano         # random weights: speed only

Torch and the graphs alternate, and the median of `--repeats` runs counts. Chunks are measured after `--warm-seconds` of
a stream, when the ring buffers are full. The real-time factor is processor time divided by the duration of the audio.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from moss_train.cli.compose import load_config
from moss_train.export.onnx import write_graphs
from moss_train.export.onnx_runtime import Tokenizer
from moss_train.export.write import known_audio, read_clips
from moss_train.losses.reconstruction import multi_scale_mel_distance
from moss_train.model import MossAudioTokenizerConfig, MossAudioTokenizerModel

SPEECH = Path(__file__).parents[1] / "recipes" / "quickstart" / "audio" / "speech"


def load(options: argparse.Namespace) -> MossAudioTokenizerModel:
    """Return the model of a folder, or a randomly initialized one of an experiment."""
    if options.model:
        return MossAudioTokenizerModel.from_pretrained(options.model).eval()
    settings = load_config("fit", [f"experiment={options.experiment}"]).tokenizer.to_plain()
    torch.manual_seed(0)
    return MossAudioTokenizerModel(MossAudioTokenizerConfig.from_stages(**settings)).eval()


def processor_time(call: Callable[[], object]) -> float:
    """Return the seconds of processor time that a call takes."""
    start = time.process_time()
    call()
    return time.process_time() - start


@torch.no_grad()
def speed(model: MossAudioTokenizerModel, graphs: dict[str, Tokenizer], options: argparse.Namespace) -> None:
    """Print a row per chunk size: milliseconds of processor time per chunk, and the real-time factor."""
    config = model.config
    hop, rate = config.downsample_rate, config.frame_rate
    audio = known_audio(config.sampling_rate, config.number_channels, options.warm_seconds + 12).float()[:1]
    warm = round(options.warm_seconds * rate)
    codes = model.encode(audio).audio_codes
    for task, data, step in (("encode", audio, hop), ("decode", codes, 1)):
        for frames in options.chunk_frames:
            torch_stream = model.stream(chunk_frames=frames)
            streams = {name: tokenizer.stream() for name, tokenizer in graphs.items()}
            getattr(torch_stream, task)(data[..., : warm * step])
            for stream in streams.values():
                getattr(stream, task)(data[..., : warm * step].numpy())
            times: dict[str, list[float]] = {name: [] for name in ("torch", *streams)}
            for number in range(options.repeats):
                at = (warm + number * frames) * step
                part = data[..., at : at + frames * step].contiguous()
                times["torch"].append(processor_time(partial(getattr(torch_stream, task), part)))
                for name, stream in streams.items():
                    samples = part.numpy()
                    times[name].append(processor_time(partial(getattr(stream, task), samples)))
            medians = {name: statistics.median(values) for name, values in times.items()}
            cells = (f"{1000 * value:.1f} ms ({value * rate / frames:.3f})" for value in medians.values())
            print(f"| {task} | {frames} | {' | '.join(cells)} |", flush=True)


@torch.no_grad()
def quality(model: MossAudioTokenizerModel, graphs: dict[str, Tokenizer], options: argparse.Namespace) -> None:
    """Print for each type of weights the codes that differ from torch and the mel distance to held-out speech."""
    clips = read_clips(options.heldout, model.config, options.clips)
    print("| weights | codes that differ, first level | all levels | mel distance | decoder alone |")
    for name, tokenizer in graphs.items():
        differs, distances, halves = [], [], []
        for clip in clips:
            clip = clip * (0.7 / clip.abs().max())
            expected = model.encode(clip[None]).audio_codes.numpy()
            codes = tokenizer.encode(clip[None].numpy())
            differs.append((codes != expected).reshape(len(codes), -1))
            length = torch.tensor([clip.shape[1]])
            for result, used in ((distances, codes), (halves, expected)):
                heard = torch.from_numpy(tokenizer.decode(used))[0, :, : clip.shape[1]]
                result.append(
                    float(multi_scale_mel_distance(heard[None], clip[None], length, model.config.sampling_rate))
                )
        joined = np.concatenate(differs, axis=1)
        values = f"{statistics.mean(distances):.3f} | {statistics.mean(halves):.3f}"
        print(f"| {name} | {joined[0].mean():.2%} | {joined.mean():.2%} | {values} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="run, checkpoint or model folder")
    source.add_argument("--experiment", help="configuration to build with random weights")
    parser.add_argument("--weights", nargs="*", choices=("float32", "int8"), default=["float32", "int8"])
    parser.add_argument("--chunk-frames", type=int, nargs="*", default=[1, 4, 8])
    parser.add_argument("--longest-chunk", type=int, default=8, help="chunk_frames of the export")
    parser.add_argument("--warm-seconds", type=float, default=10.0)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--heldout", default=SPEECH, help="audio for the quality of a trained model")
    parser.add_argument("--clips", type=int, default=3, help="for the quality; 0 measures the speed only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = load(options)
    with tempfile.TemporaryDirectory() as root:
        graphs = {}
        for weights in options.weights:
            folder = Path(root) / weights
            folder.mkdir()
            write_graphs(model, folder, chunk_frames=options.longest_chunk, weights=weights)
            sizes = (f"{path.name} {path.stat().st_size / 2**20:.1f} MiB" for path in sorted(folder.glob("*.onnx")))
            print(f"{weights}: {', '.join(sizes)}")
            graphs[weights] = Tokenizer(folder, threads=1)
        print(f"| task | frames per chunk | torch | {' | '.join(graphs)} |", flush=True)
        speed(model, graphs, options)
        if options.model and options.clips:
            quality(model, graphs, options)


if __name__ == "__main__":
    main()
