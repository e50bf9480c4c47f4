"""Attaching, detaching, generate() in its variants, and what is refused."""

import copy
import functools
import itertools

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, QuantizedCache, StaticCache

import spkv
from spkv.cache.pages import PoolFullError
from spkv.gates import OpenGate, SinkGate, SoftGate, ThresholdGate
from spkv.hf import forward
from spkv.hf.cache import CACHE_KEYWORD
from spkv.ops.attention import gated_attention

GREEDY = dict(max_new_tokens=10, min_new_tokens=10, do_sample=False, pad_token_id=0)


@pytest.fixture
def attached(tiny_llama, scatter_utilities):
    spkv.attach(tiny_llama, spkv.SPKVConfig(window=8))
    scatter_utilities(tiny_llama)
    return tiny_llama


def text(batch=1, length=40):  # a random text
    return torch.randint(3, 97, (batch, length))


def masked_greedy(model, ids, steps):
    """Greedy continuation by the dense masked forward."""
    attachment = spkv.attachment(model)
    attachment.oracle = True
    with torch.no_grad():
        for _ in range(steps):
            logits = model(ids, use_cache=False).logits[:, -1]
            logits[:, model.generation_config.eos_token_id] = float("-inf")
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    attachment.oracle = False
    return ids


def test_left_padded_batches_continue_as_each_text_alone(attached):
    texts = [text(length=n)[0] for n in (40, 3, 25)]
    longest = max(t.numel() for t in texts)
    ids = torch.stack([torch.cat([t.new_zeros(longest - t.numel()), t]) for t in texts])
    mask = torch.stack([torch.arange(longest) >= longest - t.numel() for t in texts]).long()
    out = attached.generate(ids, attention_mask=mask, **GREEDY)
    for row, one in zip(out, texts, strict=True):
        assert torch.equal(row[longest:], masked_greedy(attached, one[None], 10)[0, one.numel() :])


def test_sampling_follows_the_seed(attached):
    ids = text()
    options = GREEDY | dict(do_sample=True, top_k=0)
    outs = []
    for _ in range(2):
        torch.manual_seed(5)
        outs.append(attached.generate(ids, **options))
    assert torch.equal(*outs)
    torch.manual_seed(5)
    with spkv.attachment(attached).using(OpenGate()):
        open_gates = attached.generate(ids, **options)
    torch.manual_seed(5)
    with spkv.dense(attached):
        assert torch.equal(attached.generate(ids, **options), open_gates)


def test_beam_search_with_open_gates_is_the_original_models(attached):
    ids = text(2)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    options = GREEDY | dict(num_beams=3, num_return_sequences=2, attention_mask=mask)
    with spkv.dense(attached):
        expected = attached.generate(ids, **options)
    with spkv.attachment(attached).using(OpenGate()):
        assert torch.equal(attached.generate(ids, **options), expected)
    pruned = attached.generate(ids, return_dict_in_generate=True, **options)
    cache = pruned.past_key_values
    pages = int(cache.packed._columns_in_use(list(range(cache.packed.sequences))).sum())
    assert cache.packed.pages_in_use() == pages


def test_chunked_prefill_in_generate(attached):
    ids = text(2)
    expected = attached.generate(ids, **GREEDY)
    cache = spkv.attachment(attached).new_cache()
    assert torch.equal(attached.generate(ids, past_key_values=cache, prefill_chunk_size=7, **GREEDY), expected)
    assert cache.get_seq_length() == 49


def test_a_second_turn_continues_the_cache(attached):
    first = attached.generate(text(2), return_dict_in_generate=True, **GREEDY)
    ids = torch.cat([first.sequences, text(2, 9)], dim=1)
    second = attached.generate(ids, past_key_values=first.past_key_values, **GREEDY)
    assert torch.equal(second, masked_greedy(attached, ids, 10))


def test_the_cache_reports_what_it_holds(attached):
    cache = spkv.attachment(attached).new_cache()
    assert (cache.nbytes, cache.density(), cache.kept_fraction()) == (0, None, None)
    ids = text(2, 60)
    attached.generate(ids, past_key_values=cache, **GREEDY)
    seen, kept = 69, cache.packed.kept_pairs().sum().item()
    assert cache.get_seq_length() == seen
    assert cache.density() == kept / (2 * 2 * 2 * (seen - 8))
    assert cache.kept_fraction() == (kept + 2 * 2 * 2 * 8) / (2 * 2 * 2 * seen)
    assert cache.density_by_head().shape == (2, 2)
    assert cache.density_by_head().mean().item() == pytest.approx(cache.density())
    assert cache.kept_fraction_by_head().mean().item() == pytest.approx(cache.kept_fraction())
    assert cache.dense_nbytes == 2 * 2 * 2 * seen * 2 * 8 * 4
    assert cache.nbytes == cache.packed.nbytes
    cache.reset()
    assert (cache.nbytes, cache.get_seq_length()) == (0, 0)


