"""A tokenizer of bytes, and a model whose gates are known: they were written into its weights."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import spkv

WINDOW = 8


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: a character beyond ASCII has several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<|endoftext|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


@pytest.fixture
def known_gates(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Layer 0: head 0 keeps the digits and head 1 everything else; layer 1: head 0 keeps all and head 1 nothing."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=40_000,
    )
    model = LlamaForCausalLM(config).eval()
    digits = tokenizer.convert_tokens_to_ids(list("0123456789"))
    with torch.no_grad():
        # The first feature of an embedding says whether the token is a digit; the norm scales it and keeps its sign.
        model.model.embed_tokens.weight[:, 0] = -1.0
        model.model.embed_tokens.weight[digits, 0] = 1.0
        spkv.attach(model, spkv.SPKVConfig(window=WINDOW))
        first, second = spkv.attachment(model).predictors.values()
        for predictor in (first, second):
            predictor.up.weight.zero_()
            predictor.down.weight.zero_()
        first.up.weight[0, 0] = 100.0
        first.down.weight[:, 0] = torch.tensor([1.0, -1.0])
        first.down.bias.copy_(torch.tensor([-3.0, 3.0]))
        second.down.bias.copy_(torch.tensor([3.0, -3.0]))
    return model
