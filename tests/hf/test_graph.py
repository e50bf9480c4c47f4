"""Decoding as a CUDA graph: the same tokens as transformers' loop. On a CPU steps are run instead of replayed."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)

import spkv
from spkv.cache.pages import PoolFullError
from spkv.gates import OpenGate
from spkv.hf import compiled, graph
from spkv.predictor import UtilityPredictor

GREEDY = dict(do_sample=False, max_new_tokens=40, eos_token_id=None, pad_token_id=0)


@pytest.fixture
def looping(tiny_llama, scatter_utilities, monkeypatch):
    """A model whose `generate` takes our loop on any device; without a GPU steps are run instead of replayed."""
    spkv.attach(tiny_llama, spkv.SPKVConfig(window=9))
    scatter_utilities(tiny_llama)
    if not torch.cuda.is_available():
        monkeypatch.setattr(graph, "obstacle", lambda model, attachment: None)
        monkeypatch.setattr(graph.DecodeLoop, "_capture", lambda self, step: step)
    return tiny_llama.to("cuda" if torch.cuda.is_available() else "cpu")


def prompt(model, B=2, T=30):
    return torch.randint(1, 97, (B, T), generator=torch.Generator().manual_seed(3)).to(model.device)


def both(model, ids, **options):
    """What `generate` returns with our loop and with transformers'."""
    return [
        model.generate(ids, cuda_graph=cuda_graph, return_dict_in_generate=True, **options)
        for cuda_graph in (True, False)
    ]


def assert_same(graphed, eager):
    assert torch.equal(graphed.sequences, eager.sequences)
    assert graphed.past_key_values.get_seq_length() == eager.past_key_values.get_seq_length()
    ours, theirs = (out.past_key_values.packed for out in (graphed, eager))
    assert torch.equal(ours.seen, theirs.seen)
    assert torch.equal(ours.kept, theirs.kept)


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("new", [1, 2, 17, 40])
def test_greedy_tokens_and_the_cache_are_those_of_transformers(looping, B, new):
    assert_same(*both(looping, prompt(looping, B), **GREEDY | dict(max_new_tokens=new)))


def test_sinks_of_texts_shorter_than_they_are(looping):
    found = spkv.attachment(looping)
    found.config = found.config.replace(sinks=4)
    mask = torch.ones(2, 3, dtype=torch.long, device=looping.device)
    mask[0, :2] = 0
    graphed, eager = both(looping, prompt(looping, 2, 3), attention_mask=mask, **GREEDY)
    assert_same(graphed, eager)
    assert (graphed.past_key_values.packed.kept_pairs() >= 4).all()


def test_chunks_and_left_padding(looping):
    ids = prompt(looping)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    assert_same(*both(looping, ids, attention_mask=mask, **GREEDY))
    chunked = looping.generate(ids, attention_mask=mask, cuda_graph=True, prefill_chunk_size=8, **GREEDY)
    assert torch.equal(chunked, looping.generate(ids, attention_mask=mask, cuda_graph=False, **GREEDY))


def test_sequences_end_at_their_end_token_and_the_others_go_on(looping):
    ids = prompt(looping, 3)
    free = looping.generate(ids, cuda_graph=False, **GREEDY)[:, 30:]
    # Ends that different sequences reach at different times, one of them perhaps never.
    ends = [int(free[0, 5]), int(free[1, 21])]
    options = GREEDY | dict(eos_token_id=ends, pad_token_id=96)
    graphed, eager = both(looping, ids, **options)
    assert_same(graphed, eager)
    assert (graphed.sequences[:, 30:] == 96).any()
    one = both(looping, ids[:1], **options)
    assert_same(*one)
    assert one[0].sequences.shape[1] <= 30 + 6


