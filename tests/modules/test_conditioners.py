import json
import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from ldm.modules import conditioners as C
from ldm.modules.prompts import apply_weights
from ldm.modules.text_embedders import (
    BERTEmbedder,
    BERTTokenizer,
    FrozenCLIPEmbedder,
    FrozenOpenCLIPEmbedder,
    FrozenOpenCLIPEmbedder2,
    TransformerEmbedder,
)
from ldm.util import ConfigError, UserError
from tests.modules.conditioner_keys import check_norms, check_official
from tests.reference import compare, filler

REFERENCE = Path(__file__).parents[1] / "reference"
FIXTURES = REFERENCE / "fixtures"
CONFIGS = json.loads((REFERENCE / "official_configs.json").read_text())
OURS = "ldm.modules.conditioners."
TEXT = "ldm.modules.text_embedders."
CLIP_CONFIG = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2)
OPEN_CONFIG = dict(embed_dim=24, width=40, heads=2, layers=3)


@pytest.fixture(scope="module")
def clip():
    return filler.fill(FrozenCLIPEmbedder(clip_config=CLIP_CONFIG), 1).eval()


# --- fixtures and official key lists ----------------------------------------------------------------------------------


def test_class_embedder_fixture():
    fx = compare.load(FIXTURES / "class_embedder.json")
    m = C.ClassEmbedder(**fx["params"])
    compare.check_keys(m, fx)
    filler.fill(m, fx["seed"])
    labels = compare.inputs(fx)["class_label"]
    assert compare.check(fx, {"z": m({"class_label": labels})}) == []
    assert torch.equal(m({"other": labels}, key="other"), m({"class_label": labels}))


@pytest.mark.parametrize("name", ["plain", "bias_nearest", "none"])
def test_spatial_rescaler_fixtures(name):
    fx = compare.load(FIXTURES / f"spatial_rescaler_{name}.json")
    m = C.SpatialRescaler(**fx["params"])
    compare.check_keys(m, fx)
    check_norms(m, fx["norms"])
    filler.fill(m, fx["seed"])
    x = compare.inputs(fx)["x"]
    assert compare.check(fx, {"z": m.encode(x)}) == []
    assert torch.equal(m(x), m.encode(x))


def test_spatial_rescaler_parameters():
    x = torch.randn(1, 5, 12, 12)
    assert C.SpatialRescaler(multiplier=2.0, method="bicubic")(x).shape == (1, 5, 24, 24)
    assert C.SpatialRescaler(in_channels=5, out_channels=2, method="area")(x).shape == (1, 2, 6, 6)
    with pytest.raises(ValueError, match="got n_stages -1"):
        C.SpatialRescaler(n_stages=-1)
    with pytest.raises(ValueError, match="got method 'cubic'"):
        C.SpatialRescaler(method="cubic")


def test_sgm_timestep_conditioner_fixture():
    fx = compare.load(FIXTURES / "sgm_timestep_conditioner.json")
    m = C.ConcatTimestepEmbedderND(**fx["params"])
    size = compare.inputs(fx)["size"]
    assert compare.check(fx, {"out": m(size)}) == []
    assert torch.equal(m(size[:, 0]), m(size)[:, :256])
    with pytest.raises(ValueError, match=r"expected \[B\] or \[B, n\]"):
        m(size[None])


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: BERTEmbedder(n_embed=640, n_layer=32), "ldm_text2img256"),
        (lambda: C.ClassEmbedder(embed_dim=512, key="class_label"), "ldm_cin256"),
        (lambda: C.ClassEmbedder(n_classes=1001, embed_dim=512), "config_cin256_v2"),
        (lambda: C.SpatialRescaler(n_stages=2, in_channels=182, out_channels=3), "ldm_semantic_synthesis512"),
    ],
)
def test_official_keys_on_the_meta_device(build, name):
    with torch.device("meta"):
        module = build()
    check_official(module, name, "cond_stage_model.")


def test_text2img_large_and_layout_sizes():
    with torch.device("meta"):
        bert = BERTEmbedder(n_embed=1280, n_layer=32)
        layout = BERTEmbedder(n_embed=512, n_layer=16, vocab_size=8192, max_seq_len=92, use_tokenizer=False)
    assert sum(p.numel() for p in bert.parameters()) / 1e6 == pytest.approx(581.99, abs=0.01)
    assert sum(p.numel() for p in layout.parameters()) / 1e6 == pytest.approx(58.86, abs=0.01)


