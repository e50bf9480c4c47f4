"""Sessions: several texts on one cache, each as if it were alone."""

from __future__ import annotations

import contextlib

import pytest
import torch

import spkv
from spkv.evals.session import Session
from spkv.gates import SoftGate

STOP = (41,)


@pytest.fixture
def model(tiny_llama, scatter_utilities):
    spkv.attach(tiny_llama, spkv.SPKVConfig(window=8))
    scatter_utilities(tiny_llama)
    return tiny_llama


@pytest.fixture
def texts():
    return [torch.randint(1, 97, (length,)).tolist() for length in (60, 41, 3)]


PROMPTS = [[[1, 2, 3], [4], [5, 6]], [[9], [], [7, 7, 7, 7]]]


def run(model, texts, prompts):
    session = Session(model, chunk_size=16)
    losses = session.read(texts, losses=True)
    return losses, [session.answer(turn, 7, STOP) for turn in prompts], session


@pytest.mark.parametrize("pruned", [True, False])
def test_texts_read_together_are_as_if_alone(model, texts, pruned):
    with contextlib.nullcontext() if pruned else spkv.dense(model):
        losses, answers, together = run(model, texts, PROMPTS)
        for place, text in enumerate(texts):
            (own,), spoken, alone = run(model, [text], [[turn[place]] for turn in PROMPTS])
            torch.testing.assert_close(losses[place], own, rtol=1e-5, atol=1e-5)
            assert [turn[place] for turn in answers] == [turn[0] for turn in spoken]
            assert together.lengths[place] == alone.lengths[0]
            size, expected = together.sizes()[place], alone.sizes()[0]
            assert (size.density, size.kept_fraction) == (expected.density, expected.kept_fraction)
            if not pruned:
                assert (size.kv_bytes, size.kept_fraction) == (expected.kv_bytes, 1.0)


@pytest.mark.parametrize("pruned", [True, False])
def test_losses_and_answers_are_those_of_one_text(model, texts, pruned):
    """What was read, asked and answered, as one text in one forward pass, gives the same answers and losses."""
    with contextlib.nullcontext() if pruned else spkv.dense(model):
        losses, answers, session = run(model, texts[:1], [[turn[0]] for turn in PROMPTS])
        whole, answered = list(texts[0]), []
        for turn, answer in zip(PROMPTS, answers, strict=True):
            whole += turn[0]
            answered += range(len(whole), len(whole) + len(answer[0]))
            whole += answer[0]
        ids = torch.tensor([whole])
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[0]
    for index in answered:
        assert int(logits[index - 1].argmax()) == whole[index]
    expected = torch.nn.functional.cross_entropy(logits[:59], ids[0, 1:60], reduction="none")
    torch.testing.assert_close(losses[0], expected, rtol=1e-5, atol=1e-5)
    assert session.lengths[0] in (len(whole), len(whole) - 1)


def test_an_answer_ends_before_the_token_that_ends_it(model, texts):
    _, (answers, _), _ = run(model, texts[:1], [[turn[0]] for turn in PROMPTS])
    end = answers[0][2]
    session = Session(model)
    session.read(texts[:1])
    assert session.answer([PROMPTS[0][0]], 7, (end,)) == [answers[0][: answers[0].index(end)]]


def test_what_cannot_be_read_is_named(model, texts):
    with pytest.raises(ValueError, match="nothing to read in one of the texts"):
        Session(model).read([texts[0], []])
    with pytest.raises(ValueError, match="chunk_size must be at least 1, not 0"):
        Session(model, chunk_size=0)
    with spkv.attachment(model).using(SoftGate()), pytest.raises(ValueError, match="put a hard gate in force"):
        Session(model)
    with pytest.raises(ValueError, match="a press reads the first piece of every text, and computes no losses"):
        Session(model).read(texts, pressing=contextlib.nullcontext(), losses=True)
