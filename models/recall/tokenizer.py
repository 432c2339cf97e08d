"""The recall model's tokenizer and chat template, made from the vocabulary of its task.

Every word of the task is one token with the space before it, two digits are one token, and anything
else is spelled in bytes, so every text can be encoded and comes back as it was, but for two things
that the model is spared: letters become lower case, runs of white space one space.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tangram import conversations as recall

END = "<|end|>"
PAD = "<|pad|>"
SPECIAL = (PAD, END, "<|system|>", "<|user|>", "<|assistant|>")

#: A user's text gets a leading space, so that its first word is the token that it is elsewhere. An
#: answer is rendered as it was generated, so that a history repeats the tokens of the turn before.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{ '<|assistant|>' + message.content + '<|end|>' }}
{%- elif message.role in ('system', 'developer') -%}
{{ '<|system|> ' + message.content | trim + '<|end|>' }}
{%- else -%}
{{ '<|user|> ' + message.content | trim + '<|end|>' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|assistant|>' }}
{%- endif -%}
"""


def build() -> PreTrainedTokenizerFast:
    """The tokenizer with its chat template, ready for `save_pretrained`."""
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces += [f"{number:02}" for number in range(100)]
    pieces += [f"Ġ{word}" for word in recall.vocabulary()]
    vocabulary = {piece: index for index, piece in enumerate((*SPECIAL, *pieces))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(recall.TOKEN_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=list(SPECIAL[2:]),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=32768,
    )


def save(folder: Path) -> PreTrainedTokenizerFast:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja to a folder."""
    tokenizer = build()
    tokenizer.save_pretrained(folder)
    # The name of the class that every version of transformers knows.
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    file.write_text(json.dumps(settings, indent=2) + "\n")
    return tokenizer
