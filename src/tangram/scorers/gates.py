"""Gates: networks that make a token's scores of its hidden state, read from a file of weights."""

from __future__ import annotations

import functools
import hashlib
import pickle
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tangram.errors import ScorerError
from tangram.scorers.base import Chunks, Scorer

_SAFETENSORS = ".safetensors"
_FOLDER_FILE = "model.safetensors"
DIGEST = "sha256:"
"""What the digest begins with by which a profile knows weights."""


class GateSizes(NamedTuple):
    """What of a model a gate has to fit."""

    hidden_size: int
    num_kv_heads: int


class Gate(nn.Module):
    """The gate of one layer; its products with hidden states are of the model's type.

    Attributes:
        sizes: of the model that it is made for.
    """

    sizes: GateSizes

    def forward(self, hidden: Tensor) -> Tensor:
        """[tokens, kv_heads] float32, higher = keep.

        Args:
            hidden: [tokens, hidden_size], what enters the layer's projection to Q, K and V.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class GateScorer(Scorer):
    """Scores that a gate made together with their tokens, and that lie beside them since.

    Attributes:
        weights: file of the gates, or a folder with model.safetensors; `--compression-scorer
            NAME:FILE` gives it too.
    """

    stores_scores: ClassVar[bool] = True

    weights: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.weights, str):
            raise ScorerError(f"{self.name}: weights is {self.weights!r}, expected a file")

    @abstractmethod
    def read_layers(self, path: Path) -> list[Mapping[str, Tensor]]:
        """The tensors of every layer's gate, by name.

        Raises:
            ScorerError: the file holds something else.
        """

    @abstractmethod
    def make_gate(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Gate:
        """The gate of a layer.

        Args:
            tensors: of the layer, see `read_layers`.
            dtype: of hidden states.

        Raises:
            ScorerError: names or shapes that are no such gate's.
        """

    def gates(
        self, dtype: torch.dtype, device: torch.device | str, layers: int, sizes: GateSizes
    ) -> nn.ModuleList:
        """The gates of all layers of a model.

        Args:
            dtype: of hidden states.
            device: where they are.
            layers: of the model.
            sizes: of the model.

        Raises:
            ScorerError: there is no such file, it cannot be read, or it is of another model.
        """
        found = self.read_layers(self._path())
        made = []
        for layer, tensors in enumerate(found):
            try:
                gate = self.make_gate(tensors, dtype)
            except ScorerError as error:
                raise self.file_error(f"layer {layer}: {error}") from error
            if gate.sizes != sizes:
                raise self.file_error(
                    f"layer {layer} has a gate for {_title(gate.sizes)}, and the model has "
                    f"{_title(sizes)}: give the weights of this model"
                )
            made.append(gate.to(device).requires_grad_(False))
        if len(made) != layers:
            raise self.file_error(
                f"it has gates of {len(made)} layers, and the model has {layers}: give the weights "
                "of this model"
            )
        return nn.ModuleList(made)

    def score(self, chunks: Chunks) -> Tensor:
        """The scores as they were made."""
        if chunks.stored_scores is None:
            raise ScorerError(
                f"{self.name} got no scores: they are made of hidden states, with their tokens"
            )
        return chunks.stored_scores.clone(memory_format=torch.contiguous_format)

    def check_window(self, window_size_tokens: int) -> None:
        """Check that there are weights.

        Raises:
            ScorerError: there are none.
        """
        super().check_window(window_size_tokens)
        self._path()

    def check_model(self, num_layers: int, hidden_size: int, num_kv_heads: int) -> None:
        """Check that the weights are of the model.

        Raises:
            ScorerError: they are not, or cannot be read.
        """
        sizes = GateSizes(hidden_size, num_kv_heads)
        self.gates(torch.float32, "cpu", num_layers, sizes)

    def identity(self) -> dict[str, Any]:
        """The parameters, with a digest of the weights in the place of where they lie."""
        path = self._path()
        stat = path.stat()
        return {
            **self.parameters(),
            "weights": DIGEST + _digest(path, stat.st_mtime_ns, stat.st_size),
        }

    def file_error(self, reason: str) -> ScorerError:
        """What is wrong with the file of weights."""
        return ScorerError(
            f"--compression-scorer {self.name} with the weights {self.weights}: {reason}"
        )

    def _path(self) -> Path:
        if not self.weights:
            raise ScorerError(
                f"--compression-scorer {self.name} needs the weights of its gates: give "
                f"--compression-scorer {self.name}:FILE"
            )
        if self.weights.startswith(DIGEST):
            raise self.file_error(
                f"this is what a profile knows a file by: give --compression-scorer "
                f"{self.name}:FILE with the file of that digest"
            )
        path = Path(self.weights)
        path = path / _FOLDER_FILE if path.is_dir() else path
        if not path.is_file():
            raise self.file_error(
                f"there is no such file, nor a folder with {_FOLDER_FILE}: give one that is on "
                "this machine"
            )
        return path


def load_tensors(scorer: GateScorer, path: Path) -> Any:
    """What a file of weights holds: safetensors, or what `torch.save` wrote of tensors alone.

    Raises:
        ScorerError: it cannot be read, or not without running code that is in it.
    """
    try:
        if path.suffix == _SAFETENSORS:
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise scorer.file_error(
            "it holds more than tensors, or no tensors at all, and what it holds is not run "
            f"({reason}): save its tensors again, alone, where you trust it"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, SafetensorError) as error:
        raise scorer.file_error(f"it cannot be read ({error}): give the published file") from error


def check_shapes(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that a layer has these tensors and no others.

    Raises:
        ScorerError: it has not.
    """
    found = {
        name: tuple(t.shape) if isinstance(t, Tensor) else type(t) for name, t in tensors.items()
    }
    if found != dict(shapes):
        raise ScorerError(f"expected tensors {_list(shapes)}, got {_list(found)}")


def projection(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Linear:
    """A linear layer with these weights, in this type."""
    outputs, inputs = weight.shape
    linear = nn.Linear(inputs, outputs, bias=bias is not None, dtype=dtype, device="cpu")
    linear.weight.data.copy_(weight)
    if bias is not None:
        linear.bias.data.copy_(bias)
    return linear


def _list(shapes: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in sorted(shapes.items())) or "none"


def _title(sizes: GateSizes) -> str:
    return f"{sizes.num_kv_heads} KV heads and hidden states of {sizes.hidden_size}"


@functools.cache
def _digest(path: Path, changed_ns: int, size_bytes: int) -> str:
    """Of a file's content; asked often, and read once while the file stays as it is."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
