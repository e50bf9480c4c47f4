"""Texts that are read and asked about under one policy, on one cache.

A session reads several texts at once. They may differ in length: shorter pieces are padded on their left, the padding
is masked and never reaches a cache, and every token keeps its position in its own text.

Legend: B sequences, T tokens of a pass, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from spkv.evals.presses import Kept
from spkv.hf.attach import find_attachment
from spkv.hf.cache import CACHE_KEYWORD, SPKVCache
from spkv.hf.generation import CHUNK_SIZE, CacheSize, Reading, cache_size, decode

Pressing = AbstractContextManager[Kept]
"""Inside it, a forward pass over a whole context leaves a pruned cache, or a whole one and what each head keeps."""


class Session:
    """Reads texts into an empty cache and continues them greedily.

    Under a gate or `spkv.dense`, whichever is in force on the model; for methods that prune once, when a context has
    been read, `read` takes what does it.

    Args:
        model: a causal LM in evaluation mode, attached or not.
        chunk_size: tokens of a forward pass, of each sequence.

    Attributes:
        cache: what is held.
        lengths: tokens of each text that the cache has seen.
    """

    def __init__(self, model: PreTrainedModel, *, chunk_size: int = CHUNK_SIZE):
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, not {chunk_size}")
        found = find_attachment(model)
        self._pruning = found is not None and not found.suspended
        if model.training or (found is not None and not found.suspended and not found.gate.hard):
            raise ValueError("reading fills a cache: call model.eval(), and put a hard gate in force")
        self.model, self.chunk_size = model, chunk_size
        self.cache: Cache = (
            found.new_cache() if found is not None and self._pruning else DynamicCache(config=model.config)
        )
        self.lengths: list[int] = []
        self._valid: Tensor | None = None  # [B, columns] bool, once a piece was padded
        self._columns = 0  # of the cache's mask
        self._pending: list[list[int]] = []  # the last token of each answer, which no pass has read yet
        self._logits: Tensor | None = None  # [B, V], of the token after what was read
        self._dropped: list[int] | None = None  # pairs of each head that a press cut out of each context

    @torch.no_grad()
    def read(
        self, texts: Sequence[Sequence[int]], *, losses: bool = False, pressing: Pressing | None = None
    ) -> list[Tensor]:
        """Read the next piece of every text.

        Args:
            texts: [B] token ids, none of them empty.
            losses: also return the cross-entropy (nats) of every token that a token stands before.
            pressing: reads each text in one pass of its own, inside this; for the first piece of every text.

        Returns:
            A float32 tensor for each text, [tokens], or one less for the first piece; empty without `losses`.
        """
        if not all(texts):
            raise ValueError("there is nothing to read in one of the texts")
        if not self.lengths:
            self.lengths = [0] * len(texts)
            self._pending = [[] for _ in texts]
        if pressing is not None:
            if losses or self._columns:
                raise ValueError("a press reads the first piece of every text, and computes no losses")
            self._read_pruned(texts, pressing)
            return []
        T = max(map(len, texts))
        ids = torch.tensor([[0] * (T - len(text)) + list(text) for text in texts], device=self.model.device)
        valid = torch.tensor([[False] * (T - len(text)) + [True] * len(text) for text in texts], device=ids.device)
        before = previous = self._logits
        pieces = []
        for start in range(0, T, self.chunk_size):
            chunk, real = ids[:, start : start + self.chunk_size], valid[:, start : start + self.chunk_size]
            logits = self._forward(chunk, real, keep_logits=losses)
            if losses:
                pieces.append(token_losses(previous, logits, chunk))
                previous = logits[:, -1]
        self._logits = logits[:, -1]
        if not losses:
            return []
        joined = torch.cat(pieces, dim=1)
        first = joined.shape[1] < T  # nothing stands before the first column
        if before is not None:
            # What stands before a shorter piece is not its padding.
            begins = torch.tensor([T - len(text) for text in texts], device=ids.device)[:, None]
            opening = F.cross_entropy(before.float(), ids.gather(1, begins)[:, 0], reduction="none")
            joined.scatter_(1, begins, opening[:, None])
        joined = joined.cpu()
        return [row[T - len(text) :][: len(text) - first] for row, text in zip(joined, texts, strict=True)]

    @torch.no_grad()
    def answer(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Collection[int] = ()
    ) -> list[list[int]]:
        """Read the next prompt of every text and continue it greedily.

        Args:
            prompts: [B] token ids; an empty one goes on from where the text stands.
            max_new_tokens: of each answer, at most.
            stop: ids that end an answer.

        Returns:
            The answers without the id that ended them. What the next prompt follows is the answer without it, too.
        """
        pending = self._pending or [[] for _ in prompts]
        pieces = [[*unread, *prompt] for unread, prompt in zip(pending, prompts, strict=True)]
        if any(pieces):
            self.read(pieces)
        assert self._logits is not None
        if len(pieces) == 1 and self._dropped is None and self._valid is None:
            answers = [self._decode_one(max_new_tokens, stop)]
        else:
            answers = self._decode(max_new_tokens, stop)
        self._pending, ended = [], []
        for answer in answers:
            over = bool(answer) and answer[-1] in stop
            ended.append(answer[:-1] if over else answer)
            # The token that came last has been read by no pass, unless what came last is the id that ends the answer.
            self._pending.append([] if over else answer[-1:])
        return ended

    def sizes(self) -> list[CacheSize]:
        """How much is held of each text; the bytes are those allocated, in equal shares for texts read together."""
        B = len(self.lengths)
        whole = cache_size(self.cache)
        if isinstance(self.cache, SPKVCache):
            packed, heads = self.cache.packed, self.cache.packed.kv_heads
            kept = packed.kept_pairs().double().view(packed.layers, B, heads).sum((0, 2)).tolist()
            left = (packed.left_window().double().sum(0) * heads).tolist()
            seen = (packed.seen.double().sum(0) * heads).tolist()
            return [
                CacheSize(
                    # A press knows no window, so its density would say nothing.
                    density=inside / outside if outside and self._dropped is None else None,
                    kept_fraction=(inside + total - outside) / total,
                    kv_bytes=whole.kv_bytes // B,
                    dense_kv_bytes=int(whole.dense_kv_bytes * total / sum(seen)),
                )
                for inside, outside, total in zip(kept, left, seen, strict=True)
            ]
        pair_bytes = whole.kv_bytes / (self._columns * B)  # of a pair in all layers and heads
        dropped = self._dropped or [0] * B
        return [
            CacheSize(
                density=1.0 if self._dropped is None else None,
                kept_fraction=(seen_tokens - gone) / seen_tokens,
                kv_bytes=int(pair_bytes * (seen_tokens - gone)),
                dense_kv_bytes=int(pair_bytes * seen_tokens),
            )
            for seen_tokens, gone in zip(self.lengths, dropped, strict=True)
        ]

    def _read_pruned(self, texts: Sequence[Sequence[int]], pressing: Pressing) -> None:
        """Read each text by itself, since kvpress takes no padding; put the pruned caches side by side.

        With budgets by head the caches stay whole until all texts are read.
        """
        caches, logits, kept = [], [], []
        with pressing as kept_by_layer:
            for text in texts:
                ids = torch.tensor([list(text)], device=self.model.device)
                caches.append(DynamicCache(config=self.model.config))
                # kvpress knows a prefill by cache_position, which newer versions of transformers no longer make.
                position = torch.arange(len(text), device=ids.device)
                passed = {CACHE_KEYWORD: caches[-1], "cache_position": position, "logits_to_keep": 1}
                read = self.model(ids, **passed)
                logits.append(read.logits[:, -1])
                kept.append(dict(kept_by_layer))
        columns = [cache.get_seq_length() for cache in caches]
        self._columns = max(columns)
        if min(columns) < self._columns:
            column = torch.arange(self._columns, device=self.model.device)
            self._valid = column >= self._columns - torch.tensor(columns, device=column.device)[:, None]
        for index in range(len(caches[0])):
            layers: list[Any] = [cache.layers[index] for cache in caches]
            keys = torch.cat([_pad_left(layer.keys, self._columns) for layer in layers])
            values = torch.cat([_pad_left(layer.values, self._columns) for layer in layers])
            if not kept[0]:
                self.cache.update(keys, values, index)
                continue
            if not isinstance(self.cache, SPKVCache):
                raise ValueError("heads that keep different pairs need room_for_press around the session")
            keep = torch.cat([_pad_left(of_text[index][..., None], self._columns) for of_text in kept])[..., 0]
            group = self.model.config.get_text_config().num_attention_heads // keys.shape[1]
            self.cache.append(index, keys, values, keep, self._valid, group=group)
        self.lengths = [len(text) for text in texts]
        self._dropped = [length - left for length, left in zip(self.lengths, columns, strict=True)]
        self._logits = torch.cat(logits)

    def _forward(self, ids: Tensor, valid: Tensor, *, keep_logits: bool) -> Tensor:
        """One pass over [B, T]: returns logits [B, T or 1, V]."""
        B, T = ids.shape
        seen = torch.tensor(self.lengths, device=ids.device)[:, None]
        position = (seen + valid.cumsum(1) - 1).clamp_min(0)
        if self._valid is None and not bool(valid.all()):
            self._valid = torch.ones(B, self._columns, dtype=torch.bool, device=ids.device)
        if self._valid is not None:
            self._valid = torch.cat([self._valid, valid], dim=1)
        extra = {} if self._valid is None else {"attention_mask": self._valid.long()}
        logits: Tensor = self.model(
            input_ids=ids,
            position_ids=position,
            use_cache=True,
            logits_to_keep=0 if keep_logits else 1,
            **{CACHE_KEYWORD: self.cache},
            **extra,
        ).logits
        self._columns += T
        self.lengths = [length + new for length, new in zip(self.lengths, valid.sum(1).tolist(), strict=True)]
        return logits

    def _decode_one(self, max_new_tokens: int, stop: Collection[int]) -> list[int]:
        assert self._logits is not None
        reading = Reading(cache=self.cache, next_logits=self._logits, seconds=0.0)
        ids, _ = decode(self.model, reading, max_new_tokens, stop=stop)
        self._columns += len(ids) - 1
        self.lengths[0] += len(ids) - 1
        return ids

    def _decode(self, max_new_tokens: int, stop: Collection[int]) -> list[list[int]]:
        assert self._logits is not None
        answers: list[list[int]] = [[] for _ in self.lengths]
        ends = torch.tensor(sorted(stop), dtype=torch.long, device=self.model.device)
        active = torch.ones(len(answers), dtype=torch.bool, device=self.model.device)
        logits = self._logits
        for made in range(1, max_new_tokens + 1):
            token = logits.argmax(-1)
            for answer, goes_on, new in zip(answers, active.tolist(), token.tolist(), strict=True):
                answer += [new] * goes_on
            active = active & ~torch.isin(token, ends)
            if made == max_new_tokens or not bool(active.any()):
                break
            logits = self._forward(token[:, None], active[:, None], keep_logits=False)[:, -1]
        return answers


def _pad_left(pairs: Tensor, columns: int) -> Tensor:
    """[1, Hkv, n, D] to [1, Hkv, columns, D], zeros in front."""
    return F.pad(pairs, (0, 0, columns - pairs.shape[2], 0))


def token_losses(previous: Tensor | None, logits: Tensor, ids: Tensor) -> Tensor:
    """[B, T], the cross-entropy of every token of a pass; [B, T - 1] if there are no logits from before it."""
    within = [
        # In blocks: the logits of a whole chunk in float32 would take more than the model.
        F.cross_entropy(block.float().transpose(1, 2), wanted, reduction="none")
        for block, wanted in zip(logits[:, :-1].split(256, dim=1), ids[:, 1:].split(256, dim=1), strict=True)
    ]
    first = [] if previous is None else [F.cross_entropy(previous.float(), ids[:, 0], reduction="none")[:, None]]
    return torch.cat([*first, *within], dim=1) if first or within else logits.new_empty(len(ids), 0).float()
