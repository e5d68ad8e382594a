import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from ldm import checkpoint
from ldm.modules.decoding import draw, filter_logits, generate
from ldm.modules.gpt import GPT, POSITIONS, Cache, ScaledLayerNorm, Transformer, rotate, stable_attention
from ldm.modules.sequence import Layout
from ldm.util import SeededNoise

SPARSE = ("row", "column", "conv", "full")
TEXT, H, W, BEHIND = 5, 3, 4, 2
LENGTH = TEXT + H * W + BEHIND


def lively(model, std=0.3, seed=0):
    """Weights so large that every part of the network counts."""
    torch.manual_seed(seed)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=std)
    return model.eval()


def small(**options):
    options = {"n_layer": 4, "n_head": 2, "n_embd": 16, "grid": (H, W), "image_start": TEXT, "kernel_size": 3} | options
    return lively(Transformer(20, LENGTH, **options))


# --- the official network ---------------------------------------------------------------------------------------------


def mingpt(state, idx, n_head, layers, mask):
    """The formula, on a state dict with the official names."""

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    x = state["tok_emb.weight"][idx] + state["pos_emb"][:, : idx.shape[1]]
    for i in range(layers):
        h = norm(x, f"blocks.{i}.ln1")
        q, k, v = (
            linear(h, f"blocks.{i}.attn.{n}").unflatten(-1, (n_head, -1)).transpose(1, 2)
            for n in ("query", "key", "value")
        )
        scores = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).masked_fill(mask == 0, -torch.inf)
        x = x + linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), f"blocks.{i}.attn.proj")
        h = F.gelu(linear(norm(x, f"blocks.{i}.ln2"), f"blocks.{i}.mlp.0"))
        x = x + linear(h, f"blocks.{i}.mlp.2")
    return linear(norm(x, "ln_f"), "head")


@pytest.mark.parametrize("n_unmasked", [0, 3])
def test_mingpt_is_the_formula(n_unmasked):
    model = lively(GPT(11, 7, n_layer=2, n_head=2, n_embd=8, n_unmasked=n_unmasked)).double()
    idx = torch.randint(11, (2, 7))
    state = model.state_dict()
    mask = state["blocks.1.attn.mask"]
    assert mask.shape == (1, 1, 7, 7) and int(mask.sum()) == 28 + n_unmasked * (n_unmasked - 1) // 2
    logits, loss = model(idx, targets=idx)
    expected = mingpt(state, idx, 2, 2, mask)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(loss, F.cross_entropy(expected.flatten(0, 1), idx.flatten()))
    assert model(idx)[1] is None


def test_mingpt_has_the_official_keys_and_loads_strictly():
    with torch.device("meta"):
        model = GPT(vocab_size=1024, block_size=512, n_layer=2, n_head=16, n_embd=1024)
    wide, block = {"weight": (1024, 1024), "bias": (1024,)}, {}
    for name in ("key", "query", "value", "proj"):
        block |= {f"attn.{name}.{k}": v for k, v in wide.items()}
    block |= {f"{n}.{k}": (1024,) for n in ("ln1", "ln2") for k in ("weight", "bias")}
    block |= {"mlp.0.weight": (4096, 1024), "mlp.0.bias": (4096,), "mlp.2.weight": (1024, 4096), "mlp.2.bias": (1024,)}
    block["attn.mask"] = (1, 1, 512, 512)
    expected = {f"blocks.{i}.{k}": v for i in range(2) for k, v in block.items()}
    expected |= {"tok_emb.weight": (1024, 1024), "pos_emb": (1, 512, 1024), "head.weight": (1024, 1024)}
    expected |= {"ln_f.weight": (1024,), "ln_f.bias": (1024,)}
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == expected

    one, two = (lively(GPT(11, 7, 2, 2, 8), seed=s) for s in (0, 1))
    assert (
        checkpoint.load(two, one.state_dict()) == f"loaded {len(one.state_dict())} of {len(one.state_dict())} tensors"
    )
    idx = torch.randint(11, (1, 7))
    assert torch.equal(one(idx)[0], two(idx)[0])


