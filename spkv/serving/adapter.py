"""An adapter by `spkv adapt`, put into a base model's weights while vLLM loads them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from spkv.config import read_stored
from spkv.fingerprint import check_magnitude

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_DECODER = "model."  # what checkpoints of the served families put before the names of the decoder's weights
_PEFT = "base_model.model."  # what PEFT puts before all
# Of PEFT's config: what would need more than W + scale * B @ A. `spkv adapt` uses none of it.
_UNSUPPORTED = (
    "alora_invocation_tokens",
    "alpha_pattern",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "monteclora_config",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "use_rslora",
    "velora_config",
)
# Other ways to start may change the base, too.
_STARTS = (True, False, "gaussian")
_PARTS = (".lora_A.weight", ".lora_B.weight")


class Adapter:
    """LoRA weights and what is known of their base.

    Args:
        directory: of the adapter; without LoRA weights in it the base stays as it is.

    Raises:
        ValueError: if they are of a kind that cannot be merged here.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.base: dict[str, Any] = read_stored(directory)["base"]
        self.scale, self._lora = 0.0, dict[str, Tensor]()
        if (directory / _CONFIG).is_file():
            config = json.loads((directory / _CONFIG).read_text(encoding="utf-8"))
            unsupported = [name for name in _UNSUPPORTED if config.get(name)]
            unsupported += ["peft_type"] * (config["peft_type"] != "LORA")
            unsupported += ["bias"] * (config.get("bias", "none") != "none")
            unsupported += ["init_lora_weights"] * (config.get("init_lora_weights", True) not in _STARTS)
            self.scale = config["lora_alpha"] / config["r"] if "r" in config else 0.0
            self._lora = load_file(directory / _WEIGHTS)
            unsupported += sorted(name for name in self._lora if not name.endswith(_PARTS))[:1]
            if unsupported:
                raise ValueError(
                    f"the adapter in {directory} is more than plain LoRA ({', '.join(unsupported)}); "
                    "make a whole model of it: spkv.save(spkv.load(BASE, adapter=DIR), OUTPUT)"
                )

    def merge(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield a base model's weights by their names in its checkpoint, those with LoRA changed, and in float32.

        Raises:
            ValueError: if the base is another model, or has no weights that the adapter changes.
        """
        unseen = set(self.base["mean_magnitudes"])
        left = {name.rpartition(".lora_")[0] for name in self._lora}
        for name, weight in weights:
            own = name.removeprefix(_DECODER)
            if own in unseen:
                check_magnitude(self.base, own, weight.float().abs().mean().item(), self.directory)
                unseen.remove(own)
            module = _PEFT + name.removesuffix(".weight")
            if module in left:
                left.remove(module)
                down, up = (self._lora[module + part].float() for part in _PARTS)
                weight = weight.float() + self.scale * (up @ down).to(weight.device)
            yield name, weight
        if unseen:
            check_magnitude(self.base, min(unseen), None, self.directory)
        if left:
            raise ValueError(f"the model has no weights for the adapter's {', '.join(sorted(left)[:3])}")
