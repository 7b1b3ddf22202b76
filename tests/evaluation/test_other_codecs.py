"""Every adapter with a small random model of the real class; if a package is missing, it is skipped and named.

XY-Tokenizer is not tested: its code is distributed only with its weights.
"""

import contextlib
import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch
import transformers

from moss_train.evaluation.codecs.base import (
    BigCodec,
    DacCodec,
    EncodecCodec,
    HiggsCodec,
    MimiCodec,
    MimoCodec,
    Qwen3TtsCodec,
    SpeechTokenizerCodec,
    Xcodec2Codec,
    bitrate,
    check_levels,
)
from moss_train.evaluation.codecs.published_table import CODECS, load_codec
from moss_train.utils.errors import UserError

CPU = torch.device("cpu")


def small_encodec():
    config = transformers.EncodecConfig(hidden_size=16, num_filters=4, num_lstm_layers=1, codebook_dim=16)
    return EncodecCodec(transformers.EncodecModel(config))


def small_dac():
    config = transformers.DacConfig(encoder_hidden_size=8, decoder_hidden_size=32, n_codebooks=3, sampling_rate=24000)
    return DacCodec(transformers.DacModel(config))


MIMI = {
    "hidden_size": 32,
    "num_filters": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 32,
    "codebook_dim": 16,
    "vector_quantization_hidden_dimension": 16,
    "num_quantizers": 6,
    "upsample_groups": 32,
}


def small_mimi():
    return MimiCodec(transformers.MimiModel(transformers.MimiConfig(**MIMI)))


