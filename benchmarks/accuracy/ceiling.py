"""The ceiling: what the best possible ranking keeps, and to what the answers are lost.

    python -m benchmarks.accuracy.ceiling --model FOLDER --scorers key_diff --out FILE.jsonl
    python -m benchmarks.accuracy.ceiling --report FILE.jsonl

The oracle ranks a row by the largest attention that the very questions and answers to come pay to
it, taken from a run with full KV, over all queries of its KV head. It is played beside scorers of
the package with the same budgets, in plain torch, chunk by chunk as the engine does: C tokens, a
window of W raw ones, sinks kept, a fixed share of each head. Budgets (pages of 16 rows, no groups):

    uniform   the same for every head
    static    each head's mean share under one threshold over all heads, of the other conversations
    own       the same of the conversation itself
    free      one threshold over all rows of the conversation: no share is fixed, of no head and no
              chunk; for the oracle alone
    profile   those of --profile, by --level

By default queries of later chunks see only what was kept; with `--context full` the context is
computed in full, and only questions and answers see what was kept. An answer is right by the
task's own rule (`greedy`), or if each token of the right one is the likeliest (`forced`: one pass).
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.accuracy import ceiling_report
from benchmarks.accuracy.ceiling_run import Run, by_label, by_scorer, prepare
from benchmarks.accuracy.needles import about, add_needles, kinds_of, make_scripts
from benchmarks.accuracy.plain import PAGE_ROWS, Keep, Sizes, rows_of, static
from tangram.budgets import BudgetProblem, allocate, default_level
from tangram.budgets.grouping import group_by_demand
from tangram.errors import ConfigurationError
from tangram.evaluate.chat import ChatFormat
from tangram.evaluate.play import Script
from tangram.evaluate.results import Cell, append_cell, read_cells, settings_digest
from tangram.geometry import HeadGroups
from tangram.plan.model_facts import ModelFacts
from tangram.plan.models import bundled_model, is_bundled, read_config
from tangram.plan.supported import refuse_model
from tangram.profile import ModelIdentity, Profile
from tangram.scorers import get_scorer, score_ranks
from tangram.scorers.shares import threshold_shares

ORACLE = "oracle"
BUDGETS = ("uniform", "static", "own", "free", "profile")
CONTEXTS = ("compressed", "full")
SMALLEST_SHARE = 1e-6
"""Of a head that no question looked at: it gets its page, as every head does."""
MORE_TOKENS = 16
"""That an answer may take beyond twice the right one's."""


@dataclass(frozen=True)
class Setting:
    """How conversations are compressed; full KV without a ranking."""

    sizes: Sizes
    ranking: str | None = None
    budgets: str | None = None
    ratio: float = 1.0
    context: str = CONTEXTS[0]

    def to_json(self) -> dict[str, Any]:
        """The setting as part of a line."""
        if self.ranking is None:
            return {"ranking": None, "budgets": None, "ratio": 1.0}
        return {
            "ranking": self.ranking, "budgets": self.budgets, "ratio": self.ratio,
            "context": self.context, "chunk_size": self.sizes.chunk,
            "window_size": self.sizes.window, "sink_tokens": self.sizes.sinks,
        }  # fmt: skip


@dataclass(frozen=True)
class Talk:
    """A conversation as token ids.

    Attributes:
        tokens: the whole, right answers included.
        context: tokens before the first question.
        begins: of each question, where its answer begins.
        golds: tokens of each right answer.
    """

    tokens: tuple[int, ...]
    context: int
    begins: tuple[int, ...]
    golds: tuple[tuple[int, ...], ...]


def make_talk(script: Script, number: int, chat: ChatFormat, encode: Any) -> Talk:
    """One of a script's conversations.

    Raises:
        ConfigurationError: the chat template renders an answer differently once it is history.
    """
    prompts, dialogue = script.prompts[number], script.dialogues[number]
    whole = tuple(chat.tokens(dialogue.whole(), ask=False))
    golds = tuple(tuple(encode(question.gold)) for question in dialogue.questions)
    for prompt, gold in zip(prompts[1:], golds, strict=True):
        if whole[: len(prompt) + len(gold)] != (*prompt, *gold):
            raise ConfigurationError(
                "the chat template renders an answer differently once it is history, which the "
                "ceiling cannot follow: take a model whose template appends alone"
            )
    return Talk(whole, len(prompts[0]), tuple(map(len, prompts[1:])), golds)


