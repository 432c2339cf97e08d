"""Gathers the statistics of one sample after another, and makes a profile of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tangram.calibrate.recording.layer_sample import (
    LayerSample,
    keep_steps,
    later_queries,
    retention_curves,
    score_sealed,
    sink_mask,
)
from tangram.errors import ProfileError
from tangram.geometry import Geometry, HeadGroups
from tangram.profile import (
    ERROR_CURVE,
    MASS_CURVE,
    ROPE_FREQUENCIES,
    ModelIdentity,
    Profile,
    threshold_share,
)
from tangram.scorers import Scorer, score_ranks
from tangram.scorers.gates import GateScorer, GateSizes
from tangram.scorers.shares import threshold_shares

DEFAULT_RATIOS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9, 1.0)


class StatisticsRecorder:
    """Takes queries, keys and values of full-KV runs; gives a `Profile`.

    Samples come one after another; the layers of one sample in any order, each once, and then
    `finish_sample`. A sample of C tokens or fewer has no query past a boundary and counts for
    nothing. No [queries, keys] matrix of a whole sample is ever made.

    Args:
        model: the network.
        scorer: whose rows the statistics are about.
        chunk_size_tokens: C.
        window_size_tokens: W.
        n_sink_tokens: S.
        softmax_scale: factor on query . key before the softmax.
        output_projections: for each layer [hidden, query_heads * head_size].
        share_grid: n; the curves are taken at 0, 1/n .. 1 of a chunk. Rows are whole: at share
            i / n a chunk keeps round(i * C / n) of them.
        ratios: grid of the threshold shares.
        max_query_rows: queries that are looked at together; as many as memory allows when absent.
        max_later_queries: queries of a sample that the curves are means over, spread evenly over
            the positions past the first boundary.
        statistics: query statistics of a first pass over the samples (`QueryStatistics.arrays`),
            for a scorer that needs them; they go into the profile as they are.
        factors: what is made of the projections is kept here; recorders of one model may share it.

    Raises:
        ProfileError: arguments that do not fit the model.
        ConfigurationError: C, W and S that do not fit each other.
        ScorerError: the scorer needs statistics that were not given, or a window.
    """

    def __init__(
        self,
        model: ModelIdentity,
        scorer: Scorer,
        *,
        chunk_size_tokens: int,
        window_size_tokens: int,
        n_sink_tokens: int,
        softmax_scale: float,
        output_projections: Sequence[Tensor],
        share_grid: int = 32,
        ratios: tuple[float, ...] = DEFAULT_RATIOS,
        max_query_rows: int | None = None,
        max_later_queries: int = 256,
        statistics: Mapping[str, np.ndarray] | None = None,
        factors: dict[int, Tensor] | None = None,
    ) -> None:
        rows = 1 if max_query_rows is None else max_query_rows
        if min(share_grid, rows, max_later_queries) < 1:
            raise ProfileError(
                "share_grid, max_query_rows and max_later_queries must be at least 1, got "
                f"{share_grid}, {max_query_rows} and {max_later_queries}"
            )
        projection = (model.hidden_size, model.num_query_heads * model.head_size)
        shapes = [tuple(weight.shape) for weight in output_projections]
        if shapes != [projection] * model.num_layers:
            raise ProfileError(
                f"expected {model.num_layers} output projections of shape {projection}, "
                f"got {shapes}"
            )
        self._geometry = _full_geometry(model, chunk_size_tokens, window_size_tokens, n_sink_tokens)
        self._model, self._scorer, self._softmax_scale = model, scorer, softmax_scale
        self._output_projections = output_projections
        self._factors = {} if factors is None else factors
        self._grid_rows = [round(i * chunk_size_tokens / share_grid) for i in range(share_grid + 1)]
        self._ratios = ratios
        self._max_query_rows, self._max_later_queries = max_query_rows, max_later_queries
        self._given = dict(statistics or {})
        scorer.check_inputs(window_size_tokens, self._given)

        self._made_gates: Any = None
        self._later: tuple[int, ...] = ()
        self._num_tokens: int | None = None  # of the sample whose layers come in now
        self._seen: set[int] = set()
        self._ranks: dict[int, Tensor] = {}
        self._curves: dict[int, np.ndarray] = {}
        self._lengths: list[int] = []
        self._sample_shares: list[tuple[np.ndarray, np.ndarray]] = []
        self._sample_curves: list[np.ndarray] = []

    def begin_sample(self, later: Sequence[int]) -> None:
        """Tell where later answers are generated in the sample whose layers come next.

        Args:
            later: positions of the queries that generate them, rising; see `later_queries`.
        """
        self._later = tuple(later)

    @torch.no_grad()
    def add_layer(
        self,
        layer: int,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        residual_norms: Tensor,
        hidden_states: Tensor | None = None,
    ) -> None:
        """Take one layer of the current sample.

        Args:
            layer: attention layer.
            queries: [tokens, query_heads, head_size] after RoPE, of positions 0, 1, 2 ...
            keys: [tokens, kv_heads, head_size] after RoPE.
            values: the same shape as `keys`.
            residual_norms: [tokens], Euclidean norm of the residual stream that the attention's
                output is added to.
            hidden_states: [tokens, hidden_size], of which queries, keys and values were made, for a
                scorer that makes scores of them.

        Raises:
            ProfileError: shapes that do not fit the model, or a layer that was there already.
            ScorerError: gates of another model.
        """
        self._check_layer(layer, queries, keys, values, residual_norms)
        self._seen.add(layer)
        if len(keys) <= self._geometry.chunk_size_tokens:
            return
        stored = None
        if hidden_states is not None and self._scorer.stores_scores:
            stored = self._gates(hidden_states)[layer](hidden_states)
        sample = LayerSample(queries, keys, values, self._softmax_scale, stored)
        scores = score_sealed(sample, self._scorer, self._statistics(layer, keys), self._geometry)
        self._ranks[layer] = self._sortable(scores)
        positions, weights = later_queries(
            len(keys), self._geometry.chunk_size_tokens, self._max_later_queries, self._later
        )
        mass, error = retention_curves(
            sample,
            keep_steps(scores, self._grid_rows, self._geometry),
            len(self._grid_rows),
            positions=positions,
            weights=weights,
            residual_norms=residual_norms,
            factors=self._projection_factors(layer).to(keys.device),
            geometry=self._geometry,
            max_query_rows=self._max_query_rows,
        )
        self._curves[layer] = torch.stack([mass, error]).float().cpu().numpy()

    def finish_sample(self) -> None:
        """Close the current sample, all of whose layers have been added.

        Raises:
            ProfileError: layers are missing.
        """
        layers = range(self._model.num_layers)
        missing = sorted(set(layers) - self._seen)
        if missing or self._num_tokens is None:
            raise ProfileError(f"the sample is not complete: no layers {missing}")
        self._lengths.append(self._num_tokens)
        if self._ranks:
            ranks = torch.stack([self._ranks[layer] for layer in layers])
            shares = threshold_shares(ranks, self._ratios)
            curves = np.stack([self._curves[layer] for layer in layers], axis=1)
            if not np.isfinite(curves).all():
                raise ProfileError(
                    f"sample {len(self._lengths)} ({self._num_tokens} tokens) gives statistics "
                    "that are not finite: calibrate with --dtype bfloat16 or float32, or leave the "
                    "text out"
                )
            cross, per = (shares[scope].cpu().numpy() for scope in ("crosslayer", "perlayer"))
            self._sample_shares.append((cross, per))
            self._sample_curves.append(curves)
        self._num_tokens, self._later = None, ()
        self._seen, self._ranks, self._curves = set(), {}, {}

    def state(self) -> dict[str, np.ndarray]:
        """What was gathered over the finished samples, for `restore`."""
        arrays = {"lengths": np.array(self._lengths, dtype=np.int64)}
        if self._sample_curves:
            arrays["shares"] = np.stack([np.stack(scopes) for scopes in self._sample_shares])
            arrays["curves"] = np.stack(self._sample_curves)
        return arrays

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from where `state` was taken: the profile will be the same, bit for bit.

        Args:
            state: of a recorder that was made with the same arguments.
        """
        self._lengths = state["lengths"].tolist()
        self._sample_shares = [(cross, per) for cross, per in state.get("shares", ())]
        self._sample_curves = list(state.get("curves", ()))

    def profile(self, data: Mapping[str, Any], *, seed: int = 0) -> Profile:
        """What was found over all finished samples.

        Args:
            data: what was calibrated on, `sha256` and `description`; the number of samples that
                were long enough is added as `n_samples`.
            seed: seed of whatever was drawn to make the samples.

        Raises:
            ProfileError: a sample is not finished, or none has more than C tokens.
        """
        if self._seen:
            raise ProfileError("a sample is not finished: call finish_sample after its last layer")
        if not self._sample_curves:
            chunk = self._geometry.chunk_size_tokens
            raise ProfileError(
                f"none of {len(self._lengths)} samples has more than {chunk} tokens (the longest "
                f"has {max(self._lengths, default=0)}), so no query ever looks back at a sealed "
                "chunk: give longer samples, or a smaller --compression-chunk-size"
            )
        cross, per = (np.stack(scope, axis=1) for scope in zip(*self._sample_shares, strict=True))
        mass, error = np.stack(self._sample_curves, axis=1)
        points = len(self._grid_rows) - 1
        return Profile(
            model=self._model,
            scorer_name=self._scorer.name,
            scorer_parameters=self._scorer.identity(),
            chunk_size_tokens=self._geometry.chunk_size_tokens,
            window_size_tokens=self._geometry.window_size_tokens,
            n_sink_tokens=self._geometry.n_sink_tokens,
            ratios=self._ratios,
            shares=tuple(i / points for i in range(points + 1)),
            data={**data, "n_samples": len(self._sample_curves)},
            seed=seed,
            extra={
                "max_later_queries": self._max_later_queries,
                "sample_tokens": list(self._lengths),
            },
            arrays={
                threshold_share("crosslayer"): cross,
                threshold_share("perlayer"): per,
                MASS_CURVE: mass,
                ERROR_CURVE: error,
                **self._given,
            },
        )

    def _check_layer(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, residual_norms: Tensor
    ) -> None:
        model, tokens = self._model, len(keys)
        if not 0 <= layer < model.num_layers or layer in self._seen:
            raise ProfileError(
                f"layer {layer} was added twice, or is not one of {model.num_layers} layers"
            )
        if self._num_tokens is None:
            self._num_tokens = tokens
        found = [tuple(x.shape) for x in (queries, keys, values, residual_norms)]
        rows = (self._num_tokens, model.num_kv_heads, model.head_size)
        expected = [(rows[0], model.num_query_heads, rows[2]), rows, rows, (rows[0],)]
        if found != expected:
            raise ProfileError(
                f"layer {layer}: queries, keys, values and residual norms must have the shapes "
                f"{expected}, got {found}"
            )

    def _gates(self, hidden_states: Tensor) -> Any:
        """What makes scores of hidden states of this type, by layer; read once."""
        if self._made_gates is None:
            assert isinstance(self._scorer, GateScorer)
            sizes = GateSizes(self._model.hidden_size, self._model.num_kv_heads)
            self._made_gates = self._scorer.gates(
                hidden_states.dtype, hidden_states.device, self._model.num_layers, sizes
            )
        return self._made_gates

    def _statistics(self, layer: int, keys: Tensor) -> dict[str, Tensor]:
        """What the scorer may ask about the layer."""
        given = {n: a if n == ROPE_FREQUENCIES else a[layer] for n, a in self._given.items()}
        return {name: torch.tensor(array, device=keys.device) for name, array in given.items()}

    def _sortable(self, scores: Tensor) -> Tensor:
        """[kv_heads, tokens] int32 that order the tokens of a sample over heads, sinks first."""
        sinks = sink_mask(len(scores), self._geometry, scores.device)
        ranks = score_ranks(scores).masked_fill(sinks[:, None], torch.iinfo(torch.int32).max)
        return ranks.T

    def _projection_factors(self, layer: int) -> Tensor:
        """[kv_heads, k, group * head_size] float32: the norm after the output projection.

        The triangular factor of each KV head's slice has the same norm as the slice and at most
        as many rows as columns; kept, since every sample asks for it.
        """
        if layer not in self._factors:
            weight = self._output_projections[layer].detach().float()
            slices = weight.unflatten(1, (self._model.num_kv_heads, -1)).transpose(0, 1)
            self._factors[layer] = torch.linalg.qr(slices, mode="r").R
        return self._factors[layer]