def small_higgs():
    ratios = [8, 5, 4, 2, 3]
    acoustic = {"model_type": "dac", "encoder_hidden_size": 4, "decoder_hidden_size": 32, "hidden_size": 16}
    semantic = {"model_type": "hubert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    semantic |= {"intermediate_size": 16, "conv_dim": [8] * 7, "num_conv_pos_embeddings": 4, "mask_time_prob": 0.0}
    config = transformers.HiggsAudioV2TokenizerConfig(
        acoustic_model_config=acoustic | {"downsampling_ratios": ratios, "upsampling_ratios": ratios},
        semantic_model_config=semantic | {"num_conv_pos_embedding_groups": 2},
        codebook_dim=8,
    )
    return HiggsCodec(transformers.HiggsAudioV2TokenizerModel(config))


def small_xcodec2():
    semantic = {"model_type": "wav2vec2-bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    semantic |= {"intermediate_size": 16, "feature_projection_input_dim": 160, "conv_depthwise_kernel_size": 3}
    config = transformers.Xcodec2Config(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        encoder_hidden_size=4,
        quantization_dim=48,
        semantic_model_config=semantic | {"output_hidden_size": 16},
    )
    return Xcodec2Codec(transformers.Xcodec2Model(config), transformers.Xcodec2FeatureExtractor())


SPEECHTOKENIZER = {
    "n_filters": 4,
    "dimension": 16,
    "strides": [8, 5, 4, 2],
    "lstm_layers": 1,
    "bidirectional": True,
    "dilation_base": 2,
    "residual_kernel_size": 3,
    "n_residual_layers": 1,
    "activation": "ELU",
    "sample_rate": 16_000,
    "n_q": 4,
    "semantic_dimension": 16,
    "codebook_size": 32,
}


def small_speechtokenizer():
    return SpeechTokenizerCodec(pytest.importorskip("speechtokenizer").SpeechTokenizer(SPEECHTOKENIZER))


BIGCODEC = {
    "ngf": 4,
    "use_rnn": True,
    "rnn_bidirectional": False,
    "rnn_num_layers": 1,
    "up_ratios": (2, 2, 2, 5, 5),
    "dilations": (1, 3, 9),
    "out_channels": 32,
    "codebook_size": 64,
    "vq_num_quantizers": 1,
    "codebook_dim": 4,
}


def small_bigcodec():
    return BigCodec(pytest.importorskip("bigcodec").BigCodec(**BIGCODEC))


def small_qwen3_tts():
    if importlib.util.find_spec("qwen_tts") is None:
        pytest.skip("qwen-tts is not installed: it pins an older transformers")
    from qwen_tts.core import Qwen3TTSTokenizerV2Config, Qwen3TTSTokenizerV2Model

    decoder = {"codebook_size": 32, "num_quantizers": 4, "hidden_size": 32, "latent_dim": 32, "codebook_dim": 32}
    decoder |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 32}
    decoder |= {"num_hidden_layers": 1, "decoder_dim": 32}
    config = Qwen3TTSTokenizerV2Config(MIMI | {"codebook_size": 32}, decoder, encoder_valid_num_quantizers=4)
    return Qwen3TtsCodec(Qwen3TTSTokenizerV2Model(config))


MIMO_CODE = "MIMO_AUDIO_TOKENIZER_CODE"


def small_mimo_model():
    folder = os.environ.get(MIMO_CODE)
    if folder is None:
        pytest.skip(f"set {MIMO_CODE} to the folder in which its package mimo_audio_tokenizer lies")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    module = importlib.import_module("mimo_audio_tokenizer.modeling_audio_tokenizer")
    sizes = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
    sizes |= {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
    sizes |= {"vocoder_dim": 16, "vocoder_intermediate_dim": 16, "vocoder_num_layers": 1, "vocoder_attention_heads": 2}
    config = module.MiMoAudioTokenizerConfig(
        avg_pooler=2, nfft=960, window_size=960, num_quantizers=5, codebook_size=[64, 64, 16], **sizes
    )
    return module.MiMoAudioTokenizer(config)


def small_mimo():
    return MimoCodec(small_mimo_model())


NEEDED = {small_higgs: "HiggsAudioV2TokenizerModel", small_xcodec2: "Xcodec2Model"}


@pytest.mark.parametrize(
    ("build", "rate", "levels", "bits"),
    [
        (small_encodec, 24000, 32, 750.0),
        (small_dac, 24000, 3, 468.75),
        (small_mimi, 24000, 6, 137.5),
        (small_higgs, 24000, 16, 250.0),
        (small_xcodec2, 16000, 1, 800.0),
        (small_speechtokenizer, 16000, 4, 250.0),
        (small_bigcodec, 16000, 1, 480.0),
        (small_qwen3_tts, 24000, 4, 62.5),
        (small_mimo, 24000, 5, 150.0),
    ],
)
def test_adapter_encodes_once_and_decodes_prefixes(build, rate, levels, bits):
    if build in NEEDED and not hasattr(transformers, NEEDED[build]):
        pytest.skip(f"this transformers has no {NEEDED[build]}")
    torch.manual_seed(0)
    codec = build()
    fill_codebooks(codec.model)
    assert (codec.sampling_rate, len(codec.codebook_sizes), bitrate(codec, 1)) == (rate, levels, bits)
    audio = 0.1 * torch.randn(1, rate + 77, generator=torch.Generator().manual_seed(0))
    codes = codec.encode(audio)
    assert codes.shape[0] == levels
    assert codes.dtype == torch.int64
    assert codes.shape[1] == pytest.approx(codec.frame_rate, abs=2)
    for count in {1, levels}:
        decoded = codec.decode(codes[:count])
        assert decoded.shape[0] == 1
        assert decoded.shape[1] == pytest.approx(rate, abs=2 * rate / codec.frame_rate)
        assert torch.isfinite(decoded).all()
    if levels > 1:
        assert not torch.equal(codec.decode(codes), codec.decode(codes[:1]))


def fill_codebooks(model: torch.nn.Module) -> None:
    """Fill codebooks stored as buffers: they start as zeros, so that all levels would decode to the same audio."""
    for name, buffer in model.named_buffers():
        if name.rsplit(".", 1)[-1] in ("embed", "embed_sum"):
            buffer.normal_(generator=torch.Generator().manual_seed(1))
    for name, parameter in model.named_parameters():
        if name.endswith("embedding_sum"):
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))


def test_published_bitrates_follow_from_the_facts_of_the_codecs():
    codec = small_encodec()
    assert bitrate(codec, 2) == 1500
    assert bitrate(codec, 6) == 4500


@pytest.mark.parametrize(
    ("name", "package", "way_out"),
    [
        ("bigcodec", "bigcodec", "pairs=<folder>"),
        ("speechtokenizer", "speechtokenizer", "pairs=<folder>"),
        ("qwen3_tts", "qwen_tts", "an environment of its own"),
    ],
)
def test_codecs_without_their_package_say_what_to_do(name, package, way_out, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("moss_train.evaluation.metrics.base.find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"package {package} is not installed.*{way_out}"):
        load_codec(name, "weights", CPU)


def test_code_of_a_repository_is_asked_for_by_the_codec_that_needs_it(tmp_path):
    with pytest.raises(UserError, match=r"codec=mimo runs code.*give code_dir="):
        load_codec("mimo", str(tmp_path), CPU)
    with pytest.raises(UserError, match="there is no mimo_audio_tokenizer"):
        load_codec("mimo", str(tmp_path), CPU, str(tmp_path))
    with pytest.raises(UserError, match=r"code_dir=here has no effect with codec=mimi"):
        load_codec("mimi", str(tmp_path), CPU, "here")
    with pytest.raises(UserError, match=f"weights={tmp_path}"):
        load_codec("xy_tokenizer", str(tmp_path), CPU, str(tmp_path))


def folder_with_code(folder: Path, canary: Path, prefix: str = "") -> Path:
    """Write weights with a module beside them that creates a file when it is imported."""
    (folder / "evil.py").write_text(f"from pathlib import Path\n\nPath({str(canary)!r}).touch()\n")
    auto_map = {"AutoConfig": f"{prefix}evil.Config", "AutoModel": f"{prefix}evil.Model"}
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto_map}))
    return folder


