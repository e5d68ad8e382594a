import pytest
import torch

from ldm.modules.dit import DiT, DiTBlock, grid_positions

SMALL = {"image_size": 8, "in_channels": 4, "patch_size": 2, "hidden_size": 32, "depth": 2, "num_heads": 4}


def awake(model, seed=0):
    """With every weight random: adaLN-Zero starts as the identity."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.1
    return model.eval()


def test_starts_at_zero_and_each_block_as_the_identity():
    torch.manual_seed(0)
    model = DiT(**SMALL, context_dim=16)
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)
    assert (model(x, torch.tensor([3.0, 700.0]), context) == 0).all()
    tokens = torch.randn(2, 16, 32)
    assert torch.equal(DiTBlock(32, 4, context_dim=16)(tokens, torch.randn(2, 32), context), tokens)


def test_every_input_matters_and_only_to_its_own_image():
    model = awake(DiT(**SMALL, out_channels=3, context_dim=16, num_classes=7))
    x, t, context, y = torch.randn(2, 4, 8, 8), torch.tensor([10.0, 500.0]), torch.randn(2, 5, 16), torch.tensor([1, 6])
    with torch.no_grad():
        out = model(x, t, context, y)
        assert out.shape == (2, 3, 8, 8)
        changed = [
            model(x + torch.tensor([1.0, 0.0])[:, None, None, None], t, context, y),
            model(x, torch.tensor([11.0, 500.0]), context, y),
            model(x, t, torch.cat([context[:1] + 1, context[1:]]), y),
            model(x, t, context, torch.tensor([2, 6])),
        ]
    for other in changed:
        assert (other[0] - out[0]).abs().max() > 1e-4
        torch.testing.assert_close(other[1], out[1], atol=1e-5, rtol=1e-5)


def test_a_later_word_matters_too():
    model = awake(DiT(**SMALL, context_dim=16))
    x, t, context = torch.randn(1, 4, 8, 8), torch.tensor([10.0]), torch.randn(1, 5, 16)
    other = context.clone()
    other[:, 4] += 1  # reaches the tokens by cross-attention alone
    with torch.no_grad():
        assert (model(x, t, context) - model(x, t, other)).abs().max() > 1e-5


def test_positions_tell_every_place_apart_and_do_not_depend_on_the_grid():
    p = grid_positions(4, 6, 32)
    assert p.shape == (24, 32) and p.abs().max() <= 1
    assert torch.cdist(p, p).fill_diagonal_(9).min() > 0.1
    torch.testing.assert_close(grid_positions(8, 6, 32)[:24], p)
    with pytest.raises(ValueError, match="multiple of 4"):
        grid_positions(2, 2, 30)


def test_patches_go_back_where_they_came_from():
    """With the identity in place of the blocks, what comes out is where it went in."""
    model = DiT(1, 1, patch_size=2, hidden_size=4, depth=0, num_heads=1)
    model.eval()
    seen = {}
    model.embed.register_forward_hook(lambda m, args, out: seen.update(tokens=args[0]))
    model.out = torch.nn.Identity()
    model.norm_out = torch.nn.Identity()
    model.embed.weight.data = torch.eye(4)
    model.embed.bias.data.zero_()
    x = torch.arange(32.0).reshape(1, 1, 4, 8)
    with torch.no_grad():
        out = model(x, torch.tensor([1.0]))
    positions = grid_positions(2, 4, 4)
    assert seen["tokens"].shape == (1, 8, 4)
    back = torch.nn.functional.pixel_shuffle(positions.T.reshape(1, 4, 2, 4), 2)
    torch.testing.assert_close(out, x + back)


def test_other_sizes_work_and_wrong_ones_are_told():
    model = awake(DiT(**SMALL))
    assert model(torch.randn(1, 4, 12, 6), torch.tensor([5.0])).shape == (1, 4, 12, 6)
    with pytest.raises(ValueError, match="got latents of 7x8, expected multiples of patch_size 2"):
        model(torch.randn(1, 4, 7, 8), torch.tensor([5.0]))
    with pytest.raises(ValueError, match="got no context"):
        awake(DiT(**SMALL, context_dim=16))(torch.randn(1, 4, 8, 8), torch.tensor([5.0]))
