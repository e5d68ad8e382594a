"""Text and image encoders as conditioners, with official names and constructor parameters: BERT, CLIP, OpenCLIP.

They are built from sizes alone; weights come from the model's checkpoint. `device` is a parameter of the official
classes that has no effect here: a module works where its weights are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.clip_text import CLIP_TEXT_CONFIGS, CLIPTextModel
from ldm.modules.open_clip_text import CLIP, OpenCLIPText, text_arch
from ldm.modules.prompts import TextEmbedder
from ldm.modules.tokenizer import CLIPTokenizer, Tokenizer, WordPieceTokenizer
from ldm.modules.x_transformer import Encoder, TransformerWrapper

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def _check_layer(layer: str, known: tuple[str, ...]) -> None:
    if layer not in known:
        raise ValueError(f"got layer {layer!r}, expected one of {', '.join(known)}")


# --- BERT -------------------------------------------------------------------------------------------------------------


class TransformerEmbedder(nn.Module):
    """Tokens through an encoder trained with the model: [B, L] int64 -> [B, L, n_embed].

    Args:
        n_embed: width.
        n_layer: attention + feed-forward pairs.
        vocab_size: number of tokens.
        max_seq_len: longest input.
        device: no effect.
    """

    output_keys = ("crossattn",)

    def __init__(
        self, n_embed: int, n_layer: int, vocab_size: int, max_seq_len: int = 77, device: str | None = None
    ) -> None:
        super().__init__()
        self.transformer = TransformerWrapper(
            num_tokens=vocab_size, max_seq_len=max_seq_len, attn_layers=Encoder(dim=n_embed, depth=n_layer)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return self.transformer(tokens, return_embeddings=True)

    def encode(self, tokens: Tensor) -> Tensor:
        """The same as calling it."""
        return self(tokens)


class BERTTokenizer(nn.Module):
    """bert-base-uncased's tokens as a (parameterless) module: texts -> int64 [B, max_length].

    Args:
        device: no effect.
        vq_interface: `encode` returns (None, None, [None, None, tokens]), the shape of a VQ model's result.
        max_length: tokens of one row, [CLS] and [SEP] included.
        vocab_path: vocab.txt; None = models/bert-base-uncased/vocab.txt. Read when the first text arrives.
    """

    def __init__(
        self,
        device: str | None = None,
        vq_interface: bool = True,
        max_length: int = 77,
        vocab_path: str | None = None,
    ) -> None:
        super().__init__()
        self.vq_interface, self.max_length, self.vocab_path = vq_interface, max_length, vocab_path
        self._tokenizer: WordPieceTokenizer | None = None

    @property
    def tokenizer(self) -> WordPieceTokenizer:
        """Made on first use; raises UserError if the vocabulary is missing."""
        if self._tokenizer is None:
            self._tokenizer = WordPieceTokenizer(self.vocab_path, self.max_length)
        return self._tokenizer

    def forward(self, text: str | Sequence[str]) -> Tensor:
        return self.tokenizer(text)

    def encode(self, text: str | Sequence[str]) -> Tensor | tuple[None, None, list[Tensor | None]]:
        """Tokens, wrapped if `vq_interface`."""
        tokens = self(text)
        return (None, None, [None, None, tokens]) if self.vq_interface else tokens

    def decode(self, text: Any) -> Any:
        """What came in."""
        return text


class BERTEmbedder(TextEmbedder):
    """BERT tokens through an encoder trained with the model: texts (or tokens [B, L]) -> [B, L, n_embed].

    Padding is attended to, as in training.

    Args:
        n_embed: width.
        n_layer: attention + feed-forward pairs.
        vocab_size: number of tokens.
        max_seq_len: longest input, and the length of every text.
        device: no effect.
        use_tokenizer: input is text; False = input is tokens (layouts).
        embedding_dropout: dropout on the embeddings, in training.
        vocab_path: see `BERTTokenizer`.
    """

    def __init__(
        self,
        n_embed: int,
        n_layer: int,
        vocab_size: int = 30522,
        max_seq_len: int = 77,
        device: str | None = None,
        use_tokenizer: bool = True,
        embedding_dropout: float = 0.0,
        vocab_path: str | None = None,
    ) -> None:
        super().__init__()
        self.use_tknz_fn = use_tokenizer
        if use_tokenizer:
            self.tknz_fn = BERTTokenizer(vq_interface=False, max_length=max_seq_len, vocab_path=vocab_path)
        self.transformer = TransformerWrapper(
            num_tokens=vocab_size,
            max_seq_len=max_seq_len,
            attn_layers=Encoder(dim=n_embed, depth=n_layer),
            emb_dropout=embedding_dropout,
        )

    def make_tokenizer(self) -> Tokenizer:
        if not self.use_tknz_fn:
            raise ValueError("got text, expected tokens [B, L] (use_tokenizer is False)")
        return self.tknz_fn.tokenizer

    def embed(self, tokens: Tensor, clip_skip: int = 1) -> Tensor:
        return self.transformer(tokens, return_embeddings=True)


# --- CLIP -------------------------------------------------------------------------------------------------------------


class FrozenCLIPEmbedder(TextEmbedder):
    """OpenAI's CLIP text transformer (SD v1, SDXL's first tower): texts -> [B, 77, 768].

    Args:
        version: name of the released model, which gives the sizes.
        device: no effect.
        max_length: tokens of one row.
        freeze: no gradients.
        layer: last (final norm applied), hidden (layer `layer_idx`, no norm), or pooled ([B, 1, D], the end token).
        layer_idx: for hidden: 0 = embeddings, 1 = after the first layer; negative counts from the end.
        always_return_pooled: returns (z, [B, D] end token) instead of z.
        clip_config: sizes under transformers' names (`CLIPTextModel`), instead of `version`.
        vocab_path: CLIP's merge list; None = the copy in open_clip_torch.

    Raises:
        ValueError: unknown version or layer, layer_idx out of range.
    """

    def __init__(
        self,
        version: str = "openai/clip-vit-large-patch14",
        device: str | None = None,
        max_length: int = 77,
        freeze: bool = True,
        layer: str = "last",
        layer_idx: int | None = None,
        always_return_pooled: bool = False,
        clip_config: Mapping[str, Any] | None = None,
        vocab_path: str | None = None,
    ) -> None:
        super().__init__()
        _check_layer(layer, ("last", "pooled", "hidden"))
        if clip_config is None and version not in CLIP_TEXT_CONFIGS:
            raise ValueError(
                f"got version {version!r}, expected one of {', '.join(CLIP_TEXT_CONFIGS)} or a clip_config"
            )
        self.transformer = CLIPTextModel.from_config(clip_config or CLIP_TEXT_CONFIGS[version])
        depth = len(self.transformer.text_model.encoder.layers)
        if layer == "hidden" and (layer_idx is None or not 0 <= abs(layer_idx) <= depth):
            raise ValueError(f"got layer_idx {layer_idx} with layer hidden, expected {-depth}..{depth}")
        self.layer, self.layer_idx, self.return_pooled = layer, layer_idx, always_return_pooled
        self.n_layers = depth if layer != "hidden" else layer_idx + (depth + 1 if layer_idx < 0 else 0)
        self.per_token = layer != "pooled"
        self.output_keys = ("crossattn", "vector") if always_return_pooled else ("crossattn",)
        self.max_length, self.vocab_path = max_length, vocab_path
        if freeze:
            self.freeze()

    def freeze(self) -> None:
        """No gradients from here on."""
        self.eval().requires_grad_(False)

    def make_tokenizer(self) -> Tokenizer:
        return CLIPTokenizer(self.vocab_path, pad="end", max_length=self.max_length)

    def embed(self, tokens: Tensor, clip_skip: int = 1) -> Tensor | tuple[Tensor, Tensor]:
        depth = self.n_layers - clip_skip + 1
        pooled = None
        if self.return_pooled or self.layer == "pooled":
            out = self.transformer(tokens, output_hidden_states=True)
            z, pooled = out.hidden_states[depth], out.pooler_output
        else:
            z = self.transformer.encode(tokens, depth)
        if self.layer == "pooled":
            z = pooled[:, None]
        elif self.layer == "last":
            z = self.transformer.text_model.final_layer_norm(z)
        return (z, pooled) if self.return_pooled else z


class FrozenCLIPTextEmbedder(TextEmbedder):
    """CLIP's text vector: texts -> [B, D]; `encode` repeats it to [B, n_repeat, D]. Holds the whole CLIP model's keys.

    Args:
        version: OpenAI's model name (ViT-L/14).
        device: no effect.
        max_length: tokens of one row.
        n_repeat: rows that `encode` gives.
        normalize: to length 1.
        clip_config: `{vision: ..., text: ...}`, the parameters of `CLIP`, instead of `version`.
        vocab_path: see `FrozenCLIPEmbedder`.
    """

    output_keys = ("vector",)
    per_token = False

    def __init__(
        self,
        version: str = "ViT-L/14",
        device: str | None = None,
        max_length: int = 77,
        n_repeat: int = 1,
        normalize: bool = True,
        clip_config: Mapping[str, Any] | None = None,
        vocab_path: str | None = None,
    ) -> None:
        super().__init__()
        self.model = CLIP(**clip_config) if clip_config else CLIP.from_name(version)
        self.max_length, self.n_repeat, self.normalize, self.vocab_path = max_length, n_repeat, normalize, vocab_path

    def freeze(self) -> None:
        """No gradients from here on."""
        self.eval().requires_grad_(False)

    def make_tokenizer(self) -> Tokenizer:
        return CLIPTokenizer(self.vocab_path, pad="zero", max_length=self.max_length)

    def embed(self, tokens: Tensor, clip_skip: int = 1) -> Tensor:
        z = self.model.encode_text(tokens)
        return F.normalize(z, dim=1) if self.normalize else z

    def encode_whole(self, text: str | Sequence[str] | Tensor) -> Tensor:
        """Texts (or tokens) -> [B, n_repeat, D]."""
        return self(text)[:, None].repeat(1, self.n_repeat, 1)


class FrozenClipImageEmbedder(nn.Module):
    """CLIP's image vector: [B, 3, H, W] in [-1, 1] -> [B, D].

    Args:
        model: OpenAI's model name (ViT-L/14).
        jit: must be False; TorchScript archives are not loaded.
        device: no effect.
        antialias: low-pass filter when the picture is made smaller.
        clip_config: see `FrozenCLIPTextEmbedder`.
    """

    output_keys = ("vector",)

    def __init__(
        self,
        model: str = "ViT-L/14",
        jit: bool = False,
        device: str | None = None,
        antialias: bool = False,
        clip_config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if jit:
            raise ValueError("got jit True, expected False: the model is built from its sizes, not from an archive")
        self.model = CLIP(**clip_config) if clip_config else CLIP.from_name(model)
        self.antialias = antialias

    def preprocess(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> [B, 3, S, S], CLIP's mean and deviation taken out."""
        side = self.model.visual.image_size
        x = F.interpolate(x, (side, side), mode="bicubic", align_corners=True, antialias=self.antialias)
        mean, std = (torch.tensor(v, dtype=x.dtype, device=x.device)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
        return ((x + 1) / 2 - mean) / std

    def forward(self, x: Tensor) -> Tensor:
        return self.model.encode_image(self.preprocess(x))


# --- OpenCLIP ---------------------------------------------------------------------------------------------------------


class FrozenOpenCLIPEmbedder(TextEmbedder):
    """OpenCLIP's text tower (SD 2.x): texts -> [B, 77, D], the final norm applied whatever the layer.

    Args:
        arch: OpenCLIP's model name, which gives the sizes.
        version: name of the training run; "openai" means quick GELU, others change nothing.
        device: no effect.
        max_length: tokens of one row.
        freeze: no gradients.
        layer: last or penultimate.
        clip_config: parameters of `OpenCLIPText`, instead of `arch`.
        vocab_path: see `FrozenCLIPEmbedder`.

    Raises:
        ValueError: unknown arch or layer.
    """

    LAYERS: tuple[str, ...] = ("last", "penultimate")

    def __init__(
        self,
        arch: str = "ViT-H-14",
        version: str = "laion2b_s32b_b79k",
        device: str | None = None,
        max_length: int = 77,
        freeze: bool = True,
        layer: str = "last",
        clip_config: Mapping[str, Any] | None = None,
        vocab_path: str | None = None,
    ) -> None:
        super().__init__()
        _check_layer(layer, self.LAYERS)
        self.model = OpenCLIPText(**(clip_config or {**text_arch(arch), "quick": version == "openai"}))
        self.layer, self.max_length, self.vocab_path = layer, max_length, vocab_path
        self.n_layers = self.model.layers - (layer == "penultimate")
        if freeze:
            self.freeze()

    def freeze(self) -> None:
        """No gradients from here on."""
        self.eval().requires_grad_(False)

    def make_tokenizer(self) -> Tokenizer:
        return CLIPTokenizer(self.vocab_path, pad="zero", max_length=self.max_length)

    def embed(self, tokens: Tensor, clip_skip: int = 1) -> Tensor:
        return self.model.ln_final(self.model.features(tokens, self.n_layers - clip_skip + 1))


class FrozenOpenCLIPEmbedder2(FrozenOpenCLIPEmbedder):
    """SDXL's second tower: texts -> [B, 77, D], or that and the pooled text vector [B, D'].

    Args:
        arch, version, device, max_length, freeze, clip_config, vocab_path: see `FrozenOpenCLIPEmbedder`.
        layer: last, penultimate, or pooled ([B, D'] only).
        always_return_pooled: returns (z, pooled).
        legacy: apply the final norm to z (SDXL does not); knows no pooled output.

    Raises:
        ValueError: also for legacy together with a pooled output.
    """

    LAYERS = ("pooled", "last", "penultimate")

    def __init__(
        self,
        arch: str = "ViT-H-14",
        version: str = "laion2b_s32b_b79k",
        device: str | None = None,
        max_length: int = 77,
        freeze: bool = True,
        layer: str = "last",
        always_return_pooled: bool = False,
        legacy: bool = True,
        clip_config: Mapping[str, Any] | None = None,
        vocab_path: str | None = None,
    ) -> None:
        super().__init__(arch, version, device, max_length, freeze, layer, clip_config, vocab_path)
        if legacy and (always_return_pooled or layer == "pooled"):
            raise ValueError("got legacy True with a pooled output, expected legacy: false")
        self.return_pooled, self.legacy = always_return_pooled, legacy
        self.per_token = layer != "pooled"
        self.output_keys = ("vector",) if layer == "pooled" else ("crossattn", "vector")[: 1 + always_return_pooled]
        if layer == "pooled" and always_return_pooled:
            self.output_keys = ("vector", "vector")

    def embed(self, tokens: Tensor, clip_skip: int = 1) -> Tensor | tuple[Tensor, Tensor]:
        if self.legacy:
            return super().embed(tokens, clip_skip)
        depth = self.n_layers - clip_skip + 1
        if self.per_token and not self.return_pooled:
            return self.model.features(tokens, depth)
        z, last = self.model.states(tokens, depth)
        pooled = self.model.pool(self.model.ln_final(last), tokens)
        z = z if self.per_token else pooled
        return (z, pooled) if self.return_pooled else z