def _translated(node):
    """The official config with our class names; ldm.legacy holds the same rows."""
    target = node["target"].removeprefix("sgm.modules.encoders.modules.")
    home = TEXT if target.startswith("Frozen") else OURS
    return {**node, "target": home + target.replace("ClassEmbedder", "LabelEmbedder")}


def official_conditioner(path):
    config = CONFIGS[path]["model"]["params"]["conditioner_config"]["params"]["emb_models"]
    return C.GeneralConditioner([_translated(c) for c in config])


@pytest.mark.parametrize(("path", "name"), [("sd_2_1", "sd_2_1"), ("sd_xl_base", "sdxl_base")])
def test_official_sgm_conditioners_on_the_meta_device(path, name):
    with torch.device("meta"):
        m = official_conditioner(f"sgm/configs/inference/{path}.yaml")
    check_official(m, name, "conditioner.")


def test_official_mnist_conditioner():
    m = official_conditioner("sgm/configs/example_training/toy/mnist_cond.yaml")
    out = m.encode({"cls": torch.tensor([1, 2])})
    assert list(out) == ["vector"] and out["vector"].shape == (2, 128)
    assert all(p.requires_grad for p in m.parameters()) and m.embedders[0].ucg_rate == 0.2


# --- prompts through an embedder --------------------------------------------------------------------------------------


def test_encode_of_a_plain_prompt_is_forward(clip):
    texts = ["a photo of a cat", "", "a photo of a cat"]
    z = clip.encode(texts)
    assert z.shape == (3, 77, 32)
    assert torch.allclose(z, clip(texts), atol=1e-6) and torch.equal(z[0], z[2])
    assert torch.allclose(clip.encode("a dog")[0], clip(["a dog"])[0], atol=1e-6)
    tokens = clip.tokenizer(texts)
    assert torch.equal(clip.encode(tokens), clip(tokens))


def test_brackets_are_text_in_forward_and_without_weights(clip):
    literal, weighted = clip(["a (cat:1.5)"]), clip.encode(["a (cat:1.5)"])
    assert torch.allclose(clip.encode(["a (cat:1.5)"], weights=False), literal, atol=1e-6)
    assert not torch.allclose(weighted, literal, atol=1e-2)
    assert torch.allclose(clip.encode([r"a \(cat:1.5\)"]), literal, atol=1e-6)


def test_weights_scale_tokens_and_keep_the_mean(clip):
    plain, weighted = clip.encode(["a red cat"]), clip.encode(["a (red:1.5) cat"])
    assert weighted.mean().item() == pytest.approx(plain.mean().item(), rel=1e-4)
    ratio = weighted / plain
    restored = ratio[0, 1, 0].item()
    rows = torch.ones(77)
    rows[2] = 1.5  # start, a, red
    assert torch.allclose(ratio, (restored * rows)[None, :, None].expand_as(ratio), rtol=1e-3)


def test_weights_of_one_prompt_do_not_touch_its_neighbours(clip):
    both = clip.encode(["a (red:1.9) cat", "a [blue] dog", "plain"])
    for i, p in enumerate(["a (red:1.9) cat", "a [blue] dog", "plain"]):
        assert torch.allclose(both[i], clip.encode([p])[0], atol=1e-5)
    assert torch.allclose(both[2], clip(["plain"])[0], atol=1e-6)


def test_apply_weights_edge_cases():
    z = torch.tensor([[[1.0, 3.0], [2.0, 2.0]], [[1.0, -1.0], [2.0, -2.0]]])
    assert torch.equal(apply_weights(z, torch.ones(2, 2)), z)
    out = apply_weights(z, torch.tensor([[2.0, 1.0], [2.0, 1.0]]))
    assert torch.allclose(out[0], torch.tensor([[2.0, 6.0], [2.0, 2.0]]) * (2 / 3))
    assert torch.equal(out[1], torch.tensor([[2.0, -2.0], [2.0, -2.0]]))  # mean 0: scaled only
    assert apply_weights(z.half(), torch.full((2, 2), 1.5)).dtype == torch.float16


def test_clip_skip(clip):
    tokens = clip.tokenizer(["a cat"])
    text = clip.transformer.text_model
    for skip in (1, 2, 3):
        want = text.final_layer_norm(text.hidden_states(tokens)[4 - skip])
        assert torch.allclose(clip.encode(["a cat"], clip_skip=skip), want, atol=1e-6)
    for bad in (0, 4):
        with pytest.raises(ValueError, match=rf"got clip_skip {bad}, expected 1..3"):
            clip.encode(["a cat"], clip_skip=bad)
    second = filler.fill(FrozenOpenCLIPEmbedder(clip_config=OPEN_CONFIG, layer="penultimate"), 2).eval()
    tokens = second.tokenizer(["a cat"])
    want = second.model.ln_final(second.model.features(tokens, 1))
    assert torch.allclose(second.encode(["a cat"], clip_skip=2), want, atol=1e-6)
    hidden = filler.fill(FrozenCLIPEmbedder(clip_config=CLIP_CONFIG, layer="hidden", layer_idx=2), 1).eval()
    assert torch.allclose(hidden.encode(["a cat"], clip_skip=2), text.hidden_states(clip.tokenizer("a cat"))[1])