def test_several_turns_on_one_cache(looping):
    caches = [spkv.attachment(looping).new_cache() for _ in range(2)]
    outputs = [prompt(looping)] * 2
    for turn in range(3):
        user = prompt(looping, T=5 + turn)
        outputs = [
            looping.generate(
                torch.cat([so_far, user], 1), past_key_values=cache, cuda_graph=cuda_graph,
                **GREEDY | dict(max_new_tokens=11),
            )
            for so_far, cache, cuda_graph in zip(outputs, caches, (True, False), strict=True)
        ]  # fmt: skip
        assert torch.equal(*outputs)
    assert torch.equal(caches[0].packed.kept, caches[1].packed.kept)


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    B=st.integers(1, 3),
    padding=st.lists(st.integers(0, 12), min_size=3, max_size=3),
    turns=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 24), st.integers(1, 64)), min_size=1, max_size=3),
    page_dtype=st.sampled_from([None, (None, "int8")]),
    seed=st.integers(0, 99),
)
def test_any_schedule_of_arrivals_turns_and_chunks_gives_the_tokens_of_transformers(
    looping, B, padding, turns, page_dtype, seed
):
    generator = torch.Generator().manual_seed(seed)
    caches = [spkv.attachment(looping).new_cache(page_dtype=page_dtype) for _ in range(2)]
    mask = torch.empty(B, 0, dtype=torch.long, device=looping.device)
    outputs = [mask, mask]
    for turn, (user, new, chunk) in enumerate(turns):
        ids = torch.randint(1, 97, (B, user), generator=generator).to(looping.device)
        real = torch.ones(B, user + outputs[0].shape[1] - mask.shape[1], dtype=torch.long, device=looping.device)
        if turn == 0:
            for b in range(B):
                real[b, : min(padding[b], user - 1)] = 0
        mask = torch.cat([mask, real], 1)
        options = GREEDY | dict(max_new_tokens=new, attention_mask=mask)
        # Transformers' own loop reads a turn at once: version 5.0 takes chunks in the first turn only.
        own = (dict(cuda_graph=True, prefill_chunk_size=chunk), dict(cuda_graph=False))
        outputs = [
            looping.generate(torch.cat([so_far, ids], 1), past_key_values=cache, **options, **loop)
            for so_far, cache, loop in zip(outputs, caches, own, strict=True)
        ]
        assert torch.equal(*outputs)
    assert torch.equal(caches[0].packed.seen, caches[1].packed.seen)
    assert torch.equal(caches[0].packed.kept, caches[1].packed.kept)


def test_a_turn_may_bring_its_new_ids_alone(looping):
    for past, new in ((30, 5), (10, 50)):
        ids = prompt(looping, T=past + new)
        caches = [spkv.attachment(looping).new_cache() for _ in range(2)]
        with torch.no_grad():
            for cache in caches:
                looping(ids[:, :past], past_key_values=cache)
        mask = torch.ones_like(ids)
        # Not every transformers takes new ids alone in its own loop, so that gets them all.
        expected = looping.generate(ids, past_key_values=caches[0], cuda_graph=False, **GREEDY)
        actual = looping.generate(
            ids[:, past:], attention_mask=mask, past_key_values=caches[1], cuda_graph=True, **GREEDY
        )
        assert torch.equal(actual, expected[:, past:])
        assert caches[1].get_seq_length() == caches[0].get_seq_length() == past + new + 39


def test_sampling_follows_the_distribution(looping):
    ids = prompt(looping, 1).expand(400, -1)
    options = GREEDY | dict(do_sample=True, top_k=3, temperature=1.5, max_new_tokens=2)
    with torch.no_grad():
        logits = looping(ids[:1]).logits[0, -1]
    expected = torch.zeros(97, device=logits.device).index_add(
        0, logits.topk(3).indices, (logits.topk(3).values / 1.5).softmax(-1)
    )
    drawn = looping.generate(ids, cuda_graph=True, **options)[:, 30].bincount(minlength=97) / 400
    assert (drawn[expected == 0] == 0).all()
    # 400 draws of a share p deviate by more than 5 sqrt(p (1 - p) / 400) once in a million cases.
    assert ((drawn - expected).abs() <= 5 * (expected * (1 - expected) / 400).sqrt() + 1e-6).all()


class NeverTwice(LogitsProcessor):
    """Looks at the tokens so far, so it cannot be part of a graph."""

    def __call__(self, input_ids, scores):
        return scores.scatter(1, input_ids, float("-inf"))


def test_processors_that_look_at_the_tokens_run_after_each_replay(looping):
    processors = LogitsProcessorList([NeverTwice()])
    graphed, eager = both(looping, prompt(looping), logits_processor=processors, **GREEDY)
    assert_same(graphed, eager)
    assert all(len(set(row.tolist())) == 40 for row in graphed.sequences[:, 30:])


