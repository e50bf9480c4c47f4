"""Writes a tiny random self-pruned model, with a tokenizer of one word a number: python tiny_checkpoint.py DIR."""

import sys

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import spkv
from spkv.checkpoint import save_adapter

VOCABULARY = 199


def make(window=20, layers=None, family="llama", sinks=0):
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
    spkv.attach(model, spkv.SPKVConfig(window=window, layers=layers, sinks=sinks))
    for predictor in spkv.attachment(model).predictors.values():
        torch.nn.init.normal_(predictor.up.weight, std=1.0)
        torch.nn.init.normal_(predictor.down.weight, std=0.3)
        torch.nn.init.constant_(predictor.down.bias, -1.0)
    return model


def write(directory, density=0.5, ids=None, **options):
    """With `ids`, every head keeps the share `density` of them."""
    model = make(**options)
    if ids is not None:
        calibrate(model, density, ids)
    spkv.save(model, directory, training={"density": density})
    write_tokenizer(directory)


@torch.no_grad()
def calibrate(model, density, ids):
    found = spkv.attachment(model)
    for layer, predictor in found.predictors.items():  # in order, since what one keeps changes the inputs of later ones
        with found.record() as record:
            model(ids, use_cache=False)
        logits = record.utilities[layer].transpose(0, 1).flatten(1).logit()
        predictor.down.bias -= logits.quantile(1 - density, dim=1)


def write_base_and_adapter(base, adapter):
    model = make()
    model.save_pretrained(base, state_dict={k: v for k, v in model.state_dict().items() if "predictor" not in k})
    write_tokenizer(base)
    lora = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    for name, parameter in lora.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    save_adapter(lora, adapter, training={"density": 0.5})


def write_tokenizer(directory):
    words = Tokenizer(WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="1", eos_token="2").save_pretrained(directory)


if __name__ == "__main__":
    write(sys.argv[1])
