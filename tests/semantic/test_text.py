import pytest

from moss_train.semantic import ByteText


@pytest.mark.parametrize("text", ["", "he was not an ill disposed young man", "Žluťoučký kůň", "汉语", "🎧"])
def test_bytes_bring_every_text_back(text):
    tokens = ByteText()(text)
    assert tokens[-1] == 256
    assert len(tokens) == len(text.encode()) + 1
    assert max(tokens) < ByteText.vocab_size
    assert ByteText().decode([*tokens, 0, 0]) == text
