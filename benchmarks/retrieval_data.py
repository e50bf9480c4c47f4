"""Documents that ask for something said far back, to mix into training data: numbers hidden in stretches of a corpus.

    python -m benchmarks.retrieval_data --data train.npz --output retrieval.npz --tokens 5000000
    python -m benchmarks.recipes --suite retrieval --data train.npz --retrieval retrieval.npz ...

Every document is text of the corpus with several statements "The magic number of X is N." in it, anywhere, and one of
them asked for at its end.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from spkv.checkpoint import resolve_model
from spkv.training.tokens import Tokens, document_marks, save_tokens, tokenize_files, vocabulary_digest

_STATEMENT = " The magic number of {name} is {number}."
_QUESTION = " What is the magic number of {name}?"
_MOST_STATEMENTS = 8
_SHORTEST = 256


def retrieval_documents(
    corpus: Tokens, tokenizer: PreTrainedTokenizerBase, tokens: int, longest: int, seed: int
) -> Tokens:
    """Make documents until they hold so many tokens.

    Args:
        corpus: what the numbers are hidden in; its documents must be of the same vocabulary.
        tokenizer: the model's.
        tokens: to make.
        longest: of the stretches of the corpus; the shortest have 256 tokens. A row as long as this, or longer, cuts
            few of the documents in two.
        seed: of the draw.
    """
    draw = random.Random(seed)
    prefix, separator = document_marks(tokenizer)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    documents: list[list[int]] = []
    made = 0
    while made < tokens:
        length = min(draw.randint(min(_SHORTEST, longest), longest), len(corpus.tokens))
        first = draw.randrange(len(corpus.tokens) - length + 1)
        # A stretch may cross documents of the corpus: without their separators it reads as one.
        stretch = [int(token) for token in corpus.tokens[first : first + length] if token != separator]
        facts = {_name(draw): draw.randrange(10**6, 10**7) for _ in range(draw.randint(1, _MOST_STATEMENTS))}
        places = sorted(draw.randint(0, len(stretch)) for _ in facts)
        document, before = [*prefix], 0
        for place, (name, number) in zip(places, facts.items(), strict=True):
            document += [*stretch[before:place], *encode(_STATEMENT.format(name=name, number=number))]
            before = place
        name, number = draw.choice(list(facts.items()))
        question = (_QUESTION + _STATEMENT).format(name=name, number=number)
        document += [*stretch[before:], *encode(question), separator]
        documents.append(document)
        made += len(document)
    lengths = [len(document) for document in documents]
    return Tokens(
        np.concatenate([np.array(document, dtype=corpus.tokens.dtype) for document in documents]),
        np.cumsum([0, *lengths[:-1]], dtype=np.int64),
        vocabulary_digest(tokenizer),
    )


def _name(draw: random.Random) -> str:
    return "".join(draw.choice("bcdfghjklmnprstvwz") + draw.choice("aeiou") for _ in range(3)).capitalize()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="the corpus, as for `spkv adapt`")
    parser.add_argument("--output", type=Path, required=True, help="a .npz file")
    parser.add_argument("--model", default="smollm2", help="whose tokenizer to use; default: smollm2")
    parser.add_argument("--tokens", type=int, default=5_000_000)
    parser.add_argument("--longest", type=int, default=3000, help="tokens of the longest stretch of the corpus")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    tokenizer: Any = AutoTokenizer.from_pretrained(resolve_model(options.model))
    corpus = tokenize_files(options.data, tokenizer, progress=False)
    made = retrieval_documents(corpus, tokenizer, options.tokens, options.longest, options.seed)
    save_tokens(made, options.output)
    print(json.dumps({"documents": len(made.document_starts), "tokens": len(made.tokens)}))


if __name__ == "__main__":
    main()
