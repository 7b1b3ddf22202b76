"""Train the generators of other codecs with our training on equal data for equal minutes, and print one table.

    python tools/compare_peers.py --train /shards/train --heldout /shards/heldout --minutes 30            # one GPU
    python tools/compare_peers.py --size tiny --train /shards/train --heldout /shards/heldout --minutes 1

Compares Cat's encoder and decoder with those of DAC (arXiv 2306.06546) and Mimi (arXiv 2410.00037) from transformers.
All start from random weights, use the same residual quantizer at the same frame rate, and are trained with the same
losses, discriminators, text LM, optimizers and order of the data, so only the generators differ. DAC's own quantizer is
of the same kind as ours; Mimi's is trained with moving averages, which transformers does not implement. The peers start
from torch's default weights: with the normal(0, 0.02) of their classes the output would be silent, and a silent model
does not learn from a log mel loss.

A few updates measure each system's speed. The number of updates, with the whole schedule, is chosen to fit its minutes:
wall-clock time on a GPU, CPU time of the process on a CPU, so that other load does not decide.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from transformers import DacConfig, MimiConfig
from transformers.models.dac.modeling_dac import DacDecoder, DacEncoder
from transformers.models.mimi.modeling_mimi import (
    MimiConv1d,
    MimiConvTranspose1d,
    MimiDecoder,
    MimiEncoder,
    MimiTransformerModel,
)

from moss_train import load_config
from moss_train.config.fit_schema import FitConfig
from moss_train.model import MossAudioTokenizerModel
from moss_train.training.module import CatModule
from moss_train.training.run.warm_start import plan_initialization
from tools.short_runs import DepthReport, depth_report, packed_clips, quarter_depths, shortened, train_in_memory

PACE_UPDATES = 16  # more than the data workers prefetch
EXPERIMENTS = {"tiny": "cat_tiny", "small": "cat_small"}
# About as many parameters as the experiment's encoder and decoder.
DAC_SIZES = {
    "tiny": {"encoder_hidden_size": 12, "decoder_hidden_size": 448},
    "small": {"encoder_hidden_size": 24, "decoder_hidden_size": 960},
}
MIMI_SIZES = {
    "tiny": {"num_filters": 12, "hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6},
    "small": {"num_filters": 24, "hidden_size": 384, "num_hidden_layers": 5, "num_attention_heads": 6},
}


class PeerTokenizer(nn.Module):
    """Another codec's encoder and decoder around Cat's quantizer, with the methods that training and evaluation use."""

    def __init__(self, cat: MossAudioTokenizerModel, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.config = cat.config
        self.sampling_rate, self.output_sampling_rate = cat.sampling_rate, cat.output_sampling_rate
        self.num_frames = cat.num_frames
        self.encoder, self.quantizer, self.decoder = encoder, cat.quantizer, decoder

    def encode_latent(self, audio: Tensor) -> Tensor:
        """Encode audio [B, C, F * hop] to a latent [B, F, D]."""
        return self.encoder(audio).transpose(1, 2)

    def decode_latent(self, latent: Tensor) -> Tensor:
        """Decode a latent [B, F, D] to audio [B, C, F * hop]."""
        return self.decoder(latent.transpose(1, 2))


class MimiHalf(nn.Module):
    """SEANet and the transformer at 25 frames per second, and the resampling to or from 12.5, in Mimi's order."""

    def __init__(self, config: MimiConfig, is_encoder: bool) -> None:
        super().__init__()
        width = config.hidden_size
        self.is_encoder = is_encoder
        self.transformer = MimiTransformerModel(config)
        self.convolutions = MimiEncoder(config) if is_encoder else MimiDecoder(config)
        step = {"kernel_size": 4, "stride": 2, "bias": False}
        if is_encoder:
            self.step: nn.Module = MimiConv1d(config, width, width, pad_mode="replicate", **step)
        else:
            self.step = MimiConvTranspose1d(config, width, width, groups=width, **step)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, T] to [B, C', T'], at a lower rate in the encoder and a higher one in the decoder."""
        if self.is_encoder:
            return self.step(self._attend(self.convolutions(x)))
        return self.convolutions(self._attend(self.step(x)))

    def _attend(self, x: Tensor) -> Tensor:
        return self.transformer(x.transpose(1, 2), use_cache=False).last_hidden_state.transpose(1, 2)


def dac_halves(cat: MossAudioTokenizerModel, size: str) -> tuple[nn.Module, nn.Module]:
    """Return DAC's convolutional encoder and decoder, with strides whose product is 1920."""
    config = DacConfig(sampling_rate=cat.sampling_rate, downsampling_ratios=[4, 6, 8, 10], **DAC_SIZES[size])
    config.upsampling_ratios = [10, 8, 6, 4]
    return DacEncoder(config), DacDecoder(config)


