"""`pipeline("feature-extraction")`: audio in, codes out."""

from typing import Any

from torch import Tensor
from transformers import Pipeline


class MossAudioTokenizerPipeline(Pipeline):
    """Encode clips: samples at the model's rate, or mappings with `array` (or `raw`) and `sampling_rate`.

    Returns codes [levels, frames] of each clip. Options: `num_quantizers`, `chunk_duration`, `loudness` of `encode`.
    """

    _load_tokenizer: Any = False
    _load_feature_extractor: Any = True
    _load_image_processor: Any = False
    _load_processor: Any = False

    def _sanitize_parameters(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        names = ("num_quantizers", "chunk_duration")
        forward = {name: options[name] for name in names if name in options}
        return {name: options[name] for name in ("loudness",) if name in options}, forward, {}

    def preprocess(self, clip: Any, loudness: float | None = None) -> Any:  # type: ignore[override]
        """Return the model's inputs for one clip."""
        rate = None
        if isinstance(clip, dict):
            rate = clip.get("sampling_rate")
            clip = clip["array"] if "array" in clip else clip["raw"]
        if isinstance(clip, str):
            raise ValueError(f"{clip!r} is a path: read the file first, for example with soundfile.read")
        extract: Any = self.feature_extractor
        features = extract(clip, sampling_rate=rate, loudness=loudness)
        # [1, T, C]: transformers pads the second dimension when it joins clips to a batch (`batch_size`).
        return features | {"input_values": features["input_values"].transpose(1, 2)}

    def _forward(self, inputs: Any, **options: Any) -> Any:  # type: ignore[override]
        model: Any = self.model
        output = model.encode(inputs["input_values"].transpose(1, 2), inputs["padding_mask"], **options)
        # transformers splits a batch at the first dimension.
        return {"codes": output.audio_codes.transpose(0, 1), "lengths": output.audio_codes_lengths}

    def postprocess(self, output: Any) -> Tensor:  # type: ignore[override]
        """Return the codes [levels, frames] of one clip."""
        return output["codes"][0, :, : int(output["lengths"][0])]
