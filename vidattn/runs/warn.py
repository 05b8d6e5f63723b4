"""Warnings about a request that a model can run, but was not made for."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

from vidattn.runs.folder import read_card
from vidattn.runs.request import Request
from vidattn.support.table import fill


def warn(words: str) -> None:
    """Say something on the standard error stream that does not stop the command."""
    print(fill(f"vidattn: warning: {words}"), file=sys.stderr)


def warn_about(pipe: object, model: str | None, requests: Sequence[Request]) -> None:
    """Warn of words outside the vocabulary, and of sizes that the model was not trained at.

    Args:
        model: as --model has it.
    """
    tokenizer = getattr(pipe, "tokenizer", None)
    unknown = dict.fromkeys(
        word for request in requests for word in unknown_words(tokenizer, request.prompt)
    )
    if unknown:
        warn(
            f"the model does not know {', '.join(map(repr, unknown))}: its tokenizer reads each as "
            "an unknown word, so the video will not show it"
        )
    sizes = read_card(model).sizes
    for size in {(x.num_frames, x.height, x.width) for x in requests}:
        if sizes and size not in sizes:
            trained = ", ".join("x".join(map(str, x)) for x in sizes)
            warn(
                f"the model was not trained at {'x'.join(map(str, size))} (frames x height x "
                f"width) but at {trained}: dense clips may look wrong, too"
            )


def unknown_words(tokenizer: object | None, prompt: str) -> list[str]:
    """The words of a prompt that a tokenizer has no token for."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None:
        return []
    if getattr(tokenizer, "is_fast", False):
        # in their context: a word may be known in a pair only
        found = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
        spans = zip(found["input_ids"], found["offset_mapping"])
        pieces = [prompt[begin:end] for token, (begin, end) in spans if token == unknown]
    else:
        words = re.findall(r"\w+", prompt)
        pieces = [
            x for x in words if unknown in tokenizer(x, add_special_tokens=False)["input_ids"]
        ]
    return [piece for piece in dict.fromkeys(pieces) if re.search(r"\w", piece)]
