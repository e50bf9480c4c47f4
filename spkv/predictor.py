"""The utility predictor: which key/value pairs will still matter once they have left the window."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class UtilityPredictor(nn.Module):
    """Linear layers, two unless said, with SiLU between and one sigmoid output per KV head.

    Two are what is published (SP-KV, arXiv 2605.14037). The input is the hidden state that enters attention, so a
    utility depends on the key's own prefix alone.

    Attributes:
        decide: what does the work of a pass and of the comparison with a threshold in fewer kernels, where
            `hf.compiled` has put it: maps hidden states and the threshold to utilities and a bool of their shape.
    """

    decide: Callable[[Tensor, float], tuple[Tensor, Tensor]] | None = None

    def __init__(
        self, hidden_size: int, kv_heads: int, width: int | None = None, initial_bias: float = 5.0, depth: int = 2
    ):
        super().__init__()
        width = width or hidden_size
        self.act = nn.SiLU()
        if depth > 1:
            self.up = nn.Linear(hidden_size, width)
        self.middle = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 2))
        self.down = nn.Linear(width if depth > 1 else hidden_size, kv_heads)
        self.depth, self.initial_bias = depth, initial_bias
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start small around `initial_bias`: early decisions come from the bias, not from random weights."""
        for layer in self.hidden_layers:
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.down.weight, std=0.1 * self.down.in_features**-0.5)
        nn.init.constant_(self.down.bias, self.initial_bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map hidden states [batch, tokens, hidden_size] to utilities [batch, kv_heads, tokens], float32 in (0, 1)."""
        for layer in self.hidden_layers:
            hidden_states = self.act(layer(hidden_states))
        # The sigmoid runs in float32: in bfloat16 utilities above 0.996 would all round to 1.
        return self.down(hidden_states).float().sigmoid().transpose(1, 2)

    @property
    def hidden_layers(self) -> list[nn.Linear]:
        """All but the last, `down`; SiLU follows each."""
        layers: list[Any] = [self.up, *self.middle] if self.depth > 1 else []
        return layers
