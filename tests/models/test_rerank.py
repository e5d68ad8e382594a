"""CLIP as a judge: sizes from the weights, cosines, and the best of several drawings."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from ldm.models import rerank
from ldm.models.autoregressive import DALLE
from ldm.models.rerank import ClipRanker
from ldm.modules.open_clip_text import CLIP
from ldm.util import SeededNoise, UserError
from tests.models.halves import halves, text_model

VISION = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2}
TEXT = {"embed_dim": 16, "width": 64, "heads": 1, "layers": 3, "quick": True}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    clip = CLIP(VISION, TEXT)
    path = tmp_path_factory.mktemp("clip") / "clip.safetensors"
    save_file({k: v.contiguous() for k, v in clip.state_dict().items()}, path)
    return path, clip.eval()


def test_the_cosine_is_that_of_the_model_in_the_file(weights):
    path, clip = weights
    ranker = ClipRanker(path)
    x = halves()["image"].permute(0, 3, 1, 2)
    texts = halves()["caption"]
    scores = ranker(x, texts)
    with torch.no_grad():
        pictures = clip.encode_image(ranker.images.preprocess(x.expand(-1, 3, -1, -1)))
        words = clip.encode_text(torch.as_tensor(ranker.text.tokenizer(texts)))
    torch.testing.assert_close(scores, F.cosine_similarity(pictures, words), rtol=1e-4, atol=1e-5)


def test_the_best_of_several_is_kept(weights, monkeypatch):
    monkeypatch.setattr(rerank, "FOLDER", weights[0].parent)
    model = text_model(DALLE).eval()
    cond = model.condition([3, 4], prompts=["bright top"])
    best = model.sample(cond, seeds=[3, 4], rerank=5)
    assert torch.equal(model.sample(model.condition([4], prompts=["bright top"]), seeds=[4], rerank=5), best[1:])
    assert not any("clip" in k or "ranker" in k for k in model.state_dict())
    # all five of a seed, judged by hand
    several = {k: v.repeat_interleave(5, 0) for k, v in cond.items()}
    u = SeededNoise([3, 4]).rand((2, 5, 16)).flatten(0, 1)
    x = model.decode_tokens(model.draw_tokens(several, [3] * 5 + [4] * 5, first=model.first_code, u=u))
    score = ClipRanker(weights[0])(x, ["bright top"] * 10).view(2, 5)
    chosen = x.unflatten(0, (2, 5))[torch.arange(2), score.argmax(1)]
    torch.testing.assert_close(best, chosen)
    with pytest.raises(UserError, match="rerank: got 0"):
        model.sample(cond, seeds=[3, 4], rerank=0)


def test_missing_and_other_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(rerank, "FOLDER", tmp_path)
    with pytest.raises(UserError, match="rerank: got none in .* CogView needs none"):
        ClipRanker()
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"x": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(UserError, match="rerank: got a.safetensors, b.safetensors"):
        ClipRanker()
    with pytest.raises(UserError, match="no CLIP model under OpenAI's names: visual.positional_embedding is missing"):
        ClipRanker(tmp_path / "a.safetensors")
