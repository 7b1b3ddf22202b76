"""Speaker similarity, speech recognition and predicted MOS; tests of uninstalled packages are skipped."""

from pathlib import Path

import pytest
import torch

from moss_train.audio.io import read_audio
from moss_train.evaluation.codecs.base import CatCodec
from moss_train.evaluation.metrics import base, signal
from moss_train.evaluation.metrics.asr import ErrorRates, choose_backend, words
from moss_train.evaluation.metrics.base import MetricError, Pair
from moss_train.evaluation.metrics.codes import TextCrossEntropy, text_lm_of_checkpoint
from moss_train.evaluation.metrics.signal import DistillMos, Dnsmos
from moss_train.evaluation.metrics.speaker import SpeakerVerifier, WavLMSimilarity, load_weights, map_weight_name
from moss_train.model import MossAudioTokenizerModel
from moss_train.semantic import ByteText, TextLM
from moss_train.utils.errors import UserError
from tests.model.small_models import one_stage_config

RATE = 16_000
FOLDER = Path(__file__).parents[1] / "data" / "metrics"
TEXT = "had he married a more amiable woman he might have been made still more respectable than he was"


def recording(kind: str, stem: str = "pocketsphinx_2967dc9e43c5-noise20.flac") -> torch.Tensor:
    return read_audio(FOLDER / kind / stem, sampling_rate=RATE, num_channels=1)[0]


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair(recording("gt_audios"), recording("syn_audios"), RATE, {"text": TEXT, "language": "en"})


def tiny_verifier() -> SpeakerVerifier:
    from transformers import WavLMConfig

    config = WavLMConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        conv_dim=(8,) * 7,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
    )
    torch.manual_seed(0)
    return SpeakerVerifier(config, channels=16, width=8).eval()


RELEASED_NAMES = {
    "feature_extract.model.mask_emb": "wavlm.masked_spec_embed",
    "feature_extract.model.layer_norm.weight": "wavlm.feature_projection.layer_norm.weight",
    "feature_extract.model.post_extract_proj.bias": "wavlm.feature_projection.projection.bias",
    "feature_extract.model.feature_extractor.conv_layers.3.0.weight": (
        "wavlm.feature_extractor.conv_layers.3.conv.weight"
    ),
    "feature_extract.model.feature_extractor.conv_layers.3.2.1.bias": (
        "wavlm.feature_extractor.conv_layers.3.layer_norm.bias"
    ),
    "feature_extract.model.encoder.pos_conv.0.bias": "wavlm.encoder.pos_conv_embed.conv.bias",
    "feature_extract.model.encoder.pos_conv.0.weight_g": (
        "wavlm.encoder.pos_conv_embed.conv.parametrizations.weight.original0"
    ),
    "feature_extract.model.encoder.layers.0.self_attn.relative_attention_bias.weight": (
        "wavlm.encoder.layers.0.attention.rel_attn_embed.weight"
    ),
    "feature_extract.model.encoder.layers.1.self_attn.grep_a": "wavlm.encoder.layers.1.attention.gru_rel_pos_const",
    "feature_extract.model.encoder.layers.1.self_attn.k_proj.weight": "wavlm.encoder.layers.1.attention.k_proj.weight",
    "feature_extract.model.encoder.layers.1.self_attn_layer_norm.bias": "wavlm.encoder.layers.1.layer_norm.bias",
    "feature_extract.model.encoder.layers.1.final_layer_norm.bias": "wavlm.encoder.layers.1.final_layer_norm.bias",
    "feature_extract.model.encoder.layers.1.fc2.weight": "wavlm.encoder.layers.1.feed_forward.output_dense.weight",
    "feature_extract.model.encoder.layer_norm.weight": "wavlm.encoder.layer_norm.weight",
    "layer2.Res2Conv1dReluBn.convs.6.weight": "layer2.Res2Conv1dReluBn.convs.6.weight",
    "feature_weight": "feature_weight",
}


def test_released_names_become_ours():
    assert {name: map_weight_name(name) for name in RELEASED_NAMES} == RELEASED_NAMES
    ours = set(tiny_verifier().state_dict())
    assert {name for name in RELEASED_NAMES.values() if "conv_layers.3" not in name} <= ours


def released_names(model: SpeakerVerifier) -> dict[str, torch.Tensor]:
    """Return the model's weights under the parameter names of the released file."""
    backwards = [
        ("wavlm.feature_projection.layer_norm", "layer_norm"),
        ("wavlm.feature_projection.projection", "post_extract_proj"),
        ("parametrizations.weight.original0", "weight_g"),
        ("parametrizations.weight.original1", "weight_v"),
        ("pos_conv_embed.conv", "pos_conv.0"),
        (".attention.rel_attn_embed", ".self_attn.relative_attention_bias"),
        (".attention.gru_rel_pos_linear", ".self_attn.grep_linear"),
        (".attention.gru_rel_pos_const", ".self_attn.grep_a"),
        (".attention.", ".self_attn."),
        (".feed_forward.intermediate_dense", ".fc1"),
        (".feed_forward.output_dense", ".fc2"),
        ("masked_spec_embed", "mask_emb"),
    ]
    named = {}
    for name, tensor in model.state_dict().items():
        new = name
        for old, replacement in backwards:
            new = new.replace(old, replacement)
        if "conv_layers" in new:
            new = new.replace(".conv.", ".0.").replace(".layer_norm.", ".2.1.")
        elif ".layers." in new and ".final_layer_norm" not in new:
            new = new.replace(".layer_norm.", ".self_attn_layer_norm.")
        named[f"feature_extract.model.{new.removeprefix('wavlm.')}" if "wavlm" in name else new] = tensor
    return named


