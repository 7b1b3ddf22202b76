"""Use an exported folder with torch and transformers alone; started by test_transformers_versions.py.

Arguments: a folder or a repository name, a folder with what to expect, a folder to save to.
"""

import sys

sys.modules["moss_train"] = None  # type: ignore[assignment]  # any import of it fails

from pathlib import Path  # noqa: E402

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModel  # noqa: E402

name, expected_path, out = sys.argv[1:]
expected = load_file(expected_path)
audio, codes = expected["audio"], expected["codes"]


def load(source: str, **options: object) -> torch.nn.Module:
    return AutoModel.from_pretrained(source, trust_remote_code=True, **options).eval()


def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Rounding decides ties: now and then a code differs, and with it the later levels of its frame."""
    return found.shape == wanted.shape and float((found == wanted).float().mean()) > 0.95


model = load(name)
assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
assert same(model.encode(audio).audio_codes, codes)
frame = model.config.downsample_rate / model.config.sampling_rate
assert same(model.encode(audio, chunk_duration=frame).audio_codes, codes)
assert same(model.stream().encode(audio)[0], codes)
torch.testing.assert_close(model.decode(codes).audio, expected["decoded"], atol=1e-5, rtol=1e-4)

half = load(name, dtype=torch.bfloat16)
assert half.dtype == torch.bfloat16
assert half.quantizer.quantizers[0].codebook.weight.dtype == torch.float32
assert half.decode(codes).audio.isfinite().all()

decoder = load(name, part="decoder")
torch.testing.assert_close(decoder.decode(codes).audio, model.decode(codes).audio, atol=1e-5, rtol=1e-4)
assert not decoder.encoder

general = load(name, attn_implementation="sdpa")
assert not general.encoder[1].transformer.layers[0].self_attn.flash

model.save_pretrained(out)
again = load(out)
assert same(again.encode(audio).audio_codes, codes)

if (Path(name) / "preprocessor_config.json").exists() or "/" in name:
    from transformers import AutoFeatureExtractor, AutoProcessor, pipeline

    clips = [audio[0, 0].numpy(), audio[0, 0, : audio.shape[2] // 2].numpy()]
    for kind in (AutoFeatureExtractor, AutoProcessor):
        features = kind.from_pretrained(name, trust_remote_code=True)(clips, sampling_rate=model.config.sampling_rate)
        encoded = model.encode(**features)
        assert same(encoded.audio_codes[:, 0], codes[:, 0])
        assert encoded.audio_codes_lengths[1] == -(-len(clips[1]) // model.config.downsample_rate)
    extractor = pipeline("feature-extraction", model=name, trust_remote_code=True)
    assert same(extractor(clips[0]), codes[:, 0])
    if hasattr(transformers, "AutoModelForAudioTokenization"):
        tokenizer = transformers.AutoModelForAudioTokenization.from_pretrained(name, trust_remote_code=True)
        assert same(tokenizer.eval().encode(audio).audio_codes, codes)

print(transformers.__version__)