def test_batches_of_a_cache_can_be_repeated_and_selected(attached):
    ids = text(2, 30)
    with torch.no_grad():
        cache = attached(ids, use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0]))
        follow = text(2, 3)
        out = attached(follow, past_key_values=cache).logits
        expected = attached(torch.cat([ids[[1, 0]], follow], dim=1), use_cache=False).logits[:, -3:]
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_layers_without_a_predictor_keep_everything(tiny_llama, scatter_utilities):
    spkv.attach(tiny_llama, spkv.SPKVConfig(window=4, layers=(1,)))
    scatter_utilities(tiny_llama)
    assert list(spkv.attachment(tiny_llama).predictors) == [1]
    with torch.no_grad():
        cache = tiny_llama(text()).past_key_values
    assert (cache.density_by_head()[0] == 1).all()
    assert 0 < cache.density_by_head()[1].mean() < 1


def test_the_threshold_can_be_moved_without_retraining(attached):
    ids, attachment = text(), spkv.attachment(attached)
    densities = []
    for threshold in (0.05, 0.5, 0.95):
        attachment.threshold = threshold
        assert attachment.gate == ThresholdGate(threshold)
        with torch.no_grad():
            densities.append(attached(ids).past_key_values.density())
    assert densities == sorted(densities, reverse=True)
    assert densities[0] > densities[2]
    for wrong in (0, 1.0, -1, "0.5"):
        with pytest.raises((ValueError, TypeError), match=r"threshold must .*0"):
            attachment.threshold = wrong


def test_packed_documents_do_not_see_each_other(attached):
    attachment = spkv.attachment(attached)
    first, second = text(length=30), text(length=22)
    packed = torch.cat([first, second], dim=1)
    segments = torch.tensor([[0] * 30 + [1] * 22])
    positions = torch.cat([torch.arange(30), torch.arange(22)])[None]
    for gate in (SoftGate(), ThresholdGate(0.5)):
        with attachment.using(gate), torch.no_grad():
            out = attached(packed, position_ids=positions, segment_ids=segments, use_cache=False).logits
            apart = torch.cat([attached(t, use_cache=False).logits for t in (first, second)], dim=1)
        torch.testing.assert_close(out, apart, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients(attached):
    attachment, ids = spkv.attachment(attached), text(2)
    attachment.gate = SoftGate()
    attached.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            attached.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        attached.zero_grad()
        with attachment.record() as record:
            loss = attached(ids, labels=ids).loss + 0.1 * sum(u.mean() for u in record.utilities.values())
        before = dict(record.utilities)
        loss.backward()
        # What is computed again is let go again, layer by layer.
        assert all(record.utilities[layer] is before[layer] for layer in before)
        gradients.append({n: p.grad.clone() for n, p in attached.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=lambda m, name=name: f"{name}: {m}")


def test_a_record_has_the_latest_pass(attached):
    with spkv.attachment(attached).record() as record, torch.no_grad():
        for length in (20, 10):
            attached(text(1, length), use_cache=False)
    assert {tuple(utility.shape[::2]) for utility in record.utilities.values()} == {(1, 10)}


def test_layers_share_what_padding_makes_of_segments(attached, monkeypatch):
    seen = []

    def spy(*args, segment_ids, **options):
        seen.append(segment_ids)
        return gated_attention(*args, segment_ids=segment_ids, **options)

    monkeypatch.setattr(forward, "gated_attention", spy)
    mask = torch.ones(1, 30)
    mask[:, :4] = 0
    with spkv.attachment(attached).using(SoftGate()), torch.no_grad():
        attached(text(1, 30), attention_mask=mask, use_cache=False)
    assert len(seen) == 2
    assert seen[0] is seen[1]
    assert seen[0].tolist() == [[-1] * 4 + [1] * 26]


def test_a_copy_of_an_attached_model_stands_alone(attached):
    twin = copy.deepcopy(attached)
    ids = text()
    with torch.no_grad():
        before = attached(ids, use_cache=False).logits
        spkv.attachment(twin).threshold = 0.99
        assert not torch.equal(twin(ids, use_cache=False).logits, before)
        assert torch.equal(attached(ids, use_cache=False).logits, before)
        spkv.detach(twin)
        assert torch.equal(attached(ids, use_cache=False).logits, before)


def test_attaching_changes_no_other_model(tiny_llama, attached):
    other = copy.deepcopy(tiny_llama)
    spkv.detach(other)
    ids = text()
    assert isinstance(other(ids).past_key_values, DynamicCache)
    assert isinstance(attached(ids).past_key_values, spkv.SPKVCache)


def test_unsupported_models_and_layers_are_refused(tiny_llama):
    with pytest.raises(TypeError, match="must be a transformers PreTrainedModel, not Linear"):
        spkv.attach(torch.nn.Linear(2, 2))
    gpt2 = AutoModelForCausalLM.from_config(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9))
    with pytest.raises(ValueError, match="model type 'gpt2' is not supported; supported are cohere2, .*starcoder2"):
        spkv.attach(gpt2)
    with pytest.raises(
        ValueError, match=r"layers \[7\] are not global attention layers of this model; those are \[0, 1\]"
    ):
        spkv.attach(tiny_llama, spkv.SPKVConfig(layers=(1, 7)))
    local = AutoModelForCausalLM.from_config(
        transformers.MistralConfig(
            vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            num_key_value_heads=1, sliding_window=16,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"every layer of this mistral model has a sliding window \(16\)"):
        spkv.attach(local)
    dropout = AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, attention_dropout=0.1)
    )
    with pytest.raises(ValueError, match=r"attention_dropout is 0.1; gated attention has no dropout"):
        spkv.attach(dropout)


