"""A small model trained from scratch, dense and self-pruned from its first step, by the runs of the suite `scratch`.

    python -m benchmarks.from_scratch --make-model model
    python -m benchmarks.recipes --suite scratch --model model --data train.npz --validation valid.npz ...

The first command writes random weights and a tokenizer; the second trains them, as it trains any other model, on
text or on tokens of the same vocabulary. The vocabulary is SmolLM2's, or with `--bytes` the 256 bytes. To compare
with adaptation, adapt the dense model that the suite leaves in its output directory (`--model` again).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from spkv.checkpoint import resolve_model

SIZES = {
    # Attention and MLP hold 19M, SmolLM2's vocabulary another 19M (bytes: 0.1M).
    "38m": dict(hidden_size=384, intermediate_size=1024, num_hidden_layers=12, num_attention_heads=6),
    # For trying the commands on a CPU.
    "tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4),
}
_KV_HEADS = 2


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and one that ends documents."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0, **{symbol: index for index, symbol in enumerate(alphabet, 1)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def configuration(size: str, vocabulary: int, positions: int, end: int | None) -> LlamaConfig:
    """Return the shape of a model; `end` is the token that ends documents."""
    return LlamaConfig(
        vocab_size=vocabulary,
        num_key_value_heads=_KV_HEADS,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        bos_token_id=None,
        eos_token_id=end,
        **SIZES[size],
    )


def make_model(directory: Path, size: str, tokenizer: PreTrainedTokenizerBase, positions: int, seed: int) -> int:
    """Write a Llama with random weights; returns its number of parameters."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(configuration(size, len(tokenizer), positions, tokenizer.eos_token_id))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return model.num_parameters()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make-model", type=Path, required=True, metavar="DIR", help="directory for the model")
    parser.add_argument("--size", choices=SIZES, default="38m")
    parser.add_argument("--bytes", action="store_true", help="one token a byte")
    parser.add_argument("--positions", type=int, default=8192, help="tokens of the longest row")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    tokenizer = byte_tokenizer() if options.bytes else AutoTokenizer.from_pretrained(resolve_model("smollm2"))
    parameters = make_model(options.make_model, options.size, tokenizer, options.positions, options.seed)
    print(json.dumps({"model": options.make_model.name, "parameters": parameters, "vocabulary": len(tokenizer)}))


if __name__ == "__main__":
    main()