class Bench:
    """A model, the conversations, and what was learned of them.

    Args:
        model: of transformers.
        ends: ids that end an answer.
        decode: the text of token ids.
        profile: for scorers that read statistics, and for budgets; or None.
        level: of the profile's budgets, its best when None.
        judge: `greedy` or `forced`.
    """

    def __init__(
        self, model: Any, ends: Sequence[int], decode: Any, profile: Profile | None,
        level: str | None, judge: str,
    ) -> None:  # fmt: skip
        self.model, self.profile, self.judge = prepare(model), profile, judge
        self._ends, self._decode, self._level = set(ends), decode, level
        self._labels: dict[tuple[Talk, Sizes], Tensor] = {}

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Layers and KV heads."""
        identity = ModelIdentity.from_config(self.model.config.to_dict())
        return identity.num_layers, identity.num_kv_heads

    def label(self, talk: Talk, sizes: Sizes) -> Tensor:
        """[layers, kv_heads, tokens], what questions to come pay, with full KV."""
        if (talk, sizes) not in self._labels:
            run = Run(self.model, sizes, labels_from=talk.context)
            run.read(talk.tokens)
            self._labels[talk, sizes] = run.label
        return self._labels[talk, sizes]

    def forget(self) -> None:
        """Let go of what was learned of the conversations so far."""
        self._labels.clear()

    def shares(self, talk: Talk, sizes: Sizes, ratio: float) -> np.ndarray:
        """[layers, kv_heads], each head's share of the sealed rows under one threshold."""
        ranks = score_ranks(self.label(talk, sizes)[:, :, : _sealed(talk, sizes)])
        return threshold_shares(ranks, [ratio])["crosslayer"][0].cpu().numpy()

    def keep(self, setting: Setting, talks: Sequence[Talk], number: int) -> Keep:
        """What a conversation keeps of every chunk."""
        sizes, talk = setting.sizes, talks[number]
        if setting.budgets == "free":
            return self._free(talk, sizes, setting.ratio)
        if setting.budgets == "static":
            others = [talk for other, talk in enumerate(talks) if other != number]
            shares = np.mean([self.shares(t, sizes, setting.ratio) for t in others], axis=0)
            groups = self._by_shares(shares, sizes, setting.ratio)
        elif setting.budgets == "own":
            groups = self._by_shares(self.shares(talk, sizes, setting.ratio), sizes, setting.ratio)
        else:
            groups = self._allocated(setting)
        return static(rows_of(groups).to(self.model.device))

    def _free(self, talk: Talk, sizes: Sizes, ratio: float) -> Keep:
        ranks = score_ranks(self.label(talk, sizes)[:, :, : _sealed(talk, sizes)]).flatten().long()
        count = round(ratio * len(ranks))
        lowest = ranks.sort(descending=True).values[max(count - 1, 0)] if len(ranks) else 0
        return lambda order: order >= lowest * order.shape[1]

    def _by_shares(self, shares: np.ndarray, sizes: Sizes, ratio: float) -> HeadGroups:
        layers, heads = self.shape
        problem = BudgetProblem(
            level="static", num_layers=layers, num_kv_heads=heads, ratio=ratio,
            chunk_size_tokens=sizes.chunk, page_size_rows=PAGE_ROWS, page_group_size=1,
            n_sink_tokens=sizes.sinks,
        )  # fmt: skip
        return group_by_demand(problem, np.maximum(shares, SMALLEST_SHARE))

    def _allocated(self, setting: Setting) -> HeadGroups:
        layers, heads = self.shape
        level = setting.budgets
        if level == "profile":
            level = self._level or default_level(self.profile)
        return allocate(
            level, num_layers=layers, num_kv_heads=heads, ratio=setting.ratio,
            chunk_size_tokens=setting.sizes.chunk, page_size_rows=PAGE_ROWS, page_group_size=1,
            n_sink_tokens=setting.sizes.sinks, profile=self.profile,
        )  # fmt: skip

    def run(self, setting: Setting, talks: Sequence[Talk], number: int) -> Run:
        """A conversation at its beginning."""
        talk, sizes = talks[number], setting.sizes
        if setting.ranking is None:
            return Run(self.model, sizes)
        if setting.ranking == ORACLE:
            ranking = by_label(self.label(talk, sizes))
        else:
            scorer = get_scorer(setting.ranking)
            scorer.check_inputs(sizes.window, () if self.profile is None else self.profile.arrays)
            ranking = by_scorer(scorer, sizes.window, self._statistics)
        return Run(
            self.model, sizes, ranking, self.keep(setting, talks, number),
            sees_all=talk.context if setting.context == "full" else 0,
        )  # fmt: skip

    @cached_property
    def _statistics(self) -> list[dict[str, Tensor]] | None:
        if self.profile is None:
            return None
        return [
            {n: torch.from_numpy(a) for n, a in self.profile.layer_statistics(layer).items()}
            for layer in range(self.shape[0])
        ]

    def play(self, setting: Setting, script: Script, talks: Sequence[Talk]) -> Mapping[str, Any]:
        """Scores of all answers, and nats of the right answers' tokens."""
        scores, nats = [], []
        for number, talk in enumerate(talks):
            run = self.run(setting, talks, number)
            if self.judge == "forced":
                found, of_gold = self._forced(run, talk)
            else:
                found, of_gold = self._greedy(run, talk, script, number)
            scores.append(found)
            nats += of_gold
        return {"scores": scores, "gold_nats": sum(nats) / len(nats) if nats else None}

    def _forced(self, run: Run, talk: Talk) -> tuple[list[float], list[float]]:
        wanted = [
            begin + step - 1
            for begin, gold in zip(talk.begins, talk.golds, strict=True)
            for step in range(len(gold))
        ]
        logits = run.read(talk.tokens[: wanted[-1] + 1], wanted)
        gold = torch.tensor([t for gold in talk.golds for t in gold], device=logits.device)
        right = (logits.argmax(dim=-1) == gold).split([len(gold) for gold in talk.golds])
        log_p = logits.log_softmax(dim=-1).gather(1, gold[:, None])
        return [float(part.all()) for part in right], (-log_p[:, 0]).tolist()

    def _greedy(
        self, run: Run, talk: Talk, script: Script, number: int
    ) -> tuple[list[float], list[float]]:
        scores = []
        for begin, gold, question in zip(
            talk.begins, talk.golds, script.dialogues[number].questions, strict=True
        ):
            logits = run.read(talk.tokens[run.length : begin], [begin - 1])
            most = min(script.task.max_answer_tokens, 2 * len(gold) + MORE_TOKENS)
            answer, fork, score = [], run.fork(), 0.0
            while score < 1 and len(answer) < most:
                token = int(logits[-1].argmax())
                if token in self._ends:
                    break
                answer.append(token)
                score = script.task.score(question, self._decode(answer))
                logits = fork.read([token], [fork.length])
            scores.append(score)
        return scores, []


