"""Models by shape: a folder with a config and no weights, which vLLM fills with random ones."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.kernels.budgets import make_benchmark_profile
from tangram.profile import ModelIdentity
from tangram.profile.store import replace_file
from tangram.scorers import get_scorer

FOLDER = Path(tempfile.gettempdir()) / "bench-models"
"""Where they are written. vLLM finds what it has compiled for a model and a profile by their paths:
the same ones in every run save each server's start half a minute."""
QWEN = {
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000,
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
    "use_sliding_window": False,
}
CONFIGS: dict[str, dict[str, Any]] = {
    # For trying a benchmark out on a CPU.
    "tiny": {
        **QWEN,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "head_dim": 32,
        "hidden_size": 64,
        "intermediate_size": 128,
        "max_position_embeddings": 32768,
        "num_attention_heads": 8,
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "vocab_size": 5000,
    },
    "qwen3-4b": {
        **QWEN,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "head_dim": 128,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "max_position_embeddings": 262144,
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "qwen2.5-7b": {
        **QWEN,
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_position_embeddings": 1010000,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
        "vocab_size": 152064,
    },
    "qwen3-32b": {
        **QWEN,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "head_dim": 128,
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "max_position_embeddings": 131072,
        "num_attention_heads": 64,
        "num_hidden_layers": 64,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
    "llama-3.1-8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 128256,
    },
}


def write_model(name: str, folder: Path = FOLDER) -> Path:
    """A folder that `--load-format dummy` serves as the model; lengths are the model's own."""
    folder = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    # Servers of other runs may be reading what was there.
    config = json.dumps(CONFIGS[name], indent=2) + "\n"
    replace_file(folder / "config.json", config.encode())
    return folder


def compression_options(
    name: str,
    folder: Path = FOLDER,
    *,
    retention: Path | None,
    budgets: str,
    scorer_name: str,
    ratio: float,
    seed: int,
) -> dict[str, Any]:
    """Options that serve a shape with budgets of real heads; writes their profile to the folder.

    Args:
        name: of the shape.
        folder: for the profile, whose name there tells its contents.
        retention: .npz of shares of real heads; made-up ones of the same spread without.
        budgets: `<scorer>/<scope>` that the shares are of.
        scorer_name: that serves.
        ratio: share of all rows that is kept.
        seed: of made-up shares.
    """
    scorer = get_scorer(scorer_name)
    identity = ModelIdentity.from_config(CONFIGS[name])
    made = make_benchmark_profile(
        retention, name, budgets, identity=identity, scorer=scorer, seed=seed
    )
    shares = b"".join(made.arrays[key].tobytes() for key in sorted(made.arrays))
    digest = hashlib.sha256(shares).hexdigest()[:12]
    profile = folder / f"{name}-{scorer.name}-{digest}.profile"
    made.save(profile)
    return {
        "compression_ratio": ratio,
        "compression_scorer": scorer.name,
        "compression_profile": str(profile),
        "compression_level": budgets.split("/")[1],
    }
