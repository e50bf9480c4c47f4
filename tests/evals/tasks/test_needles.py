"""niah and turns: where facts lie, and when they are asked for."""

from __future__ import annotations

import itertools

import pytest

from spkv.evals.tasks import TaskOptions, make_tasks
from spkv.evals.tasks.facts import sample_things
from spkv.evals.tasks.haystack import Haystack, hide, load_haystack
from spkv.evals.tasks.niah import NeedleInHaystack
from spkv.evals.tasks.scores import string_match_all, string_match_part
from spkv.evals.tasks.turns import Turns

LENGTH = 6000


def depth_of(needle: str, context: str) -> float:
    return context.index(needle) / (len(context) - len(needle))


def test_needles_lie_at_the_depths_of_the_grid(options, tokenizer):
    examples = NeedleInHaystack(options.haystack, depths=5).examples(tokenizer, LENGTH, 7, 0)
    assert [example.facts["depth"] for example in examples] == [0, 0.25, 0.5, 0.75, 1, 0, 0.25]
    for example in examples:
        number = example.questions[0].references[0]
        assert example.context.count(number) == 1
        assert depth_of(number, example.context) == pytest.approx(example.facts["depth"], abs=0.03)


def test_turns_ask_for_facts_from_all_over(options, tokenizer):
    examples = Turns(options.haystack, turns=4).examples(tokenizer, LENGTH, 5, 0)
    for example in examples:
        assert example.facts["turn"] == (0, 1, 2, 3)
        assert example.context.count("The secret number of") == 12
        assert len({question.references for question in example.questions}) == 4
        for depth, question in zip(example.facts["depth"], example.questions, strict=True):
            measured = depth_of(question.references[0], example.context)
            assert depth - 0.05 <= measured <= depth + 0.15
    # Late questions are not always about late facts.
    depths = [example.facts["depth"] for example in examples]
    assert any(later < earlier for row in depths for earlier, later in itertools.pairwise(row))


def test_needles_lie_between_sentences():
    text = 'One two three. Four five "six seven." Eight nine ten!'
    words = text.split()
    assert hide(words, []) == text
    assert hide(words, [(0, "A.")]) == 'A. One two three. Four five "six seven." Eight nine ten!'
    assert hide(words, [(0.35, "A."), (0.4, "B.")]) == 'One two three. A. B. Four five "six seven." Eight nine ten!'
    assert hide(words, [(0.8, "A."), (1, "B.")]) == 'One two three. Four five "six seven." A. Eight nine ten! B.'
    assert hide([], [(0.5, "A.")]) == "A."


def test_short_haystacks_begin_again_and_say_so(tokenizer):
    haystack = Haystack(["one two ***\n", "three."], "three words")
    assert haystack.passage(1, 5) == ["two", "three.", "one", "two", "three."]
    assert haystack.passage(0, 3) == ["one", "two", "three."]
    assert haystack.facts(3) == {}
    assert haystack.facts(4) == {"repeats": True}
    [example] = NeedleInHaystack(haystack).examples(tokenizer, 600, 1, 0)
    assert example.facts == {"depth": 0.0, "repeats": True}
    with pytest.raises(ValueError, match="the haystack, blank, holds no words"):
        Haystack(["", " -- "], "blank").passage(0, 1)


def test_passages_do_not_depend_on_what_was_read_before():
    documents = [f"{i} words" for i in range(20)]
    read, fresh = Haystack(documents, "x"), Haystack(documents, "x")
    read.passage(0, 100)
    assert read.passage(35, 8) == fresh.passage(35, 8)


def test_every_machine_has_a_haystack():
    haystack = load_haystack(None)
    # More words than 128k tokens hold, and hardly any passage twice.
    passage = haystack.passage(0, 130_000)
    assert haystack.facts(130_000) == {}
    runs = {tuple(passage[start : start + 20]) for start in range(0, len(passage) - 20, 20)}
    assert len(runs) > 0.98 * (len(passage) // 20)
    assert "Python" in haystack.source


def test_notes_name_the_haystack(options):
    for task in make_tasks(["niah", "turns"], options):
        assert task.note == "haystack: essays.txt"


def test_bad_options_are_named(options, tmp_path):
    with pytest.raises(ValueError, match="depths must be at least 2, not 1"):
        NeedleInHaystack(options.haystack, depths=1)
    with pytest.raises(ValueError, match="turns must be at least 2, not 0"):
        Turns(options.haystack, turns=0)
    with pytest.raises(FileNotFoundError, match=r"no such data file: .*absent\.txt"):
        make_tasks(["niah"], TaskOptions(essays=tmp_path / "absent.txt"))
    with pytest.raises(ValueError, match="9,999 facts were asked for; there are names for"):
        sample_things(None, 9999)


def test_string_matches():
    assert string_match_all("It is 12, or ABC.", ["12", "abc", "x"]) == pytest.approx(2 / 3)
    assert string_match_part("It is 12, or ABC.", ["x", "abc"]) == 1
    assert string_match_part("nothing", ["x1"]) == string_match_all("", ["x"]) == 0
