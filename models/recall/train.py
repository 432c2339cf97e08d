"""Trains the recall model and leaves it, with tokenizer and chat template, in a folder.

    PYTHONPATH=src python models/recall/train.py --out FOLDER
    PYTHONPATH=src python models/recall/train.py --out FOLDER --smoke   # a minute, on any machine

Recall is learned dense and short first, since among filler the few answers teach nothing: eight
facts and their keys shuffled, then 32 facts, then filler and ever longer contexts. A stage ends
when nearly all answers are right; the last takes the rest of the time.
"""

import argparse
import json
import platform
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from batches import Batch, Sampler, Shape
from evaluation import LENGTHS, accuracy
from model import RecallModel, load, make_config, save
from tokenizer import save as save_tokenizer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

#: Tokens of a batch in the stages with filler.
BATCH_TOKENS = 131072
#: Implementations of attention, the first that runs is taken.
ATTENTION = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
#: Weight of the loss on all other tokens, beside 1 for the answers.
REST_WEIGHT = 0.1


@dataclass(frozen=True)
class Stage:
    """A part of the curriculum.

    Attributes:
        lengths: context lengths and how often each is drawn; empty for dense recall.
        facts: fewest and most facts at the longest length; shorter ones hold what fits.
        learning_rate: of AdamW at the stage's start.
        until: share of right code tokens, at every length, that ends the stage.
        at_most: share of the run's time after which the stage ends anyway.
    """

    name: str
    lengths: dict[int, float]
    facts: tuple[int, int]
    learning_rate: float
    until: float
    at_most: float = 1.0


STAGES = (
    Stage("dense", {}, (8, 8), 2e-3, 0.98),
    Stage("packed", {}, (32, 32), 2e-3, 0.98, 0.15),
    Stage("1k", {256: 1, 1024: 3}, (5, 64), 1.5e-3, 0.97, 0.15),
    Stage("4k", {256: 1, 1024: 3, 4096: 6}, (5, 100), 1e-3, 0.98, 0.15),
    Stage(
        "16k", {256: 1, 1024: 2, 4096: 3, 8192: 3, 16384: 6, 32768: 2}, (5, 128), 1e-3, float("inf")
    ),
)