class Never(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(num_beams=2), "the generation mode is beam_search"),
        (dict(output_scores=True, return_dict_in_generate=True), "output_scores was asked for"),
        (dict(use_cache=False), "use_cache=False"),
        (dict(position_ids=torch.arange(30)[None]), "position_ids was given"),
        (dict(stopping_criteria=StoppingCriteriaList([Never()])), "stopping criterion Never looks at every token"),
    ],
)
def test_what_no_graph_can_do_is_done_eagerly_or_refused(looping, options, reason):
    ids = prompt(looping)
    options = {name: value.to(ids.device) if torch.is_tensor(value) else value for name, value in options.items()}
    with pytest.raises(graph.NotGraphableError, match=f"cannot be used: .*{reason}"):
        looping.generate(ids, cuda_graph=True, **GREEDY, **options)
    left_to_choose = looping.generate(ids, **GREEDY, **options)
    eager = looping.generate(ids, cuda_graph=False, **GREEDY, **options)
    assert torch.equal(getattr(left_to_choose, "sequences", left_to_choose), getattr(eager, "sequences", eager))


def test_the_tokenizer_that_stop_strings_need_and_other_caches_are_left_to_transformers(looping):
    with pytest.raises(graph.NotGraphableError, match="tokenizer was given"):
        looping.generate(prompt(looping), cuda_graph=True, tokenizer=object(), **GREEDY)
    with pytest.raises(graph.NotGraphableError, match="cache_implementation='static' was given"):
        looping.generate(prompt(looping), cuda_graph=True, cache_implementation="static", **GREEDY)
    with pytest.raises((ValueError, AttributeError), match="StaticCache|StaticLayer"):
        looping.generate(prompt(looping), cache_implementation="static", **GREEDY)


def test_coded_pages_are_for_a_new_cache(looping):
    ids = prompt(looping)
    for page_dtype in ("int8", "fp8"):
        graphed, eager = both(looping, ids, page_dtype=page_dtype, **GREEDY)
        assert_same(graphed, eager)
        assert graphed.past_key_values.packed.page_dtype == page_dtype
    with pytest.raises(ValueError, match="page_dtype has 3 entries, and the model has 2 layers"):
        looping.generate(ids, page_dtype=["int8", None, None], **GREEDY)
    graphed, eager = both(looping, ids, page_dtype=[None, "int8"], **GREEDY)
    assert_same(graphed, eager)
    assert graphed.past_key_values.packed.page_dtypes == (None, "int8")
    with pytest.raises(ValueError, match="page_dtype is for a new cache"):
        looping.generate(ids, page_dtype="int8", past_key_values=graphed.past_key_values, **GREEDY)
    spkv.attachment(looping).page_dtype = "fp8"
    assert spkv.attachment(looping).new_cache().packed.page_dtype == "fp8"
    assert spkv.attachment(looping).new_cache(page_dtype="int8").packed.page_dtype == "int8"


def test_a_length_criterion_of_ones_own_counts(looping):
    criteria = StoppingCriteriaList([MaxLengthCriteria(37)])
    assert_same(*both(looping, prompt(looping), stopping_criteria=criteria, **GREEDY))


class Fails(LogitsProcessor):
    def __call__(self, input_ids, scores):
        if input_ids.shape[1] == 40:
            raise RuntimeError("no more")
        return scores


def test_a_choice_that_fails_leaves_a_cache_that_can_go_on(looping):
    cache = spkv.attachment(looping).new_cache()
    processors = LogitsProcessorList([Fails()])
    with pytest.raises(RuntimeError, match="no more"):
        looping.generate(prompt(looping), past_key_values=cache, logits_processor=processors, cuda_graph=True, **GREEDY)
    assert (cache.packed.seen == cache.get_seq_length()).all()
    assert cache.get_seq_length() == 40


