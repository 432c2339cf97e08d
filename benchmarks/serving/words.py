"""A tokenizer for models by shape, one word for each id: text that any client can send.

A tokenizer that lacks some of a model's ids would do to ask with, not to answer with. Of an id that
it does not know no text comes, and vLLM's detokenizer then goes through the whole prompt again for
every token that follows, which takes longer than the model.
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.engine.shapes import FOLDER
from tangram.profile.store import replace_file


def write_tokenizer(vocab_size: int, folder: Path = FOLDER) -> Path:
    """A folder that Transformers loads; id 7 is the word `t7`, whatever stands beside it.

    Args:
        vocab_size: of the model; as many words.
        folder: for the tokenizer, whose name there tells its size.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    folder = folder / f"words-{vocab_size}"
    folder.mkdir(parents=True, exist_ok=True)
    made = Tokenizer(WordLevel({f"t{number}": number for number in range(vocab_size)}))
    made.pre_tokenizer = WhitespaceSplit()
    replace_file(folder / "tokenizer.json", made.to_str().encode())
    told = {"tokenizer_class": "PreTrainedTokenizerFast"}
    replace_file(folder / "tokenizer_config.json", json.dumps(told).encode())
    return folder
