"""A tokenizer, and small files for the tasks that read some."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from spkv.evals.tasks import TaskOptions


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and one that opens every sequence."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<bos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>")


@pytest.fixture(scope="session")
def options(tmp_path_factory: pytest.TempPathFactory) -> TaskOptions:
    """Options of small files that the tests write."""
    directory = tmp_path_factory.mktemp("data")
    essays = directory / "essays.txt"
    essays.write_text("\n\n".join(f"Essay {i} says what it said {i} times before. Does it? No." for i in range(900)))
    return TaskOptions(
        essays=essays,
        qa=write_records(directory / "qa.jsonl", [*map(town, range(50)), *map(person, range(50))]),
        gsm8k=write_records(directory / "sums.jsonl", map(addition, range(300))),
    )


def town(i: int) -> dict[str, Any]:
    """A question that one document answers."""
    documents = [f"Town {i} lies by the river.\nIt was founded in {7000 + i}, says the chronicle of town {i}."]
    return {"question": f"When was town {i} founded?", "answers": [str(7000 + i), "never"], "documents": documents}


def person(i: int) -> dict[str, Any]:
    """A question that takes two documents."""
    documents = [f"The mayor of city {i} is M{i}x. City {i} is old.", f"The horse of M{i}x is called horse{i}z."]
    return {
        "question": f"What is the horse of the mayor of city {i} called?",
        "answers": [f"horse{i}z"],
        "documents": documents,
    }


def addition(i: int) -> dict[str, Any]:
    """A problem, and its worked answer with a calculation marked as the published ones are."""
    question = f"Ann has {i} apples and buys {1000 + i}. How many has she?"
    return {
        "question": question,
        "answer": f"She has {i} + {1000 + i} = <<{i}+{1000 + i}={1000 + 2 * i}>>.\n#### {1000 + 2 * i:,}",
    }


def write_records(path: Path, records: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def write_lines(tmp_path: Path) -> Callable[..., Path]:
    """Writes objects to a file of the name given, one a line."""
    return lambda name, records: write_records(tmp_path / name, records)
