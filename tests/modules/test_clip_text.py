import json
from pathlib import Path

import pytest
import torch
from torch import nn

from ldm.modules.clip_text import CLIP_TEXT_CONFIGS, CLIPTextModel
from ldm.modules.open_clip_text import CLIP, TEXT_ARCHS, OpenCLIPText, VisionTransformer, text_arch
from ldm.modules.text_embedders import (
    FrozenCLIPEmbedder,
    FrozenClipImageEmbedder,
    FrozenCLIPTextEmbedder,
    FrozenOpenCLIPEmbedder,
    FrozenOpenCLIPEmbedder2,
)
from tests.modules.conditioner_keys import check_official
from tests.reference import compare, filler

FIXTURES = Path(__file__).parents[1] / "reference" / "fixtures"
SMALL = dict(
    vocab_size=120,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=20,
    eos_token_id=119,
)
SMALL_OPEN = dict(embed_dim=24, width=32, heads=4, layers=3, vocab_size=120, context_length=20)
TOKENS = torch.tensor([[118, 5, 17, 40, 119, 119, 119], [118, 7, 119, 119, 119, 119, 119]])


def test_frozen_clip_embedder_fixture():
    fx = compare.load(FIXTURES / "frozen_clip_embedder.json")
    m = FrozenCLIPEmbedder(**fx["params"], clip_config=fx["clip_config"])
    compare.check_keys(m, fx)
    filler.fill(m, fx["seed"]).eval()
    tokens = compare.inputs(fx)["tokens"]
    z = m.transformer(input_ids=tokens).last_hidden_state
    short = m.transformer(input_ids=tokens[:, :9]).last_hidden_state
    assert compare.check(fx, {"z": z, "short": short}) == []
    assert torch.allclose(m(tokens), z, atol=1e-6)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_equals_transformers(act):
    from transformers import CLIPTextConfig
    from transformers import CLIPTextModel as Theirs

    config = {**SMALL, "hidden_act": act, "projection_dim": 24, "bos_token_id": 118}
    ours = filler.fill(CLIPTextModel.from_config(config), 1).eval()
    theirs = Theirs(CLIPTextConfig(**config)).eval()
    # transformers 5 has no `text_model.` level and no persistent position_ids
    with_level = any(k.startswith("text_model.") for k in theirs.state_dict())
    state = {k if with_level else k.removeprefix("text_model."): v for k, v in ours.state_dict().items()}
    keys = theirs.load_state_dict(state, strict=False)
    assert keys.missing_keys == [] and all(k.endswith("position_ids") for k in keys.unexpected_keys)
    with torch.no_grad():
        a, b = ours(TOKENS, output_hidden_states=True), theirs(TOKENS, output_hidden_states=True)
    assert torch.allclose(a.last_hidden_state, b.last_hidden_state, atol=2e-6)
    assert torch.allclose(a.pooler_output, b.pooler_output, atol=2e-6)
    for i in range(3):  # what transformers appends last has changed between versions
        assert torch.allclose(a.hidden_states[i], b.hidden_states[i], atol=2e-6)
    assert torch.equal(a.pooler_output, a.last_hidden_state[[0, 1], [4, 2]])


@pytest.mark.parametrize("quick", [False, True])
def test_both_towers_equal_open_clip(quick):
    from open_clip.model import CLIP as Theirs

    vision = dict(image_size=28, patch_size=14, width=128, layers=2)
    ours = filler.fill(CLIP(vision, {**SMALL_OPEN, "quick": quick}), 2).eval()
    text_cfg = {k: SMALL_OPEN[k] for k in ("width", "heads", "layers", "vocab_size", "context_length")}
    theirs = Theirs(24, vision, text_cfg, quick_gelu=quick).eval()
    theirs.load_state_dict(ours.state_dict())
    tokens = torch.where(TOKENS == 119, 0, TOKENS)
    tokens[0, 4] = tokens[1, 2] = 119
    tokens = nn.functional.pad(tokens, (0, 13))
    image = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        assert torch.allclose(ours.encode_text(tokens), theirs.encode_text(tokens), atol=2e-6)
        assert torch.allclose(ours.encode_image(image), theirs.encode_image(image), atol=2e-6)
        assert torch.allclose(ours.features(tokens, 2), _open_clip_features(theirs, tokens, 2), atol=2e-6)


def _open_clip_features(model, tokens, depth):
    x = model.token_embedding(tokens) + model.positional_embedding
    for block in list(model.transformer.resblocks)[:depth]:
        x = block(x, attn_mask=model.attn_mask)
    return x


def test_arch_tables_equal_open_clips_files():
    import open_clip

    folder = Path(open_clip.__file__).parent / "model_configs"
    for name in TEXT_ARCHS:
        theirs = json.loads((folder / f"{name}.json").read_text())
        ours = text_arch(name)
        assert ours["embed_dim"] == theirs["embed_dim"]
        assert {k: ours[k] for k in ("width", "heads", "layers")} == {
            k: theirs["text_cfg"][k] for k in ("width", "heads", "layers")
        }