def test_attaching_twice_and_detaching_nothing_are_refused(attached):
    with pytest.raises(ValueError, match="already has an attachment"):
        spkv.attach(attached)
    spkv.detach(attached)
    with pytest.raises(ValueError, match="has no attachment; call spkv.attach or spkv.load first"):
        spkv.detach(attached)


def test_other_caches_are_refused(attached):
    ids = text()
    with pytest.raises(ValueError, match="a StaticCache cannot hold self-pruned pairs"):
        attached(ids, past_key_values=StaticCache(config=attached.config, max_cache_len=64))
    with pytest.raises(ValueError, match="a StaticCache cannot hold"):
        attached.generate(ids, cache_implementation="static", **GREEDY)
    with pytest.raises(ValueError, match="an offloading DynamicCache cannot hold"):
        attached(ids, past_key_values=DynamicCache(config=attached.config, offloading=True))
    with pytest.raises(ValueError, match="an offloading DynamicCache cannot hold"):
        attached.generate(ids, cache_implementation="offloaded", **GREEDY)
    assert not issubclass(QuantizedCache, DynamicCache)  # so that it is refused like the static one
    with spkv.dense(attached):
        filled = attached(ids).past_key_values
    with pytest.raises(ValueError, match="already holds 40 tokens, which cannot be pruned afterwards"):
        attached(ids, past_key_values=filled)


def test_a_cache_has_either_of_its_names(attached):
    ids = text(1, 30)
    whole = attached.model(ids).last_hidden_state
    for name in ("past_key_values", CACHE_KEYWORD):
        cache = attached.model(ids[:, :20], **{name: spkv.attachment(attached).new_cache()})[CACHE_KEYWORD]
        rest = attached.model(ids[:, 20:], **{name: cache}).last_hidden_state
        assert cache.get_seq_length() == 30
        torch.testing.assert_close(rest, whole[:, 20:], rtol=1e-4, atol=1e-5)


def test_assisted_decoding_is_refused(attached, tiny_llama):
    assistant = copy.deepcopy(tiny_llama)
    spkv.detach(assistant)
    with pytest.raises(ValueError, match=r"cannot be cropped.*Assisted \(speculative\) decoding"):
        attached.generate(text(), assistant_model=assistant, max_new_tokens=10, do_sample=False, pad_token_id=0)


def test_a_cache_of_another_window_is_refused(attached, tiny_llama):
    other = copy.deepcopy(attached)
    spkv.detach(other)
    spkv.attach(other, spkv.SPKVConfig(window=9))
    with pytest.raises(ValueError, match="the SPKVCache given is for .* window 9; this model has .* and 8"):
        attached(text(), past_key_values=spkv.attachment(other).new_cache())


def test_a_soft_gate_with_a_cache_is_refused(attached):
    attachment = spkv.attachment(attached)
    with attachment.using(SoftGate()), pytest.raises(ValueError, match="needs a hard gate, and SoftGate is in force"):
        attached(text(), past_key_values=attachment.new_cache())


