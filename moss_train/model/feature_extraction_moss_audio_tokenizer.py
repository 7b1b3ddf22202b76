"""Pad waveforms of different lengths to one batch, for `AutoFeatureExtractor` and `AutoProcessor`."""

from typing import Any

from transformers import BatchFeature, SequenceFeatureExtractor

from .waveforms import as_tensor, check_floating, pad_together, set_level

# Options of other feature extractors, with the values that ask for nothing else than what happens anyway.
WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "padding": (True, False, None, "longest", "do_not_pad"),
    "truncation": (False, None, "do_not_truncate"),
    "max_length": (None,),
    "pad_to_multiple_of": (None,),
    "return_attention_mask": (True, False, None),
}


class MossAudioTokenizerFeatureExtractor(SequenceFeatureExtractor):
    """Pad waveforms and, if asked for, bring them to one level.

    Args:
        feature_size: channels of the waveform.
        sampling_rate: rate that the model expects, in Hz.
        loudness: RMS level in dB relative to full scale that every clip is brought to; None leaves them as they are.
    """

    model_input_names = ["input_values", "padding_mask"]  # noqa: RUF012

    def __init__(
        self,
        feature_size: int = 1,
        sampling_rate: int = 24000,
        padding_value: float = 0.0,
        loudness: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(feature_size=feature_size, sampling_rate=sampling_rate, padding_value=padding_value, **kwargs)
        self.loudness = loudness

    def __call__(
        self,
        raw_audio: Any,
        sampling_rate: int | None = None,
        loudness: float | None = None,
        return_tensors: str | None = "pt",
        **others: Any,
    ) -> BatchFeature:
        """Return `input_values` [B, C, T] and `padding_mask` [B, T], true for real samples.

        Args:
            raw_audio: one clip [T] or [C, T], or a list of such clips of different lengths.
            sampling_rate: of the clips, in Hz; pass it so that a rate other than the model's is refused.
            loudness: overrides that of the feature extractor.
            others: `padding=True` and the like, which other feature extractors need; clips are padded to the longest.

        Raises:
            ValueError: the clips have another sampling rate or number of channels than the model or hold integers, or
                an option that this feature extractor does not have, such as `truncation=True`.
        """
        if unknown := [name for name in others if others[name] not in WITHOUT_EFFECT.get(name, ())]:
            given = ", ".join(f"{name}={others[name]!r}" for name in unknown)
            raise ValueError(f"clips are never cut, and padded to the longest: there is no {given}")
        if sampling_rate not in (None, self.sampling_rate):
            raise ValueError(
                f"the model takes {self.sampling_rate} Hz, got {sampling_rate} Hz: resample the audio first"
            )
        is_list = isinstance(raw_audio, list | tuple) and bool(raw_audio) and not isinstance(raw_audio[0], int | float)
        clips = [as_tensor(clip, "waveforms") for clip in (raw_audio if is_list else [raw_audio])]
        for clip in clips:
            check_floating(clip)
        clips = [(clip[None] if clip.ndim == 1 else clip).float() for clip in clips]
        if any(clip.ndim != 2 or clip.shape[0] != self.feature_size for clip in clips):
            shapes = ", ".join(str(tuple(clip.shape)) for clip in clips[:5])
            raise ValueError(f"expected clips [{self.feature_size}, T], got {shapes}")
        level = self.loudness if loudness is None else loudness
        if level is not None:
            clips = [set_level(clip[None], level)[0] for clip in clips]
        values, mask = pad_together(clips)
        if return_tensors != "pt":
            return BatchFeature({"input_values": values.numpy(), "padding_mask": mask.numpy()}, return_tensors)
        return BatchFeature({"input_values": values, "padding_mask": mask})

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, with `auto_map` as class references (see the configuration's)."""
        output = super().to_dict()
        if auto_map := output.get("auto_map"):
            output["auto_map"] = {name: v if isinstance(v, str) else v[0] for name, v in auto_map.items()}
        return output
