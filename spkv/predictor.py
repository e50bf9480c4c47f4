"""The utility predictor: which key/value pairs will still matter once they have left the window."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class UtilityPredictor(nn.Module):
    """Two linear layers with SiLU between and one sigmoid output per KV head (SP-KV, arXiv 2605.14037).

    The input is the hidden state that enters attention, so a utility depends on the key's own prefix alone.
    """

    def __init__(self, hidden_size: int, kv_heads: int, width: int | None = None, initial_bias: float = 5.0):
        super().__init__()
        self.up = nn.Linear(hidden_size, width or hidden_size)
        self.act = nn.SiLU()
        self.down = nn.Linear(width or hidden_size, kv_heads)
        self.initial_bias = initial_bias
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start small around `initial_bias`: early decisions come from the bias, not from random weights."""
        nn.init.normal_(self.up.weight, std=self.up.in_features**-0.5)
        nn.init.zeros_(self.up.bias)
        nn.init.normal_(self.down.weight, std=0.1 * self.down.in_features**-0.5)
        nn.init.constant_(self.down.bias, self.initial_bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map hidden states [batch, tokens, hidden_size] to utilities [batch, kv_heads, tokens], float32 in (0, 1)."""
        # The sigmoid runs in float32: in bfloat16 utilities above 0.996 would all round to 1.
        return self.down(self.act(self.up(hidden_states))).float().sigmoid().transpose(1, 2)