def test_a_full_pool_is_an_error_of_its_own(attached):
    spkv.attachment(attached).max_memory = 10_000
    with pytest.raises(PoolFullError, match="raise max_memory, or use fewer or shorter sequences"):
        attached.generate(text(4, 60), **GREEDY)


def test_masks_that_cannot_be_meant_are_refused(attached):
    ids = text()
    with pytest.raises(ValueError, match=r"attention_mask must have shape .* = \[1, 40\], not \[1, 39\]"):
        attached(ids, attention_mask=torch.ones(1, 39))
    with pytest.raises(ValueError, match=r"not \[1, 1, 40, 40\]; masks of other forms are not supported"):
        attached(ids, attention_mask=torch.ones(1, 1, 40, 40))
    hole = torch.ones(1, 40)
    hole[0, 5:9] = 0
    spkv.attachment(attached).gate = SoftGate()
    with pytest.raises(ValueError, match="attention_mask has padding between tokens"):
        attached(ids, attention_mask=hole)
    with pytest.raises(ValueError, match="output_attentions=True is not supported"):
        attached(ids, output_attentions=True)
    spkv.attachment(attached).gate = ThresholdGate(0.5)
    with pytest.raises(ValueError, match="segment_ids .* cannot be combined with a cache"):
        attached(ids, segment_ids=torch.zeros_like(ids))


def test_generate_while_training_is_refused_unless_gradients_are_off(attached):
    ids, attachment = text(), spkv.attachment(attached)
    expected = attached.generate(ids, **GREEDY)
    attached.train()
    assert torch.equal(attached.generate(ids, **GREEDY), expected)
    attachment.gate = SoftGate()
    with pytest.raises(ValueError, match="cannot fill a cache: call model.eval"):
        attached.generate(ids, **GREEDY)


def test_gradients_in_evaluation_mode_are_those_without_a_cache(attached):
    ids = text()
    gradients = []
    for use_cache in (False, True):
        attached.zero_grad()
        attached(ids, labels=ids, use_cache=use_cache).loss.backward()
        gradients.append({n: p.grad for n, p in attached.named_parameters() if "utility" not in n})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(
            gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_an_empty_dynamic_cache_keeps_standing_for_ours(attached):
    ids, given = text(), DynamicCache()
    with torch.no_grad():
        attached(ids[:, :30], past_key_values=given)
        out = attached(ids[:, 30:], past_key_values=given).logits
        expected = attached(ids, use_cache=False).logits[:, 30:]
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_other_attention_functions_do_not_get_our_cache(attached):
    ids = text()
    cache = attached(ids).past_key_values
    with spkv.dense(attached), pytest.raises(ValueError, match="cannot be used inside spkv.dense"):
        attached(ids[:, :1], past_key_values=cache)
    spkv.detach(attached)
    attached(ids[:, :1], past_key_values=cache)  # nothing of ours is left in this model to notice it
    with pytest.raises(ValueError, match="used by an attention function that does not know it"):
        attached(ids[:, :1], past_key_values=cache)


def test_a_changed_attention_implementation_is_noticed(attached):
    attached.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="attn_implementation was changed to 'eager' after spkv.attach"):
        attached(text())


def test_tokens_cannot_be_masked_once_they_are_in_the_cache(attached):
    ids = text(2)
    cache = attached(ids).past_key_values
    mask = torch.ones(2, 45)
    mask[1, 3] = 0
    with pytest.raises(
        ValueError, match=r"marks \[40, 39\] earlier tokens as real, but the cache was filled with \[40, 40\]"
    ):
        attached(text(2, 5), attention_mask=mask, past_key_values=cache)


def test_dense_can_be_nested(attached):
    with spkv.dense(attached):
        with spkv.dense(attached):
            pass
        assert isinstance(attached(text()).past_key_values, DynamicCache)
    assert isinstance(attached(text()).past_key_values, spkv.SPKVCache)


def test_after_a_full_pool_the_cache_wants_a_reset(attached):
    cache = spkv.attachment(attached).new_cache(max_memory=20_000)
    with pytest.raises(PoolFullError):
        attached.generate(text(4, 60), past_key_values=cache, **GREEDY)
    with pytest.raises(PoolFullError, match=r"left sequences \[0, 1, 2, 3\] incomplete: drop them, or reset the cache"):
        attached(text(4, 1), past_key_values=cache)
    cache.reset()
    assert attached(text(1, 5), past_key_values=cache).past_key_values is cache


