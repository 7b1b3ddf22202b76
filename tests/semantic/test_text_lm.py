import math

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from moss_train.config.build import build
from moss_train.semantic import ByteText, PretrainedText, TextLM

CONFIG = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.fixture
def lm() -> TextLM:
    torch.manual_seed(0)
    return TextLM(latent_dim=6, text=ByteText(), config=CONFIG)


def batch(texts: list[str], frames: list[int]) -> dict[str, torch.Tensor]:
    tokens = [ByteText()(text) for text in texts]
    longest = max(map(len, tokens))
    return {
        "states": torch.randn(len(texts), max(frames), 6, generator=torch.Generator().manual_seed(1)),
        "num_frames": torch.tensor(frames),
        "text_tokens": torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in tokens]),
        "text_lengths": torch.tensor([len(ids) for ids in tokens]),
        "task_ids": torch.zeros(len(texts), dtype=torch.long),
    }


def test_an_untrained_model_knows_nothing(lm):
    prediction = lm(**batch(["yes", "ten of clubs"], [3, 5]))
    assert prediction.num_tokens == 4 + 13
    assert prediction.loss_sum.item() / 17 == pytest.approx(math.log(257), abs=0.1)


def test_clips_do_not_touch_each_other_and_padding_is_not_seen(lm):
    together = lm(**batch(["yes", "ten of clubs"], [3, 5])).loss_sum
    full = batch(["yes", "ten of clubs"], [3, 5])
    alone = sum(lm(**{name: value[i : i + 1] for name, value in full.items()}).loss_sum for i in (0, 1))
    assert together.item() == pytest.approx(alone.item(), rel=1e-5)
    full["states"][0, 3:] = 1e3
    assert lm(**full).loss_sum.item() == pytest.approx(together.item(), rel=1e-6)


def test_it_reads_states_and_task_and_all_of_them_get_a_gradient(lm):
    inputs = batch(["seven"], [4])
    inputs["states"].requires_grad_()
    lm(**inputs).loss_sum.backward()
    assert (inputs["states"].grad.abs().sum(-1) > 0).all()
    inputs["states"] = inputs["states"].detach()
    asr = lm(**inputs).loss_sum
    inputs["task_ids"] = torch.tensor([2])
    assert lm(**inputs).loss_sum != asr


def test_the_loss_is_the_hand_assembled_sequence(lm):
    inputs = batch(["ok"], [2])
    model = lm.language_model
    sequence = torch.cat(
        (
            lm.task_tags.weight[0:1],
            lm.projection(inputs["states"][0]),
            model.get_input_embeddings()(inputs["text_tokens"][0]),
        )
    )
    logits = model(inputs_embeds=sequence[None]).logits[0]
    expected = torch.nn.functional.cross_entropy(logits[2:5], inputs["text_tokens"][0], reduction="sum")
    assert lm(**inputs).loss_sum.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("arguments", [{}, {"config": CONFIG, "pretrained": "somewhere"}])
def test_it_is_either_new_or_pretrained(arguments):
    with pytest.raises(ValueError, match="either config"):
        TextLM(latent_dim=6, text=ByteText(), **arguments)


def test_it_starts_from_pretrained_weights_with_their_tokenizer(tmp_path):
    letters = {letter: i for i, letter in enumerate(["<|endoftext|>", *"tenofclubs\u0120"])}  # \u0120 is a space in it
    Qwen2Tokenizer(vocab=letters, merges=[]).save_pretrained(tmp_path)
    released = Qwen2ForCausalLM(Qwen2Config(vocab_size=16, **CONFIG))
    released.save_pretrained(tmp_path)
    lm = build(
        {
            "_target_": "moss_train.semantic.TextLM",
            "pretrained": str(tmp_path),
            "text": {"_target_": "moss_train.semantic.PretrainedText", "path": str(tmp_path)},
        },
        latent_dim=6,
    )
    assert isinstance(lm.text, PretrainedText)
    assert all(part.training for part in lm.modules())
    tokens = [letters[letter] for letter in "ten\u0120of"]
    assert lm.text("ten of") == [*tokens, letters["<|endoftext|>"]]
    assert lm.text.decode([*tokens, letters["<|endoftext|>"]]) == "ten of"
    assert all(torch.equal(a, b) for a, b in zip(lm.language_model.parameters(), released.parameters(), strict=True))
    with pytest.raises(ValueError, match="needs 257"):
        TextLM(latent_dim=6, text=ByteText(), pretrained=str(tmp_path))


def test_greedy_text_is_what_the_model_itself_finds_most_likely(lm):
    """With teacher forcing, every generated token is the most likely one: cached and full forward passes agree."""
    states = torch.randn(1, 5, 6, generator=torch.Generator().manual_seed(3))
    tokens = lm.generate(states, torch.tensor([1]), max_tokens=12)
    assert len(tokens) == 12 or tokens[-1] == ByteText.end_id
    again = lm(states, torch.tensor([5]), torch.tensor([tokens]), torch.tensor([len(tokens)]), torch.tensor([1]))
    assert again.num_correct == again.num_tokens == len(tokens)
