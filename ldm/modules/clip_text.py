"""CLIP's text transformer (Radford et al. 2021, section 2.4) under the names that SD v1 and SDXL checkpoints hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.matmul import Linear

_SMALL = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}
_LARGE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
# Sizes of the released text towers, by the name that official code passes as `version`.
CLIP_TEXT_CONFIGS: dict[str, dict[str, Any]] = {
    "openai/clip-vit-large-patch14": _LARGE,
    "openai/clip-vit-large-patch14-336": _LARGE,
    "openai/clip-vit-base-patch16": _SMALL,
    "openai/clip-vit-base-patch32": _SMALL,
}


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x): the approximation that OpenAI's weights were trained with."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class CLIPTextOutput(NamedTuple):
    """What `CLIPTextModel` returns.

    Attributes:
        last_hidden_state: [B, L, D], after the final layer norm.
        pooler_output: [B, D], its row at the end-of-text token.
        hidden_states: None, or num_hidden_layers + 1 tensors [B, L, D] before the final norm (the first: embeddings).
    """

    last_hidden_state: Tensor
    pooler_output: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


class CLIPTextEmbeddings(nn.Module):
    """Token plus position embedding: [B, L] int64 -> [B, L, D]."""

    def __init__(self, vocab_size: int, hidden_size: int, max_positions: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, hidden_size)
        self.position_embedding = nn.Embedding(max_positions, hidden_size)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.01)
        # Part of the official key list, never read: positions are a slice of the table.
        self.register_buffer("position_ids", torch.arange(max_positions)[None])

    def forward(self, input_ids: Tensor) -> Tensor:
        length, limit = input_ids.shape[1], self.position_embedding.num_embeddings
        if length > limit:
            raise ValueError(f"got {length} tokens, expected at most {limit}")
        return self.token_embedding(input_ids) + self.position_embedding.weight[:length]

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        # A constant, not a weight: many fp16 merges hold a rounded one, files of transformers >= 4.31 hold none.
        positions = torch.arange(self.position_embedding.num_embeddings)[None]
        super()._load_from_state_dict({**state_dict, prefix + "position_ids": positions}, prefix, *args)


class CLIPAttention(nn.Module):
    """Causal self-attention, [B, L, D] -> [B, L, D]."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"got hidden_size {hidden_size}, expected a multiple of num_attention_heads {num_heads}")
        self.num_heads = num_heads
        self.q_proj = Linear(hidden_size, hidden_size)
        self.k_proj = Linear(hidden_size, hidden_size)
        self.v_proj = Linear(hidden_size, hidden_size)
        self.out_proj = Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )  # [B, heads, L, D / heads]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class CLIPMLP(nn.Module):
    """Two linear layers around the activation."""

    def __init__(self, hidden_size: int, intermediate_size: int, hidden_act: str) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[hidden_act]
        self.fc1 = Linear(hidden_size, intermediate_size)
        self.fc2 = Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class CLIPEncoderLayer(nn.Module):
    """Pre-norm transformer block, [B, L, D] -> [B, L, D]."""

    def __init__(self, hidden_size: int, intermediate_size: int, num_heads: int, hidden_act: str, eps: float) -> None:
        super().__init__()
        self.self_attn = CLIPAttention(hidden_size, num_heads)
        self.layer_norm1 = nn.LayerNorm(hidden_size, eps=eps)
        self.mlp = CLIPMLP(hidden_size, intermediate_size, hidden_act)
        self.layer_norm2 = nn.LayerNorm(hidden_size, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(nn.Module):
    """The stack of blocks; exists as a module for the sake of the official key names."""

    def __init__(self, layers: list[CLIPEncoderLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


class CLIPTextTransformer(nn.Module):
    """Embeddings, encoder, final norm. Arguments as in `CLIPTextModel`."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        intermediate_size: int,
        num_hidden_layers: int,
        num_attention_heads: int,
        max_position_embeddings: int,
        hidden_act: str,
        layer_norm_eps: float,
    ) -> None:
        super().__init__()
        if hidden_act not in ACTIVATIONS:
            raise ValueError(f"got hidden_act {hidden_act!r}, expected one of {sorted(ACTIVATIONS)}")
        self.embeddings = CLIPTextEmbeddings(vocab_size, hidden_size, max_position_embeddings)
        self.encoder = CLIPEncoder(
            [
                CLIPEncoderLayer(hidden_size, intermediate_size, num_attention_heads, hidden_act, layer_norm_eps)
                for _ in range(num_hidden_layers)
            ]
        )
        self.final_layer_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)

    def hidden_states(self, input_ids: Tensor, depth: int | None = None) -> list[Tensor]:
        """[B, L] -> [embeddings, after layer 1, ..., after layer `depth`], each [B, L, D], no final norm."""
        states = [self.embeddings(input_ids)]
        for layer in self.encoder.layers[:depth]:
            states.append(layer(states[-1]))
        return states


class CLIPTextModel(nn.Module):
    """CLIP's text encoder, official names (`text_model.embeddings...`).

    Args:
        vocab_size: number of tokens.
        hidden_size: width D.
        intermediate_size: width of the MLP.
        num_hidden_layers: blocks.
        num_attention_heads: heads, a divisor of D.
        max_position_embeddings: longest input.
        hidden_act: quick_gelu (OpenAI's weights) or gelu.
        layer_norm_eps: epsilon of every layer norm.
        eos_token_id: the token whose row is `pooler_output`.
    """

    def __init__(
        self,
        vocab_size: int = 49408,
        hidden_size: int = 768,
        intermediate_size: int = 3072,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        max_position_embeddings: int = 77,
        hidden_act: str = "quick_gelu",
        layer_norm_eps: float = 1e-5,
        eos_token_id: int = 49407,
    ) -> None:
        super().__init__()
        self.eos_token_id = eos_token_id
        self.text_model = CLIPTextTransformer(
            vocab_size,
            hidden_size,
            intermediate_size,
            num_hidden_layers,
            num_attention_heads,
            max_position_embeddings,
            hidden_act,
            layer_norm_eps,
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> CLIPTextModel:
        """From a mapping with the names of transformers' `CLIPTextConfig`.

        `projection_dim`, `bos_token_id`, `pad_token_id` and `attention_dropout` (0 in every release) shape nothing
        here and are left out. Older configs say eos_token_id 2, which transformers reads as "the largest token".

        Raises:
            ValueError: an unknown name.
        """
        known = set(cls.__init__.__annotations__) - {"return"}
        unused = {"projection_dim", "bos_token_id", "pad_token_id", "attention_dropout"}
        if unknown := sorted(set(config) - known - unused):
            raise ValueError(f"got clip_config keys {unknown}, expected {sorted(known | unused)}")
        params = {k: v for k, v in config.items() if k in known}
        if params.get("eos_token_id") == 2:
            params["eos_token_id"] = params.get("vocab_size", 49408) - 1
        return cls(**params)

    def forward(self, input_ids: Tensor, output_hidden_states: bool = False) -> CLIPTextOutput:
        """[B, L] int64 tokens, L <= max_position_embeddings -> `CLIPTextOutput`."""
        states = self.text_model.hidden_states(input_ids)
        last = self.text_model.final_layer_norm(states[-1])
        end = (input_ids == self.eos_token_id).int().argmax(-1)  # the first one: SD v1 pads with it
        pooled = last[torch.arange(len(last), device=last.device), end]
        return CLIPTextOutput(last, pooled, tuple(states) if output_hidden_states else None)

    def encode(self, input_ids: Tensor, depth: int | None = None) -> Tensor:
        """[B, L] -> the output of the first `depth` layers [B, L, D] (all if None), no final norm."""
        return self.text_model.hidden_states(input_ids, depth)[-1]