def test_too_long_prompt_says_what_was_cut(clip, caplog):
    prompt = "cat " * 74 + "one (two:1.2), three"
    assert clip.truncated_words(prompt) == ["two", ",", "three"]
    assert clip.truncated_words("cat " * 75) == []
    with caplog.at_level(logging.WARNING):
        z = clip.encode([prompt] * 3)
    assert [r.getMessage() for r in caplog.records] == ["the prompt is longer than 75 tokens; cut: two , three"]
    assert z.shape == (3, 77, 32) and torch.allclose(z[:1], clip(["cat " * 74 + "one"]), atol=1e-6)


def test_long_prompt_is_encoded_in_chunks(clip, caplog):
    words = ["cat", "dog", "hat"]
    prompt = " ".join(words[i % 3] for i in range(160))
    z = clip.encode([prompt, "short"], long_prompt=True)
    assert z.shape == (2, 3 * 77, 32) and not caplog.records
    for i in range(3):
        chunk = " ".join(words[j % 3] for j in range(75 * i, min(75 * i + 75, 160)))
        assert torch.allclose(z[0, 77 * i : 77 * i + 77], clip([chunk])[0], atol=1e-6)
    for i, text in enumerate(["short", "", ""]):
        assert torch.allclose(z[1, 77 * i : 77 * i + 77], clip([text])[0], atol=1e-6)
    assert clip.chunk_count([prompt, ""]) == 3 and clip.chunk_count([""]) == 1
    assert clip.encode([""], long_prompt=True, min_chunks=3).shape == (1, 231, 32)
    assert torch.allclose(clip.encode(["x"], long_prompt=True), clip(["x"]), atol=1e-6)


def test_pooled_output_comes_from_the_first_chunk():
    m = FrozenOpenCLIPEmbedder2(clip_config=OPEN_CONFIG, layer="penultimate", always_return_pooled=True, legacy=False)
    filler.fill(m, 3).eval()
    texts = ["cat " * 100, "dog"]
    z, pooled = m.encode(texts, long_prompt=True)
    assert z.shape == (2, 154, 40) and pooled.shape == (2, 24)
    assert torch.allclose(pooled, m(texts)[1], atol=1e-6)
    assert torch.allclose(m.encode(["a (dog:1.4)"])[1], m(["a dog"])[1], atol=1e-6)
    single = FrozenOpenCLIPEmbedder2(clip_config=OPEN_CONFIG, layer="pooled", legacy=False)
    assert single.encode(["cat"]).shape == (1, 24)


def test_padding_differs_between_families(clip):
    assert clip.tokenizer("x")[0, -1] == 49407
    assert FrozenOpenCLIPEmbedder(clip_config=OPEN_CONFIG).tokenizer("x")[0, -1] == 0


# --- BERT and plain tokens --------------------------------------------------------------------------------------------


