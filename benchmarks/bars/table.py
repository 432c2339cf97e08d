"""Every figure that the docs claim, and the commands that measure it: edit here.

A bar is judged against the committed lines in `benchmarks/results/h200`. It holds while it is worse
by no more than its spread, a share of the committed figure. Its name is the one that `figures.py`
gives to what it reads from a command's lines; a test finds every name in the committed ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.serving import study

MORE, LESS = ">=", "<="


@dataclass(frozen=True)
class Run:
    """A command, as the docs give it.

    Attributes:
        name: for `--only`.
        file: where its lines go, in the folder of results.
        command: arguments of the interpreter, without `--retention` and `--out`.
        minutes: that it is expected to take.
        takes_retention: whether it has the option `--retention`.
        resumes: whether it goes on with a file where it stopped, and keeps `--time-limit-s` itself.
    """

    name: str
    file: str
    command: Sequence[str]
    minutes: float
    takes_retention: bool = True
    resumes: bool = False


@dataclass(frozen=True)
class Bar:
    """A figure, and what it must be.

    Attributes:
        run: name of the `Run` that measures it.
        name: of the figure.
        better: `MORE` or `LESS`; the committed figure is what it must be at least, or at most.
        spread: share by which two sound runs may differ. Where the committed line holds replays
            that differ by more, that counts.
        promised: what the docs promise whatever was measured before, with the same spread; None
            for nothing.
    """

    run: str
    name: str
    better: str
    spread: float
    promised: float | None = None


SERVING_PARTS = ("long", "mid", "short", "saturation", "models", "agent")
RATES_OF_A_SEARCH = 5
"""About as many cells as a search plays."""


def serving_minutes(start_s: float = 150) -> float:
    """Minutes that the serving parts take on one GPU."""
    total = 0.0
    for job in (job for part in SERVING_PARTS for job in study.PARTS[part]):
        cells = sum(RATES_OF_A_SEARCH if "search" in cell else 1 for cell in job.load.cells)
        total += start_s + cells * job.load.phases.most_s
    return total / 60


DECODE_CASE = ("--models", "qwen3-4b", "--budgets", "snapkv/perlayer")
ENGINE = ("-m", "benchmarks.engine.bench_engine")
TURNS = (
    "--no-gate", "--sides", "tangram,stock,stock-full", "--what", "uneven,follow_up",
    "--max-model-len", "133120",
)  # fmt: skip
CHECK = ("-m", "benchmarks.engine.check_device", "--conversations", "16")
RUNS = {
    run.name: run
    for run in (
        Run("decode", "decode.jsonl", ("-m", "benchmarks.kernels.bench_decode", *DECODE_CASE), 4),
        Run("prefill", "prefill.jsonl", ("-m", "benchmarks.kernels.bench_prefill"), 5),
        Run("seal", "seal.jsonl", ("-m", "benchmarks.kernels.bench_seal"), 2, False),
        Run("launch", "launch.jsonl", ("-m", "benchmarks.kernels.bench_launch"), 2),
        Run("check", "check.jsonl", CHECK, 10, False),
        Run("engine", "engine.jsonl", (*ENGINE, "--sides", "stock,tangram,absent"), 9),
        Run("turns", "engine.jsonl", (*ENGINE, *TURNS), 6),
        Run("throughput", "engine.jsonl", (*ENGINE, "--no-gate", "--what", "throughput"), 8),
        Run(
            "serving",
            "serving.jsonl",
            ("-m", "benchmarks.serving.study", "--parts", ",".join(SERVING_PARTS)),
            serving_minutes(),
            resumes=True,
        ),
    )
}
"""In the order in which they are run: what is quick and what the others are made of comes first."""


def bars(
    run: str, names: Iterable[str], better: str, spread: float, promised: float | None = None
) -> list[Bar]:
    """Bars that are alike but for their names."""
    return [Bar(run, name, better, spread, promised) for name in names]


BATCHES = (
    "mid-48", "short-48", "short-113", "short-160", "4x100K-60x4K", "1x128K-31x2K",
    "16x32K", "100x8K", "4x32K",
)  # fmt: skip
SCORERS = ("streaming_llm", "key_norm", "key_diff", "tova", "snap_kv", "expected_attention")
LAUNCHES = (
    "store", "store queries", "seal", "decode and combine", "prefill",
    "prefill with FlashAttention 3",
)  # fmt: skip
DECODE_STEPS = ("decode 4 x 32768", "decode 16 x 32768", "decode 64 x 8192")
FULL_LOADS = (
    "qwen3-4b, long, closed 20", "llama-3.1-8b, long, closed 20", "qwen2.5-7b, long, closed 28",
    "qwen3-4b, agent, closed 24", "qwen3-4b, mid, closed 48", "qwen3-32b, mid, closed 12",
)  # fmt: skip
SHORT_LOADS = ("qwen3-4b, short, closed 160", "qwen3-4b, short, closed 48")
FOLLOW_UPS = [
    f"follow-up {cached} beside {decodes}" for cached in (8192, 47104) for decodes in (0, 16, 48)
]
STOCKS_RATE = "qwen3-4b, mid, open stock"

BARS = [
    *bars("decode", [f"{batch}, over FA3" for batch in BATCHES], MORE, 0.03),
    *bars("decode", [f"{batch}, over a plain read" for batch in BATCHES], MORE, 0.03),
    # Two runs differed by 1 %.
    *bars("prefill", [f"C = {c}, with FA3, over full KV" for c in (256, 2048)], LESS, 0.03),
    *bars("prefill", [f"C = {c}, Triton, over full KV" for c in (256, 2048)], LESS, 0.03),
    # Two runs differed by 2 %.
    *bars("seal", [f"{scorer}, mean step, us" for scorer in SCORERS], LESS, 0.04),
    # A host is shared: four runs differed by a factor of 2. The device's part did not.
    *bars("launch", [f"{call}, host, us" for call in LAUNCHES], LESS, 1.0),
    *bars("launch", [f"{call}, device, us" for call in LAUNCHES], LESS, 0.1),
    # 80 answers: one is 0.0125. No lines are committed: the docs' figures are what is promised.
    *bars("check", ["stock answers, right"], MORE, 0.02, promised=1.0),
    *bars("check", ["key_diff ratio 1 as stock, right"], MORE, 0.02, promised=1.0),
    *bars("check", ["snap_kv ratio 1 as stock, right"], MORE, 0.02, promised=1.0),
    *bars("check", ["key_diff ratio 0.5, right"], MORE, 0.02, promised=0.988),
    *bars("check", ["key_diff graphs as eager, equal"], MORE, 0.0, promised=1.0),
    *bars("check", ["snap_kv graphs as eager, equal"], MORE, 0.0, promised=1.0),
    *bars("engine", ["capacity, over stock"], MORE, 0.01),
    *bars("engine", ["first_token, over stock"], LESS, 0.05),
    *bars("engine", [f"{step}, over stock" for step in DECODE_STEPS], LESS, 0.02),
    # Installed means harmless.
    *bars("engine", ["first_token, without the flags"], LESS, 0.02, promised=1.0),
    *bars("engine", [f"{s}, without the flags" for s in DECODE_STEPS], LESS, 0.01, promised=1.0),
    *bars("turns", ["decode 1x128K-31x2K, over stock"], LESS, 0.02),
    *bars("turns", [f"{turn}, over stock" for turn in FOLLOW_UPS], LESS, 0.15),
    *bars("throughput", ["throughput, over stock"], MORE, 0.05),
    # A window holds 9 to 43 of stock's answers.
    *bars("serving", [f"{load}, requests/s" for load in FULL_LOADS], MORE, 0.2),
    *bars("serving", [f"{load}, requests/s" for load in SHORT_LOADS], MORE, 0.1),
    # Two runs of `mid` differed by 37 % in the median, by 18 % in the p95 and by 1 % in the time
    # per token, which a median of stock's few answers moves.
    *bars("serving", [f"{x}, first token, median" for x in FULL_LOADS + SHORT_LOADS], LESS, 0.4),
    *bars("serving", [f"{x}, first token, p95" for x in FULL_LOADS + SHORT_LOADS], LESS, 0.3),
    *bars("serving", [f"{x}, time per token, median" for x in FULL_LOADS + SHORT_LOADS], LESS, 0.2),
    # The next rate that a search tries is 1.2 times as high, on either side.
    *bars("serving", ["qwen3-4b, mid, search 0.3, sustained rate"], MORE, 0.35),
    *bars("serving", [f"{STOCKS_RATE}, first token, median"], LESS, 0.5),
    *bars("serving", [f"{STOCKS_RATE}, first token, p95"], LESS, 0.5),
    *bars("serving", [f"{STOCKS_RATE}, time per token, median"], LESS, 0.5),
]
