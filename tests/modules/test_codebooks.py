import json

import pytest
import torch
import torch.nn.functional as F

from ldm.modules.bpe import BytePairs
from ldm.modules.codebooks import PixelCodes
from ldm.modules.cond_stages import CoordStage, Identity, SOSProvider
from ldm.modules.quantize import EMAVectorQuantizer, straight_through
from ldm.util import UserError

# --- pixels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "levels"), [(1, 2), (1, 16), (3, 4)])
def test_pixels_are_rounded_to_their_levels(channels, levels):
    stage = PixelCodes((3, 5), channels, levels)
    x = torch.rand(2, channels, 3, 5) * 2 - 1
    quant, loss, (_, _, codes) = stage.encode(x)
    assert codes.shape == (2, 3, 5) and int(codes.min()) >= 0 and int(codes.max()) < stage.n_embed == levels**channels
    assert (quant - x).abs().max() <= 1 / (levels - 1) + 1e-6 and loss.item() == 0
    assert torch.equal(stage.decode_code(codes), quant)
    every = torch.arange(stage.n_embed).view(1, 1, -1)
    assert torch.equal(stage.encode(stage.decode_code(every))[2][2], every)
    assert stage.decode_code(every).amin() == -1 and stage.decode_code(every).amax() == 1


def test_pixels_of_other_kinds():
    with pytest.raises(ValueError, match="got 3 channels, expected 1"):
        PixelCodes(4).encode(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="levels: got 1"):
        PixelCodes(4, levels=1)


# --- formulas of the trained codebooks --------------------------------------------------------------------------------


def test_running_means_are_the_recursion_of_the_paper():
    """N <- g N + (1 - g) n, m <- g m + (1 - g) sum z, e = m / N (van den Oord et al. 2017, equations 6 to 8)."""
    torch.manual_seed(0)
    model = EMAVectorQuantizer(5, 3, decay=0.8, eps=0.0)
    N, m, e = torch.ones(5), model.embedding.weight.clone(), model.embedding.weight.clone()
    for _ in range(4):
        z = torch.randn(2, 3, 4, 4)
        flat = z.permute(0, 2, 3, 1).reshape(-1, 3)
        chosen = F.one_hot(torch.cdist(flat, e).argmin(1), 5).float()
        read = chosen @ e
        N, m = 0.8 * N + 0.2 * chosen.sum(0), 0.8 * m + 0.2 * chosen.t() @ flat
        e = m / N[:, None]
        _, loss, (perplexity, _, _) = model(z)
        p = chosen.mean(0)
        assert perplexity.item() == pytest.approx(torch.exp(-(p * (p + 1e-10).log()).sum()).item(), rel=1e-4)
        torch.testing.assert_close(model.embedding.weight, e, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(loss, 0.25 * (flat - read).square().mean())


def test_straight_through_has_the_value_of_one_and_the_gradient_of_the_other():
    z = torch.randn(4, requires_grad=True)
    weights = torch.randn(4)
    out = straight_through(z, z.round())
    assert torch.allclose(out, z.round())
    (out * weights).sum().backward()
    assert torch.equal(z.grad, weights)


# --- conditions as tokens ---------------------------------------------------------------------------------------------


def test_coordinates_are_the_mean_of_a_patch():
    stage = CoordStage(1024, 4)
    place = (torch.arange(64) / 64).view(1, 1, 8, 8)
    quant, _, (_, _, tokens) = stage.encode(place)
    means = torch.stack([place[0, 0, i : i + 4, j : j + 4].mean() for i in (0, 4) for j in (0, 4)])
    assert tokens.flatten().tolist() == (1024 * means).round().long().tolist() and torch.equal(quant.long(), tokens)
    assert stage.decode(quant).shape == (1, 1, 8, 8)
    assert int(stage.encode(torch.ones(1, 1, 8, 8))[2][2].max()) == 1023
    with pytest.raises(ValueError, match="expected \\[B, 1, H, W\\]"):
        stage.encode(torch.zeros(1, 3, 8, 8))


def test_start_token_and_order():
    assert SOSProvider(7).encode(torch.zeros(3, 2))[2][2].tolist() == [[7]] * 3
    x = torch.arange(6).view(1, 6)
    assert torch.equal(Identity()(Identity()(x), reverse=True), x)


# --- text -------------------------------------------------------------------------------------------------------------

CAPTIONS = ["red heart", "red apple", "grinning face", "Face with tears of joy"] * 3


def test_text_comes_back():
    pairs = BytePairs(300)
    pairs.learn(CAPTIONS)
    for text in ("red heart", "  Face of   an APPLE ", "für 日本 🙂", ""):
        assert pairs.decode(pairs.encode(text)) == " ".join(text.lower().split())
    assert len(pairs.encode("red heart")) < len(" red heart") and max(pairs.encode("red heart")) >= 256
    assert pairs.encode("") == []
    assert pairs.unseen("red face") == [] and pairs.unseen("red 山!") == ["山", "!"]


def test_the_vocabulary_travels_in_the_state_dict():
    one, two = BytePairs(300), BytePairs(300)
    one.learn(CAPTIONS)
    assert two.encode("red heart") != one.encode("red heart") and not two.learned
    two.load_state_dict(one.state_dict())
    assert two.encode("red heart") == one.encode("red heart") and two.learned
    again = BytePairs(300)
    again.learn(CAPTIONS)
    assert torch.equal(again.merges, one.merges)  # the same on every machine of a run


def test_a_given_file(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    other = Tokenizer(models.BPE())
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    other.train_from_iterator(CAPTIONS, trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet))
    path = tmp_path / "tokenizer.json"
    other.save(str(path))
    pairs = BytePairs(290, str(path))
    assert [pairs.decode([i]) for i in pairs.encode("red heart")] == [
        t.replace("Ġ", "") for t in other.encode("red heart").tokens
    ]
    path.write_text(json.dumps({"model": {"type": "WordPiece"}}))
    with pytest.raises(UserError, match="holds no byte-pair encoding"):
        BytePairs(290, str(path))
    path.write_text(json.dumps({"model": {"type": "BPE", "merges": ["日 本"]}}))
    with pytest.raises(UserError, match="does not work on bytes"):
        BytePairs(290, str(path))
    with pytest.raises(UserError, match="cannot be read"):
        BytePairs(290, str(tmp_path / "none.json"))


def test_vocabularies_that_cannot_be():
    with pytest.raises(ValueError, match="vocab_size: got 200, expected at least 256"):
        BytePairs(200)
    with pytest.raises(UserError, match="captions are all empty"):
        BytePairs(300).learn(["", "  "])
