"""Serving through vLLM: a plugin that gives a self-pruned model its cache, whose freed memory takes more requests.

How the parts meet: `settings.py` sets vLLM up for such a model, or says why it cannot be served. `model.py` is vLLM's
models with predictors, and with what an adapter adds to their weights (`adapter.py`); their attention layers
(`attention.py`) keep their pairs in `slabs.py`, inside the memory that vLLM allocates. `manager.py` hands its blocks
out as slabs, by the book that `ledger.py` keeps, and `connector.py` carries orders from the scheduler to the workers
and back what was used.

`versions.py` alone knows what differs between versions of vLLM. Importing this module imports none of it.
"""

from __future__ import annotations


def register() -> None:
    """Called by vLLM in each of its processes (entry point `vllm.general_plugins`)."""
    from spkv.serving import versions

    versions.register()
