"""The throughput benchmark of training, on a shape that a CPU trains in seconds."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks import adaptation
from spkv.hf.families import find_decoder
from spkv.training.recipes import get_recipe

TINY = LlamaConfig(
    vocab_size=60,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    tie_word_embeddings=True,
)


@pytest.fixture
def short_steps(monkeypatch):
    monkeypatch.setitem(adaptation.SHAPES, "smollm2", TINY)
    monkeypatch.setattr(adaptation, "_STEPS", 3)
    monkeypatch.setattr(
        adaptation,
        "get_recipe",
        lambda name, **changes: get_recipe(name, tokens_per_step=512, sequence_length=256, **changes),
    )


def test_rows_name_their_share_of_dense_throughput(short_steps):
    reported = []
    # LoRA leaves weights in bfloat16, which takes a GPU's autocast.
    dense, gated = adaptation.rows("smollm2", ["full"], ["dense", "reference"], [False], report=reported.append)
    assert [dense, gated] == reported
    assert (dense["attention"], gated["attention"]) == ("dense", "reference")
    for row in (dense, gated):
        assert row["tokens_per_second"] == pytest.approx(512e3 / row["milliseconds_per_step"])
        assert (row["training"], row["gpus"], row["batch_size"], row["compiled"]) == ("full", 1, 2, False)
    assert dense["versus_dense"] == 1.0
    assert gated["versus_dense"] == pytest.approx(gated["tokens_per_second"] / dense["tokens_per_second"])


def test_without_dense_there_is_no_share(short_steps):
    (row,) = adaptation.rows("smollm2", ["full"], ["reference"], [False], report=lambda row: None)
    assert row["versus_dense"] is None


def test_the_1b_shape_has_the_parameters_of_llama_3_2():
    shape = adaptation.SHAPES["1b"]
    kv = shape.hidden_size * shape.head_dim * (shape.num_attention_heads + shape.num_key_value_heads) * 2
    layer = kv + 3 * shape.hidden_size * shape.intermediate_size + 2 * shape.hidden_size
    total = shape.num_hidden_layers * layer + shape.vocab_size * shape.hidden_size + shape.hidden_size
    assert total == 1_235_814_400


def test_the_gemma_shape_has_the_parameters_of_gemma_3():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(adaptation.SHAPES["gemma3-270m"])
    assert model.num_parameters() == 268_098_176
    assert find_decoder(model).global_layers == (5, 11, 17)


def test_rows_that_cannot_be_divided_are_refused(short_steps, monkeypatch):
    (row,) = adaptation.rows("smollm2", ["full"], ["reference"], [False], 1, report=lambda row: None)
    assert row["batch_size"] == 1
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="2 rows of a step cannot be divided into 3 x"):
        adaptation.rows("smollm2", ["full"], ["reference"], [False])


def test_torchrun_says_how_many_share_a_step(monkeypatch):
    assert adaptation.gpus() == 1
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert adaptation.gpus() == 4
