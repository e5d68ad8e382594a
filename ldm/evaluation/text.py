"""How well pictures fit their captions: CLIP score (Hessel et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from ldm.evaluation.features import check_file, weights_of
from ldm.evaluation.pictures import Pictures
from ldm.modules.open_clip_text import CLIP
from ldm.modules.text_embedders import FrozenClipImageEmbedder, FrozenCLIPTextEmbedder
from ldm.util import UserError

ARCHS = {
    "clip-vit-b-32": "ViT-B/32",
    "clip-vit-b-16": "ViT-B/16",
    "clip-vit-l-14": "ViT-L/14",
    "clip-vit-l-14-336px": "ViT-L/14@336px",
}


def load_clip(name: str = "clip-vit-l-14") -> CLIP:
    """OpenAI's CLIP from the file that torch-fidelity would use.

    Raises:
        UserError: unknown name, or the file is not there.
    """
    if name not in ARCHS:
        raise UserError(f"CLIP score: unknown model {name}, expected one of {', '.join(ARCHS)}")
    file, url, sha = weights_of(name)
    check_file(name, file, url, sha)
    state = torch.jit.load(str(file), map_location="cpu").state_dict()
    model = CLIP.from_name(ARCHS[name])
    sizes = ("input_resolution", "context_length", "vocab_size")
    model.load_state_dict({k: v.float() for k, v in state.items() if k not in sizes})
    return model.eval()


@torch.no_grad()
def clip_score(clip: CLIP, pictures: Pictures, captions: Sequence[str], device: Any = "cpu") -> dict[str, float]:
    """{"clip_score": mean of max(100 cos, 0) between each picture and its caption}."""
    if len(captions) != len(pictures):
        raise UserError(f"CLIP score: {len(captions)} captions for {len(pictures)} pictures")
    images, texts = _towers(clip, device)
    total, start = 0.0, 0
    for batch in tqdm(pictures.batches(64), desc="CLIP score", leave=False):
        x = batch.to(device).float() / 127.5 - 1
        a = F.normalize(images(x.expand(-1, 3, -1, -1)), dim=1)
        b = F.normalize(texts(list(captions[start : start + len(batch)])), dim=1)
        total += float((100 * (a * b).sum(1)).clamp_min(0).sum())
        start += len(batch)
    return {"clip_score": total / start}


def _towers(clip: CLIP, device: Any) -> tuple[FrozenClipImageEmbedder, FrozenCLIPTextEmbedder]:
    """Both embedders around one model, so that it is held once."""
    tiny = {"vision": {"image_size": 8, "patch_size": 8, "width": 64, "layers": 0}}
    tiny["text"] = {"embed_dim": 8, "width": 64, "heads": 1, "layers": 0, "vocab_size": 8}
    images = FrozenClipImageEmbedder(clip_config=tiny, antialias=True)
    texts = FrozenCLIPTextEmbedder(clip_config=tiny)
    images.model = texts.model = clip.to(device).eval()
    return images.to(device).eval(), texts.to(device).eval()
