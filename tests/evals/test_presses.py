"""Methods of kvpress: they prune the context to what was asked for, and nothing else changes."""

from __future__ import annotations

import contextlib
import importlib
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AttentionInterface, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import spkv
from spkv.evals import Answers, Losses, Policy, evaluate, make_policies
from spkv.evals.presses import PRESSES, Press, check_press, is_press, pressing, room_for_press, share_by_score
from spkv.evals.session import Session
from spkv.gates import OpenGate, ThresholdGate

LENGTH = 200
EQUAL_HEADS = (*PRESSES, "h2o+half", "expected-attention+recent", "keydiff+half")
BY_HEAD = ("h2o+heads", "expected-attention+recent+heads", "snapkv+heads", "keydiff+half+heads")


def test_without_kvpress_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "kvpress", raising=False)
    monkeypatch.setattr(importlib, "import_module", _absent)
    with pytest.raises(ModuleNotFoundError, match=r'policy tova runs through kvpress.*pip install "spkv\[baselines\]"'):
        check_press("tova")


def _absent(name):
    raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.fixture
def kvpress():
    # Ours, so that what importing it changes is undone.
    pytest.importorskip("cachetools")
    try:
        check_press("tova")
    except ModuleNotFoundError:
        pytest.skip("needs kvpress")
    return sys.modules["kvpress"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("h2o+", r"policy h2o\+: h2o takes the settings \+recent, \+half, \+heads, each once"),
        ("h2o+half+half", "each once"),
        ("snapkv+window", "policy snapkv.window: snapkv takes the settings"),
        ("keydiff+recent+half", "exclude each other"),
        ("tova+heads", "gives all heads of a layer one score"),
        ("h3o+heads", "methods are h2o, expected-attention"),
    ],
)
def test_unknown_settings_are_named(name, message):
    with pytest.raises(ValueError, match=message):
        Press.of(name)


def test_policies_take_methods_with_settings():
    spkv_policy, pressed = make_policies(["spkv", "h2o+half+heads"])
    assert (pressed.name, pressed.press, pressed.match_threshold) == ("h2o+half+heads",) * 2 + (spkv_policy.threshold,)
    with pytest.raises(ValueError, match="each once"):
        make_policies(["spkv", "h2o+hlf"])
    _, *same = make_policies(["spkv", "h2o+heads+recent", "h2o+recent+heads"])
    assert [policy.label for policy in same] == ["h2o+recent+heads like 0.5"]
    with pytest.raises(ValueError, match="NAME=PATH needs a name of its own"):
        make_policies(["spkv", "h2o+heads=."])