def test_embeddings_stand_before_the_tokens():
    model = lively(GPT(11, 7, 2, 2, 8))
    idx = torch.randint(11, (2, 6))
    expected, _ = model(idx)
    torch.testing.assert_close(model(idx[:, 2:], embeddings=model.tok_emb(idx[:, :2]))[0], expected)


# --- cache ------------------------------------------------------------------------------------------------------------

CASES = list(itertools.product(POSITIONS, ["full", SPARSE], [False, True]))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("positions", "attention", "cogview"), CASES)
def test_cache_changes_nothing(positions, attention, cogview, dtype, tolerance):
    flags = {"sandwich_norm": cogview, "scaled_norm": cogview, "stable_attention": cogview}
    model = small(positions=positions, attention=attention, **flags).to(dtype)
    tokens = torch.randint(20, (2, LENGTH))
    for start in (TEXT, 2):
        whole = model.features(tokens, image_start=start)
        cache = Cache(model, 2, LENGTH)
        parts = [tokens[:, :3], tokens[:, 3:6], *tokens[:, 6:].split(1, 1)]
        step_by_step = torch.cat([model.features(p, cache=cache, image_start=start) for p in parts], 1)
        assert cache.length == LENGTH and not step_by_step.requires_grad
        torch.testing.assert_close(step_by_step, whole, rtol=0, atol=tolerance)


def test_cache_with_unmasked_tokens():
    model = lively(GPT(11, 9, 2, 2, 8, n_unmasked=4)).double()
    tokens = torch.randint(11, (1, 9))
    cache = Cache(model, 1, 9)
    parts = [model.features(p, cache=cache) for p in (tokens[:, :4], *tokens[:, 4:].split(1, 1))]
    torch.testing.assert_close(torch.cat(parts, 1), model.features(tokens), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="got 2 first tokens, expected all 4"):
        model.features(tokens[:, :2], cache=Cache(model, 1, 9))


# --- who sees whom ----------------------------------------------------------------------------------------------------


def seen(kind, i, j, start):
    a, b = i - start, j - start
    if j > i:
        return False
    if kind == "full" or not (0 <= a < H * W and 0 <= b < H * W):
        return True
    (r, c), (s, d) = divmod(a, W), divmod(b, W)
    return {"row": r == s, "column": c == d, "conv": r - s <= 1 and abs(c - d) <= 1}[kind]


@pytest.mark.parametrize("kind", SPARSE)
@pytest.mark.parametrize("start", [TEXT, 0, 2])
def test_masks(kind, start):
    mask = Layout(LENGTH, start, H, W).mask(kind, kernel_size=3)
    expected = [[seen(kind, i, j, start) for j in range(LENGTH)] for i in range(LENGTH)]
    assert mask.tolist() == expected


@pytest.mark.parametrize("kind", SPARSE)
def test_a_layer_sees_what_its_mask_says(kind):
    model = small(attention=kind, n_layer=1)
    x = model.tok_emb(torch.randint(20, (1, LENGTH))).detach().requires_grad_()
    out = model.features(torch.zeros(1, 0, dtype=torch.int64), embeddings=x)
    for i in range(LENGTH):
        (gradient,) = torch.autograd.grad(out[0, i].square().sum(), x, retain_graph=True)
        assert (gradient[0].abs().sum(1) > 0).tolist() == [seen(kind, i, j, TEXT) for j in range(LENGTH)]


@pytest.mark.parametrize("kind", ["row", "column", "conv"])
def test_one_token_of_a_sparse_layer_reads_what_it_sees_alone(kind):
    model = small(attention=kind)
    for i in range(1, LENGTH):
        places = model._mask(kind, model.layout, i, i + 1, model.tok_emb.weight)
        assert places.tolist() == [j for j in range(i + 1) if model.layout.mask(kind, model.kernel_size)[i, j]]
    assert model._mask("full", model.layout, 3, 4, model.tok_emb.weight) is None


