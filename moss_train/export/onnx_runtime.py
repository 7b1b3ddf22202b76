"""Encode and decode audio with the ONNX graphs in this folder; needs numpy and onnxruntime, nothing else.

    tokenizer = Tokenizer("folder")
    codes = tokenizer.encode(audio)        # [levels, batch, frames] of audio [batch, channels, T]
    audio = tokenizer.decode(codes[:8])    # any prefix of the levels
    stream = tokenizer.stream()            # stream.encode(chunk), stream.flush(), stream.decode(codes)

`python runtime.py` checks this folder on this machine against stored codes and audio.
"""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

SETTINGS_FILE, VECTORS_FILE = "codec.json", "test_vectors.npz"
SETTINGS = ("sampling_rate", "number_channels", "downsample_rate", "num_quantizers", "codebook_size", "chunk_frames")


class Tokenizer:
    """The graphs of a folder, each loaded on its first use.

    Args:
        folder: contains `codec.json`, `encoder.onnx` and `decoder.onnx`; one of the graphs may be missing.
        threads, providers: of onnxruntime; by default as many threads as it chooses, on the CPU.
    """

    def __init__(self, folder: str | Path = Path(__file__).parent, threads: int = 0, providers: Any = None) -> None:
        self.folder, self.threads, self.providers = Path(folder), threads, providers or ["CPUExecutionProvider"]
        try:
            self.settings = json.loads((self.folder / SETTINGS_FILE).read_text("utf-8"))
            values = [int(self.settings[name]) for name in SETTINGS]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.folder} is no complete ONNX export: {SETTINGS_FILE}: {error!r}") from None
        self.sampling_rate, self.num_channels, self.hop, self.num_levels, self.codebook_size, self.chunk_frames = values
        self.output_sampling_rate = int(self.settings.get("output_sampling_rate", self.sampling_rate))
        self._sessions: dict[str, Any] = {}

    def encode(self, audio: Any, lengths: Any = None, num_quantizers: int | None = None) -> np.ndarray:
        """Return the codes [levels, B, frames] of whole clips; a partial last frame is filled up with zeros.

        Audio is [B, C, T]; also [T] or [B, T] for one channel, [C, T] for several. `lengths` [B] are the valid samples
        of each clip; codes beyond them are zero. `num_quantizers` levels are returned, or all.
        """
        audio = self.check_audio(audio)
        if not audio.shape[2]:
            raise ValueError("the audio has no samples")
        own = np.full(len(audio), audio.shape[2]) if lengths is None else np.asarray(lengths)
        if own.shape != (len(audio),) or own.min() < 0 or own.max() > audio.shape[2]:
            raise ValueError(f"lengths must be {len(audio)} numbers from 0 to {audio.shape[2]}, got {lengths}")
        stream = self.stream(len(audio), num_quantizers)
        audio = np.where(np.arange(audio.shape[2]) < own[:, None, None], audio, np.float32(0))
        codes = np.concatenate((stream.encode(audio), stream.flush()), axis=2)
        return codes * (np.arange(codes.shape[2]) < -(-own[:, None] // self.hop))

    def decode(self, codes: Any) -> np.ndarray:
        """Return the audio [B, C, T] of codes [n, B, frames], or [n, frames], at `output_sampling_rate`."""
        codes = np.asarray(codes)[:, None] if np.ndim(codes) == 2 else np.asarray(codes)
        return self.stream(codes.shape[1] if codes.ndim == 3 else 1).decode(codes)

    def stream(self, batch_size: int = 1, num_quantizers: int | None = None) -> "Stream":
        """Start streams that are encoded or decoded chunk by chunk; `num_quantizers` levels are encoded."""
        levels = self.num_levels if num_quantizers is None else num_quantizers
        if batch_size < 1 or not 1 <= levels <= self.num_levels:
            raise ValueError(f"a batch of {batch_size} with {levels} levels: need 1 or more, 1 to {self.num_levels}")
        return Stream(self, batch_size, levels)

    def check_audio(self, audio: Any) -> np.ndarray:
        """Return float32 [B, C, T]; ValueError for other shapes, integers, and samples that are not finite."""
        audio, shape, channels = np.asarray(audio), np.shape(audio), self.num_channels
        if audio.dtype.kind != "f":
            raise ValueError(f"expected floating-point audio in -1..1, got {audio.dtype} (divide 16 bits by 32768)")
        if channels == 1 and audio.ndim in (1, 2):
            audio = audio[None, None] if audio.ndim == 1 else audio[:, None]
        elif audio.ndim == 2:
            audio = audio[None]
        if audio.ndim != 3 or audio.shape[1] != channels:
            raise ValueError(f"expected audio [B, {channels}, T], got shape {shape}")
        if not np.isfinite(audio).all():
            raise ValueError("the audio has samples that are not finite")
        return audio.astype(np.float32)

    def session(self, part: str) -> Any:
        """Return the session of "encoder" or "decoder"."""
        if part not in self._sessions:
            try:
                onnxruntime = importlib.import_module("onnxruntime")
            except ImportError:
                raise ImportError("this needs onnxruntime: pip install onnxruntime") from None
            path = self.folder / f"{part}.onnx"
            if not path.is_file():
                raise ValueError(f"{self.folder} has no {part}: export one without part=, or copy {path.name} there")
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = self.threads
            try:
                self._sessions[part] = onnxruntime.InferenceSession(str(path), options, providers=self.providers)
            except Exception as error:  # onnxruntime's classes share no other base
                raise ValueError(
                    f"{path} is damaged, copy or export it again: {str(error).split(chr(10))[0]}"
                ) from None
        return self._sessions[part]


class Stream:
    """State of `batch_size` independent streams; make it with `Tokenizer.stream`."""

    def __init__(self, tokenizer: Tokenizer, batch_size: int, levels: int) -> None:
        self.tokenizer, self.batch_size, self.levels = tokenizer, batch_size, levels
        self._states: dict[str, dict[str, Any]] = {}
        self._pending = np.zeros((batch_size, tokenizer.num_channels, 0), np.float32)

    def encode(self, chunk: Any) -> np.ndarray:
        """Take any number of samples [B, C, T] and return the codes [levels, B, frames] that they complete."""
        chunk, hop = self.tokenizer.check_audio(chunk), self.tokenizer.hop
        self._check_batch(len(chunk))
        audio = np.concatenate((self._pending, chunk), axis=2)
        frames = audio.shape[2] // hop
        self._pending = audio[:, :, frames * hop :].copy()
        empty = np.zeros((self.tokenizer.num_levels, self.batch_size, 0), np.int64)
        codes = self._run("encoder", "audio", audio[:, :, : frames * hop], hop)
        return np.concatenate([empty, *codes], axis=2)[: self.levels]

    def flush(self) -> np.ndarray:
        """Encode the remaining samples of a partial frame, filled up with zeros."""
        missing = -self._pending.shape[2] % self.tokenizer.hop
        return self.encode(np.zeros((self.batch_size, self.tokenizer.num_channels, missing), np.float32))

    def decode(self, codes: Any) -> np.ndarray:
        """Return the audio [B, C, T] of the next frames of codes [n, B, frames] of the first n levels."""
        codes, levels, size = np.asarray(codes), self.tokenizer.num_levels, self.tokenizer.codebook_size
        if codes.ndim != 3 or not 1 <= len(codes) <= levels or codes.dtype.kind not in "iu":
            raise ValueError(f"expected whole numbers [1..{levels}, B, frames], got {codes.dtype} {codes.shape}")
        self._check_batch(codes.shape[1])
        if codes.size and not 0 <= codes.min() <= codes.max() < size:
            raise ValueError(f"codes must lie in 0..{size - 1}, got {codes.min()}..{codes.max()}")
        absent = np.full((levels - len(codes), *codes.shape[1:]), -1)
        every = np.concatenate((codes, absent)).astype(np.int64)
        empty = np.zeros((self.batch_size, self.tokenizer.num_channels, 0), np.float32)
        return np.concatenate([empty, *self._run("decoder", "codes", every, 1)], axis=2)

    def reset(self, items: Any = None) -> None:
        """Restart the streams in `items` (bool [B]), or all; those restarted within a frame begin it with silence."""
        chosen = np.full(self.batch_size, True) if items is None else np.asarray(items, bool)
        self._pending = self._pending[:, :, :0] if chosen.all() else self._pending * ~chosen[:, None, None]
        for state in self._states.values():
            state["position"] = _value(np.where(chosen, 0, state["position"].numpy()))

    def _check_batch(self, found: int) -> None:
        if found != self.batch_size:
            raise ValueError(f"this stream has {self.batch_size} items, the chunk has {found}")

    def _run(self, part: str, name: str, whole: np.ndarray, hop: int) -> Iterator[np.ndarray]:
        """Run a graph step by step; its output `next_x` is its input `x` in the next step."""
        step = self.tokenizer.chunk_frames * hop
        for at in range(0, whole.shape[2], step):
            session = self.tokenizer.session(part)
            if part not in self._states:
                inputs = [i for i in session.get_inputs() if i.name != name]
                kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
                zeros = {i.name: np.zeros([self.batch_size, *i.shape[1:]], kinds[i.type]) for i in inputs}
                self._states[part] = {key: _value(array) for key, array in zeros.items()}
            values = {name: _value(np.ascontiguousarray(whole[:, :, at : at + step])), **self._states[part]}
            outputs = [output.name for output in session.get_outputs()]
            found = dict(zip(outputs, session.run_with_ort_values(outputs, values), strict=True))
            self._states[part] = {key: found[f"next_{key}"] for key in self._states[part]}
            yield found["codes" if name == "audio" else "audio"].numpy()


def _value(array: np.ndarray) -> Any:
    return importlib.import_module("onnxruntime").OrtValue.ortvalue_from_numpy(array)


def main() -> int:
    """Check this folder; return 0 when codes and audio are as close to the stored ones as when it was exported."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    try:
        tokenizer, stored, passed = Tokenizer(folder), np.load(folder / VECTORS_FILE), True
        if (folder / "encoder.onnx").exists():
            equal = float((tokenizer.encode(stored["audio"] / np.float32(32768)) == stored["codes"]).mean())
            passed = equal >= stored["least_equal"]
            print(f"{equal:.2%} of the codes are equal, {float(stored['least_equal']):.2%} have to be")
        if (folder / "decoder.onnx").exists():
            decoded = tokenizer.decode(stored["codes"])[:1, :1]
            error = float(np.abs(decoded - stored["decoded"]).max() / np.abs(stored["decoded"]).max())
            passed &= bool(error <= stored["greatest_error"])
            print(f"audio differs by {error:.1e} of its peak, {float(stored['greatest_error']):.1e} is allowed")
    except Exception as error:  # also those of zipfile and onnxruntime
        print(f"cannot check {folder}: {error}", file=sys.stderr)
        return 2
    print("passed" if passed else "FAILED")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
