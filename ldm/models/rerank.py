"""CLIP as the judge of drawn pictures (Radford et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm import checkpoint
from ldm.modules.text_embedders import FrozenClipImageEmbedder, FrozenCLIPTextEmbedder
from ldm.util import UserError

FOLDER = Path(__file__).resolve().parents[2] / "models" / "clip"


class ClipRanker(nn.Module):
    """Cosine of a picture's and a text's CLIP vectors. The sizes are read from the weights.

    Args:
        file: OpenAI's weights under their own key names; None takes the only file in `models/clip/`.

    Raises:
        UserError: no file, several, or one of another kind.
    """

    def __init__(self, file: str | Path | None = None) -> None:
        super().__init__()
        path = find_weights() if file is None else Path(file)
        state = checkpoint.read_state(path)
        self.text = FrozenCLIPTextEmbedder(clip_config=sizes(state, path))
        self.images = FrozenClipImageEmbedder(clip_config=sizes(state, path), antialias=True)
        # file's constants that are no weights
        state = {k: v for k, v in state.items() if k not in ("input_resolution", "context_length", "vocab_size")}
        self.images.model = self.text.model  # one network
        checkpoint.load(self.text.model, state, source=path)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, x: Tensor, texts: Sequence[str]) -> Tensor:
        """Pictures [B, 1 or 3, H, W] in [-1, 1] and as many texts -> cosines [B]."""
        pictures = F.normalize(self.images(x.expand(-1, 3, -1, -1).float()), dim=1)
        return (pictures * self.text(list(texts))).sum(1)


def find_weights() -> Path:
    """The file in `models/clip/`.

    Raises:
        UserError: none, or several.
    """
    files = sorted(p for p in FOLDER.glob("*") if p.suffix in (".safetensors", ".pt", ".ckpt", ".bin"))
    if len(files) != 1:
        got = "none" if not files else ", ".join(p.name for p in files)
        raise UserError(
            f"rerank: got {got} in {FOLDER}, expected one file with OpenAI's CLIP weights, such as "
            "open_clip_model.safetensors of timm/vit_base_patch32_clip_224.openai; CogView needs none"
        )
    return files[0]


def sizes(state: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """The parameters of `CLIP` that fit the tensors.

    Raises:
        UserError: they are no CLIP model's.
    """
    try:
        patches, width = state["visual.positional_embedding"].shape
        patch = state["visual.conv1.weight"].shape[-1]
        length, text_width = state["positional_embedding"].shape
        vocabulary, embed_dim = len(state["token_embedding.weight"]), state["text_projection"].shape[1]
    except KeyError as e:
        raise UserError(f"{path} holds no CLIP model under OpenAI's names: {e.args[0]} is missing") from e
    side = patch * round((patches - 1) ** 0.5)
    depth = [len({k.split(".")[n] for k in state if k.startswith(p)}) for p, n in _BLOCKS]
    vision = {"image_size": side, "patch_size": patch, "width": width, "layers": depth[0]}
    text = {"embed_dim": embed_dim, "width": text_width, "heads": text_width // 64, "layers": depth[1]}
    return {"vision": vision, "text": {**text, "vocab_size": vocabulary, "context_length": length, "quick": True}}


_BLOCKS = (("visual.transformer.resblocks.", 3), ("transformer.resblocks.", 2))
