"""Try a tokenizer in the browser: record or upload audio, choose the number of levels, listen to the reconstruction.

    python recipes/demo/app.py                                      # the committed model, at http://127.0.0.1:7860
    python recipes/demo/app.py my-tokenizer recipes/cat_mini        # several, to compare

Nothing is downloaded and no audio leaves the machine. `recipes/demo/README.md` explains how to publish it as a Space.
"""

import argparse
import io
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # has to be set before gradio is imported

import gradio as gr
import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from moss_train import MossAudioTokenizerModel
from moss_train.audio.io import NamedBytes, audio_info, read_audio, resample
from moss_train.export import load_tokenizer
from moss_train.plotting import save_spectrograms
from moss_train.utils.errors import UserError

HERE = Path(__file__).parent
BESIDE = HERE / "model"  # the folder of the model in a Space
DEFAULT_MODEL = BESIDE if BESIDE.is_dir() else HERE.parent / "cat_mini"
EXAMPLES = sorted((HERE.parent / "quickstart" / "audio" / "speech").glob("*.flac"), key=os.path.getsize)[-3:]
MAX_SECONDS = 30.0
MAX_BYTES = 20 * 2**20
PEAK = 0.7
# Fonts installed on the browser's machine: the default theme would fetch its own from a server.
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


@dataclass(frozen=True)
class Clip:
    """Audio [C, T] as the model receives it, and notes about what was changed."""

    audio: Tensor
    remark: str


@dataclass(frozen=True)
class Reconstruction:
    """A reconstructed clip: codes [levels, frames], audio [C, T], seconds taken by encoding and decoding."""

    codes: Tensor
    audio: Tensor
    sampling_rate: int
    bit_rate: float
    encode_seconds: float
    decode_seconds: float


def read_clip(path: str | None, model: MossAudioTokenizerModel, is_scaled: bool) -> Clip:
    """Read the first `MAX_SECONDS` of a file at the model's rate.

    Raises:
        gr.Error: there is no file, it is too large, or it is not audio; the page shows the one-line message.
    """
    if path is None:
        raise gr.Error("Record or upload something first.", print_exception=False)
    file = Path(path)
    if (size := file.stat().st_size) > MAX_BYTES:
        raise gr.Error(f"{file.name} has {size / 2**20:.0f} MiB, {MAX_BYTES >> 20} are allowed.", print_exception=False)
    try:
        content = file.read_bytes()
        info = audio_info(NamedBytes(content, file.name))
        wanted = min(info.num_samples, round(MAX_SECONDS * info.sampling_rate))
        if not wanted:
            raise ValueError(f"{file.name} has no samples")
        audio, _ = read_audio(
            NamedBytes(content, file.name),
            sampling_rate=model.config.sampling_rate,
            num_channels=model.config.number_channels,
            num_samples=wanted,
        )
    except ValueError as error:  # includes UserError
        raise gr.Error(f"{error}", print_exception=False) from None
    remark = f"the first {MAX_SECONDS:g} of {info.seconds:.1f} s" if wanted < info.num_samples else ""
    if is_scaled and (peak := float(audio.abs().max())) > 0:
        audio = audio * (PEAK / peak)
    return Clip(audio, remark)


def output_rate(model: MossAudioTokenizerModel) -> int:
    """Return the rate in Hz of decoded audio, which may be higher than that of the encoder."""
    return getattr(model.config, "output_sampling_rate", None) or model.config.sampling_rate


def reconstruct(model: MossAudioTokenizerModel, audio: Tensor, levels: int) -> Reconstruction:
    """Encode audio [C, T] with the given number of levels, and decode it."""
    config = model.config
    start = time.perf_counter()
    codes: Any = model.encode(audio[None], num_quantizers=levels, return_dict=True).audio_codes
    encoded = time.perf_counter()
    decoded: Any = model.decode(codes, return_dict=True).audio[0]
    done = time.perf_counter()
    rate = output_rate(model)
    num_samples = audio.shape[1] * rate // config.sampling_rate
    bits = np.log2(config.quantizer_kwargs["codebook_size"])
    return Reconstruction(
        codes[:, 0], decoded[:, :num_samples], rate, levels * bits * config.frame_rate, encoded - start, done - encoded
    )


