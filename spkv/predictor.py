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

    Inputs may be standardised while it is trained, so that a learning rate means the same to models whose hidden states
    differ in scale; `fold_inputs` then makes it the plain layers again.

    Attributes:
        input_mean, input_scale: [hidden_size] float32, what is taken from each channel of the input and what the rest
            is multiplied by; None while inputs are taken as they are.
        decide: what does the work of a pass and of the comparison with a threshold in fewer kernels, where
            `hf.compiled` has put it: maps hidden states and the threshold to utilities and a bool of their shape.
    """

    decide: Callable[[Tensor, float], tuple[Tensor, Tensor]] | None = None
    input_mean: Tensor | None
    input_scale: Tensor | None

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
        # Not in the state dict: sharded models want all of that to be sharded.
        self.register_buffer("input_mean", None, persistent=False)
        self.register_buffer("input_scale", None, persistent=False)
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
        if self.input_mean is not None and self.input_scale is not None:
            hidden_states = (hidden_states - self.input_mean) * self.input_scale
        for layer in self.hidden_layers:
            hidden_states = self.act(layer(hidden_states))
        # The sigmoid runs in float32: in bfloat16 utilities above 0.996 would all round to 1.
        return self.down(hidden_states).float().sigmoid().transpose(1, 2)

    @property
    def hidden_layers(self) -> list[nn.Linear]:
        """All but the last, `down`; SiLU follows each."""
        layers: list[Any] = [self.up, *self.middle] if self.depth > 1 else []
        return layers

    def standardise_inputs(self, mean: Tensor, scale: Tensor) -> None:
        """Take inputs as (x - mean) * scale, [hidden_size] each, from now on."""
        self.input_mean, self.input_scale = mean.float(), scale.float()

    def plain_parameters(self) -> dict[str, Tensor]:
        """Parameters by name of the predictor that computes the same from inputs as they are."""
        found = {name: parameter.detach() for name, parameter in self.named_parameters()}
        if self.input_mean is not None and self.input_scale is not None:
            first = "up" if self.depth > 1 else "down"
            weight = found[f"{first}.weight"] * self.input_scale
            found |= {f"{first}.weight": weight, f"{first}.bias": found[f"{first}.bias"] - weight @ self.input_mean}
        return found

    @torch.no_grad()
    def fold_inputs(self) -> None:
        """Put `input_mean` and `input_scale`, where there are any, into the weights."""
        for name, value in self.plain_parameters().items():
            self.get_parameter(name).copy_(value)
        self.input_mean = self.input_scale = None