@pytest.mark.parametrize(
    ("build", "name", "prefix"),
    [
        (lambda: FrozenCLIPEmbedder(), "sd_v1", "cond_stage_model."),
        (lambda: FrozenOpenCLIPEmbedder(layer="penultimate"), "sd_2_1", "conditioner.embedders.0."),
        (lambda: FrozenCLIPEmbedder(layer="hidden", layer_idx=11), "sdxl_base", "conditioner.embedders.0."),
        (
            lambda: FrozenOpenCLIPEmbedder2(
                "ViT-bigG-14", layer="penultimate", always_return_pooled=True, legacy=False
            ),
            "sdxl_base",
            "conditioner.embedders.1.",
        ),
    ],
)
def test_official_keys_on_the_meta_device(build, name, prefix):
    with torch.device("meta"):
        module = build()
    check_official(module, name, prefix)
    assert not any(p.requires_grad for p in module.parameters())


def test_clip_layers_and_pooling():
    build = lambda **kw: filler.fill(FrozenCLIPEmbedder(clip_config=SMALL, **kw), 3).eval()  # noqa: E731
    last = build()
    out = last.transformer(TOKENS, output_hidden_states=True)
    assert torch.allclose(last(TOKENS), out.last_hidden_state, atol=1e-6)
    for index in range(-3, 4):
        assert torch.allclose(build(layer="hidden", layer_idx=index)(TOKENS), out.hidden_states[index], atol=1e-6)
    z, pooled = build(layer="hidden", layer_idx=2, always_return_pooled=True)(TOKENS)
    assert torch.equal(z, out.hidden_states[2]) and torch.equal(pooled, out.pooler_output)
    assert torch.equal(build(layer="pooled")(TOKENS), out.pooler_output[:, None])
    for bad in (dict(layer="first"), dict(layer="hidden"), dict(layer="hidden", layer_idx=4), dict(version="clip")):
        with pytest.raises(ValueError, match="expected"):
            FrozenCLIPEmbedder(**{"clip_config": None if "version" in bad else SMALL, **bad})
    with pytest.raises(ValueError, match="hiden_size"):
        CLIPTextModel.from_config({"hiden_size": 3})
    with pytest.raises(ValueError, match="hidden_act"):
        CLIPTextModel.from_config({**SMALL, "hidden_act": "relu"})
    with pytest.raises(ValueError, match="got 21 tokens, expected at most 20"):
        last(torch.zeros(1, 21, dtype=torch.int64))


def test_open_clip_layers_and_pooling():
    build = lambda cls, **kw: filler.fill(cls(clip_config=SMALL_OPEN, **kw), 4).eval()  # noqa: E731
    reference = build(FrozenOpenCLIPEmbedder)
    m = reference.model
    two, three = m.features(TOKENS, 2), m.features(TOKENS)
    pooled = m.encode_text(TOKENS)
    close = lambda a, b: torch.allclose(a, b, atol=1e-6)  # noqa: E731
    assert close(reference(TOKENS), m.ln_final(three))
    assert close(build(FrozenOpenCLIPEmbedder, layer="penultimate")(TOKENS), m.ln_final(two))
    assert close(build(FrozenOpenCLIPEmbedder2, layer="penultimate")(TOKENS), m.ln_final(two))
    new = dict(legacy=False)
    assert close(build(FrozenOpenCLIPEmbedder2, layer="penultimate", **new)(TOKENS), two)
    assert close(build(FrozenOpenCLIPEmbedder2, layer="last", **new)(TOKENS), three)
    assert close(build(FrozenOpenCLIPEmbedder2, layer="pooled", **new)(TOKENS), pooled)
    z, p = build(FrozenOpenCLIPEmbedder2, layer="penultimate", always_return_pooled=True, **new)(TOKENS)
    assert close(z, two) and close(p, pooled)
    assert torch.equal(pooled, (m.ln_final(three)[[0, 1], [4, 2]] @ m.text_projection))
    with pytest.raises(ValueError, match="legacy"):
        FrozenOpenCLIPEmbedder2(clip_config=SMALL_OPEN, always_return_pooled=True)
    with pytest.raises(ValueError, match="ViT-H-14"):
        FrozenOpenCLIPEmbedder(arch="ViT-H/14")
    with pytest.raises(ValueError, match="expected last, penultimate|expected one of last, penultimate"):
        FrozenOpenCLIPEmbedder(clip_config=SMALL_OPEN, layer="pooled")
    with torch.device("meta"):
        openai = FrozenOpenCLIPEmbedder(arch="ViT-B-32", version="openai").model.transformer.resblocks[0].mlp.activation
        laion = FrozenOpenCLIPEmbedder(arch="ViT-B-32").model.transformer.resblocks[0].mlp.activation
    x = torch.tensor([1.0])
    assert openai(x).item() == pytest.approx(0.8458, abs=1e-4) and laion(x).item() == pytest.approx(0.8413, abs=1e-4)