def test_long_generations_are_captured_a_few_times_only(looping, monkeypatch):
    captures = []
    capture = graph.DecodeLoop._capture
    monkeypatch.setattr(graph.DecodeLoop, "_capture", lambda self, step: captures.append(1) or capture(self, step))
    with spkv.attachment(looping).using(OpenGate()):
        looping.generate(prompt(looping, T=10), cuda_graph=True, **GREEDY | dict(max_new_tokens=400))
    # On a CPU the pool is one tensor, which moves as it grows.
    assert len(captures) <= (2 if torch.cuda.is_available() else 400 // 16 + 1)
    assert captures


def test_models_on_a_cpu_are_refused(tiny_llama):
    spkv.attach(tiny_llama)
    with pytest.raises(graph.NotGraphableError, match="the model is on cpu"):
        tiny_llama.generate(prompt(tiny_llama), cuda_graph=True, **GREEDY)


def test_a_full_pool_says_so_between_steps_and_the_cache_is_whole(looping):
    ids = prompt(looping, 1)
    cache = spkv.attachment(looping).new_cache(max_memory=2 * 2 * 2 * 2 * 16 * 8 * 4)
    with pytest.raises(PoolFullError, match="raise max_memory") as caught:
        looping.generate(ids, past_key_values=cache, cuda_graph=True, **GREEDY | dict(max_new_tokens=200))
    made = caught.value.tokens
    expected = looping.generate(ids, cuda_graph=False, **GREEDY | dict(max_new_tokens=made.shape[1]))
    assert torch.equal(made, expected[:, 30:])
    seen = cache.packed.seen
    assert (seen == seen[0, 0]).all()
    assert int(seen[0, 0]) == cache.get_seq_length() >= 30


def test_parts_are_compiled_inside_the_context_and_as_before_after_it(looping, monkeypatch):
    calls = []

    def compile(function, reproducible):
        return lambda *args, **kwargs: calls.append(function.__qualname__) or function(*args, **kwargs)

    monkeypatch.setattr(compiled, "_compile", compile)
    # Of what a GPU puts in place of predictors the next test speaks.
    monkeypatch.setattr(compiled, "_ends_in_one_kernel", lambda module: False)
    ids = prompt(looping)
    with torch.no_grad():
        expected = looping(ids).logits
        assert not calls
        with compiled.compiled_parts(looping):
            assert torch.equal(looping(ids).logits, expected)
        names = {"LlamaRMSNorm.forward", "UtilityPredictor.forward", "apply_rotary_pos_emb"}
        assert set(calls) == names
        assert calls.count("LlamaRMSNorm.forward") == 5
        calls.clear()
        assert torch.equal(looping(ids).logits, expected)
        assert not calls
    assert not any("forward" in vars(module) for module in looping.modules())


def test_predictors_decide_in_one_kernel_inside_the_context_alone(looping, monkeypatch):
    monkeypatch.setattr(compiled, "_ends_in_one_kernel", lambda module: isinstance(module, UtilityPredictor))
    predictors = spkv.attachment(looping).predictors.values()
    with compiled.compiled_parts(looping):
        for predictor in predictors:
            hidden_states = torch.randn(1, 3, looping.config.hidden_size, device=looping.device)
            with torch.no_grad(), torch.autocast(looping.device.type, torch.bfloat16):  # the kernel knows nothing of it
                utility, keep = predictor.decide(hidden_states, 0.5)
                assert torch.equal(utility, predictor(hidden_states))
                assert torch.equal(keep, utility >= 0.5)
    assert all(predictor.decide is None for predictor in predictors)


def test_compiling_needs_the_graph(looping, tiny_llama):
    with pytest.raises(graph.NotGraphableError, match="compile=True needs the CUDA graph, and cuda_graph=False"):
        looping.generate(prompt(looping), cuda_graph=False, compile=True, **GREEDY)
    with pytest.raises(graph.NotGraphableError, match=r"compile=True was asked for and cannot be used: .* beam_search"):
        looping.generate(prompt(looping), compile=True, num_beams=2, **GREEDY)


def test_detaching_brings_back_the_models_own_generate(tiny_llama):
    own = tiny_llama.generate
    spkv.attach(tiny_llama)
    assert tiny_llama.generate != own
    spkv.detach(tiny_llama)
    assert tiny_llama.generate == own
    assert "generate" not in vars(tiny_llama)


@pytest.mark.gpu
def test_a_real_graph_is_captured_once_for_many_tokens(monkeypatch, scatter_utilities):
    config = LlamaConfig(
        vocab_size=500, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=8192,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().cuda()
    spkv.attach(model, spkv.SPKVConfig(window=64))
    scatter_utilities(model)
    captures = []
    capture = graph.DecodeLoop._capture
    monkeypatch.setattr(graph.DecodeLoop, "_capture", lambda self, step: captures.append(1) or capture(self, step))
    ids = torch.randint(0, 500, (4, 700), device="cuda")
    graphed, eager = both(model, ids, **GREEDY | dict(max_new_tokens=300))
    assert len(captures) <= 4
    # bfloat16 rounds alike in both, since both run the same kernels.
    assert_same(graphed, eager)
    compiled_too = model.generate(ids, compile=True, return_dict_in_generate=True, **GREEDY | dict(max_new_tokens=300))
    # Compiled parts round where the model rounds, but add up in another order.
    same = (compiled_too.sequences == eager.sequences)[:, 700:].cummin(1).values
    assert same[:, :16].all()
