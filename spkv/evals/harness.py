"""The model `spkv` for lm-evaluation-harness.

The harness finds models of other packages only once they are registered, and looks for no entry points (0.4.13).
Importing this module registers `spkv`; `spkv lm-eval` imports it and hands over to the harness' own command line.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor

import spkv
from spkv.checkpoint import resolve_model
from spkv.config import check_page_dtype

logger = logging.getLogger("lm_eval.spkv")  # the harness sets up the loggers below its own


@register_model("spkv")
class SPKVLM(HFLM):
    """A self-pruning model.

    Likelihoods are computed in one forward pass into the pruned cache, and texts are continued by `generate()` with it.

    Args:
        pretrained: as `spkv.load` takes it: a directory, a hub name or a packaged model.
        adapter: an adapter directory.
        threshold: overrides the stored one.
        page_dtype: how kept pairs are coded; None leaves it to the model.
        dense: keep every pair, by the model's own attention and cache.
        oracle: compute likelihoods with a mask instead of the cache; texts are continued with the cache all the same.
        device: such as cuda:1; None takes a GPU if there is one.
        dtype: of the weights; None takes the checkpoint's.
        options: those of the harness' `hf` model that a loaded model can take, such as batch_size or max_length.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        adapter: str | None = None,
        threshold: float | None = None,
        page_dtype: str | None = None,
        dense: bool = False,
        oracle: bool = False,
        device: str | None = None,
        dtype: str | None = None,
        tokenizer: str | None = None,
        **options: Any,
    ) -> None:
        check_page_dtype(page_dtype)
        if dense and (threshold is not None or page_dtype is not None or oracle):
            raise ValueError("dense keeps every pair as it is: it goes without threshold, page_dtype and oracle")
        from transformers import AutoTokenizer

        # The harness' command line says cuda:0 where nobody said anything.
        place = (device or "cuda") if torch.cuda.is_available() else "cpu"
        if device is not None and torch.device(device).type != torch.device(place).type:
            logger.warning("There is no CUDA device for %s: the model runs on the CPU.", device)
        model = spkv.load(pretrained, adapter=adapter, dtype=dtype, device=place, threshold=threshold)
        if page_dtype is not None:
            spkv.attachment(model).page_dtype = page_dtype
        self.oracle, self._source = oracle, str(pretrained)
        self._around = contextlib.ExitStack()
        if dense:
            self._around.enter_context(spkv.dense(model))
        super().__init__(
            pretrained=model,
            tokenizer=AutoTokenizer.from_pretrained(tokenizer or resolve_model(pretrained)),
            backend="causal",
            **options,
        )

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        found = spkv.attachment(self.model)
        before, found.oracle = found.oracle, self.oracle
        try:
            with torch.no_grad():
                logits: Tensor = self.model(inps, use_cache=not self.oracle).logits
                return logits
        finally:
            found.oracle = before

    def get_model_info(self) -> dict[str, Any]:
        """What the harness saves about the model."""
        found = spkv.attachment(self.model)
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": self.model.dtype,
            "model_source": self._source,
            "spkv_threshold": None if found.suspended else found.threshold,
            "spkv_window": found.config.window,
        }


def main(arguments: Sequence[str]) -> None:
    """The harness' own command line, with the model `spkv`."""
    from lm_eval.__main__ import cli_evaluate

    before, sys.argv = sys.argv, ["lm-eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
