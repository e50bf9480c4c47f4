"""From a GGUF to the files of a Hugging Face checkpoint: what the conversions of all packaged models share.

transformers' own GGUF import is not used: it needs accelerate, and what it loads refuses `save_pretrained`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig

if TYPE_CHECKING:
    from gguf import GGUFReader

# On held-out books, manuals and code, computing in float32, rounding the dequantised values to bfloat16 moved the loss
# of SmolLM2 by at most 7e-4 nats (8 sequences of 2,048 tokens; 1e-5 on average), and that of Gemma-3-270M by at most
# 9e-4 (12 of 1,024; -1e-4 on average). float32 would double the files for that. Not float16, in which
# `from_pretrained` would then also compute by default: SmolLM2's hidden states reach 2.8e4, and it ends at 6.6e4.
WEIGHT_DTYPE = torch.bfloat16

# llama.cpp's types of tokens.
NORMAL_TOKEN = 1
CONTROL_TOKEN = 3
USER_DEFINED_TOKEN = 4

_MODULES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def read_gguf(source: Path, kind: Mapping[str, str]) -> GGUFReader:
    """Open a GGUF whose metadata hold the values of `kind`.

    Raises:
        ValueError: if the file is no GGUF or a damaged one, or one of another kind.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(source)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{source.name} is damaged or no GGUF: {error}") from error
    for key, known in kind.items():
        if (given := metadata(reader, key)) != known:
            raise ValueError(f"{source.name}: {key} is {given!r}; this converter understands {known!r} alone")
    return reader


def metadata(reader: GGUFReader, key: str) -> Any:
    """Return a value of the metadata; a ValueError names it if it is not there."""
    field = reader.get_field(key)
    if field is None:
        raise ValueError(f"the GGUF has no metadata {key!r}, which the conversion needs")
    return field.contents()


def meant_number(single: float) -> float:
    """Return the decimal number that a float32 stands for: 1e-6 instead of 9.999999974752427e-07."""
    return float(f"{single:.6e}")


def common_config(reader: GGUFReader, architecture: str) -> dict[str, Any]:
    """Return the arguments of a transformers config that are found in the same way in every GGUF."""

    def value(key: str) -> Any:
        return metadata(reader, f"{architecture}.{key}")

    return {
        "dtype": WEIGHT_DTYPE,
        "vocab_size": len(metadata(reader, "tokenizer.ggml.tokens")),
        "hidden_size": value("embedding_length"),
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": value("attention.head_count"),
        "num_key_value_heads": value("attention.head_count_kv"),
        "max_position_embeddings": value("context_length"),
        "rms_norm_eps": meant_number(value("attention.layer_norm_rms_epsilon")),
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
        "bos_token_id": metadata(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata(reader, "tokenizer.ggml.padding_token_id"),
    }


def dequantized_weights(
    reader: GGUFReader, layer_modules: Mapping[str, str], restore: Callable[[str, Tensor], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight with its name in transformers.

    Args:
        reader: the GGUF.
        layer_modules: what this architecture has in a layer beside the common parts, GGUF's name -> transformers'.
        restore: undoes what llama.cpp did to a weight, given GGUF's name of the module and the values.

    Raises:
        ValueError: for a tensor of an unknown name.
    """
    from gguf.quants import dequantize

    for tensor in reader.tensors:
        layer, _, module = tensor.name.removesuffix(".weight").rpartition(".")
        names = {**_LAYER_MODULES, **layer_modules} if layer.startswith("blk.") else _MODULES
        if module not in names:
            raise ValueError(f"the GGUF holds a tensor {tensor.name!r}; known there are {', '.join(names)}")
        weight = restore(module, torch.tensor(dequantize(tensor.data, tensor.tensor_type)))
        prefix = f"model.layers.{layer.removeprefix('blk.')}." if layer else ""
        yield f"{prefix}{names[module]}.weight", weight.to(WEIGHT_DTYPE).contiguous()


def save_model(directory: Path, config: PreTrainedConfig, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Write config, generation config and weights."""
    config.save_pretrained(directory)
    special_ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**special_ids).save_pretrained(directory)
    weights_file = directory / "model.safetensors"
    save_file(dict(weights), weights_file, metadata={"format": "pt"})
    # safetensors lets only the owner read its files; a cache may be shared as far as the umask allows.
    shutil.copymode(directory / "config.json", weights_file)


def save_tokenizer(
    directory: Path, tokenizer: Tokenizer, reader: GGUFReader, architecture: str, **settings: Any
) -> None:
    """Write a tokenizer, after adding its special tokens; `settings` join those of `tokenizer_config.json`."""
    tokens: list[str] = metadata(reader, "tokenizer.ggml.tokens")
    types: list[int] = metadata(reader, "tokenizer.ggml.token_type")
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind == CONTROL_TOKEN
        ]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    special = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    settings = {
        # A class of its own name would be rebuilt by transformers instead of read from tokenizer.json.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata(reader, f"{architecture}.context_length"),
        "clean_up_tokenization_spaces": False,
        **settings,
        **{
            f"{name}_token": tokens[metadata(reader, f"tokenizer.ggml.{key}_token_id")] for name, key in special.items()
        },
    }
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
