"""Held-out accuracy: whole answers over conversations as they are served."""

import torch
from model import RecallModel

from tangram import conversations as recall

#: Context tokens, facts, turns of the conversations that the README reports.
LENGTHS = (
    (256, 8, 4),
    (1024, 25, 10),
    (4096, 50, 20),
    (8192, 75, 20),
    (16384, 100, 25),
    (16384, 10, 10),
    (30720, 100, 25),
)


@torch.no_grad()
def accuracy(
    model: RecallModel,
    tokenizer,
    context_tokens: int,
    facts: int,
    turns: int,
    conversations: int,
    seed: int,
) -> float:
    """Share of questions whose whole answer, end of turn included, greedy decoding gets right.

    The history holds the right answers. One forward pass tells: greedy decoding gives an answer
    exactly if each of its tokens is the most likely one after those before it.
    """
    device = next(model.parameters()).device
    assistant = tokenizer.convert_tokens_to_ids("<|assistant|>")
    right = asked = 0
    for number in range(conversations):
        talk = recall.make_conversation(seed + number, context_tokens, facts, turns)
        messages = talk.messages(turns - 1)
        messages.append({"role": "assistant", "content": talk.turns[-1].answer})
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        tokens = torch.tensor([ids], device=device)
        best = model.logits(model(tokens)).argmax(dim=-1)
        starts = (tokens[0] == assistant).nonzero()
        answer = starts + torch.arange(3, device=device)
        hits = best[answer] == tokens[0, answer + 1]
        right += int(hits.all(dim=1).sum())
        asked += len(starts)
    return right / asked
