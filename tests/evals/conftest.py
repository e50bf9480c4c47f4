"""A tiny attached model with a tokenizer of bytes, and a task whose answers it can give in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import spkv
from spkv.evals.task import Example, Question

WINDOW = 16


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<|endoftext|>", *alphabet])}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>")


@pytest.fixture
def words_model(scatter_utilities) -> PreTrainedModel:
    """A random Llama of 2 layers, 4 query and 2 KV heads of 8, 512 positions, that keeps about half of the pairs."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.2,  # answers that depend on what was read
    )
    model = LlamaForCausalLM(config).eval()
    spkv.attach(model, spkv.SPKVConfig(window=WINDOW))
    scatter_utilities(model)
    return model


@dataclass
class LetterTask:
    """Counts the characters of an answer that its reference has, too; contexts differ in length."""

    name: str = "letters"
    turns: int = 2
    context: int = 120

    def examples(self, tokenizer, length: int, count: int, seed: int) -> Sequence[Example]:
        if length < 200:
            raise ValueError(f"an example of task {self.name} takes at least 200 tokens, not {length}")
        generator = torch.Generator().manual_seed(seed)
        made = []
        for index in range(count):
            size = self.context - 7 * (index % 3) if self.context else 0
            letters = torch.randint(32, 127, (size,), generator=generator).tolist()
            questions = tuple(
                Question(f" {index}?{'!' * (index % 2)}", ("etaoin shrdlu" * 3,), 5 + turn)
                for turn in range(self.turns)
            )
            made.append(Example("".join(map(chr, letters)), questions, {"place": index % 2, "kind": "letters"}))
        return made

    def score(self, answer: str, question: Question) -> float:
        return sum(letter.lower() in question.references[0] for letter in answer) / max(1, len(answer))


@pytest.fixture
def letters() -> type[LetterTask]:
    return LetterTask