def draw_shape(stage: Stage, rng: random.Random, batch_tokens: int) -> Shape:
    """The shape of a stage's next batch."""
    if not stage.lengths:
        facts = stage.facts[1]
        rows = max(2, min(256, batch_tokens // 2 // (17 * facts)))
        return Shape(rows, 1 + 17 * facts, facts, facts, 0.0, 0.0, 0.0)
    (length,) = rng.choices(list(stage.lengths), weights=list(stage.lengths.values()))
    fewest, most = stage.facts
    # Facts fill half of a context at most, and few are as likely as many.
    most = max(fewest + 1, min(most, length // 2 // 20))
    facts = round(fewest * (most / fewest) ** rng.random())
    return Shape(
        sequences=max(1, batch_tokens // length),
        length=length,
        facts=facts,
        questions=min(facts, 64, length // 32),
        jump_share=0.5,
        noise=0.01,
    )


def losses(model: RecallModel, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Mean loss on answers, mean loss on a sample of all tokens, share of right code tokens."""
    rows, length = batch.tokens.shape
    hidden = model(batch.tokens, batch.positions)

    start = torch.arange(rows, device=hidden.device)[:, None] * length
    at = (start + batch.answer_at - 1).flatten()
    logits = model.logits(hidden[at]).float()
    target = batch.tokens.gather(1, batch.answer_at).flatten()
    valid = batch.answered.flatten().float()
    answers = (F.cross_entropy(logits, target, reduction="none") * valid).sum() / valid.sum()
    code = valid * (target != model.config.eos_token_id)
    right = ((logits.argmax(dim=-1) == target) * code).sum() / code.sum()

    sample = torch.randint(rows * length - 1, (max(2048, rows * length // 16),), device=at.device)
    target = batch.tokens.flatten()[sample + 1]
    pad = model.config.pad_token_id
    rest = F.cross_entropy(model.logits(hidden[sample]).float(), target, ignore_index=pad)
    return answers, rest, right


def make_optimizer(model: RecallModel) -> torch.optim.Optimizer:
    """AdamW with the short memory that lets recall appear early; no decay of norms."""
    matrices = [w for w in model.parameters() if w.dim() > 1]
    vectors = [w for w in model.parameters() if w.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def train(model: RecallModel, sampler: Sampler, arguments: argparse.Namespace, log) -> None:
    """Runs the curriculum for `arguments.minutes`."""
    device = arguments.device
    optimizer = make_optimizer(model)
    rng = random.Random(arguments.seed)
    seconds, begin, step = 60 * arguments.minutes, time.monotonic(), 0
    names = [stage.name for stage in STAGES]
    for stage in STAGES[names.index(arguments.stage) :]:
        started, first = time.monotonic(), step
        by_length: dict[int, list[Tensor]] = {}
        while True:
            now = time.monotonic()
            left = 1 - (now - begin) / seconds
            if left <= 0 or (now - started) / seconds > stage.at_most:
                break
            if step - first >= arguments.steps:
                break
            shape = draw_shape(stage, rng, arguments.batch_tokens)
            rate = stage.learning_rate * min(1, (step + 1) / 200)
            if stage is STAGES[-1]:
                rate *= left / (1 - (started - begin) / seconds)
            for group in optimizer.param_groups:
                group["lr"] = rate
            # On an H200 cuDNN's attention takes two thirds of the time of FlashAttention 2.
            with torch.autocast(device, torch.bfloat16), sdpa_kernel(ATTENTION, set_priority=True):
                answers, rest, right = losses(model, sampler.draw(shape))
            (answers + REST_WEIGHT * rest).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            by_length.setdefault(shape.length, []).append(right.detach())
            if step % 50 == 0:
                shares = {n: torch.stack(r).mean().item() for n, r in sorted(by_length.items())}
                log(
                    stage=stage.name,
                    step=step,
                    seconds=round(time.monotonic() - begin, 1),
                    answer_loss=round(answers.item(), 4),
                    rest_loss=round(rest.item(), 3),
                    right={n: round(share, 4) for n, share in shares.items()},
                )
                by_length.clear()
                if min(shares.values()) >= stage.until:
                    break
        save(model, arguments.out)
    log(steps=step, seconds=round(time.monotonic() - begin, 1))


def evaluate(folder: Path, tokenizer, arguments: argparse.Namespace, log) -> None:
    """Held-out accuracy of the saved weights, in bfloat16 as they are served."""
    model = load(folder, torch.bfloat16).to(arguments.device)
    for context_tokens, facts, turns in LENGTHS:
        if arguments.smoke and context_tokens > 1024:
            continue
        conversations = 1 if arguments.smoke else -(-arguments.questions // turns)
        share = accuracy(model, tokenizer, context_tokens, facts, turns, conversations, 10**6)
        log(
            context_tokens=context_tokens,
            facts=facts,
            turns=turns,
            questions=conversations * turns,
            accuracy=round(share, 4),
        )


def main() -> None:
    """Reads the arguments, trains, saves, evaluates."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for model and log")
    parser.add_argument(
        "--minutes", type=float, default=4.5, help="time to train; 0 evaluates only"
    )
    parser.add_argument("--init", type=Path, help="folder of a model to go on from")
    parser.add_argument("--stage", choices=[s.name for s in STAGES], default="dense")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=10**9, help="at most per stage")
    parser.add_argument("--batch-tokens", type=int, default=BATCH_TOKENS)
    parser.add_argument("--questions", type=int, default=2000, help="asked per length at the end")
    parser.add_argument("--smoke", action="store_true", help="a few steps of a tiny model")
    arguments = parser.parse_args()
    arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)

    with open(arguments.out / "training.jsonl", "a") as file:

        def log(**entry: object) -> None:
            print(json.dumps(entry), flush=True)
            file.write(json.dumps(entry) + "\n")
            file.flush()

        device = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
        given = {name: str(value) for name, value in vars(arguments).items() if name != "out"}
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        versions |= {"transformers": transformers.__version__}
        log(device=device, versions=versions, arguments=given)
        tokenizer = save_tokenizer(arguments.out)
        changes = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        if arguments.smoke:
            changes |= {"num_hidden_layers": 1}
            arguments.steps, arguments.batch_tokens = 2, 2048
        model = RecallModel(make_config(len(tokenizer), **changes))
        if arguments.init:
            model = load(arguments.init)
        model.to(arguments.device)
        if arguments.device == "cuda":
            model.compile()
        if arguments.minutes > 0:
            train(model, Sampler(tokenizer, arguments.device), arguments, log)
        else:
            save(model, arguments.out)
        evaluate(arguments.out, tokenizer, arguments, log)


if __name__ == "__main__":
    main()