@given(st.data())
def test_shared_budgets_go_to_the_best_pairs_after_some_of_each_head(data):
    B, heads, T = (data.draw(st.integers(1, most)) for most in (2, 4, 30))
    budget = data.draw(st.integers(1, T))
    # Distinct, so that there is one right answer.
    scores = torch.stack(
        [torch.tensor(data.draw(st.permutations(range(heads * T))), dtype=torch.float32) for _ in range(B)]
    ).view(B, heads, T)
    keep = share_by_score(scores, budget)
    for own, kept in zip(scores, keep, strict=True):
        safe = {(h, t) for h in range(heads) for t in own[h].argsort(descending=True)[: max(1, budget // 5)].tolist()}
        order = sorted(((h, t) for h in range(heads) for t in range(T)), key=lambda p: (p not in safe, -own[p].item()))
        assert {tuple(p) for p in kept.nonzero().tolist()} == set(order[: budget * heads])


@contextlib.contextmanager
def _masking(model, kept):
    """Attention over a whole context, of which each KV head sees what it keeps, and all that follows."""

    def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
        group, columns, new = query.shape[1] // key.shape[1], key.shape[2], query.shape[2]
        past = kept[module.layer_idx].shape[2]
        seen = torch.ones(new, columns, dtype=torch.bool).tril(columns - new).expand(1, query.shape[1], -1, -1).clone()
        seen[..., :past] &= kept[module.layer_idx].repeat_interleave(group, 1)[:, :, None]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling)
        return out.transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS["masked_by_head"] = attention
    with spkv.dense(model) if spkv.hf.attach.find_attachment(model) else contextlib.nullcontext():
        model.set_attn_implementation("masked_by_head")
        try:
            yield
        finally:
            model.set_attn_implementation("sdpa")
            del ALL_ATTENTION_FUNCTIONS["masked_by_head"]


@pytest.mark.usefixtures("kvpress")
class TestPresses:
    def test_importing_changes_no_attention_function(self):
        code = sys.modules["kvpress"].attention_patch.__file__
        for name in AttentionInterface._global_mapping:
            assert getattr(ALL_ATTENTION_FUNCTIONS[name], "__code__", None) is None or (
                ALL_ATTENTION_FUNCTIONS[name].__code__.co_filename != code
            )

    @pytest.mark.parametrize("press", EQUAL_HEADS)
    def test_a_context_is_pruned_to_what_was_asked_for(self, words_model, press):
        ids = torch.randint(0, 256, (100,)).tolist()
        with spkv.dense(words_model):
            before = {name for name, _ in words_model.named_modules()}
            session = Session(words_model)
            session.read([ids], pressing=pressing(press, words_model, 0.4))
            assert session.cache.get_seq_length() == 40
            assert session.sizes()[0].kept_fraction == pytest.approx(0.4)
            session.answer([[1, 2, 3]], 5)
            (size,) = session.sizes()
            assert size.kept_fraction == pytest.approx((40 + 3 + 4) / (100 + 3 + 4))
            assert size.kv_bytes == 2 * 2 * 47 * 2 * 8 * 4  # layers, key and value, tokens, heads, head size, bytes
            assert session.lengths == [107]
            assert {name for name, _ in words_model.named_modules()} == before
            assert words_model.config._attn_implementation == "sdpa"

    @pytest.mark.parametrize("press", EQUAL_HEADS)
    def test_what_follows_sees_the_pruned_context_at_its_own_positions(self, words_model, press, kvpress):
        """The answer is that of the model whose cache kvpress' own pipeline would have made."""
        context, prompt = torch.randint(0, 256, (1, 100)), torch.randint(0, 256, (1, 6))
        with spkv.dense(words_model), torch.no_grad():
            session = Session(words_model)
            session.read(context.tolist(), pressing=pressing(press, words_model, 0.3))
            losses = session.read(prompt.tolist(), losses=True)[0]
            keys, values = (
                [getattr(layer, n)[:, :, :30] for layer in session.cache.layers] for n in ("keys", "values")
            )
            # By hand: attention of the prompt's tokens over the kept pairs, whose keys carry their rotation.
            cache = DynamicCache(config=words_model.config)
            for layer, pair in enumerate(zip(keys, values, strict=True)):
                cache.update(*pair, layer)
            logits = words_model(prompt, past_key_values=cache, position_ids=torch.arange(100, 106)[None]).logits
        expected = torch.nn.functional.cross_entropy(logits[0, :-1], prompt[0, 1:], reduction="none")
        torch.testing.assert_close(losses[1:], expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("press", [*EQUAL_HEADS, *BY_HEAD])
    def test_texts_of_a_batch_are_pruned_and_asked_as_each_by_itself(self, words_model, press):
        texts = [torch.randint(0, 256, (length,)).tolist() for length in (100, 70, 90)]
        prompts, follow = [[1, 2, 3], [6], [10, 11]], [[4, 5, 6, 7], [7, 8], [12, 13, 14]]
        with room_for_press(press, words_model):
            together = Session(words_model)
            together.read(texts, pressing=pressing(press, words_model, 0.4))
            losses = together.read(follow, losses=True)
            answers = together.answer(prompts, 6)
            for place, text in enumerate(texts):
                alone = Session(words_model)
                alone.read([text], pressing=pressing(press, words_model, 0.4))
                (expected,) = alone.read([follow[place]], losses=True)
                torch.testing.assert_close(losses[place], expected, rtol=1e-4, atol=1e-5)
                assert len(expected) == len(follow[place])  # the first token's, too
                assert alone.answer([prompts[place]], 6) == [answers[place]]
                assert alone.sizes()[0].kept_fraction == together.sizes()[place].kept_fraction
                assert alone.lengths == [together.lengths[place]]

    @pytest.mark.parametrize("attached", [True, False])
    @pytest.mark.parametrize("press", BY_HEAD)
    def test_heads_share_what_is_kept_and_hold_their_own_pairs(self, words_model, press, attached):
        context, prompt = torch.randint(0, 256, (1, 100)), torch.randint(0, 256, (1, 6))
        model = words_model if attached else spkv.detach(words_model)
        config = spkv.attachment(model).config if attached else None
        # By hand: attention of the prompt's tokens over the whole cache, each head under a mask of its own.
        cache = DynamicCache(config=model.config)
        with torch.no_grad(), pressing(press, model, 0.3) as kept:
            model(context, past_key_values=cache, cache_position=torch.arange(100))
        assert [keep.sum().item() for keep in kept.values()] == [60, 60]  # two heads of 30 on average
        assert any(keep[0, 0].sum() != keep[0, 1].sum() for keep in kept.values())
        assert all(keep.sum(-1).min() >= 6 and keep[..., -1].all() for keep in kept.values())
        with _masking(model, kept), torch.no_grad():
            position = torch.arange(100, 106)[None]
            logits = model(prompt, past_key_values=cache, position_ids=position).logits
        expected = torch.nn.functional.cross_entropy(logits[0, :-1], prompt[0, 1:], reduction="none")
        with room_for_press(press, model):
            session = Session(model)
            session.read(context.tolist(), pressing=pressing(press, model, 0.3))
            (before,) = session.sizes()
            held = session.cache.packed.kept_pairs()[:, 0] + 1  # the last token is in the window
            assert torch.equal(held, torch.stack([keep[0].sum(-1) for keep in kept.values()]))
            losses = session.read(prompt.tolist(), losses=True)[0]
            (after,) = session.sizes()
        torch.testing.assert_close(losses[1:], expected, rtol=1e-4, atol=1e-5)
        assert (before.kept_fraction, after.kept_fraction) == (pytest.approx(0.3), pytest.approx(36 / 106))
        assert before.density is None
        # Nothing is left of it.
        assert (spkv.hf.attach.find_attachment(model) is not None) == attached
        assert not attached or spkv.attachment(model).config == config
        assert model.config._attn_implementation == ("spkv_sdpa" if attached else "sdpa")

    @pytest.mark.parametrize("attached", [True, False])
    def test_what_fails_inside_leaves_the_model_as_it_was(self, words_model, attached):
        model = words_model if attached else spkv.detach(words_model)
        config = spkv.attachment(model).config if attached else None
        for outer in (room_for_press("h2o+heads", model), pressing("h2o+heads", model, 0.5)):
            with pytest.raises(RuntimeError, match="in the middle"), outer:
                raise RuntimeError("in the middle")
            assert model.config._attn_implementation == ("spkv_sdpa" if attached else "sdpa")
            assert not any(hasattr(layer.self_attn, "rotary_emb") for layer in model.model.layers)
            assert not any(layer.self_attn._forward_hooks for layer in model.model.layers)
        assert not attached or spkv.attachment(model).config == config

    def test_a_model_that_cannot_be_attached_is_refused_before_work_starts(self, words_model):
        with spkv.dense(words_model), pytest.raises(ValueError, match="cannot run inside spkv.dense"):
            check_press("h2o+heads", words_model)
        plain = spkv.detach(words_model)
        plain.config.attention_dropout = 0.1
        with pytest.raises(ValueError, match="attention_dropout is 0.1"):
            check_press("h2o+heads", plain)
        check_press("h2o", plain)

    @pytest.mark.parametrize("kept_fraction", [0.03, 0.31, 0.77])
    def test_all_settings_keep_as_many_pairs(self, words_model, kept_fraction):
        text = torch.randint(0, 256, (99,)).tolist()
        found = set()
        for press in (*EQUAL_HEADS, *BY_HEAD):
            with room_for_press(press, words_model):
                session = Session(words_model)
                session.read([text], pressing=pressing(press, words_model, kept_fraction))
                found.add(round(session.sizes()[0].kept_fraction, 9))
        assert len(found) == 1

    def test_recent_tokens_are_kept_where_that_is_asked_for(self, words_model):
        context = torch.randint(0, 256, (1, 300))
        with torch.no_grad():
            for settings, kept_fraction, recent in (("+recent", 0.9, 128), ("+recent", 0.3, 45), ("+half", 0.9, 135)):
                with pressing(f"keydiff{settings}+heads", words_model, kept_fraction) as kept:
                    model_cache = DynamicCache(config=words_model.config)
                    words_model(context, past_key_values=model_cache, cache_position=torch.arange(300))
                for keep in kept.values():
                    assert keep[..., -recent:].all()
                    assert kept_fraction > 0.5 or not keep[..., -recent - 10 :].all()

    @pytest.mark.parametrize("press", [*EQUAL_HEADS, *BY_HEAD])
    def test_keeping_everything_scores_as_dense(self, words_model, tokenizer, letters, press):
        jobs = [Answers(letters(), tokenizer, LENGTH, 3, seed=0), Losses(torch.randint(0, 256, (2, 150)))]
        policies = [
            Policy("dense"), Policy("spkv", OpenGate(), threshold=0.5), Policy(press, match_threshold=0.5, press=press),
        ]  # fmt: skip
        rows = evaluate(words_model, jobs, policies)
        (dense, _, pressed), (dense_loss, _, pressed_loss) = rows[:3], rows[3:]
        for name in ("score", "kept_fraction", "by_fact", "by_turn", "tokens"):
            assert pressed[name] == dense[name]
        assert press in BY_HEAD or pressed["kv_bytes"] == dense["kv_bytes"]
        assert pressed_loss["continuation_loss"] == pytest.approx(dense_loss["continuation_loss"], rel=1e-5)
        assert pressed_loss["loss"] is None

    def test_memory_is_that_of_spkv(self, words_model, tokenizer, letters):
        jobs = [Answers(letters(), tokenizer, LENGTH, 3, seed=0), Losses(torch.randint(0, 256, (2, 150)))]
        policies = make_policies(["dense", "spkv", *PRESSES, *BY_HEAD], [0.3, 0.6], match_thresholds=[0.3, 0.6])
        rows = evaluate(words_model, jobs, policies)
        for row in rows:
            if is_press(row["policy"]):
                (own,) = (
                    other for other in rows if other["policy"] == "spkv" and other["task"] == row["task"]
                    and other["threshold"] == row["match_threshold"]
                )  # fmt: skip
                # kvpress rounds down to whole pairs of each head.
                assert 0 <= own["context_kept_fraction"] - row["context_kept_fraction"] < 0.01
                assert row["density"] is None

    def test_models_and_texts_that_cannot_be_pruned_are_named(self, words_model, tokenizer, letters):
        from transformers import StableLmConfig, StableLmForCausalLM

        other = StableLmForCausalLM(
            StableLmConfig(
                vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
                num_key_value_heads=2,
            )
        )  # fmt: skip
        with pytest.raises(ValueError, match=r"policy tova: kvpress supports .*LlamaForCausalLM.*, not StableLm"):
            check_press("tova", other)
        policies = [
            Policy("spkv", ThresholdGate(0.5), threshold=0.5),
            Policy("snapkv", match_threshold=0.5, press="snapkv"),
        ]
        with pytest.raises(ValueError, match="policy snapkv needs a context of at least 65 tokens; this one has 60"):
            evaluate(words_model, [Losses(torch.zeros(1, 80, dtype=torch.long))], policies)
        with pytest.raises(ValueError, match="cannot be computed with a mask"):
            evaluate(words_model, [Losses(torch.zeros(1, 150, dtype=torch.long))], policies, oracle=True)
        words_model.config.max_position_embeddings = 100
        with pytest.raises(ValueError, match="150 tokens exceed the model's 100 positions"):
            evaluate(words_model, [Losses(torch.zeros(1, 150, dtype=torch.long))], policies)
