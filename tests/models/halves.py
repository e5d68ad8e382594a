"""Four pictures of 4x4 with a bright half each, and token models small enough to learn them by heart."""

import torch

PIXELS = {"target": "ldm.modules.codebooks.PixelCodes", "params": {"size": 4, "levels": 4}}
TINY = {"params": {"n_layer": 2, "n_head": 2, "n_embd": 32}}
WORDS = ["left", "right", "top", "bottom"]


def halves():
    """Four pictures of 4x4, a bright half each, and what they show: [4, 4, 4, 1] in [-1, 1]."""
    x = -torch.ones(4, 4, 4, 1)
    x[0, :, :2], x[1, :, 2:], x[2, :2], x[3, 2:] = 1, 1, 1, 1
    return {"image": x, "caption": [f"bright {w}" for w in WORDS], "class_label": torch.arange(4)}


def fit(model, steps, lr=3e-3):
    model.learning_rate = lr
    optimizer = model.configure_optimizers()
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        order, batch = torch.randperm(4).tolist(), halves()
        loss, _ = model.loss(
            {k: v[order] if isinstance(v, torch.Tensor) else [v[i] for i in order] for k, v in batch.items()}
        )
        loss.backward()
        optimizer.step()
    return model.eval()


def text_model(cls, **options):
    torch.manual_seed(0)
    model = cls(PIXELS, TINY, text_vocab=270, text_length=6, **options)
    model.text.learn(halves()["caption"])
    return model