def _sealed(talk: Talk, sizes: Sizes) -> int:
    """Tokens of a conversation whose chunks are sealed in the end."""
    return max(0, len(talk.tokens) // sizes.chunk * sizes.chunk - sizes.window)


def make_settings(args: argparse.Namespace) -> list[Setting]:
    """Full KV, then all combinations; `free` for the oracle alone."""
    made = [Setting(Sizes(args.chunk_sizes[0], args.window_size, args.sink_tokens))]
    for chunk in args.chunk_sizes:
        sizes = Sizes(chunk, args.window_size, args.sink_tokens)
        made += [
            Setting(sizes, ranking, budgets, ratio, args.context)
            for ratio in args.ratios
            for ranking in (ORACLE, *args.scorers)
            for budgets in args.budgets
            if budgets != "free" or ranking == ORACLE
        ]
    return made


def parser() -> argparse.ArgumentParser:
    """The command's parser."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    what = made.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="folder, name, or recall for the bundled one")
    what.add_argument("--report", type=Path, nargs="+", metavar="FILE", help="only print tables")
    add("--out", type=Path, metavar="FILE")
    add_needles(made, seeds=1, questions=64)
    add("--scorers", nargs="*", default=["key_diff"])
    add("--budgets", nargs="+", choices=BUDGETS, default=list(BUDGETS[:-1]))
    add("--ratios", nargs="+", type=float, default=[0.25, 0.1])
    add("--chunk-sizes", nargs="+", type=int, default=[256, 512, 1024, 2048])
    add("--window-size", type=int, default=32)
    add("--sink-tokens", type=int, default=4)
    add("--context", choices=CONTEXTS, default=CONTEXTS[0])
    add("--judge", choices=("greedy", "forced"), default="greedy")
    add("--profile", type=Path, help="for scorers that read one, and for the budgets `profile`")
    add("--level", help="of the profile's budgets (default: its best)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    return made


def check(args: argparse.Namespace) -> None:
    """Raise ConfigurationError for what cannot be played."""
    if args.out is None:
        raise ConfigurationError("--out is needed: the file that lines are written to")
    if "profile" in args.budgets and args.profile is None:
        raise ConfigurationError("--budgets profile needs --profile FILE")
    conversations = args.questions / (args.seeds * args.questions_per_conversation)
    if "static" in args.budgets and conversations <= 1:
        raise ConfigurationError(
            "--budgets static are of the other conversations, and there is one: ask more "
            "--questions, or leave static out"
        )


def measure(args: argparse.Namespace, command: list[str]) -> list[Cell]:
    """All cells; those that are in the file are not played again."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(bundled_model()) if is_bundled(args.model) else args.model
    config = read_config(folder)
    refuse_model(folder, ModelFacts.from_config(config, {}))
    chat, tokenizer = ChatFormat.load(folder), AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=args.dtype).to(args.device)
    ends = model.generation_config.eos_token_id
    profile = Profile.load(args.profile) if args.profile else None
    if profile is not None:
        profile.check(
            model=ModelIdentity.from_config(config),
            scorer_name=profile.scorer_name,
            scorer_parameters=profile.scorer_parameters,
        )
    bench = Bench(
        model, ends if isinstance(ends, list) else [ends], tokenizer.decode, profile, args.level,
        args.judge,
    )  # fmt: skip
    run = {
        **about(folder, command), "dtype": args.dtype, "device": args.device, "judge": args.judge,
    }  # fmt: skip
    same = {name: run[name] for name in ("sha256", "dtype", "judge")}
    known = {}
    if args.out.exists():
        known = {c["digest"]: c for c in read_cells(args.out, "--out", ("digest", "ranking"))}
    cells = []
    for script in make_scripts(args, chat):
        talks = [
            make_talk(script, n, chat, partial(tokenizer.encode, add_special_tokens=False))
            for n in range(len(script.dialogues))
        ]
        for setting in make_settings(args):
            plain = setting.to_json()
            if profile is not None and (setting.budgets == "profile" or plain["ranking"] != ORACLE):
                content = hashlib.sha256(args.profile.read_bytes()).hexdigest()
                plain |= {"profile": args.profile.name, "profile_sha256": content}
                plain |= {"level": args.level}
            digest = settings_digest({**same, "script": script.digest, "setting": plain})
            if digest not in known:
                begun = time.perf_counter()
                known[digest] = {
                    "digest": digest, "task": script.spec, "context_tokens": script.context_tokens,
                    "seed": script.sizes.seed, "script": script.digest, "kinds": kinds_of(script),
                    **plain, **bench.play(setting, script, talks),
                    "seconds": time.perf_counter() - begun, **run,
                }  # fmt: skip
                append_cell(args.out, known[digest])
                print(ceiling_report.line(known[digest]), file=sys.stderr, flush=True)
            cells.append(known[digest])
        bench.forget()
    return cells


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print the tables."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(argv)
    if args.report:
        cells = [c for f in args.report for c in read_cells(f, "--report", ("digest", "ranking"))]
    else:
        check(args)
        cells = measure(args, ["python", "-m", "benchmarks.accuracy.ceiling", *argv])
    print(ceiling_report.report(cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
