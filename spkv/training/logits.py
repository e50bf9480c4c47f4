"""Training passes without the logits that nobody reads."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def without_logits(model: Any) -> Iterator[None]:
    """Inside, a pass with labels returns its loss and no logits.

    accelerate copies to float32 whatever a model in half precision returns, and logits are much: 4 GiB for 4,096 tokens
    and a vocabulary of 262,144. What it puts around the forward pass stays there afterwards, so that ours must, too.
    """
    before, inside = vars(model).get("forward"), True
    forward = model.forward.__func__

    # A method as it was one, for those who copy the model or look for what was there before.
    @functools.wraps(forward)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        if not inside or output.get("loss") is None:
            return output
        return type(output)(**{name: value for name, value in output.items() if name != "logits"})

    model.forward = ours = types.MethodType(wrapped, model)
    try:
        yield
    finally:
        inside = False
        if vars(model).get("forward") is ours:
            del model.forward
            if before is not None:
                model.forward = before
