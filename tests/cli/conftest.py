"""A tiny model on disk, with a tokenizer, an adapter, and both in one directory; and a text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import spkv
from spkv.checkpoint import save_adapter

WINDOW = 16
TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}[assistant]"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: a character beyond ASCII has several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<|endoftext|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", chat_template=TEMPLATE)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 2 layers, 4 query and 2 KV heads of 8, 256 positions; it never ends a text."""
    path = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory, scatter_utilities) -> Path:
    """An untrained adapter for it that keeps about half of the pairs."""
    path = tmp_path_factory.mktemp("adapter")
    model = spkv.attach(LlamaForCausalLM.from_pretrained(base), spkv.SPKVConfig(window=WINDOW))
    scatter_utilities(model)
    save_adapter(model, path)
    return path


@pytest.fixture(scope="session")
def whole(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as one directory."""
    path = tmp_path_factory.mktemp("whole")
    spkv.save(spkv.load(base, adapter=adapter), path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """448 tokens."""
    path = tmp_path_factory.mktemp("text") / "notes.txt"
    path.write_text("".join(f"Line {n:2d} of a text that goes on.\n" for n in range(14)))
    return path