def test_weights_under_released_names_give_the_same_embeddings():
    model, other = tiny_verifier(), tiny_verifier()
    for parameter in other.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    weights = released_names(model)
    load_weights(other, weights | {"loss_calculator.projection.weight": torch.ones(1)})
    audio = torch.randn(2, 8000, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.equal(model(audio), other(audio))
        assert model(audio).shape == (2, 8)
    del weights["linear.weight"]
    with pytest.raises(UserError, match=r"lacks 1 weights, such as linear\.weight"):
        load_weights(other, weights)


def test_embeddings_do_not_depend_on_the_level():
    model = tiny_verifier()
    audio = torch.randn(1, 8000, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(model(audio), model(0.1 * audio), rtol=1e-3, atol=1e-3)


def test_the_published_similarity_asks_for_its_weights():
    assert "wavlm_large_finetune.pth" in str(WavLMSimilarity().missing())
    assert "there is no /nowhere" in str(WavLMSimilarity("/nowhere").missing())


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("He's well-read, isn't he?", "en", ["he", "is", "well", "read", "is", "not", "he"]),
        ("Uh, Mr. Smith paid twenty-one dollars (laughs)", "en", ["mister", "smith", "paid", "$21"]),
        ("colour", "en", ["colour"]),
        ("L\N{RIGHT SINGLE QUOTATION MARK}ÉTÉ, quoi!", "fr", ["l", "été", "quoi"]),
        ("你好，世界。 ok", "zh", ["你", "好", "世", "界", "o", "k"]),
    ],
)
def test_texts_are_compared_as_whisper_normalises_them(text, language, expected):
    assert words(text, language) == expected


def test_the_table_of_spellings_is_that_of_the_model(tmp_path):
    """The description, which decides whether results are comparable, includes whether the table is used."""
    for name, content in (("with", '{"colour": "color"}'), ("without", None), ("wrong", "[1]")):
        (tmp_path / name).mkdir()
        if content is not None:
            (tmp_path / name / "normalizer.json").write_text(content)
    folders = [str(tmp_path / name) for name in ("with", "without")]
    assert [words("Colour!", "en", folder) for folder in folders] == [["color"], ["colour"]]
    with_table, without = (ErrorRates("whisper", folder).description for folder in folders)
    assert "with its table" in with_table
    assert "without its table" in without
    with pytest.raises(UserError, match="no table of spellings"):
        words("colour", "en", str(tmp_path / "wrong"))


def test_recognition_of_a_sentence(pair):
    rates = ErrorRates("faster_whisper")
    if rates.missing():
        pytest.skip(str(rates.missing()))
    values = rates.score(pair)
    assert values["wer_words"] == len(TEXT.split())
    assert values["wer_original_errors"] / values["wer_words"] <= 0.2
    assert values == rates.score(pair)
    assert values["dwer_errors"] <= 3


def test_a_recogniser_of_english_leaves_other_languages_out(pair):
    other = Pair(recording("gt_audios"), recording("syn_audios"), RATE, {"language": "cs", "text": "ahoj"})
    assert ErrorRates("faster_whisper").score(other) == {}


def test_missing_recognisers_say_what_to_do(tmp_path):
    assert "recognition_model=" in str(ErrorRates("whisper").missing())
    assert "there is no /nowhere" in str(ErrorRates("whisper", "/nowhere").missing())
    assert choose_backend("whisper", str(tmp_path)).missing() is None
    assert choose_backend("auto", None).backend == "faster_whisper"


