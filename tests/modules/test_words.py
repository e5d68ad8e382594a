import pytest
import torch

from ldm.modules.words import UNKNOWN, WordEmbedder, WordTokenizer
from ldm.util import words_of

WORDS = ["apple", "blue", "cat", "green", "red"]


def test_words_are_split_at_punctuation_and_lower_case():
    assert words_of("Red_Apple, (two) Côte d’Ivoire's") == ["red", "apple", "two", "côte", "divoires"]


def test_tokens():
    tokenizer = WordTokenizer(WORDS, max_length=6)
    assert tokenizer("blue APPLE").tolist() == [[1, 5, 4, 2, 0, 0]]
    assert tokenizer(["", "blue dog"]).tolist() == [[1, 2, 0, 0, 0, 0], [1, 5, UNKNOWN, 2, 0, 0]]
    assert tokenizer.unknown("blue aple dog") == {"aple": ["apple"], "dog": []}
    assert tokenizer.truncated_words("red red red green cat") == ["cat"]


def test_padding_changes_nothing_and_order_does():
    torch.manual_seed(0)
    model = WordEmbedder(WORDS, dim=16, depth=2, heads=2, max_length=6).eval()
    with torch.no_grad():
        out = model(["red cat", "cat red", "red"])
        assert out.shape == (3, 6, 16)
        model.token.weight.data[0] += 5  # the padding's own row
        again = model(["red cat", "cat red", "red"])
    torch.testing.assert_close(again[:2, :4], out[:2, :4])
    assert (out[0, 0] - out[1, 0]).abs().max() > 1e-3  # the first token has read all of them
    assert (out[0, 0] - out[2, 0]).abs().max() > 1e-3


def test_vocabulary_as_one_line_is_the_same():
    assert WordEmbedder(" ".join(WORDS), dim=8, heads=2).words == WORDS
    with pytest.raises(ValueError, match="has no captions"):
        WordEmbedder("auto")


def test_weights_and_unknown_words():
    model = WordEmbedder(WORDS, dim=8, depth=1, heads=2, max_length=6).eval()
    with torch.no_grad():
        plain, weighted = model.encode(["red cat"]), model.encode(["(red:1.5) cat"])
    assert plain.shape == (1, 6, 8) and (plain - weighted).abs().max() > 1e-3
    assert model.unknown_words("xyzzy cat") == {"xyzzy": []}
