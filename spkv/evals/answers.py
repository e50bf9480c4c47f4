"""Tasks that are answered in words, run: a context is read, questions are asked on its cache, answers are scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spkv.evals.presses import check_press_length, pressing
from spkv.evals.session import Session
from spkv.evals.task import Task
from spkv.hf.families import find_decoder
from spkv.hf.generation import check_length, decode_text, stop_ids
from spkv.text import prefix_ids


class Answers:
    """The examples of one task at one length.

    Args:
        task: makes and scores them.
        tokenizer: the model's.
        length: tokens that an example takes at most.
        count: examples.
        seed: of the examples.

    Attributes:
        name: the task's.
        length: as given.
        count: examples that the task made.
    """

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int):
        if count < 1:
            raise ValueError(f"the number of examples must be at least 1, not {count}")
        self.name, self.length, self.task, self.tokenizer = task.name, length, task, tokenizer
        self.examples = list(task.examples(tokenizer, length, count, seed))
        if not self.examples:
            raise ValueError(f"task {task.name} made no example of {length:,} tokens")
        self.count = len(self.examples)
        prefix = prefix_ids(tokenizer)
        self._contexts = [_begun(prefix, self._encode(example.context)) for example in self.examples]
        self._prompts = [[self._encode(question.prompt) for question in example.questions] for example in self.examples]
        stops = {question.stop for example in self.examples for question in example.questions}
        self._stops = {stop: _ids_that_hold(stop, tokenizer) for stop in stops}
        for index, example in enumerate(self.examples):
            answers = sum(question.max_new_tokens for question in example.questions)
            tokens = len(self._contexts[index]) - len(prefix) + sum(map(len, self._prompts[index])) + answers
            if tokens > length:
                raise ValueError(
                    f"task {task.name}: example {index} takes {tokens:,} tokens; it was asked for at most {length:,}"
                )

    def identity(self) -> dict[str, Any]:
        """What a saved evaluation of the same examples must agree in."""
        questions = [
            [(question.references, question.max_new_tokens, question.stop) for question in example.questions]
            for example in self.examples
        ]
        return {"contexts": self._contexts, "prompts": self._prompts, "questions": questions}

    def check(self, model: PreTrainedModel, press: str | None = None, *, oracle: bool = False) -> None:
        """Raise a ValueError if a model cannot hold the examples, or a method cannot prune them."""
        if oracle:
            raise ValueError(
                f"--oracle computes losses, and task {self.name} is answered in words, which takes a cache"
            )
        check_length(model.config, self.length)
        if press is not None:
            for context in self._contexts:
                check_press_length(press, len(context))

    def batches(self, model: PreTrainedModel, batch_size: int) -> list[list[int]]:
        """Examples that are read together: asked as often, for answers as long, of contexts as equal as can be."""
        decoder = find_decoder(model)
        if len(decoder.global_layers) < len(list(decoder.attentions)):
            batch_size = 1  # sliding windows of transformers would count padding
        alike: dict[tuple[Any, ...], list[int]] = {}
        for index in sorted(range(self.count), key=lambda i: (-len(self._contexts[i]), i)):
            limits = tuple((question.max_new_tokens, question.stop) for question in self.examples[index].questions)
            alike.setdefault((bool(self._contexts[index]), *limits), []).append(index)
        return [
            group[start : start + batch_size] for group in alike.values() for start in range(0, len(group), batch_size)
        ]

    def run(
        self,
        model: PreTrainedModel,
        batch: Sequence[int],
        *,
        chunk_size: int,
        press: str | None = None,
        kept_fraction: float | None = None,
        oracle: bool = False,
    ) -> list[dict[str, Any]]:
        """Read and ask, under the policy in force; a record for each example of the batch."""
        session = Session(model, chunk_size=chunk_size)
        contexts = [self._contexts[i] for i in batch]
        if press is not None:
            assert kept_fraction is not None
            session.read(contexts, pressing=pressing(press, model, kept_fraction))
        elif contexts[0]:
            session.read(contexts)
        at_context = session.sizes() if contexts[0] else [None] * len(batch)
        answers = []
        for turn, question in enumerate(self.examples[batch[0]].questions):
            stop = self._stops[question.stop].union(stop_ids(model))
            ids = session.answer([self._prompts[i][turn] for i in batch], question.max_new_tokens, stop)
            answers.append([decode_text(self.tokenizer, one) for one in ids])
        records = []
        for place, index in enumerate(batch):
            example, size, before = self.examples[index], session.sizes()[place], at_context[place]
            said = [turn[place] for turn in answers]
            scores = [
                float(self.task.score(answer, question))
                for answer, question in zip(said, example.questions, strict=True)
            ]
            records.append(
                {
                    "example": index,
                    "tokens": session.lengths[place],
                    "score": sum(scores) / len(scores),
                    "scores": scores,
                    "answers": said,
                    "facts": dict(example.facts),
                    "density": size.density,
                    "kept_fraction": size.kept_fraction,
                    "context_density": before and before.density,
                    "context_kept_fraction": before and before.kept_fraction,
                    "kv_bytes": size.kv_bytes,
                }
            )
        return records

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return ids


def _begun(prefix: list[int], ids: list[int]) -> list[int]:
    """A text behind the tokenizer's prefix, unless a chat template has put it there already."""
    return ids if prefix and ids[: len(prefix)] == prefix else [*prefix, *ids]


def _ids_that_hold(text: str, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids of tokens with `text` in them; none for an empty one."""
    if not text:
        return frozenset()
    pieces = tokenizer.batch_decode([[index] for index in range(len(tokenizer))])
    return frozenset(index for index, piece in enumerate(pieces) if text in piece)
