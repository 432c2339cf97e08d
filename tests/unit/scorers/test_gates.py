"""Gates: the published formulas in plain loops, and what files of weights are taken."""

import math
import os
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from tangram.errors import ScorerError
from tangram.plan.compression_plan import make_plan
from tangram.plan.options import CompressionOptions
from tangram.profile import ModelIdentity
from tangram.scorers import get_scorer, registered_name, with_weights
from tangram.scorers.gates import GateSizes
from tests.gate_files import (
    fastkvzip_layer,
    kvzap_state,
    linear_layer,
    mlp_layer,
    write_fastkvzip,
    write_gates,
)

SIZES = GateSizes(hidden_size=24, num_kv_heads=2)


def dot(a, b):
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def project(weight, x, bias=None):
    out = [dot(row, x) for row in weight]
    return out if bias is None else [o + b for o, b in zip(out, bias, strict=True)]


def normalised(x, scale):
    root = math.sqrt(dot(x, x) / len(x) + 1e-6)
    return [value / root * s for value, s in zip(x, scale, strict=True)]


def naive_fastkvzip(state, x, heads, group, size):
    """[heads] scores of one hidden state."""
    s = {name: tensor.tolist() for name, tensor in state.items()}
    queries = project(s["q_proj.weight"], x, s["q_proj.bias"])
    keys = project(s["k_proj.weight"], x)
    scores = []
    for h in range(heads):
        key = normalised(keys[h * size : (h + 1) * size], s["k_norm.weight"])
        total = 0.0
        for g in range(group):
            first = (h * group + g) * size
            query = normalised(queries[first : first + size], s["q_norm.weight"])
            own = dot(query, key) / math.sqrt(size) + s["b"][h][0][g]
            sinks = [dot(sink, query) / math.sqrt(size) for sink in s["k_base"][h][0]]
            total += 1 / (1 + math.fsum(math.exp(sink - own) for sink in sinks))
        scores.append(total / group)
    return scores


def naive_kvzap(state, x):
    s = {name: tensor.tolist() for name, tensor in state.items()}
    if "weight" in s:
        return project(s["weight"], x, s["bias"])
    inner = project(s["0.weight"], x, s["0.bias"])
    inner = [v / 2 * (1 + math.erf(v / math.sqrt(2))) for v in inner]
    return project(s["2.weight"], inner, s["2.bias"])


def close(found, expected):
    torch.testing.assert_close(
        found.double(), torch.tensor(expected).double(), rtol=2e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    "shape",
    [{}, {"group": 1, "sinks": 1}, {"heads": 1, "group": 8, "size": 16, "sinks": 16, "hidden": 40}],
    ids=str,
)
def test_fastkvzip_is_its_formula(shape):
    torch.manual_seed(1)
    state = fastkvzip_layer(**shape)
    gate = get_scorer("fastkvzip").make_gate(state, torch.float32)
    hidden = 3 * torch.randn(7, gate.sizes.hidden_size)
    scores = gate(hidden)
    assert scores.dtype == torch.float32
    heads, _, group = state["b"].shape
    size = len(state["q_norm.weight"])
    close(scores, [naive_fastkvzip(state, x, heads, group, size) for x in hidden.tolist()])


def test_fastkvzip_has_no_overflow():
    state = fastkvzip_layer()
    state["k_base"] *= 1e4
    scores = get_scorer("fastkvzip").make_gate(state, torch.float32)(torch.randn(5, 24))
    assert torch.isfinite(scores).all() and (scores >= 0).all() and (scores <= 1).all()


@pytest.mark.parametrize("make", [linear_layer, mlp_layer])
def test_kvzap_is_its_formula(make):
    torch.manual_seed(2)
    state = make()
    gate = get_scorer("kvzap").make_gate(state, torch.float32)
    hidden = torch.randn(7, 24)
    close(gate(hidden), [naive_kvzap(state, x) for x in hidden.tolist()])


