"""A folder with a tiny random model whose tokens are bytes."""

import pytest

from tests.unit.evaluate.conftest import byte_tokenizer


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=8192,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, dtype="float32",
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # attention that looks at something
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(20)
            layer.self_attn.k_proj.weight.mul_(20)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def save_profile(tiny_model, tmp_path):
    """Writes a profile of the tiny model, with statistics drawn from a seed; gives its file."""
    import numpy as np

    from tangram.plan.models import read_config
    from tangram.profile import (
        ERROR_CURVE,
        QUERY_COVARIANCE,
        QUERY_MEAN,
        ROPE_FREQUENCIES,
        ModelIdentity,
        Profile,
    )
    from tangram.scorers import get_scorer

    def save(seed, scorer="key_diff"):
        random = np.random.default_rng(seed)
        shares = np.linspace(0, 1, 17)
        steepness = random.uniform(0.5, 20, size=(3, 2, 2, 1))
        scale = random.uniform(0.1, 1, size=(1, 2, 2, 1))
        path = tmp_path / f"{scorer}-{seed}.profile"
        Profile(
            model=ModelIdentity.from_config(read_config(str(tiny_model))),
            scorer_name=scorer,
            scorer_parameters=get_scorer(scorer).parameters(),
            chunk_size_tokens=256,
            window_size_tokens=32,
            n_sink_tokens=4,
            shares=tuple(shares),
            arrays={
                ERROR_CURVE: scale * (1 - shares) ** steepness,
                QUERY_MEAN: random.normal(size=(2, 4, 16)),
                QUERY_COVARIANCE: np.broadcast_to(np.eye(16), (2, 4, 16, 16)),
                ROPE_FREQUENCIES: 10000.0 ** (-np.arange(8) / 8),
            },
        ).save(path)
        return path

    return save
