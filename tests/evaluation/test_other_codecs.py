"""Every adapter with a small random model of the real class, and what the others say."""

import pytest
import torch
import transformers

from moss_train.evaluation.codecs import bitrate, check_levels
from moss_train.evaluation.other_codecs import (
    CODECS,
    DacCodec,
    EncodecCodec,
    HiggsCodec,
    MimiCodec,
    Xcodec2Codec,
    load_codec,
)
from moss_train.utils.errors import UserError

CPU = torch.device("cpu")


def small_encodec():
    config = transformers.EncodecConfig(hidden_size=16, num_filters=4, num_lstm_layers=1, codebook_dim=16)
    return EncodecCodec(transformers.EncodecModel(config))


def small_dac():
    config = transformers.DacConfig(encoder_hidden_size=8, decoder_hidden_size=32, n_codebooks=3, sampling_rate=24000)
    return DacCodec(transformers.DacModel(config))


def small_mimi():
    config = transformers.MimiConfig(
        hidden_size=32,
        num_filters=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=32,
        codebook_dim=16,
        vector_quantization_hidden_dimension=16,
        num_quantizers=6,
        upsample_groups=32,
    )
    return MimiCodec(transformers.MimiModel(config))


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


NEEDED = {
    small_encodec: "EncodecModel",
    small_dac: "DacModel",
    small_mimi: "MimiModel",
    small_higgs: "HiggsAudioV2TokenizerModel",
    small_xcodec2: "Xcodec2Model",
}


@pytest.mark.parametrize(
    ("build", "rate", "levels", "bits"),
    [
        (small_encodec, 24000, 32, 750.0),
        (small_dac, 24000, 3, 468.75),
        (small_mimi, 24000, 6, 137.5),
        (small_higgs, 24000, 16, 250.0),
        (small_xcodec2, 16000, 1, 800.0),
    ],
)
def test_adapter_encodes_once_and_decodes_prefixes(build, rate, levels, bits):
    if not hasattr(transformers, NEEDED[build]):
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
    """Codebooks that are buffers start as zeros, with which every level decodes to the same."""
    for name, buffer in model.named_buffers():
        if name.rsplit(".", 1)[-1] in ("embed", "embed_sum"):
            buffer.normal_(generator=torch.Generator().manual_seed(1))


def test_published_bitrates_follow_from_the_facts_of_the_codecs():
    codec = small_encodec()
    assert bitrate(codec, 2) == 1500
    assert bitrate(codec, 6) == 4500


@pytest.mark.parametrize("name", ["bigcodec", "qwen3_tts", "mimo", "xy_tokenizer"])
def test_codecs_without_a_usable_package_say_how_to_measure_them(name):
    with pytest.raises(UserError, match="pairs=<folder>"):
        load_codec(name, "weights", CPU)


def test_wrong_names_and_weights_are_errors(tmp_path):
    with pytest.raises(UserError, match=f"has to be one of {CODECS[0]}"):
        load_codec("mp3", None, CPU)
    with pytest.raises(UserError, match="needs weights="):
        load_codec("mimi", None, CPU)
    with pytest.raises(UserError, match=f"weights={tmp_path}"):
        load_codec("dac", str(tmp_path), CPU)


def test_weights_are_read_from_a_folder(tmp_path):
    torch.manual_seed(0)
    codec = small_dac()
    codec.model.save_pretrained(tmp_path)
    loaded = load_codec("dac", str(tmp_path), CPU)
    assert loaded.fingerprint == codec.fingerprint
    audio = 0.1 * torch.randn(1, 4096, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.encode(audio), codec.encode(audio))


def test_numbers_of_levels_are_checked():
    codec = small_mimi()
    assert check_levels(codec, None) == (1, 2, 4, 6)
    assert check_levels(codec, [6, 1, 6]) == (1, 6)
    for wrong in ([0], [7], [True], []):
        with pytest.raises(UserError, match="num_quantizers="):
            check_levels(codec, wrong)
