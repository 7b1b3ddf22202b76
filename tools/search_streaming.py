"""Search at random for codes and audio that differ between offline and streaming, over models and chunk sizes.

    python tools/search_streaming.py --seconds 120

Every round makes a small random model, with random norms, gains and biases, streams clips that are many windows long in
random chunks, and compares the result with that of the whole clips. Another order of summation leaves differences of
about 1e-7. If the two best scores of a level are closer than that, another code can win, and all later levels of the
frame then quantize another residual. So only the first differing code of a frame counts: as a tie if its scores differ
by at most 1e-5 (cosine), otherwise as an error. The exit status is 1 if there is an error, if more than 1 in 100,000
codes are ties, or if audio differs by 1e-5 of its maximum or more.
"""

import argparse
import random
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moss_train.model import MossAudioTokenizerConfig, MossAudioTokenizerModel
from moss_train.model.quantizer import apply_pointwise

TIE = 1e-5
HIGHEST_RATE = 1e-5
HIGHEST_AUDIO_ERROR = 1e-5
BATCH_SIZE = 4


@dataclass
class Counts:
    """Counts over all rounds of a search."""

    models: int = 0
    codes: int = 0
    ties: int = 0
    errors: int = 0
    audio_error: float = 0.0

    @property
    def passed(self) -> bool:
        rare = self.ties <= max(1, HIGHEST_RATE * self.codes)  # one tie in a short search says nothing about the rate
        return rare and self.errors == 0 and self.audio_error < HIGHEST_AUDIO_ERROR


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of processor time to search for")
    parser.add_argument("--models", type=int, help="stop after so many models instead")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def random_model(rng: random.Random) -> MossAudioTokenizerModel:
    """Return a model of one to three stages in which every branch affects the output audibly."""
    torch.manual_seed(rng.randrange(2**31))
    heads = [rng.choice((1, 2, 4)) for _ in range(rng.randint(1, 3))]
    stages = [
        {
            "patch_size": rng.choice((2, 4)),
            "output_dimension": rng.choice((16, 24)),
            "d_model": count * rng.choice((8, 16)),
            "num_heads": count,
            "num_layers": rng.randint(1, 3),
            "context_duration": rng.choice((1.0, 1.5, 2.0)),
        }
        for count in heads
    ]
    quantizer = {
        "rvq_dim": rng.choice((16, 20)),
        "num_quantizers": rng.choice((4, 8, 16)),
        "codebook_size": rng.choice((32, 256, 1024)),
        "codebook_dim": 8,
    }
    return randomize(MossAudioTokenizerModel(MossAudioTokenizerConfig.from_stages(80, stages, quantizer)).eval())


@torch.no_grad()
def randomize(model: MossAudioTokenizerModel) -> MossAudioTokenizerModel:
    """Set norms, gains and biases to random values, so that no branch is nearly silent."""
    for name, parameter in model.named_parameters():
        if "norm" in name or "layer_scale" in name:
            parameter.add_(torch.randn_like(parameter) * 0.3)
        elif name.endswith("bias"):
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model


def random_sizes(rng: random.Random, frames: int) -> list[int]:
    """Return chunk sizes with the given sum: all equal, or mixed."""
    alike = rng.choice((1, 2, 3, 7, 25, None))
    sizes: list[int] = []
    while (left := frames - sum(sizes)) > 0:
        sizes.append(min(left, alike or rng.choice((1, 2, 3, 7, 25, 60))))
    return sizes


@torch.no_grad()
def compare_codes(model: MossAudioTokenizerModel, hidden: Tensor, actual: Tensor, expected: Tensor) -> tuple[int, int]:
    """Count ties and errors among the first differing codes [n, B, F] of each frame, for a latent [B, D, F]."""
    first = ((actual != expected).cumsum(dim=0) == 1) & (actual != expected)
    ties = errors = 0
    residual = apply_pointwise(model.quantizer.input_proj, hidden.transpose(1, 2))
    for level, ours, theirs, is_first in zip(model.quantizer.quantizers, actual, expected, first, strict=False):
        latent, _ = level.search(residual)
        scores = F.normalize(latent, dim=-1) @ F.normalize(level.codebook.weight, dim=-1).T
        margin = (scores.gather(-1, theirs[..., None]) - scores.gather(-1, ours[..., None]))[..., 0].abs()
        ties += int((is_first & (margin <= TIE)).sum())
        errors += int((is_first & (margin > TIE)).sum())
        residual = residual - level.decode(theirs)
    return ties, errors


@torch.no_grad()
def search_one(rng: random.Random, counts: Counts) -> None:
    """Stream through one random model and add the differences to `counts`."""
    model = random_model(rng)
    hop, frames = model.config.downsample_rate, rng.randint(150, 400)
    audio = torch.randn(BATCH_SIZE, 1, frames * hop)
    whole = model.encode(audio)
    stream = model.stream(BATCH_SIZE)
    sizes = random_sizes(rng, frames)
    codes = torch.cat([stream.encode(part)[0] for part in audio.split([n * hop for n in sizes], dim=2)], dim=2)
    ties, errors = compare_codes(model, whole.encoder_hidden_states, codes, whole.audio_codes)
    expected = model.decode(whole.audio_codes).audio
    decoded = torch.cat([stream.decode(part)[0] for part in whole.audio_codes.split(sizes, dim=2)], dim=2)
    counts.models += 1
    counts.ties += ties
    counts.errors += errors
    differs = (codes != whole.audio_codes).int()
    counts.codes += int((differs.cumsum(dim=0) - differs == 0).sum())  # not those behind a difference
    counts.audio_error = max(counts.audio_error, float((decoded - expected).abs().max() / expected.abs().max()))


def main() -> int:
    options = arguments()
    torch.set_num_threads(1)
    rng, counts, start = random.Random(options.seed), Counts(), time.process_time()
    while counts.models < options.models if options.models else time.process_time() - start < options.seconds:
        search_one(rng, counts)
    print(
        f"{counts.models} models, {counts.codes} codes: {counts.ties} ties ({counts.ties / counts.codes:.1e}), "
        f"{counts.errors} errors; audio within {counts.audio_error:.1e}"
    )
    return 0 if counts.passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
