"""Reading, decoding and measuring, against transformers' own loss and generate()."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedModel

import spkv
from spkv.cache.reservation import Reservation
from spkv.hf.generation import cache_size, check_length, decode, encode_prompt, generate, read, tokens_per_second

TOKENS = 70


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(1, 97, (2, TOKENS))


@pytest.fixture
def attached(tiny_llama: PreTrainedModel, scatter_utilities) -> PreTrainedModel:
    spkv.attach(tiny_llama, spkv.SPKVConfig(window=9))
    scatter_utilities(tiny_llama)
    return tiny_llama


@pytest.mark.parametrize("chunk_size", [1, 16, TOKENS - 1, TOKENS, 1000])
def test_loss_is_that_of_one_pass_whatever_the_chunks(attached, ids, chunk_size):
    expected = attached(ids, labels=ids, use_cache=False)
    reading = read(attached, ids, chunk_size=chunk_size, loss=True)
    assert reading.loss == pytest.approx(expected.loss.item(), rel=1e-5)
    torch.testing.assert_close(reading.next_logits, expected.logits[:, -1], rtol=1e-4, atol=1e-5)
    assert reading.cache.get_seq_length() == TOKENS
    assert reading.seconds > 0
    assert reading.utilities == {}


def test_long_chunks_are_summed_in_blocks(tiny_llama):
    ids = torch.randint(1, 97, (1, 500))
    expected = tiny_llama(ids, labels=ids).loss.item()
    assert read(tiny_llama, ids, chunk_size=500, loss=True).loss == pytest.approx(expected, rel=1e-6)


def test_loss_is_optional_and_undefined_for_one_token(attached, ids):
    assert read(attached, ids).loss is None
    assert read(attached, ids[:, :1], loss=True).loss is None


def test_recorded_utilities_are_those_of_one_pass(attached, ids):
    with spkv.attachment(attached).record() as whole, torch.no_grad():
        attached(ids, use_cache=False)
    reading = read(attached, ids, chunk_size=32, record=True)
    assert sorted(reading.utilities) == [0, 1]
    for layer, utility in whole.utilities.items():
        torch.testing.assert_close(reading.utilities[layer], utility)


def test_plain_models_and_dense_ones_keep_everything(attached, ids):
    with spkv.dense(attached):
        inside = read(attached, ids, loss=True)
    spkv.detach(attached)
    outside = read(attached, ids, loss=True)
    assert inside.loss == outside.loss
    size = cache_size(outside.cache)
    held = 2 * 2 * 2 * TOKENS * 2 * 8 * 4  # layers, key and value, sequences, tokens, heads, head size, bytes
    assert (size.density, size.kept_fraction) == (1.0, 1.0)
    assert size.kv_bytes == size.dense_kv_bytes == held


def test_self_pruned_sizes_come_from_the_cache(attached, ids):
    cache = read(attached, ids).cache
    size = cache_size(cache)
    assert (size.density, size.kept_fraction) == (cache.density(), cache.kept_fraction())
    assert (size.kv_bytes, size.dense_kv_bytes) == (cache.nbytes, cache.dense_nbytes)


class Characters:
    """A tokenizer of one token a character."""

    chat_template = None

    def __call__(self, text, **options):
        return SimpleNamespace(input_ids=[ord(character) for character in text])

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(map(str, ids))


@pytest.mark.parametrize("dense", [False, True])
def test_generate_makes_what_transformers_makes(attached, ids, dense):
    attached.generation_config.eos_token_id = None
    with spkv.dense(attached) if dense else torch.no_grad():
        result = generate(attached, Characters(), ids[:1], max_new_tokens=20)
        expected = attached.generate(ids[:1], max_new_tokens=20, do_sample=False)[0, TOKENS:]
    assert result.text == " ".join(map(str, expected.tolist()))
    assert (result.prompt_tokens, result.new_tokens) == (TOKENS, 20)
    assert result.decode_tokens_per_second > 0
    assert result.kv_bytes <= result.dense_kv_bytes or not dense


def test_decoding_stops_at_an_end_token_and_counts_it(tiny_llama, ids):
    free, _ = decode(tiny_llama, read(tiny_llama, ids[:1]), 8)
    stopped, _ = decode(tiny_llama, read(tiny_llama, ids[:1]), 8, stop=[free[3]])
    assert stopped == free[: free.index(free[3]) + 1]
    assert tokens_per_second([1], 0.0) is None
    assert tokens_per_second([1, 2, 3], 0.5) == 4


def test_prompts_without_tokens_or_template_are_refused():
    assert encode_prompt(Characters(), "Hi").tolist() == [[72, 105]]
    with pytest.raises(ValueError, match="has no chat template"):
        encode_prompt(Characters(), "Hi", chat=True)
    with pytest.raises(ValueError, match="the prompt is empty"):
        encode_prompt(Characters(), "")


def test_bad_arguments_are_named(attached, ids):
    with pytest.raises(ValueError, match="not empty, got shape"):
        read(attached, ids[:, :0])
    with pytest.raises(ValueError, match="chunk_size must be at least 1, not 0"):
        read(attached, ids, chunk_size=0)
    with pytest.raises(ValueError, match="the text has 600 tokens, but the model has 512 positions"):
        read(attached, torch.ones(1, 600, dtype=torch.long))
    with pytest.raises(ValueError, match="500 tokens and 13 new ones are asked for, but the model has 512"):
        check_length(attached.config, 500, 13)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, not 0"):
        decode(attached, read(attached, ids[:1]), 0)
    with pytest.raises(ValueError, match="one sequence is decoded at a time, not 2"):
        decode(attached, read(attached, ids), 1)


@pytest.mark.gpu
def test_decoding_on_a_gpu_gives_the_tokens_of_transformers(attached, ids):
    attached.cuda()
    for stop in ((), (5, 50)):
        options = dict(do_sample=False, max_new_tokens=40, eos_token_id=list(stop) or None, pad_token_id=0)
        expected = attached.generate(ids[:1].cuda(), cuda_graph=False, **options)[0, TOKENS:].tolist()
        calls: list[int] = []
        new_ids, seconds = decode(attached, read(attached, ids[:1]), 40, stop=stop, progress=calls.append)
        assert new_ids == expected
        assert seconds > 0
        assert calls == sorted(calls)


def test_each_layer_asks_the_device_once_for_a_chunk_and_ahead(tiny_llama, scatter_utilities, monkeypatch):
    spkv.attach(tiny_llama, spkv.SPKVConfig(window=5))
    scatter_utilities(tiny_llama)
    asked, ask = [], Reservation._ask_for

    def counted(self, layers, *arguments):
        asked.append(layers)
        return ask(self, layers, *arguments)

    monkeypatch.setattr(Reservation, "_ask_for", counted)
    cache = spkv.attachment(tiny_llama).new_cache()
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[0, :7] = 0
    with torch.no_grad():
        for start, stop in ((0, 20), (20, 60)):
            ids = torch.randint(1, 97, (2, stop - start))
            tiny_llama(ids, attention_mask=mask[:, :stop], past_key_values=cache)
    assert asked == [[0], [1], [0], [1]]