def describe(name: str, clip: Clip, result: Reconstruction, model: MossAudioTokenizerModel) -> str:
    """Return the numbers of a reconstruction as a table in Markdown."""
    levels, frames = result.codes.shape
    seconds = clip.audio.shape[1] / model.config.sampling_rate
    rows = {
        "model": name,
        "audio": f"{seconds:.2f} s" + (f" ({clip.remark})" if clip.remark else ""),
        "bit rate": f"{result.bit_rate:,.0f} bit/s",
        "codes": f"{levels} x {frames}, {result.bit_rate * seconds / 8:,.0f} bytes",
        "time": f"{result.encode_seconds:.2f} s to encode, {result.decode_seconds:.2f} s to decode: "
        f"{seconds / (result.encode_seconds + result.decode_seconds):.1f} times as fast as it plays",
    }
    return "| | |\n|---|---|\n" + "\n".join(f"| {key} | {value} |" for key, value in rows.items())


def playable(audio: Tensor, sampling_rate: int) -> tuple[int, np.ndarray]:
    """Return audio [C, T] in gradio's format: the rate and int16 [T, C]."""
    return sampling_rate, (audio * 32768).round().clamp(-32768, 32767).to(torch.int16).T.numpy()


def spectrograms(waveforms: dict[str, Tensor], sampling_rate: int) -> Image.Image:
    """Draw log-mel spectrograms of waveforms [C, T], one below the other."""
    picture = io.BytesIO()
    save_spectrograms(waveforms, sampling_rate, picture)
    return Image.open(picture)


def draw_codes(codes: Tensor, codebook_size: int, frame_rate: float) -> Image.Image:
    """Draw codes [levels, frames]: time runs to the right, the first level is at the top, each entry has a colour."""
    levels, frames = codes.shape
    figure = Figure(figsize=(9, 1.1 + 0.1 * levels), layout="constrained")
    axes = figure.subplots()
    extent = (0, frames / frame_rate, levels + 0.5, 0.5)
    axes.imshow(
        codes.numpy(),
        aspect="auto",
        interpolation="nearest",
        cmap="turbo",
        vmin=0,
        vmax=codebook_size - 1,
        extent=extent,
    )
    axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    axes.set_xlabel("time (s)")
    axes.set_ylabel("level")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format="png")
    return Image.open(picture)


def build(models: dict[str, MossAudioTokenizerModel]) -> gr.Blocks:
    """Build the page for models, given by name."""
    names = list(models)

    def show(path: str | None, name: str, levels: int, is_scaled: bool) -> tuple[Any, ...]:
        model = models[name]
        clip = read_clip(path, model, is_scaled)
        result = reconstruct(model, clip.audio, min(int(levels), model.config.num_quantizers))
        rate, heard_rate = model.config.sampling_rate, result.sampling_rate
        seen = {"original": resample(clip.audio, rate, heard_rate), "reconstruction": result.audio}
        size = model.config.quantizer_kwargs["codebook_size"]
        return (
            describe(name, clip, result, model),
            playable(clip.audio, rate),
            playable(result.audio, heard_rate),
            spectrograms(seen, heard_rate),
            draw_codes(result.codes, size, model.config.frame_rate),
        )

    def compare(path: str | None, *choices: Any) -> tuple[Any, ...]:
        first, first_levels, second, second_levels, is_scaled = choices
        outputs: list[Any] = []
        seen: dict[str, Tensor] = {}
        rate = max(output_rate(models[name]) for name in (first, second))
        for label, name, levels in (("A", first, first_levels), ("B", second, second_levels)):
            model = models[name]
            clip = read_clip(path, model, is_scaled)
            result = reconstruct(model, clip.audio, min(int(levels), model.config.num_quantizers))
            outputs += [describe(name, clip, result, model), playable(result.audio, result.sampling_rate)]
            seen.setdefault("original", resample(clip.audio, model.config.sampling_rate, rate))
            seen[f"{label}: {name}, {len(result.codes)} levels"] = resample(result.audio, result.sampling_rate, rate)
        return *outputs, spectrograms(seen, rate)

    with gr.Blocks(title="Audio tokenizer", analytics_enabled=False, delete_cache=(600, 3000)) as page:
        gr.Markdown(
            f"# Audio tokenizer\nRecord or upload up to {MAX_SECONDS:g} seconds and {MAX_BYTES >> 20} MiB (WAV, FLAC, "
            "MP3, Ogg); the model turns it into codes and back."
        )
        with gr.Tab("Reconstruct"):
            with gr.Row():
                source = audio_input("source")
                with gr.Column():
                    name, levels = model_choice(models, names[0], "Model")
                    is_scaled = scaling()
                    button = gr.Button("Reconstruct", variant="primary", elem_id="reconstruct")
                    numbers = gr.Markdown(elem_id="numbers")
            with gr.Row():
                original = gr.Audio(label="Original, as the model takes it", format="wav", interactive=False)
                restored = gr.Audio(label="Reconstruction", format="wav", interactive=False, elem_id="restored")
            picture = gr.Image(label="Spectrograms", interactive=False, format="png", elem_id="spectrograms")
            codes = gr.Image(label="Codes", interactive=False, format="png", elem_id="codes")
            outputs = [numbers, original, restored, picture, codes]
            button.click(show, [source, name, levels, is_scaled], outputs, api_name="reconstruct")
            if EXAMPLES:
                gr.Examples([[str(path)] for path in EXAMPLES], [source], cache_examples=False)
        with gr.Tab("Compare"):
            other_source = audio_input("other_source")
            with gr.Row():
                choices: list[Any] = []
                shown: list[Any] = []
                for label, chosen in (("A", names[0]), ("B", names[-1])):
                    with gr.Column():
                        choices += model_choice(models, chosen, f"Model {label}", 1.0 if label == "A" else 0.25)
                        shown.append(gr.Markdown(elem_id=f"numbers_{label}"))
                        shown.append(
                            gr.Audio(label=label, format="wav", interactive=False, elem_id=f"restored_{label}")
                        )
            both_scaled = scaling()
            compare_button = gr.Button("Compare", variant="primary", elem_id="compare")
            both = gr.Image(label="Spectrograms", interactive=False, format="png", elem_id="both")
            compare_button.click(compare, [other_source, *choices, both_scaled], [*shown, both], api_name="compare")
    return page