@pytest.fixture
def vocab(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog", "(", ")"]))
    return str(path)


def test_bert_embedder_reads_text(vocab, caplog):
    m = filler.fill(BERTEmbedder(16, 1, vocab_size=10, max_seq_len=6, vocab_path=vocab), 4).eval()
    tokens = torch.tensor([[2, 5, 6, 3, 0, 0], [2, 6, 7, 6, 7, 3]])
    assert torch.equal(m(["a cat", "cat dog cat dog"]), m(tokens))
    assert torch.allclose(m.encode(["a cat"]), m(tokens[:1]), atol=1e-6)
    assert m.encode(["a cat dog a cat dog"], long_prompt=True).shape == (1, 12, 16)
    assert m.truncated_words("a cat dog a cat (dog)") == ["cat", "dog"]
    m.encode(["a cat dog a cat"])
    assert "cut: cat" in caplog.text
    with pytest.raises(ValueError, match="expected 1..1"):
        m.encode(["a"], clip_skip=2)
    assert BERTEmbedder(16, 1, vocab_size=10, embedding_dropout=0.3).transformer.emb_dropout.p == 0.3


def test_vocabularies_are_needed_only_for_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    m = BERTEmbedder(16, 1, vocab_size=10)
    m.load_state_dict(m.state_dict())
    assert m(torch.zeros(1, 77, dtype=torch.int64)).shape == (1, 77, 16)
    with pytest.raises(UserError, match="vocab.txt"):
        m(["a cat"])
    with pytest.raises(ValueError, match="use_tokenizer is False"):
        BERTEmbedder(16, 1, vocab_size=10, use_tokenizer=False)(["a cat"])
    clip = FrozenCLIPEmbedder(clip_config=CLIP_CONFIG, vocab_path="nowhere.gz")
    with pytest.raises(UserError, match="nowhere.gz"):
        clip(["a cat"])


def test_bert_tokenizer_module(vocab):
    m = BERTTokenizer(max_length=5, vocab_path=vocab)
    tokens = m(["a cat"])
    assert tokens.tolist() == [[2, 5, 6, 3, 0]]
    assert m.encode(["a cat"])[2][2].equal(tokens) and m.encode("a")[:2] == (None, None)
    assert BERTTokenizer(vq_interface=False, max_length=5, vocab_path=vocab).encode(["a cat"]).equal(tokens)
    assert m.decode("x") == "x" and not m.state_dict()


def test_transformer_embedder():
    m = filler.fill(TransformerEmbedder(16, 1, vocab_size=10, max_seq_len=4), 5)
    bert = filler.fill(BERTEmbedder(16, 1, vocab_size=10, max_seq_len=4, use_tokenizer=False), 5)
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(m.encode(tokens), bert.encode(tokens)) and m.state_dict().keys() == bert.state_dict().keys()


# --- conditioners that join others ------------------------------------------------------------------------------------


def test_hybrid_conditioner():
    m = C.HybridConditioner(
        {"target": OURS + "SpatialRescaler"}, {"target": OURS + "ClassEmbedder", "params": {"embed_dim": 4}}
    )
    x, batch = torch.randn(2, 3, 8, 8), {"class": torch.tensor([1, 2])}
    out = m(x, batch)
    assert torch.equal(out["c_concat"][0], m.concat_conditioner(x))
    assert torch.equal(out["c_crossattn"][0], m.crossattn_conditioner(batch))


def sdxl_like(**extra):
    size = {"target": OURS + "ConcatTimestepEmbedderND", "params": {"outdim": 8}}
    first = {"layer": "hidden", "layer_idx": 2, "clip_config": CLIP_CONFIG}
    second = dict(layer="penultimate", always_return_pooled=True, legacy=False, clip_config=OPEN_CONFIG)
    m = C.GeneralConditioner(
        [
            {"target": TEXT + "FrozenCLIPEmbedder", "params": first, "input_key": "txt", **extra},
            {"target": TEXT + "FrozenOpenCLIPEmbedder2", "params": second, "input_key": "txt", **extra},
            {**size, "input_key": "original_size_as_tuple"},
            {**size, "input_key": "crop_coords_top_left"},
        ]
    )
    return filler.fill(m, 6).eval()


BATCH = {
    "txt": ["a photo of a cat", "dog"],
    "original_size_as_tuple": torch.tensor([[64, 48], [64, 64]]),
    "crop_coords_top_left": torch.tensor([[0, 0], [3, 4]]),
}


def test_general_conditioner_joins_by_kind():
    m = sdxl_like()
    out = m(BATCH)
    first, second, size, crop = m.embedders
    z, pooled = second(BATCH["txt"])
    assert torch.equal(out["crossattn"], torch.cat((first(BATCH["txt"]), z), 2))
    sizes = [size(BATCH["original_size_as_tuple"]), crop(BATCH["crop_coords_top_left"])]
    assert torch.equal(out["vector"], torch.cat((pooled, *sizes), 1))
    assert out["crossattn"].shape == (2, 77, 72) and out["vector"].shape == (2, 24 + 16 + 16)
    assert set(C.CONDITION_NAMES) == set(C.CONCAT_AXIS)


def test_general_conditioner_encode_passes_text_options():
    m = sdxl_like()
    out = m.encode({**BATCH, "txt": ["a (red:1.3) cat " * 40, "x"]}, long_prompt=True, clip_skip=2, min_chunks=3)
    assert out["crossattn"].shape == (2, 231, 72) and out["vector"].shape == (2, 56)
    assert torch.allclose(m.encode(BATCH)["crossattn"], m(BATCH)["crossattn"], atol=1e-6)
    assert m.text_embedder is m.embedders[0]
    assert C.GeneralConditioner([]).text_embedder is None and C.GeneralConditioner([])({}) == {}


def test_unconditional_conditioning_and_forced_zeros():
    m = sdxl_like(ucg_rate=1.0)
    c, uc = m.get_unconditional_conditioning(BATCH, force_uc_zero_embeddings=["txt"])
    assert torch.equal(c["vector"][:, 24:], uc["vector"][:, 24:])
    assert c["crossattn"].abs().sum() > 0 and uc["crossattn"].abs().sum() == 0 and uc["vector"][:, :24].abs().sum() == 0
    c, uc = m.get_unconditional_conditioning(BATCH, {**BATCH, "txt": ["", ""]})
    assert not torch.equal(c["crossattn"], uc["crossattn"]) and uc["crossattn"].abs().sum() > 0
    assert m.embedders[0].ucg_rate == 1.0
    assert m(BATCH)["crossattn"].abs().sum() == 0  # a rate of 1 drops everything at every call


def test_dropping_is_per_sample():
    torch.manual_seed(0)
    entry = {"target": OURS + "LabelEmbedder", "params": {"embed_dim": 4, "n_classes": 10}, "input_key": "cls"}
    labels = torch.randint(10, (4000,))
    out = C.GeneralConditioner([{**entry, "ucg_rate": 0.3}])({"cls": labels})["vector"]
    assert (out == 0).all(1).float().mean().item() == pytest.approx(0.3, abs=0.03)
    m = C.GeneralConditioner([{**entry, "ucg_rate": 0.3, "legacy_ucg_value": 9}])
    before = labels.clone()
    out = m({"cls": labels})["vector"]
    null = (out == m.embedders[0].embedding.weight[9]).all(1).float().mean().item()
    assert null == pytest.approx(0.3 + 0.07, abs=0.03) and torch.equal(labels, before)


def test_frozen_embedders_stay_frozen():
    entry = {"target": TEXT + "BERTEmbedder", "input_key": "x"}
    params = {"n_embed": 8, "n_layer": 1, "vocab_size": 9, "use_tokenizer": False, "embedding_dropout": 0.5}
    frozen = C.GeneralConditioner([{**entry, "params": params}]).train()
    x = {"x": torch.tensor([[1, 2]])}
    assert not frozen(x)["crossattn"].requires_grad and torch.equal(frozen(x)["crossattn"], frozen(x)["crossattn"])
    trained = C.GeneralConditioner([{**entry, "params": params, "is_trainable": True}]).train()
    assert trained(x)["crossattn"].requires_grad and trained.embedders[0].training
    assert not trained.eval().embedders[0].training


class TwoKeys(nn.Module):
    """A user's embedder that declares nothing."""

    def forward(self, a, b):
        return a + b


def test_routes_are_explicit(monkeypatch):
    monkeypatch.setattr(C, "TwoKeys", TwoKeys, raising=False)
    monkeypatch.setattr(TwoKeys, "__module__", C.__name__)
    entry = {"target": OURS + "TwoKeys", "input_keys": ["a", "b"]}
    with pytest.raises(ValueError, match="expected names of"):
        C.GeneralConditioner([entry])
    m = C.GeneralConditioner([{**entry, "output_keys": "concat"}])
    x = torch.randn(1, 2, 4, 4)
    assert torch.equal(m({"a": x, "b": x})["concat"], 2 * x)
    with pytest.raises(ValueError, match="expected b for TwoKeys"):
        m({"a": x})
    with pytest.raises(ValueError, match="got 1 outputs"):
        C.GeneralConditioner([{**entry, "output_keys": ["concat", "vector"]}])({"a": x, "b": x})
    with pytest.raises(ValueError, match="unknown key output_key"):
        C.GeneralConditioner([{**entry, "output_keys": "concat", "output_key": "x"}])
    with pytest.raises(ValueError, match="input_key or input_keys"):
        C.GeneralConditioner([{"target": OURS + "TwoKeys", "output_keys": "concat"}])
    with pytest.raises(ConfigError, match="unknown key outdimm"):
        C.GeneralConditioner(
            [{"target": OURS + "ConcatTimestepEmbedderND", "params": {"outdimm": 3}, "input_key": "a"}]
        )


def test_label_embedder():
    m = C.LabelEmbedder(4, n_classes=5, add_sequence_dim=True)
    assert m(torch.tensor([1, 2])).shape == (2, 1, 4) and m.output_keys == ("crossattn",)
    m.input_key = "label"
    assert m.get_unconditional_conditioning(2)["label"].tolist() == [4, 4]