def test_kinds_repeat_over_the_layers():
    assert Transformer(5, 13, n_layer=5, grid=(3, 4), image_start=1, attention=("row", "conv")).kinds == [
        "row", "conv", "row", "conv", "row",
    ]  # fmt: skip


# --- positions --------------------------------------------------------------------------------------------------------


def test_rotary_scores_depend_on_distances_alone():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    line = Layout(40).angles(8)
    plane = Layout(40, 3, 5, 6).angles(8)

    def score(angles, i, j):
        turned = (rotate(x, (angles[p : p + 1].cos(), angles[p : p + 1].sin())) for x, p in ((q, i), (k, j)))
        a, b = turned
        return float((a * b).sum())

    assert score(line, 9, 4) == pytest.approx(score(line, 30, 25), abs=1e-12)
    assert score(line, 9, 4) != pytest.approx(score(line, 9, 5), abs=1e-3)
    at = lambda r, c: 3 + 6 * r + c  # noqa: E731
    assert score(plane, at(3, 4), at(1, 1)) == pytest.approx(score(plane, at(4, 5), at(2, 2)), abs=1e-12)
    assert score(plane, at(3, 4), at(1, 1)) != pytest.approx(score(plane, at(3, 4), at(1, 2)), abs=1e-3)
    # in the text rows and columns count together, and no two places are equal
    assert score(plane, 2, 0) == pytest.approx(score(plane, 38, 36), abs=1e-12)
    assert len({tuple(row) for row in plane.tolist()}) == 40


def test_axial_positions_are_rows_plus_columns():
    model = small(positions="axial")
    places = model._positions(model.layout, 0, LENGTH, model.tok_emb.weight)[0]
    assert torch.equal(places[:TEXT], model.pos_emb[0, :TEXT])
    assert torch.equal(places[TEXT + H * W :], model.pos_emb[0, TEXT:])
    assert torch.equal(places[TEXT + W + 2], model.row_emb[1] + model.column_emb[2])


# --- CogView's measures -----------------------------------------------------------------------------------------------


def test_stable_attention_is_attention():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 6, 8, dtype=torch.float64)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(stable_attention(q, k, v, mask), expected, rtol=0, atol=1e-13)


def test_scaled_norm_is_a_norm():
    torch.manual_seed(0)
    x = torch.randn(3, 64, dtype=torch.float64)
    norm = ScaledLayerNorm(64).double()
    torch.testing.assert_close(norm(x), F.layer_norm(x, (64,)), rtol=0, atol=2e-5)  # the eps is of another scale
    assert (norm.half()((3000 * x).half()).double() - F.layer_norm(x, (64,))).abs().max() < 0.01
    assert torch.equal(norm(torch.zeros(1, 64).half()), torch.zeros(1, 64).half())


def narrow_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
    """Attention whose scores are numbers of the precision of q."""
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return scores.softmax(-1) @ v


def narrow_norm(x, shape, weight, bias, eps):
    """LayerNorm whose squares and means are numbers of the precision of x."""
    x = x - x.mean(-1, keepdim=True)
    return x / ((x * x).mean(-1, keepdim=True) + eps).sqrt() * weight + bias


@pytest.fixture
def narrow_kernels(monkeypatch):
    # PyTorch's kernels for the CPU keep scores and sums in float32, with which neither flag has anything to prevent:
    # here they are float16 as on a device (or in a framework) that has float16 alone, and the network is the same
    monkeypatch.setattr(F, "scaled_dot_product_attention", narrow_attention)
    monkeypatch.setattr(F, "layer_norm", narrow_norm)