def mimi_halves(cat: MossAudioTokenizerModel, size: str) -> tuple[nn.Module, nn.Module]:
    """Return Mimi's encoder and decoder with convolutions and transformers."""
    sizes: dict[str, Any] = dict(MIMI_SIZES[size])
    width, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    config = MimiConfig(
        sampling_rate=cat.sampling_rate,
        upsampling_ratios=[8, 6, 5, 4],
        intermediate_size=4 * width,
        num_key_value_heads=heads,
        head_dim=width // heads,
        **sizes,
    )
    config._attn_implementation = "sdpa"
    return MimiHalf(config, is_encoder=True), MimiHalf(config, is_encoder=False)


PEERS = {"cat": None, "dac": dac_halves, "mimi": mimi_halves}


def build_module(config: FitConfig, system: str, size: str) -> CatModule:
    """Return the training module of a system, with the same random weights on every call."""
    module = CatModule(**plan_initialization(config).arguments)
    halves = PEERS[system]
    if halves is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            module.tokenizer = PeerTokenizer(module.tokenizer, *halves(module.tokenizer, size))  # type: ignore[assignment]
    return module


def shorten(config: FitConfig, updates: int) -> FitConfig:
    return config.replace(stages=shortened(config.stages, updates))


def clock() -> float:
    """Return the time that is budgeted: wall-clock time on a GPU, CPU time of this process otherwise."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def seconds_of(config: FitConfig, module: CatModule) -> float:
    begin = clock()
    train_in_memory(config, module)
    return clock() - begin


class Pace(Callback):
    """Records when updates end; the first ones include one-time costs."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.ends.append(clock())

    @property
    def seconds_per_update(self) -> float:
        """Return the mean duration of the last six updates."""
        later = self.ends[-7:]
        return (later[-1] - later[0]) / (len(later) - 1)


def affordable_updates(config: FitConfig, system: str, options: argparse.Namespace) -> int:
    """Return the number of updates that fit the minutes, estimated from a few timed updates of each stage."""
    per_update, total = 0.0, sum(stage.updates for stage in config.stages)
    for stage in config.stages:
        alone = config.replace(stages=[stage.replace(updates=PACE_UPDATES, discriminator_warmup_updates=0)])
        pace = Pace()
        train_in_memory(alone, build_module(alone, system, options.size), [pace])
        per_update += pace.seconds_per_update * stage.updates / total
    return max(4, int(options.minutes * 60 / per_update))


def compare(config: FitConfig, system: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train one system for its minutes, measure it on held-out clips, and return one row."""
    whole = shorten(config, affordable_updates(config, system, options))
    module = build_module(whole, system, options.size)
    seconds = seconds_of(whole, module)
    clips = packed_clips(whole, options.heldout, module, options.clips, options.longest_seconds)
    device = "cuda" if torch.cuda.is_available() else "cpu"  # Lightning moves the model to the CPU after training
    tokenizer = module.tokenizer.to(device).eval()
    report = depth_report(tokenizer, clips, quarter_depths(tokenizer.config.num_quantizers))
    audio = sum(stage.updates * stage.batch_seconds for stage in whole.stages)
    parameters = [sum(p.numel() for p in part.parameters()) for part in (tokenizer.encoder, tokenizer.decoder)]
    return {
        "system": system,
        "parameters": sum(parameters),
        "updates": module.update,
        "audio_seconds": audio,
        "seconds": seconds,
        **summary(report),
    }


def summary(report: DepthReport) -> dict[str, Any]:
    """Return the distances by number of levels and the mean share of codebook entries in use."""
    used = sum(report.used_shares) / len(report.used_shares)
    return {"distances": {str(levels): value for levels, value in report.distances.items()}, "used_share": used}


def table(rows: list[dict[str, Any]]) -> str:
    depths = list(rows[0]["distances"])
    head = [
        "system",
        "parameters",
        "updates",
        "audio s",
        "s",
        *(f"mel, {depth} level(s)" for depth in depths),
        "entries used",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [row["system"], f"{row['parameters']:,}", str(row["updates"]), f"{row['audio_seconds']:,.0f}"]
        cells += [f"{row['seconds']:.0f}", *(f"{value:.2f}" for value in row["distances"].values())]
        lines.append("| " + " | ".join([*cells, f"{row['used_share']:.0%}"]) + " |")
    return "\n".join(lines)


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", nargs="+", required=True, help="packed folders")
    parser.add_argument("--heldout", required=True, help="packed folder of held-out clips")
    parser.add_argument("--minutes", type=float, default=10.0, help="of training, per system")
    parser.add_argument("--size", choices=EXPERIMENTS, default="small")
    parser.add_argument("--systems", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--clips", type=int, default=48, help="held-out clips")
    parser.add_argument("--longest-seconds", type=float, default=5.0, help="of a held-out clip")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    return parser.parse_known_args()


def main() -> None:
    options, overrides = parse_arguments()
    config = load_config(
        "fit",
        [f"experiment={EXPERIMENTS[options.size]}", *(f"data.train={folder}" for folder in options.train), *overrides],
    )
    rows = []
    for system in options.systems:
        rows.append(compare(config, system, options))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
        if options.out is not None:
            options.out.write_text(json.dumps(rows, indent=1))
    print(f"\n{options.minutes:g} minutes per system, torch {torch.__version__}\n{table(rows)}")


if __name__ == "__main__":
    main()