@pytest.mark.parametrize("name", ["fastkvzip", "kvzap"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gates_take_hidden_states_of_the_models_type(name, dtype, tmp_path):
    scorer = get_scorer(f"{name}:{write_gates(name, tmp_path / 'gates.pt')}")
    hidden = torch.randn(50, 24).to(dtype)
    half, full = (scorer.gates(d, "cpu", 3, SIZES)[1] for d in (dtype, torch.float32))
    found, expected = half(hidden), full(hidden.float())
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_every_layer_has_its_own_gate(tmp_path):
    path = write_fastkvzip(tmp_path / "gates.pt")
    gates = get_scorer("fastkvzip", weights=str(path)).gates(torch.float32, "cpu", 3, SIZES)
    layers = torch.load(path, weights_only=True)["module"]
    hidden = torch.randn(4, 24)
    for gate, state in zip(gates, layers, strict=True):
        close(gate(hidden), [naive_fastkvzip(state, x, 2, 3, 8) for x in hidden.tolist()])
        assert not any(weight.requires_grad for weight in gate.parameters())


@pytest.mark.parametrize("make", [linear_layer, mlp_layer])
def test_kvzap_reads_a_folder_and_a_safetensors_file_and_what_torch_saved(make, tmp_path):
    state = kvzap_state(make, layers=12)
    save_file(state, tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "gates.pt")
    hidden, scores = torch.randn(3, 24), []
    for path in (tmp_path, tmp_path / "model.safetensors", tmp_path / "gates.pt"):
        gates = get_scorer(f"kvzap:{path}").gates(torch.float32, "cpu", 12, SIZES)
        scores.append(torch.stack([gate(hidden) for gate in gates]))
    assert torch.equal(scores[0], scores[1]) and torch.equal(scores[0], scores[2])
    tenth = {
        n.removeprefix("layers.10."): t for n, t in state.items() if n.startswith("layers.10.")
    }
    close(scores[0][10], [naive_kvzap(tenth, x) for x in hidden.tolist()])


class Opens:
    """What runs when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["fastkvzip", "kvzap"])
def test_code_in_a_file_is_not_run(name, tmp_path):
    path, made = tmp_path / "gates.pt", tmp_path / "made"
    torch.save({"module": [fastkvzip_layer()], "more": Opens(made)}, path)
    with pytest.raises(ScorerError, match=rf"{name} with .*gates.pt.* more than tensors.*not run"):
        get_scorer(f"{name}:{path}").gates(torch.float32, "cpu", 1, SIZES)
    assert not made.exists()


def without(name):
    state = fastkvzip_layer()
    del state[name]
    return state


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("fastkvzip", {"layers": []}, 'expected {"module"'),
        ("fastkvzip", [fastkvzip_layer()], 'expected {"module"'),
        ("fastkvzip", {"module": [3]}, 'expected {"module"'),
        ("fastkvzip", {"module": [without("k_base")]}, "layer 0: expected tensors"),
        ("fastkvzip", {"module": [without("q_norm.weight")]}, r"q_norm.weight \(8,\)"),
        ("fastkvzip", {"module": [{**fastkvzip_layer(), "c": torch.ones(1)}]}, r"c \(1,\)"),
        ("fastkvzip", {"module": [{**fastkvzip_layer(), "b": "b"}]}, "layer 0: expected tensors"),
        ("kvzap", {"module": []}, "expected tensors layers.0.weight"),
        ("kvzap", {}, "expected tensors layers.0.weight"),
        ("kvzap", {"layers.0.1.weight": torch.ones(2, 3)}, "layer 0: expected matrices"),
        ("kvzap", {"layers.1.weight": torch.ones(2, 3)}, r"of the layers \[1\]"),
        ("kvzap", {"layers.0.weight": torch.ones(2, 3)}, r"bias \(2,\)"),
    ],
)
def test_what_is_no_such_file_is_refused(name, content, said, tmp_path):
    path = tmp_path / "gates.pt"
    torch.save(content, path)
    with pytest.raises(ScorerError, match=said) as caught:
        get_scorer(f"{name}:{path}").gates(torch.float32, "cpu", 1, SIZES)
    assert str(path) in str(caught.value) and f"--compression-scorer {name}" in str(caught.value)


@pytest.mark.parametrize("name", ["fastkvzip", "kvzap"])
@pytest.mark.parametrize("file", ["gates.pt", "gates.safetensors"])
def test_a_damaged_file_is_refused(name, file, tmp_path):
    path = tmp_path / file
    path.write_bytes(b"no weights at all")
    with pytest.raises(ScorerError, match="cannot be read|more than tensors"):
        get_scorer(f"{name}:{path}").gates(torch.float32, "cpu", 1, SIZES)
    with pytest.raises(ScorerError, match="there is no such file"):
        get_scorer(f"{name}:{path}x").gates(torch.float32, "cpu", 1, SIZES)


@pytest.mark.parametrize("name", ["fastkvzip", "kvzap"])
@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"layers": 4}, "gates of 4 layers, and the model has 3"),
        ({"hidden": 32}, "hidden states of 32, and the model has"),
        ({"heads": 4}, "for 4 KV heads .* the model has 2 KV heads"),
    ],
)
def test_weights_of_another_model_are_refused(name, sizes, said, tmp_path):
    path = write_gates(name, tmp_path / "gates.pt", **sizes)
    with pytest.raises(ScorerError, match=said):
        get_scorer(f"{name}:{path}").check_model(3, 24, 2)


def test_scores_that_were_not_made_are_an_error(make_chunks):
    with pytest.raises(ScorerError, match="fastkvzip got no scores"):
        get_scorer("fastkvzip").score(replace(make_chunks(), stored_scores=None))


def test_a_file_is_named_after_a_colon_or_as_a_parameter(tmp_path):
    path = str(write_gates("kvzap", tmp_path / "gates.pt"))
    one, other = get_scorer(f"KVzap:{path}"), get_scorer("kvzap", weights=path)
    assert one == other and one.changed_parameters() == {"weights": path}
    assert with_weights(f"kvzap:{path}", {}) == ("kvzap", {"weights": path})
    assert with_weights("snap_kv", {"kernel_size": 3}) == ("snap_kv", {"kernel_size": 3})
    with pytest.raises(ScorerError, match="give one of the two"):
        get_scorer("kvzap:this", weights="that")
    with pytest.raises(ScorerError, match="key_diff has no parameter weights"):
        get_scorer(f"key_diff:{path}")
    with pytest.raises(ScorerError, match="weights is 3, expected a file"):
        get_scorer("kvzap", weights=3)
    assert registered_name(f"KVzap:{path}") == "kvzap"
    options = CompressionOptions.from_mapping({"compression_scorer": f"kvzap:{path}"})
    assert options.compression_scorer == "kvzap"
    assert options.compression_scorer_parameters == {"weights": path}


@pytest.mark.parametrize("name", ["fastkvzip", "kvzap"])
def test_without_weights_nothing_is_served(name):
    with pytest.raises(ScorerError, match=f"give --compression-scorer {name}:FILE"):
        CompressionOptions.from_mapping({"compression_scorer": name})
    with pytest.raises(ScorerError, match="what a profile knows a file by"):
        CompressionOptions.from_mapping({"compression_scorer": f"{name}:sha256:00ff"})


def test_a_profile_knows_a_file_by_its_content(tmp_path):
    write_fastkvzip(tmp_path / "a.pt")
    shutil.copy(tmp_path / "a.pt", tmp_path / "b.pt")
    write_fastkvzip(tmp_path / "c.pt", seed=1)
    first, same, other = (get_scorer(f"fastkvzip:{tmp_path / n}.pt") for n in "abc")
    assert first.identity()["weights"].startswith("sha256:")
    assert first.identity() == same.identity() != other.identity()
    shutil.copy(tmp_path / "c.pt", tmp_path / "b.pt")
    os.utime(tmp_path / "b.pt", ns=(1, 1))
    assert same.identity() == other.identity()


def test_a_plan_is_of_weights_that_fit_and_remembers_which(tmp_path):
    model = ModelIdentity("Sample", 3, 2, 4, 64, 24, 100)
    path = write_fastkvzip(tmp_path / "gates.pt")
    options = CompressionOptions.from_mapping(
        {"compression_scorer": f"fastkvzip:{path}", "page_group_size": 1}
    )
    plan = make_plan(options, model, itemsize_bytes=2)
    assert plan.geometry.has_stored_scores and not plan.geometry.has_query_ring
    assert plan.weights_digest == options.scorer.identity()["weights"]
    assert type(plan).from_json(plan.to_json()) == plan and plan.scorer == options.scorer
    with pytest.raises(ScorerError, match="the model has 4"):
        make_plan(options, ModelIdentity("Sample", 4, 2, 4, 64, 24, 100), itemsize_bytes=2)
