"""Shared pieces of the tests: hypothesis settings, tiny models, and packed storage filled by hand."""

from __future__ import annotations

import os
from collections.abc import Callable

import hypothesis
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

hypothesis.settings.register_profile("default", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=500)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    # Tests run side by side, one process a core; more threads only get in each other's way.
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


@pytest.fixture
def tiny_llama() -> PreTrainedModel:
    """A random Llama: 2 layers, 4 query and 2 KV heads of 8."""
    return make_model(
        LlamaConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
        )
    )


def make_model(config: object) -> PreTrainedModel:
    """A random model in evaluation mode, float32."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def scatter_utilities() -> Callable[[PreTrainedModel], None]:
    """Makes an attached model's utilities spread over (0, 1) instead of starting near one."""

    def scatter(model: PreTrainedModel) -> None:
        from spkv import attachment

        torch.manual_seed(1)
        for predictor in attachment(model).predictors.values():
            torch.nn.init.normal_(predictor.up.weight, std=1.0)
            torch.nn.init.normal_(predictor.down.weight, std=1.0)
            torch.nn.init.zeros_(predictor.down.bias)

    return scatter


@pytest.fixture(scope="session")
def relative_error() -> Callable[[Tensor, Tensor], float]:
    def measure(actual: Tensor, expected: Tensor) -> float:
        # Not NaN-tolerant on purpose: any comparison with NaN is false.
        return ((actual - expected).norm() / expected.norm()).item()

    return measure
