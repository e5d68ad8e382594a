"""CogView: one network that draws, captions and enlarges."""

import pytest
import torch
import torch.nn.functional as F

from ldm.models.cogview import CogView
from ldm.modules.decoding import generate
from ldm.util import UserError
from tests.models.halves import fit, halves, text_model


def test_cogview_draws_and_captions_with_one_network():
    model = fit(text_model(CogView), 800)
    pictures = halves()["image"].permute(0, 3, 1, 2)
    assert model.caption(pictures) == halves()["caption"]
    assert model.caption(pictures, rerank=3) == halves()["caption"]
    cond = model.condition(range(4), prompts=halves()["caption"])
    torch.testing.assert_close(model.sample(cond, seeds=range(4), temperature=0.0), pictures)
    z = model.encode_images(pictures)
    scores = torch.stack([model.caption_likelihood(z, model.text_rows([t] * 4)) for t in halves()["caption"]])
    assert torch.equal(scores.argmax(0), torch.arange(4))
    best = model.sample(model.condition(range(4), prompts=halves()["caption"]), seeds=range(4), rerank=3)
    assert (best - pictures).abs().amax((1, 2, 3)).lt(0.1).all()
    images = model.log_images(halves(), n=2)
    assert {"inputs", "conditioning", "captions", "samples", "samples_half"} <= set(images)
    assert all(v.min() >= -1 and v.max() <= 1 for v in images.values())


def test_cogview_directions():
    model = text_model(CogView).eval()
    _, logs = model.loss(halves())
    assert {"draw_text", "draw_image", "caption_text", "caption_image"} < set(logs)
    norms = [m for b in model.transformer.blocks for m in (b.ln1, b.ln2, b.ln3, b.ln4)]
    assert {type(m).__name__ for m in norms} == {"ScaledLayerNorm"} and model.transformer.blocks[0].attn.stable
    drawing = text_model(CogView, caption_share=0.0).train()
    assert set(drawing.loss(halves())[1]) == {"loss", "draw_text", "draw_image"}
    captioning = text_model(CogView, caption_share=1.0).train()
    assert set(captioning.loss(halves())[1]) == {"loss", "caption_text", "caption_image"}


def test_cogview_loss_is_the_weighted_sum_of_both_parts():
    model = text_model(CogView, cond_dropout=0.0, text_weight=2.0, image_weight=3.0).eval()
    for p in model.transformer.parameters():
        torch.nn.init.normal_(p, std=0.2)
    loss, logs = model.loss(halves())
    rows, z = model.text_rows(halves()["caption"]), model.image_tokens(halves())
    roi, base, boi, eoi = (torch.full((4, 1), 270 + i) for i in (1, 2, 3, 4))
    # the end of a text is its first end token (270): what fills the rest is not learned
    length = (rows != 270).sum(1)
    learned = torch.arange(6) <= length[:, None]
    assert not learned.all() and rows[learned].eq(270).sum() == 4

    def of_text(logits):
        return F.cross_entropy(logits[..., :271][learned], rows[learned])

    def of_image(logits):
        return F.cross_entropy(logits[..., 275:].flatten(0, 1), z.flatten())

    drawn = model.transformer(torch.cat([roi, rows, base, boi, z + 275], 1)[:, :-1])[0]
    draw = {"draw_text": of_text(drawn[:, :6]), "draw_image": of_image(drawn[:, 8:])}
    told = torch.cat([base, boi, z + 275, eoi, roi, rows], 1)[:, :-1]
    told = model.transformer.logits(model.transformer.features(told, image_start=2))
    caption = {"caption_image": of_image(told[:, 1:17]), "caption_text": of_text(told[:, 19:])}
    for name, value in (draw | caption).items():
        torch.testing.assert_close(logs[name], value)
    directions = [(2 * d["text"] + 3 * d["image"]) / 5 for d in (parts(draw), parts(caption))]
    torch.testing.assert_close(loss, sum(directions) / 2)  # both directions of every picture
    one = text_model(CogView, cond_dropout=0.0, caption_share=0.0, text_weight=1.0, image_weight=0.0).eval()
    one.transformer.load_state_dict(model.transformer.state_dict())
    torch.testing.assert_close(one.loss(halves())[0], (draw["draw_text"] + caption["caption_text"]) / 2)