class Recorders:
    """Recorders of several scorers that take in the same readings.

    Args:
        each: name of a scorer -> its recorder.
    """

    def __init__(self, each: Mapping[str, StatisticsRecorder]) -> None:
        self.each = each

    def begin_sample(self, later: Sequence[int]) -> None:
        """See `StatisticsRecorder`, and so for the rest."""
        for recorder in self.each.values():
            recorder.begin_sample(later)

    def add_layer(self, layer: int, *arrays: Tensor) -> None:
        """Take one layer of the current sample."""
        for recorder in self.each.values():
            recorder.add_layer(layer, *arrays)

    def finish_sample(self) -> None:
        """Close the current sample."""
        for recorder in self.each.values():
            recorder.finish_sample()

    def state(self) -> dict[str, np.ndarray]:
        """What was gathered by all of them."""
        return {
            f"{name}/{key}": array
            for name, recorder in self.each.items()
            for key, array in recorder.state().items()
        }

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from where `state` was taken."""
        for name, recorder in self.each.items():
            recorder.restore(with_prefix(f"{name}/", state))


def with_prefix(prefix: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Those of the arrays whose names begin so, under the rest of their names."""
    return {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}


def _full_geometry(
    model: ModelIdentity, chunk_size_tokens: int, window_size_tokens: int, n_sink_tokens: int
) -> Geometry:
    """Chunks of which every head keeps everything; checks C, W and S."""
    heads = tuple((head,) for head in range(model.num_kv_heads))
    return Geometry(
        head_groups=HeadGroups(
            heads=(heads,) * model.num_layers, pages=((1,) * len(heads),) * model.num_layers
        ),
        num_query_heads=model.num_query_heads,
        head_size=model.head_size,
        itemsize_bytes=2,
        chunk_size_tokens=chunk_size_tokens,
        window_size_tokens=window_size_tokens,
        n_sink_tokens=n_sink_tokens,
        page_size_rows=chunk_size_tokens,
    )