@torch.no_grad()
def half_error(prepare, **options):
    """Distance of a network's float16 logits from its float32 ones, relative to the largest; nan where there are nan.

    `prepare(model)` sets weights, from the same random numbers whatever the options.
    """
    torch.manual_seed(0)
    model = Transformer(24, 16, n_head=1, n_embd=64, **options).eval()
    torch.manual_seed(1)
    prepare(model)
    tokens = torch.randperm(24)[None, :16]
    exact = model(tokens)[0]
    assert exact.isfinite().all()
    return float((model.half()(tokens)[0].float() - exact).abs().max() / exact.abs().max())


def test_scores_overflow_without_stable_attention(narrow_kernels):
    def prepare(model):  # a token's score with itself is |20 W x|^2 / 8, about 200,000
        torch.nn.init.normal_(model.tok_emb.weight)
        for attn in (b.attn for b in model.blocks):
            weight = 20 * torch.randn(64, 64)
            attn.query.weight.copy_(weight)
            attn.key.weight.copy_(weight)
            for layer in (attn.value, attn.proj):
                torch.nn.init.normal_(layer.weight, std=0.3)

    assert math.isnan(half_error(prepare, n_layer=2))
    assert half_error(prepare, n_layer=2, stable_attention=True) < 0.005


def test_squares_overflow_without_scaled_norm(narrow_kernels):
    def prepare(model):  # squares of numbers above 256 are beyond 65,504: the norm divides by infinity
        torch.nn.init.normal_(model.tok_emb.weight, std=3000.0)

    assert half_error(prepare, n_layer=2) > 0.9
    assert half_error(prepare, n_layer=2, scaled_norm=True) < 0.005


def test_the_sum_of_the_layers_overflows_without_sandwich_norm():
    """Whatever the kernels: the residual itself is float16."""

    def prepare(model):  # each layer's part fits, and all twelve together do not
        for block in model.blocks:
            torch.nn.init.normal_(block.mlp[0].weight, std=0.1)
            torch.nn.init.normal_(block.mlp[2].weight, std=1000.0)

    assert math.isnan(half_error(prepare, n_layer=12))
    assert half_error(prepare, n_layer=12, sandwich_norm=True) < 0.01


def test_sandwich_norm_has_weights_of_its_own():
    plain, sandwich = (small(sandwich_norm=s) for s in (False, True))
    assert sandwich.blocks[0].ln3.weight.shape == sandwich.blocks[0].ln4.weight.shape == (16,)
    assert set(sandwich.state_dict()) - set(plain.state_dict()) == {
        f"blocks.{i}.{n}.{k}" for i in range(4) for n in ("ln3", "ln4") for k in ("weight", "bias")
    }


# --- options ----------------------------------------------------------------------------------------------------------


def test_tied_weights_and_slices_of_the_head():
    tied, free = small(tie_weights=True), small()
    assert "head.weight" not in tied.state_dict() and "head.weight" in free.state_dict()
    h = torch.randn(2, 16)
    assert torch.equal(tied.logits(h), h @ tied.tok_emb.weight.T)
    torch.testing.assert_close(free.logits(h, 3, 9), free.logits(h)[:, 3:9])


@pytest.mark.parametrize("positions", POSITIONS)
def test_recomputing_changes_no_gradient(positions):
    tokens, gradients = torch.randint(20, (2, LENGTH)), []
    for use in (False, True):
        model = small(use_checkpoint=use, positions=positions, attention=SPARSE).train()
        model(tokens, targets=tokens)[1].backward()
        gradients.append({k: p.grad for k, p in model.named_parameters()})
    for k, g in gradients[0].items():
        torch.testing.assert_close(g, gradients[1][k], rtol=1e-6, atol=1e-7)