def audio_input(elem_id: str) -> gr.Audio:
    """Return an input component for a recording or a file."""
    return gr.Audio(sources=["upload", "microphone"], type="filepath", label="Audio", elem_id=elem_id)


def scaling() -> gr.Checkbox:
    """Return a checkbox for scaling audio to the training level before encoding."""
    return gr.Checkbox(True, label=f"Scale to a peak of {PEAK}, the level that the committed model was trained at")


def model_choice(
    models: dict[str, MossAudioTokenizerModel], chosen: str, label: str, share: float = 1.0
) -> tuple[gr.Dropdown, gr.Slider]:
    """Return a menu of models and a slider whose maximum is the number of levels of the chosen model."""
    most = models[chosen].config.num_quantizers
    slug = label.lower().replace(" ", "_")
    menu = gr.Dropdown(list(models), value=chosen, label=label, elem_id=slug)
    slider = gr.Slider(1, most, value=max(1, round(share * most)), step=1, label="Levels", elem_id=f"{slug}_levels")

    def follow(name: str, levels: int) -> Any:
        most = models[name].config.num_quantizers
        return gr.Slider(maximum=most, value=min(levels, most))

    menu.change(follow, [menu, slider], slider, api_visibility="private")
    return menu, slider


def load(names: list[str]) -> dict[str, MossAudioTokenizerModel]:
    """Load models, each named after the last part of its path or hub name, with a number added where names clash."""
    models: dict[str, MossAudioTokenizerModel] = {}
    for name in names:
        title = short = Path(name).resolve().name
        number = 1
        while title in models:
            number += 1
            title = f"{short} ({number})"
        models[title] = load_tokenizer(name).eval()
    return models


def start(page: gr.Blocks, **options: Any) -> Any:
    """Serve the page without anything from other servers; `options` are passed to `launch`."""
    return page.launch(theme=THEME, max_file_size=MAX_BYTES, ssr_mode=False, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=[str(DEFAULT_MODEL)], help="runs, export folders or hub names")
    parser.add_argument("--host", help="address to listen at; GRADIO_SERVER_NAME, else this machine only")
    parser.add_argument("--port", type=int, help="GRADIO_SERVER_PORT, else the first free one from 7860 on")
    options = parser.parse_args()
    try:
        models = load(options.models)
    except UserError as error:
        sys.exit(f"app.py: {error}")
    start(build(models), server_name=options.host, server_port=options.port)


if __name__ == "__main__":
    main()