def test_whisper_through_transformers(tmp_path, pair):
    """A tiny random model of the real class returns some text, the same on a second call."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    tokenizer = pytest.importorskip("transformers").WhisperTokenizer
    extractor = pytest.importorskip("transformers").WhisperFeatureExtractor
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=300,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        pad_token_id=256,
        bos_token_id=256,
        eos_token_id=256,
        decoder_start_token_id=257,
        begin_suppress_tokens=None,
        max_target_positions=8,
    )
    model = WhisperForConditionalGeneration(config)
    model.generation_config.update(is_multilingual=False, max_length=6, no_timestamps_token_id=258)
    model.save_pretrained(tmp_path)
    vocabulary = write_byte_vocabulary(tmp_path)
    tokenizer(*vocabulary, errors="replace").save_pretrained(tmp_path)
    extractor().save_pretrained(tmp_path)
    rates = ErrorRates("whisper", str(tmp_path))
    assert rates.missing() is None
    values = rates.score(pair)
    assert values["wer_words"] == len(TEXT.split())
    assert values == rates.score(pair)
    longer = Pair(*(recording(kind).repeat(1, 31) for kind in ("gt_audios", "syn_audios")), RATE, {"text": TEXT})
    with pytest.raises(MetricError, match="longer than 30 seconds"):
        rates.score(longer)


def write_byte_vocabulary(folder: Path) -> tuple[str, str]:
    import json

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]
    entries = {character: index for index, character in enumerate(characters)}
    entries |= {"<|endoftext|>": 256, "<|startoftranscript|>": 257, "<|notimestamps|>": 258}
    (folder / "vocab.json").write_text(json.dumps(entries))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return str(folder / "vocab.json"), str(folder / "merges.txt")


@pytest.fixture(scope="module")
def tokenizer_and_lm() -> tuple[MossAudioTokenizerModel, TextLM]:
    torch.manual_seed(0)
    config = one_stage_config(RATE, num_quantizers=4)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text_lm = TextLM(config.quantizer_kwargs["output_dim"], ByteText(), sizes | {"num_key_value_heads": 1})
    return MossAudioTokenizerModel(config).eval(), text_lm


def test_the_text_lm_sees_the_levels_it_is_given(tokenizer_and_lm):
    tokenizer, text_lm = tokenizer_and_lm
    metric = TextCrossEntropy(tokenizer, text_lm)
    codes = CatCodec(tokenizer, "x").encode(recording("gt_audios")[:, :RATE])
    labels = {"text": "hello", "task": "caption"}
    values = metric.measure(codes[:2], labels)
    assert values["text_tokens"] == 6  # five bytes and the end-of-text token
    states = tokenizer.quantizer.decode(codes[:2, None])
    with torch.no_grad():
        tokens = torch.tensor([text_lm.text("hello")])
        expected = text_lm(states, torch.tensor([codes.shape[1]]), tokens, torch.tensor([6]), torch.tensor([2]))
    assert values["text_lm_loss"] == pytest.approx(expected.loss_sum.item())
    assert values["text_lm_loss"] != metric.measure(codes, labels)["text_lm_loss"]
    assert metric.measure(codes, {}) == {}


def test_the_text_lm_comes_out_of_a_checkpoint(tokenizer_and_lm):
    _, text_lm = tokenizer_and_lm
    width = text_lm.projection.in_features
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    node = {"_target_": "moss_train.semantic.TextLM", "text": {"_target_": "moss_train.semantic.ByteText"}}
    node["config"] = sizes | {"num_key_value_heads": 1}
    weights = {f"semantic.{name}": tensor for name, tensor in text_lm.state_dict().items()}
    checkpoint = {"hyper_parameters": {"semantic": node}, "state_dict": weights | {"tokenizer.x": torch.ones(1)}}
    before = torch.get_rng_state()
    loaded = text_lm_of_checkpoint(checkpoint, width)
    assert torch.equal(before, torch.get_rng_state())
    assert loaded is not None
    assert torch.equal(loaded.projection.weight, text_lm.projection.weight)
    assert text_lm_of_checkpoint({"hyper_parameters": {"semantic": None}, "state_dict": {}}, width) is None


@pytest.mark.slow
def test_dnsmos_prefers_the_original(pair):
    if Dnsmos().missing():
        pytest.skip(str(Dnsmos().missing()))
    values = Dnsmos().score(pair)
    assert 1 < values["dnsmos"] < values["dnsmos_original"] < 5


def test_distillmos_gives_the_scores_of_its_package_and_prefers_the_original(pair, capsys):
    metric = DistillMos()
    if metric.missing():
        pytest.skip(str(metric.missing()))
    values = metric.score(pair)
    assert values == {
        "distillmos": pytest.approx(3.050, abs=0.01),
        "distillmos_original": pytest.approx(4.242, abs=0.01),
    }
    assert capsys.readouterr().out == ""


def test_distillmos_scores_a_long_clip_as_its_package_does_but_part_by_part(pair, monkeypatch):
    if DistillMos().missing():
        pytest.skip(str(DistillMos().missing()))
    network = signal._load_distillmos()
    reference = torch.cat([audio[None] for audio in (*pair.at(RATE), *pair.at(RATE))], dim=1)[:, :139_000]
    with torch.inference_mode():
        expected = float(network(reference))
    shapes = []

    def network_of_one_part(audio: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(audio.shape))
        return network(audio)

    monkeypatch.setattr(signal, "_load_distillmos", lambda: network_of_one_part)
    value = DistillMos().score(Pair(reference, reference, RATE))["distillmos"]
    assert value == pytest.approx(expected, abs=1e-4)
    assert shapes == [(1, 122_880)] * 3


def test_distillmos_of_a_silent_recording_has_no_value():
    silence = torch.zeros(1, RATE)
    with pytest.raises(MetricError, match="the reference is silent"):
        DistillMos().score(Pair(silence, silence + 0.1, RATE))


def test_distillmos_says_which_of_its_two_packages_is_missing(monkeypatch):
    monkeypatch.setattr(base, "find_spec", lambda name: None if name == "xls_r_sqa" else "found")
    assert DistillMos().missing() == "package xls_r_sqa is not installed"
