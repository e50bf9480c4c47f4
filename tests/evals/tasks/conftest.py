"""A tokenizer, and small files for the tasks that read some."""

from __future__ import annotations

from pathlib import Path

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
    return TaskOptions(essays=write_essays(tmp_path_factory.mktemp("data") / "essays.txt"))


def write_essays(path: Path) -> Path:
    path.write_text("\n\n".join(f"Essay {i} says what it said {i} times before. Does it? Not yet." for i in range(900)))
    return path