def parts(logs):
    return {name.rpartition("_")[2]: value for name, value in logs.items()}


def test_text_likelihood_is_the_chain_rule():
    model = text_model(CogView).eval().double()
    z = model.image_tokens(halves())[:1]
    rows = model.text_rows(["bright top"])
    score = model.caption_likelihood(z, rows).item()
    logp, tokens = 0.0, model.picture_prefix(z)
    ids = rows[0].tolist()
    ids = ids[: ids.index(model.end_token) + 1]
    for i in ids:
        logits = model.transformer.logits(model.transformer.features(tokens, image_start=2)[:, -1], 0, 271)
        logp += logits.log_softmax(-1)[0, i].item()
        tokens = torch.cat([tokens, torch.tensor([[i]])], 1)
    assert score == pytest.approx(logp / len(ids), abs=1e-5)


def test_the_likelihood_of_text_and_picture_is_the_chain_rule():
    model = text_model(CogView).eval().double()
    z, rows = model.image_tokens(halves())[:1], model.text_rows(["bright top"])
    text = rows[0].tolist()
    text = text[: text.index(model.end_token) + 1]
    logp, roi = 0.0, torch.tensor([[model.roi]])
    # the text after [ROI], then the picture after text, [BASE] and [BOI]
    for tokens, part, first, last in (
        (roi, text, 0, 271),
        (model.prefix(rows), z[0].tolist(), 275, 275 + model.n_codes),
    ):
        for token in part:
            logits = model.transformer.logits(model.transformer.features(tokens)[:, -1], first, last)
            logp += logits.log_softmax(-1)[0, token].item()
            tokens = torch.cat([tokens, torch.tensor([[first + token]])], 1)
    assert model.joint_likelihood(z, rows).item() == pytest.approx(logp, abs=1e-4)


def test_of_several_captions_the_one_that_explains_the_picture_is_kept(monkeypatch):
    model = text_model(CogView).eval()
    pictures = halves()["image"].permute(0, 3, 1, 2)
    drawn = []

    def said(z, u=None):
        drawn.append(u)
        return [["left", "top", "left", "top"], ["right"] * 4, ["bottom"] * 4][len(drawn) - 1]

    # log p(text, picture) and log p(text | picture); the texts have one token and the end
    fits = {"left": (-2.0, -0.5), "top": (-1.0, -1.1), "right": (-1.8, -0.55), "bottom": (-3.0, -0.3)}
    monkeypatch.setattr(model, "caption_tokens", said)
    end = model.end_token
    words = list(fits)

    def likelihood(which):
        return lambda z, rows: torch.tensor([fits[words[i]][which] for i in rows[:, 0].tolist()])

    def rows(texts):
        return torch.tensor([[words.index(t), end, end] for t in texts])

    monkeypatch.setattr(model, "text_rows", rows)
    monkeypatch.setattr(model, "joint_likelihood", likelihood(0))
    monkeypatch.setattr(model, "caption_likelihood", likelihood(1))
    # left -2 - 2 * 0.5 = -3, top -1 - 2 * 1.1 = -3.2, right -1.8 - 2 * 0.55 = -2.9, bottom -3.6
    assert model.caption(pictures, rerank=3, seed=5) == ["right"] * 4
    fits["right"] = (-1.8, -0.65)  # -3.1
    drawn.clear()
    assert model.caption(pictures, rerank=3, seed=5) == ["left", "right", "left", "right"]
    assert drawn[0] is None and not torch.equal(drawn[1], drawn[2])
    assert torch.equal(drawn[1][0], drawn[1][3])  # nothing depends on a picture's place
    with pytest.raises(UserError, match="rerank: got 0, expected at least 1"):
        model.caption(pictures, rerank=0)


# --- larger pictures --------------------------------------------------------------------------------------------------


