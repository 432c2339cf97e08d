import json
from pathlib import Path

import huggingface_hub
import pytest

from tangram.bundled import recall_model_path

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}


@pytest.fixture
def write_config(tmp_path):
    """Makes a folder with that config, changed as asked, and nothing else."""

    def write(**changes) -> Path:
        folder = tmp_path / "model"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(LLAMA | changes))
        return folder

    return write


@pytest.fixture
def llama(write_config) -> Path:
    """A model like Llama 3.1 8B."""
    return write_config()


@pytest.fixture
def hub(monkeypatch, llama) -> str:
    """A model by name: like Llama on its main branch, and the recall model at revision `old`."""

    def cached(model, file, revision=None):
        assert model == "org/m"
        folder = {None: llama, "old": recall_model_path()}.get(revision)
        return folder and str(folder / file)

    def offline(*arguments, **options):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    return "org/m"


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    """Tables are not to wrap what a test looks for."""
    monkeypatch.setenv("COLUMNS", "300")
