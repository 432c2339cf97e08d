"""Qwen3's architecture for training: the same numbers as transformers' class, fewer kernels.

Tokens of all sequences lie in one flat array wherever they do not meet, so that compiled code sees
one shape whatever the sequence length. Parameters are named as in transformers' Qwen3ForCausalLM.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GenerationConfig, Qwen3Config


def make_config(vocabulary: int, **changes: object) -> Qwen3Config:
    """The recall model's configuration: 6 layers of width 256, 4 KV heads of 64."""
    settings: dict[str, object] = {
        "vocab_size": 64 * math.ceil(vocabulary / 64),
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        "architectures": ["Qwen3ForCausalLM"],
    }
    return Qwen3Config(**(settings | changes))


class Norm(nn.Module):
    """Root-mean-square norm over the last axis."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalises in float32 and gives the input's type back."""
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return (wide * scale * self.weight).to(x.dtype)


class Attention(nn.Module):
    """Parameters of one attention layer; `Layer` does the arithmetic."""

    def __init__(self, config: Qwen3Config):
        super().__init__()
        size, width = config.head_dim, config.hidden_size
        query, kv = config.num_attention_heads * size, config.num_key_value_heads * size
        self.q_proj = nn.Linear(width, query, bias=False)
        self.k_proj = nn.Linear(width, kv, bias=False)
        self.v_proj = nn.Linear(width, kv, bias=False)
        self.o_proj = nn.Linear(query, width, bias=False)
        self.q_norm = Norm(size, config.rms_norm_eps)
        self.k_norm = Norm(size, config.rms_norm_eps)


class Feedforward(nn.Module):
    """The gated feed-forward layer."""

    def __init__(self, config: Qwen3Config):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, width] to the same."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One decoder layer, split where sequences meet: `before`, attention, `after`."""

    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.input_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.mlp = Feedforward(config)
        self.size = config.head_dim

    def before(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [tokens, heads, size] each, of [tokens, width]."""
        own, tokens = self.self_attn, x.shape[0]
        x = self.input_layernorm(x)
        query = own.q_norm(own.q_proj(x).view(tokens, -1, self.size))
        key = own.k_norm(own.k_proj(x).view(tokens, -1, self.size))
        value = own.v_proj(x).view(tokens, -1, self.size)
        return _rotate(query, cos, sin), _rotate(key, cos, sin), value

    def after(self, x: Tensor, attended: Tensor) -> Tensor:
        """The layer's output, from its input and what the heads attended to, both flat."""
        x = x + self.self_attn.o_proj(attended)
        return x + self.mlp(self.post_attention_layernorm(x))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x.float() * cos[:, None] + turned * sin[:, None]).to(x.dtype)


class Decoder(nn.Module):
    """Embeddings, layers and the last norm."""

    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)


class RecallModel(nn.Module):
    """The language model; tied embeddings."""

    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                out = name.endswith(("o_proj.weight", "down_proj.weight"))
                depth = math.sqrt(2 * config.num_hidden_layers) if out else 1.0
                nn.init.normal_(weight, std=1 / math.sqrt(weight.shape[1]) / depth)
        nn.init.normal_(self.model.embed_tokens.weight, std=0.02)
        exponent = torch.arange(0, config.head_dim, 2) / config.head_dim
        theta = config.rope_parameters["rope_theta"]
        self.register_buffer("frequency", theta ** -exponent.float(), persistent=False)

    def compile(self) -> None:
        """Compiles what is between attentions, one graph for all layers."""
        for layer in self.model.layers:
            layer.before = torch.compile(layer.before, dynamic=False)
            layer.after = torch.compile(layer.after, dynamic=False)

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Hidden states after the last norm.

        Args:
            tokens: [sequences, length] ids.
            positions: [sequences, length], increasing along a sequence; 0, 1, 2 ... if left out.

        Returns:
            [sequences * length, width].
        """
        sequences, length = tokens.shape
        if positions is None:
            positions = torch.arange(length, device=tokens.device).repeat(sequences, 1)
        angle = positions.reshape(-1, 1).float() * self.frequency
        cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
        x = self.model.embed_tokens(tokens.reshape(-1))
        for layer in self.model.layers:
            q, k, v = (
                part.view(sequences, length, *part.shape[1:]).transpose(1, 2)
                for part in layer.before(x, cos, sin)
            )
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = layer.after(x, attended.transpose(1, 2).reshape(sequences * length, -1))
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., vocabulary] of hidden states."""
        return F.linear(hidden, self.model.embed_tokens.weight)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> RecallModel:
    """The model of a folder that `save` wrote."""
    model = RecallModel(Qwen3Config.from_pretrained(folder))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.to(dtype)


def save(model: RecallModel, folder: Path) -> None:
    """Writes config.json, generation_config.json and bfloat16 weights, for any loader of Qwen3."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    marks = {"eos_token_id": model.config.eos_token_id, "pad_token_id": model.config.pad_token_id}
    # Of one token only, sampling takes the likeliest: servers answer greedily unless told not to.
    GenerationConfig(do_sample=True, top_k=1, **marks).save_pretrained(folder)
    weights = {name: w.detach().to("cpu", torch.bfloat16) for name, w in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