def test_half_precision_stays_finite():
    model = small(positions="rotary", sandwich_norm=True, scaled_norm=True, stable_attention=True).half()
    tokens = torch.randint(20, (2, LENGTH))
    assert model(tokens)[0].isfinite().all()
    out = generate(model, tokens[:, :TEXT], H * W, u=torch.rand(2, H * W))
    assert out.shape == (2, H * W)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": "sine"}, "positions: got 'sine', expected one of learned"),
        ({"attention": ("full", "diagonal")}, "attention: got 'diagonal', expected one of full"),
        ({"grid": None, "image_start": 0, "attention": "row"}, "row: got no grid"),
        ({"grid": None, "image_start": 0, "positions": "axial"}, "axial: got no grid"),
        ({"grid": (5, 4)}, "image of 5x4 tokens from place 5 on, expected it to end within 19"),
        ({"n_embd": 15}, "n_embd: got 15, expected a multiple of n_head"),
        ({"n_embd": 12, "positions": "rotary"}, "heads of 6, expected a multiple of 4"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_sequences_over_the_position_table():
    for model in (small(), small(positions="rotary")):
        with pytest.raises(ValueError, match=f"got {LENGTH + 1} tokens, expected at most {LENGTH}"):
            model(torch.zeros(1, LENGTH + 1, dtype=torch.int64))
        with pytest.raises(ValueError, match="expected at most"):
            generate(model, torch.zeros(1, 2, dtype=torch.int64), LENGTH)


# --- drawing tokens ---------------------------------------------------------------------------------------------------

LOGITS = torch.tensor([2.0, 0.5, 1.0, -1.0, 0.0])


def enumerate_exactly(logits, temperature=1.0, top_k=None, top_p=None):
    p = [math.exp(float(x) / temperature) for x in logits]
    order = sorted(range(len(p)), key=lambda i: -p[i])[: top_k or len(p)]
    total, kept, reached = sum(p[i] for i in order), [], 0.0
    for i in order:
        kept.append(i)
        reached += p[i] / total
        if top_p is not None and reached >= top_p:
            break
    mass = sum(p[i] for i in kept)
    return [p[i] / mass if i in kept else 0.0 for i in range(len(p))]


@pytest.mark.parametrize(
    "filters",
    [{}, {"temperature": 0.7}, {"top_k": 2}, {"top_k": 5}, {"top_p": 0.6}, {"top_p": 1.0}, {"top_k": 3, "top_p": 0.8},
     {"temperature": 2.0, "top_k": 4, "top_p": 0.9}, {"top_p": 1e-6}],
)  # fmt: skip
def test_filters_give_the_exact_distribution(filters):
    expected = enumerate_exactly(LOGITS, **filters)
    filtered = filter_logits(LOGITS, **filters)
    torch.testing.assert_close(filtered.softmax(-1), torch.tensor(expected), rtol=1e-5, atol=1e-7)
    n = 20000
    u = (torch.arange(n) + 0.5) / n  # every part of [0, 1) equally often
    counts = torch.bincount(draw(filtered.expand(n, -1), u), minlength=5) / n
    torch.testing.assert_close(counts, torch.tensor(expected), rtol=0, atol=1.5 / n)


def test_draws_at_the_ends_of_the_unit_interval():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    assert draw(logits, torch.zeros(1)).item() == 1
    assert draw(logits, torch.tensor([1 - 2**-24])).item() == 3


@pytest.mark.parametrize(
    ("filters", "message"),
    [({"top_k": 6}, "top_k: got 6, expected 1 to 5"), ({"top_k": 0}, "top_k"), ({"top_p": 0.0}, "top_p: got 0.0"),
     ({"top_p": 1.5}, "top_p"), ({"temperature": -1.0}, "temperature: got -1.0")],
)  # fmt: skip
def test_filters_that_make_no_sense(filters, message):
    with pytest.raises(ValueError, match=message):
        filter_logits(LOGITS, **filters)


def test_generated_sequences_have_the_exact_probabilities():
    """All sequences of three tokens out of four, against the product of the model's conditional probabilities."""
    model = lively(Transformer(4, 5, n_layer=1, n_head=1, n_embd=4), std=1.0)
    n = 4000
    prefix = torch.zeros(n, 1, dtype=torch.int64)
    u = torch.rand(n, 3, generator=torch.Generator().manual_seed(0))
    tokens = generate(model, prefix, 3, u=u)
    counts = torch.bincount((tokens * torch.tensor([16, 4, 1])).sum(1), minlength=64) / n
    all_sequences = torch.cartesian_prod(*[torch.arange(4)] * 3)
    with torch.no_grad():
        logp = model(F.pad(all_sequences, (1, 0))[:, :-1])[0].log_softmax(-1)
    exact = logp.gather(2, all_sequences[:, :, None]).sum((1, 2)).exp()
    assert float(exact.sum()) == pytest.approx(1, abs=1e-5)
    assert float((counts - exact).abs().sum()) < 3 * math.sqrt(64 / n)


def test_greedy_priming_range_and_order():
    model = small()
    prefix = torch.randint(20, (2, TEXT))
    greedy = generate(model, prefix, 6, first=4, last=15)
    tokens = prefix
    for _ in range(6):
        with torch.no_grad():
            nxt = model(tokens)[0][:, -1, 4:15].argmax(-1)
        tokens = torch.cat([tokens, nxt[:, None] + 4], 1)
    assert torch.equal(greedy, tokens[:, TEXT:] - 4)
    u = torch.rand(2, 6)
    assert torch.equal(generate(model, prefix, 6, u=u, temperature=0.0, first=4, last=15), greedy)
    free = generate(model, prefix, 6, u=u)
    assert torch.equal(generate(model, prefix, 6, u=u, primed=free[:, :3]), free)
    assert torch.equal(generate(model, prefix, 6, u=u, primed=free), free)
    other = (free[:, :2] + 1) % 20
    assert torch.equal(generate(model, prefix, 6, u=u, primed=other)[:, :2], other)
    calls = []
    generate(model, prefix, 4, u=u, callback=lambda i, t: calls.append((i, t.shape)))
    assert calls == [(i, (2, i)) for i in range(1, 5)]


def test_guidance_is_the_formula():
    model = small()
    prefix, empty = torch.randint(20, (2, TEXT)), torch.zeros(2, TEXT, dtype=torch.int64)
    u = torch.rand(2, 5)
    tokens = generate(model, prefix, 5, u=u, uncond=empty, scale=2.5)
    made = torch.zeros(2, 0, dtype=torch.int64)
    for i in range(5):
        with torch.no_grad():
            c, n = (model(torch.cat([p, made], 1))[0][:, -1] for p in (prefix, empty))
        made = torch.cat([made, draw(n + 2.5 * (c - n), u[:, i])[:, None]], 1)
    assert torch.equal(tokens, made)
    plain = generate(model, prefix, 5, u=u)
    assert torch.equal(generate(model, prefix, 5, u=u, uncond=empty, scale=1.0), plain)


def test_a_sequence_does_not_depend_on_its_batch():
    model = small(attention=SPARSE, positions="rotary")
    prefix = torch.randint(20, (3, TEXT))
    together = generate(model, prefix, H * W, u=SeededNoise([7, 8, 9]).rand((3, H * W)), top_k=10)
    alone = generate(model, prefix[1:2], H * W, u=SeededNoise([8]).rand((1, H * W)), top_k=10)
    assert torch.equal(together[1:2], alone)


def test_the_end_token_stops():
    model = small()
    prefix = torch.randint(20, (2, TEXT))
    free = generate(model, prefix, 10)
    end = int(free[0, 3])
    ended = generate(model, prefix[:1], 10, end=end)
    first = free[0].tolist().index(end)
    assert torch.equal(ended[0, : first + 1], free[0, : first + 1]) and (ended[0, first:] == end).all()
    with pytest.raises(ValueError, match="prefix: got no tokens"):
        generate(model, prefix[:, :0], 2)
