"""What a running server says of its compression, whatever it says."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from tangram.cli.findings import Finding
from tangram.printable import cut
from tangram.serving.scrape import read_samples
from tangram.vllm_plugin.drift.board import LEAST_CHUNKS

_MIB = 1 << 20
_MOST_ROWS, _MOST_LINES = 60, 5
"""Rows that are shown, and of them lines that are no samples."""


def served(text: str) -> list[Finding]:
    """What a server's metrics, in Prometheus' text format, say of its compression.

    Whatever the text is, it is findings: values that are missing or cannot be, and lines that are
    no samples, are wrong.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    layouts: dict[str, Mapping[str, str]] = {}
    taken, others = read_samples(text)
    for sample in taken:
        prefix, _, name = sample.name.partition(":")
        if prefix != "tangram":
            continue
        labels, engine = sample.labels, sample.labels.get("engine", "")
        if name == "layout_info":
            layouts[engine] = labels
        values = found.setdefault(engine, {}).setdefault(name, {})
        values[labels.get("kind") or labels.get("reason", "")] = sample.value
    findings = []
    for engine in sorted(found.keys() - {""}):
        findings.append(_layout(engine, layouts.get(engine, {})))
        findings += _engine(engine, found[engine])
    if not findings:
        note = "start it with --enable-compression, and without --disable-log-stats"
        findings.append(Finding("compression", "no metrics of it", False, note))
    findings += _refused(found.get("", {}).get("refused_requests_total", {}))
    findings += [Finding("no sample", cut(line, 80), False) for line in others[:_MOST_LINES]]
    if len(others) > _MOST_LINES:
        findings.append(Finding("no samples", f"{len(others)} lines in all", False))
    return _shortened(findings)


def _layout(engine: str, labels: Mapping[str, str]) -> Finding:
    name = f"engine {engine}: layout"
    wanted = ("layout", "scorer", "level", "ratio", "chunk_size")
    if missing := [label for label in wanted if label not in labels]:
        return Finding(name, f"does not say: {', '.join(missing)}", False)
    parameters = labels.get("scorer_parameters", "")
    scorer = f"{labels['scorer']}({parameters})" if parameters else labels["scorer"]
    what = "{layout}: scorer {scorer}, level {level}, ratio {ratio}, chunks of {chunk_size} tokens"
    return Finding(name, what.format(**{**labels, "scorer": scorer}))


def _refused(counts: Mapping[str, float]) -> Iterator[Finding]:
    if wrong := _wrong(counts):
        yield Finding("refused requests", wrong, False)
    elif refused := {reason: count for reason, count in counts.items() if count}:
        listed = ", ".join(f"{count:.0f} for {reason}" for reason, count in refused.items())
        yield Finding("refused requests", listed, warning=True)


def _wrong(values: Mapping[str, float]) -> str:
    """Those that are no finite numbers or negative, in words; empty without any."""
    return ", ".join(
        f"{name} is {'missing, or no number' if math.isnan(value) else f'{value:g}'}"
        for name, value in values.items()
        if not 0 <= value < math.inf
    )


def _engine(engine: str, found: Mapping[str, Mapping[str, float]]) -> Iterator[Finding]:
    """Rows about one engine; a row whose values are missing or cannot be is wrong."""

    def row(name: str, wanted: Mapping[str, float], words: Callable[..., str]) -> Finding:
        wrong = _wrong(wanted)
        return Finding(f"engine {engine}: {name}", wrong or words(*wanted.values()), not wrong)

    def values(*names: str) -> dict[str, float]:
        return {name: found.get(name, {}).get("", math.nan) for name in names}

    kinds = found.get("blocks", {"blocks": math.nan})
    yield row("blocks", kinds, lambda *_: _blocks_words(kinds))
    yield row("running requests", values("retained_bytes", "saved_bytes"), _bytes_words)
    yield row("chunks sealed", values("chunks_sealed_total"), "{:.0f}".format)
    if not any(name.startswith("drift_") for name in found):
        note = "--compression-drift-sample N samples it"
        yield Finding(f"engine {engine}: drift", "not sampled", note=note)
        return
    drift = values("drift_sampled_chunks_total")
    if 0 <= drift["drift_sampled_chunks_total"] < LEAST_CHUNKS:
        few = f"too few chunks yet ({{:.0f}} of {LEAST_CHUNKS})"
        yield row("drift", drift, few.format)
        return
    drift |= values(
        "drift_deviation", "drift_limit", "drift_heads_over_budget", "drift_expected_over_budget"
    )
    finding = row("drift", drift, _drift_words)
    if finding.ok and drift["drift_deviation"] > drift["drift_limit"]:
        note = "calibrate a --compression-profile on text like this traffic"
        finding = replace(finding, note=note, warning=True)
    yield finding


def _blocks_words(kinds: Mapping[str, float]) -> str:
    return ", ".join(f"{number:.0f} {kind.replace('_', ' ')}" for kind, number in kinds.items())


def _bytes_words(kept: float, saved: float) -> str:
    return f"{kept / _MIB:.1f} MiB of rows kept, {saved / _MIB:.1f} MiB saved against full KV"


def _drift_words(sampled: float, off: float, limit: float, over: float, expected: float) -> str:
    return (
        f"{off:.2f} deviations over {sampled:.0f} sampled chunks, limit {limit:g}; {over:.0%} of "
        f"the heads want more than their budget, {expected:.0%} in calibration"
    )


def _shortened(findings: Sequence[Finding]) -> list[Finding]:
    """As many as fit a screen or two, those that are wrong first where there are more."""
    if len(findings) <= _MOST_ROWS:
        return list(findings)
    first = sorted(findings, key=lambda finding: finding.ok)[:_MOST_ROWS]
    more = len(findings) - _MOST_ROWS
    return [*first, Finding("more", f"{more} that are not shown", all(f.ok for f in findings))]