def test_positions_follow_padding_and_documents_where_none_are_given(attached):
    ids = text(1, 30)
    padded = torch.cat([torch.zeros(1, 6, dtype=torch.long), ids], dim=1)
    mask = torch.cat([torch.zeros(1, 6), torch.ones(1, 30)], dim=1)
    with spkv.attachment(attached).using(SinkGate(4)), torch.no_grad():
        cache = attached(padded, attention_mask=mask).past_key_values
    assert (cache.packed.kept_pairs() == 4).all()


@pytest.mark.parametrize("cuts", [[4], [3, 4, 5], [4, 5, 6, 7, 8, 12], []])
def test_sinks_of_a_short_padded_prompt_follow_in_later_passes(tiny_llama, scatter_utilities, relative_error, cuts):
    attached = spkv.attach(tiny_llama, spkv.SPKVConfig(window=3, sinks=4))
    scatter_utilities(attached)
    ids, padding = text(2, 20), torch.tensor([3, 0])  # in the first row, one token comes before the first cut
    mask = (torch.arange(20) >= padding[:, None]).long()
    spkv.attachment(attached).oracle = True
    with torch.no_grad():
        expected = attached(ids, attention_mask=mask, use_cache=False).logits
        cache, parts = None, []
        for start, stop in itertools.pairwise([0, *cuts, 20]):
            out = attached(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True)
            cache, parts = out.past_key_values, [*parts, out.logits]
    logits = torch.cat(parts, dim=1)
    assert relative_error(logits[mask.bool()], expected[mask.bool()]) < 1e-5
    assert (cache.packed.kept_pairs() >= 4).all()


def test_sinks_are_kept_whatever_the_predictor_says_in_each_document(tiny_llama):
    found = spkv.attachment(spkv.attach(tiny_llama, spkv.SPKVConfig(window=8, initial_bias=0.0, sinks=2)))
    segments = torch.tensor([[0] * 9 + [1] * 1 + [2] * 20])
    with found.record() as record, found.using(SoftGate()):
        tiny_llama(text(1, 30), segment_ids=segments, use_cache=False)
    for utility in record.utilities.values():
        one = torch.zeros(30, dtype=torch.bool)
        one[[0, 1, 9, 10, 11]] = True
        assert torch.equal(utility == 1, one.expand_as(utility))


@pytest.mark.parametrize("sinks", [0, 3])
def test_a_predictor_that_decides_by_itself_is_asked_under_a_threshold_alone(tiny_llama, scatter_utilities, sinks):
    ids = torch.randint(1, 97, (2, 30))
    attached = spkv.attach(tiny_llama, spkv.SPKVConfig(window=8, sinks=sinks))
    scatter_utilities(attached)
    found, asked = spkv.attachment(attached), []

    def decide(predictor, hidden_states, threshold):
        asked.append(threshold)
        return predictor(hidden_states), predictor(hidden_states) >= threshold

    expected = attached(ids, use_cache=True)
    for predictor in found.predictors.values():
        predictor.decide = functools.partial(decide, predictor)
    with found.record() as record:
        actual = attached(ids, use_cache=True)
    assert asked == [found.threshold] * len(found.predictors)
    assert torch.equal(actual.logits, expected.logits)
    assert actual.past_key_values.density() == expected.past_key_values.density() < 1
    assert sorted(record.utilities) == sorted(found.predictors)
    with found.using(OpenGate()):
        assert attached(ids, use_cache=True).past_key_values.density() == 1
    assert len(asked) == len(found.predictors)


def test_what_a_layer_keeps_follows_from_its_predictor_or_a_layout(tiny_llama):
    found = spkv.attachment(spkv.attach(tiny_llama, spkv.SPKVConfig(window=8, layers=(1,))))
    heads = found.decoder.kv_heads
    utility, position = torch.zeros(1, heads, 6), torch.arange(6)[None]
    assert found.keep(0, utility, position).all()
    assert found.keep(0, utility, position, SinkGate(2)).all()
    assert not found.keep(1, utility, position).any()
    assert found.keep(1, utility, position, SinkGate(2)).sum() == 2 * heads
    with pytest.raises(ValueError, match="a hard gate is needed, which keeps or drops, not SoftGate"):
        found.keep(1, utility, position, SoftGate())
    spkv.detach(tiny_llama)
    found = spkv.attachment(spkv.attach(tiny_llama, spkv.SPKVConfig(window=8, layout=((0,), ()))))
    assert [found.keep(layer, utility, position)[0].all(1).tolist()[0] for layer in (0, 1)] == [True, False]
