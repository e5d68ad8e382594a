from pathlib import Path

import pytest
import torch

from ldm.modules.text_embedders import BERTEmbedder
from ldm.modules.x_transformer import Encoder, TransformerWrapper
from tests.modules.conditioner_keys import check_norms
from tests.reference import compare, filler

FIXTURES = Path(__file__).parents[1] / "reference" / "fixtures"


def test_bert_embedder_fixture():
    fx = compare.load(FIXTURES / "bert_embedder.json")
    m = BERTEmbedder(**fx["params"])
    compare.check_keys(m, fx)
    check_norms(m, fx["norms"])
    filler.fill(m, fx["seed"]).eval()
    x = compare.inputs(fx)
    assert compare.check(fx, {"z": m(x["tokens"]), "short": m(x["tokens2"])}) == []
    assert torch.equal(m.encode(x["tokens"]), m(x["tokens"]))


def test_logits_tied_or_not_and_other_embedding_width():
    tokens = torch.arange(6).reshape(2, 3)
    layers = dict(dim=16, depth=1, heads=2, attn_dim_head=8)
    own = TransformerWrapper(num_tokens=10, max_seq_len=3, attn_layers=Encoder(**layers), emb_dim=8)
    assert own(tokens).shape == (2, 3, 10)
    assert own.project_emb.weight.shape == (16, 8)
    tied = TransformerWrapper(num_tokens=10, max_seq_len=3, attn_layers=Encoder(**layers), tie_embedding=True)
    want = tied(tokens, return_embeddings=True) @ tied.token_emb.weight.T
    assert torch.allclose(tied(tokens), want, atol=1e-6)
    with pytest.raises(ValueError, match="tie_embedding"):
        TransformerWrapper(num_tokens=10, max_seq_len=3, attn_layers=Encoder(**layers), tie_embedding=True, emb_dim=8)


def test_positions_matter_only_with_their_embedding():
    layers = dict(dim=16, depth=2, heads=2, attn_dim_head=8)
    tokens = torch.tensor([[1, 2, 3]])
    for use, equal in ((False, True), (True, False)):
        m = TransformerWrapper(num_tokens=10, max_seq_len=4, attn_layers=Encoder(**layers), use_pos_emb=use)
        torch.nn.init.normal_(m.token_emb.weight)
        a, b = (m(t, return_embeddings=True) for t in (tokens, tokens.flip(1)))
        assert torch.allclose(a, b.flip(1), atol=1e-5) is equal


def test_masked_tokens_change_nothing():
    m = TransformerWrapper(num_tokens=10, max_seq_len=4, attn_layers=Encoder(16, 2, heads=2, attn_dim_head=8))
    tokens = torch.tensor([[1, 2, 3, 0], [1, 2, 3, 9]])
    mask = torch.tensor([[True, True, True, False]]).expand(2, -1)
    out = m(tokens, return_embeddings=True, mask=mask)
    assert torch.allclose(out[0, :3], out[1, :3], atol=1e-6)
    assert torch.allclose(out[:1, :3], m(tokens[:1, :3], return_embeddings=True), atol=1e-6)


def test_dropout_works_in_training_only():
    torch.manual_seed(0)
    layers = Encoder(16, 1, heads=2, attn_dim_head=8, attn_dropout=0.5, ff_dropout=0.5)
    m = TransformerWrapper(num_tokens=10, max_seq_len=4, attn_layers=layers, emb_dropout=0.5)
    tokens = torch.tensor([[1, 2, 3]])
    assert not torch.allclose(m(tokens), m(tokens))
    m.eval()
    assert torch.equal(m(tokens), m(tokens))


def test_too_long_input_is_said():
    m = TransformerWrapper(num_tokens=10, max_seq_len=4, attn_layers=Encoder(16, 1))
    with pytest.raises(ValueError, match="got 5 tokens, expected at most 4"):
        m(torch.zeros(1, 5, dtype=torch.int64))
