"""Writes a tiny random self-pruned model, with a tokenizer of one word a number: python tiny_checkpoint.py DIR."""

import sys

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import spkv

VOCABULARY = 199


def write(directory, window=20, layers=None, density=0.5, family="llama"):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        initializer_range=0.3,  # far from uniform, so that greedy choices are clear
        bos_token_id=1,
        eos_token_id=2,
        sliding_window=None,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    spkv.attach(model, spkv.SPKVConfig(window=window, layers=layers))
    for predictor in spkv.attachment(model).predictors.values():
        torch.nn.init.normal_(predictor.up.weight, std=1.0)
        torch.nn.init.normal_(predictor.down.weight, std=0.3)
        torch.nn.init.constant_(predictor.down.bias, -1.0)
    spkv.save(model, directory, training={"density": density})
    words = Tokenizer(WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="1", eos_token="2").save_pretrained(directory)


if __name__ == "__main__":
    write(sys.argv[1])