def test_meta_build_then_assign_equals_a_real_build():
    for cls, config in ((FrozenCLIPEmbedder, SMALL), (FrozenOpenCLIPEmbedder, SMALL_OPEN)):
        real = filler.fill(cls(clip_config=config), 5).eval()
        with torch.device("meta"):
            lazy = cls(clip_config=config)
        lazy.load_state_dict(real.state_dict(), assign=True)
        assert not any(t.is_meta for t in (*lazy.parameters(), *lazy.buffers()))
        assert not any(p.requires_grad for p in lazy.parameters())
        assert torch.equal(lazy(TOKENS), real(TOKENS))
        empty = cls(clip_config=config).to_empty(device="cpu")
        empty.load_state_dict(real.state_dict())
        assert torch.equal(empty(TOKENS), real(TOKENS))


@pytest.mark.parametrize("stored", [None, torch.arange(20).half()[None] * 1.01])
def test_position_ids_of_any_file_are_accepted(stored):
    real = filler.fill(FrozenCLIPEmbedder(clip_config=SMALL), 5)
    state = real.state_dict()
    key = "transformer.text_model.embeddings.position_ids"
    del state[key]
    if stored is not None:
        state[key] = stored
    with torch.device("meta"):
        lazy = FrozenCLIPEmbedder(clip_config=SMALL)
    lazy.load_state_dict(state, assign=True)
    assert torch.equal(lazy.state_dict()[key], torch.arange(20)[None])
    assert (key in state) == (stored is not None)  # the caller's dict is untouched


def test_causal_and_half_precision():
    m = filler.fill(FrozenCLIPEmbedder(clip_config=SMALL), 6).eval()
    a, b = m(TOKENS), m(torch.cat((TOKENS[:, :4], TOKENS.flip(0)[:, 4:]), 1))
    assert torch.allclose(a[:, :4], b[:, :4], atol=1e-6)
    half = FrozenCLIPEmbedder(clip_config=SMALL).bfloat16()
    half.load_state_dict(m.state_dict())
    assert half(TOKENS).dtype == torch.bfloat16
    assert (half(TOKENS).float() - a).abs().max() < 0.1


def test_freeze_is_optional():
    assert all(p.requires_grad for p in FrozenCLIPEmbedder(clip_config=SMALL, freeze=False).parameters())
    assert all(p.requires_grad for p in FrozenOpenCLIPEmbedder(clip_config=SMALL_OPEN, freeze=False).parameters())


def test_text_and_image_vectors():
    config = dict(vision=dict(image_size=28, patch_size=14, width=128, layers=1), text={**SMALL_OPEN, "quick": True})
    text = filler.fill(FrozenCLIPTextEmbedder(clip_config=config, n_repeat=2), 7).eval()
    text.freeze()
    z = text(TOKENS)
    assert z.shape == (2, 24) and torch.allclose(z.norm(dim=1), torch.ones(2), atol=1e-6)
    assert torch.equal(text.encode(TOKENS), torch.stack((z, z), 1))
    raw = filler.fill(FrozenCLIPTextEmbedder(clip_config=config, normalize=False), 7).eval()
    assert torch.allclose(raw(TOKENS), text.model.encode_text(TOKENS), atol=1e-6)
    with pytest.raises(ValueError, match="one vector per text"):
        text.encode(["a"], clip_skip=2)
    for antialias in (False, True):
        image = filler.fill(FrozenClipImageEmbedder(clip_config=config, antialias=antialias), 8).eval()
        x = torch.rand(2, 3, 40, 56) * 2 - 1
        assert image(x).shape == (2, 24)
        assert image.state_dict().keys() == image.model.state_dict(prefix="model.").keys()
    same = image.preprocess(torch.ones(1, 3, 28, 28))[0, :, 0, 0]
    assert torch.allclose(same, torch.tensor([1.9303, 2.0749, 2.1459]), atol=1e-3)
    with pytest.raises(ValueError, match="jit"):
        FrozenClipImageEmbedder(clip_config=config, jit=True)
    with pytest.raises(ValueError, match="RN50"):
        FrozenClipImageEmbedder("RN50")
    with torch.device("meta"):
        large = FrozenCLIPTextEmbedder("ViT-L/14@336px").model
    assert isinstance(large.visual, VisionTransformer) and large.visual.positional_embedding.shape == (577, 1024)
    assert isinstance(large, OpenCLIPText) and "openai/clip-vit-base-patch32" in CLIP_TEXT_CONFIGS