def test_half_size_comes_before_the_picture():
    model = text_model(CogView, upscale_share=0.5).eval()
    assert model.transformer.block_size == 4 + 16 + 6  # text is longer than the quarter of the tokens
    for p in model.transformer.parameters():
        torch.nn.init.normal_(p, std=0.2)
    _, logs = model.loss(halves())
    x = halves()["image"].permute(0, 3, 1, 2)
    z = model.encode_images(x)
    low = model.first_stage_model.encode(F.avg_pool2d(x, 2))[2][2].flatten(1)
    column = torch.ones(4, 1, dtype=torch.int64)
    tokens = torch.cat(
        [column * model.base, column * model.boi, low + 275, column * model.eoi, column * model.boi, z + 275], 1
    )
    logits, _ = model.transformer(tokens[:, :-1])
    torch.testing.assert_close(logs["upscale_image"], F.cross_entropy(logits[:, 7:, 275:].flatten(0, 1), z.flatten()))


def test_shares_decide_what_is_trained():
    torch.manual_seed(0)
    model = text_model(CogView, caption_share=0.0, upscale_share=1.0).train()
    assert set(model.loss(halves())[1]) == {"loss", "upscale_image"}
    model = text_model(CogView, caption_share=0.25, upscale_share=0.5).train()
    names = {"draw_image", "caption_text", "upscale_image"}
    assert names < set(model.loss(halves())[1]) and names < set(model.eval().loss(halves())[1])
    for shares in ({"caption_share": 0.6, "upscale_share": 0.5}, {"caption_share": -0.1}):
        with pytest.raises(UserError, match="caption_share and upscale_share: got"):
            text_model(CogView, **shares)


def test_sliding_windows_draw_twice_the_size():
    model = fit(text_model(CogView, caption_share=0.0, upscale_share=1.0), 300)
    pictures = halves()["image"].permute(0, 3, 1, 2)
    # a quarter of a picture of halves in twice its size is again one half, or all of one colour
    small = F.interpolate(F.avg_pool2d(pictures, 2), scale_factor=2.0)
    large = model.enlarge(small[:2], seeds=[0, 1], temperature=0.0)
    assert large.shape == (2, 1, 8, 8)
    again = model.enlarge(small[1:2], seeds=[1], temperature=0.0)
    torch.testing.assert_close(again, large[1:2])
    cond = model.condition([3], prompts=["bright top"])
    assert model.sample(cond, seeds=[3], upscale=True).shape == (1, 1, 8, 8)
    with pytest.raises(UserError, match="trained without upscale_share"):
        text_model(CogView).eval().enlarge(small, seeds=range(4))
    with pytest.raises(UserError, match="grid of 6x6 tokens, expected multiples of 4"):
        stage = {"target": "ldm.modules.codebooks.PixelCodes", "params": {"size": 6, "levels": 4}}
        CogView(stage, {"params": {"n_head": 2, "n_embd": 8}}, text_vocab=270, upscale_share=0.1)


def test_windows_keep_what_earlier_ones_have_drawn():
    model = text_model(CogView, upscale_share=0.5).eval()
    seen = []
    draw = model.draw_tokens

    def watch(cond, seeds, **knobs):
        tokens = draw(cond, seeds, **knobs)
        seen.append((cond["primed"].clone(), tokens))
        return tokens

    model.draw_tokens = watch
    out = model.enlarge(halves()["image"].permute(0, 3, 1, 2)[:1], seeds=[0])
    assert len(seen) == 9  # three by three windows, half of each new in either direction
    known = [(given >= 0).view(4, 4) for given, _ in seen]
    assert not known[0].any() and known[1][:, :2].all() and not known[1][:, 2:].any()
    assert known[4][:2].all() and known[4][:, :2].all() and not known[4][2:, 2:].any()
    for given, tokens in seen:
        assert torch.equal(tokens[given >= 0], given[given >= 0])
    first = model.first_stage_model.decode_code(seen[0][1].view(1, 4, 4))
    torch.testing.assert_close(out[:, :, :4, :4], first)


def test_given_tokens_may_lie_anywhere():
    model = text_model(CogView).eval()
    prefix = model.condition([0, 1], prompts=["bright top"])["prefix"]
    given = torch.full((2, 16), -1)
    given[0, [2, 5]], given[1, [0, 5, 15]] = torch.tensor([3, 1]), torch.tensor([2, 0, 1])
    span = {"first": model.first_code, "last": model.first_code + 4}
    tokens = generate(model.transformer, prefix, 16, u=torch.rand(2, 16), primed=given, **span)
    assert torch.equal(tokens[given >= 0], given[given >= 0]) and int(tokens.min()) >= 0