@pytest.mark.parametrize(("prefix", "code"), [("", None), ("", "elsewhere"), ("others/repository--", "beside")])
def test_the_code_beside_weights_runs_only_when_it_is_named(tmp_path, prefix, code):
    canary = tmp_path / "canary"
    weights = tmp_path / "weights"
    weights.mkdir()
    folder = str(folder_with_code(weights, canary, prefix))
    with pytest.raises(UserError, match="code"):
        load_codec("xy_tokenizer", folder, CPU, {None: None, "beside": folder}.get(code, str(tmp_path)))
    assert not canary.exists()


def test_code_beside_weights_is_run_by_whoever_names_it(tmp_path):
    """Shows that importing the code of the folder above does create the canary."""
    canary = tmp_path / "canary"
    with contextlib.suppress(Exception):
        load_codec("xy_tokenizer", str(folder_with_code(tmp_path, canary)), CPU, str(tmp_path))
    assert canary.exists()


def test_the_folder_of_code_gives_one_package_and_shadows_no_other(tmp_path):
    package = tmp_path / "src" / "mimo_audio_tokenizer"
    package.mkdir(parents=True)
    (tmp_path / "src" / "wave.py").write_text("raise AssertionError('not the module of Python')\n")
    (package / "modeling_audio_tokenizer.py").write_text("import wave\n\nfrom .more import NoSuchThing\n")
    (package / "more.py").touch()
    before = list(sys.path)
    sys.modules.pop("wave", None)
    try:
        with pytest.raises(UserError, match=r"NoSuchThing"):
            load_codec("mimo", str(tmp_path), CPU, str(tmp_path))
    finally:
        for name in [name for name in sys.modules if name.startswith("mimo_audio_tokenizer")]:
            del sys.modules[name]
    assert sys.path == before


def test_code_that_does_not_run_beside_this_transformers_is_one_line(tmp_path):
    package = tmp_path / "src" / "mimo_audio_tokenizer"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "modeling_audio_tokenizer.py").write_text("from transformers import NoSuchThing\n")
    with pytest.raises(UserError, match=r"codec=mimo: its code does not run beside transformers .*NoSuchThing"):
        load_codec("mimo", str(tmp_path), CPU, str(tmp_path))
    for name in [name for name in sys.modules if name.startswith("mimo_audio_tokenizer")]:
        del sys.modules[name]


def test_wrong_names_and_weights_are_errors(tmp_path):
    with pytest.raises(UserError, match=f"has to be one of {CODECS[0]}"):
        load_codec("mp3", None, CPU)
    with pytest.raises(UserError, match="needs weights="):
        load_codec("mimi", None, CPU)
    with pytest.raises(UserError, match=f"weights={tmp_path}"):
        load_codec("dac", str(tmp_path), CPU)


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("dac", small_dac),
        ("speechtokenizer", small_speechtokenizer),
        ("bigcodec", small_bigcodec),
        ("qwen3_tts", small_qwen3_tts),
        ("mimo", small_mimo),
    ],
)
def test_weights_are_read_from_a_folder(name, build, tmp_path):
    torch.manual_seed(0)
    codec = build()
    if name == "speechtokenizer":
        (tmp_path / "config.json").write_text(json.dumps(SPEECHTOKENIZER))
        torch.save(codec.model.state_dict(), tmp_path / "SpeechTokenizer.pt")
    else:
        codec.model.save_pretrained(tmp_path)
    loaded = load_codec(name, str(tmp_path), CPU, os.environ.get(MIMO_CODE) if name == "mimo" else None)
    assert loaded.fingerprint == codec.fingerprint
    assert loaded.codebook_sizes == codec.codebook_sizes
    audio = 0.1 * torch.randn(1, 4096, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.encode(audio), codec.encode(audio))


def test_numbers_of_levels_are_checked():
    codec = small_mimi()
    assert check_levels(codec, None) == (1, 2, 4, 6)
    assert check_levels(codec, [6, 1, 6]) == (1, 6)
    for wrong in ([0], [7], []):
        with pytest.raises(UserError, match="num_quantizers="):
            check_levels(codec, wrong)
