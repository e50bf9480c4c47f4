"""Sizes that have to fit: of a batch, a step, a row, a window, a vocabulary."""

from __future__ import annotations

import logging
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase

from spkv.hf.families import find_decoder
from spkv.training.data import PackedRows, leaves_window
from spkv.training.recipes import Recipe, fast

logger = logging.getLogger(__name__)

# Where the recipes' learning rate of full training was found; Gemma-3-270M does better with a sixth of it.
_PARAMETERS_OF_TRIALS = 135e6
# Whole steps that take this many times the tokens that were asked for are worth a word.
_TOLERATED_ROUNDING = 1.1


def accumulation_steps(recipe: Recipe, batch_size: int, processes: int) -> int:
    """Return the micro-batches of a step: tokens_per_step / (batch_size * processes * sequence_length).

    Raises:
        ValueError: if that is no whole number, naming sizes that are allowed.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    part = batch_size * processes * recipe.sequence_length
    if recipe.tokens_per_step % part:
        allowed = allowed_batch_sizes(recipe, processes)
        hint = (
            f"batch_size may be {', '.join(map(str, allowed))}"
            if allowed
            else f"{processes} rows of sequence_length must divide tokens_per_step"
        )
        raise ValueError(
            f"tokens_per_step {recipe.tokens_per_step} is no multiple of batch_size {batch_size} * {processes} "
            f"processes * sequence_length {recipe.sequence_length} = {part}; {hint}"
        )
    return recipe.tokens_per_step // part


def allowed_batch_sizes(recipe: Recipe, processes: int) -> list[int]:
    """Return the rows that a process may take at once, from 1 to all of its share of a step."""
    share, rest = divmod(recipe.tokens_per_step, processes * recipe.sequence_length)
    return [] if rest else [size for size in range(1, share + 1) if share % size == 0]


def default_batch_size(model: nn.Module, recipe: Recipe, processes: int, gradient_checkpointing: bool) -> int:
    """Return the most rows that each process should be able to compute at once: by an estimate on GPUs, 1 on CPUs.

    To be called by all processes, which get the same: with different sizes they would read some rows twice, and others
    never.
    """
    own = _fitting_batch_size(model, recipe, processes, gradient_checkpointing)
    return int(min(gather_object([own])))


def _fitting_batch_size(model: nn.Module, recipe: Recipe, processes: int, gradient_checkpointing: bool) -> int:
    """What fits into this process' GPU, or 1.

    Per token, training holds logits (in bfloat16, float32, and their gradient) and each layer's activations, or its
    input alone. The factors fit what SmolLM2 took on an H100: 1.6 MB a token.
    """
    allowed = allowed_batch_sizes(recipe, processes) or [1]
    if not torch.cuda.is_available():
        return 1
    config = find_decoder(model).config
    layer = (
        4 * config.hidden_size if gradient_checkpointing else 24 * config.hidden_size + 10 * config.intermediate_size
    )
    per_row = recipe.sequence_length * (16 * config.vocab_size + config.num_hidden_layers * layer)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    free = torch.cuda.mem_get_info()[0] - 4 * total - 12 * trained  # weights; gradients and AdamW's two moments
    return max([size for size in allowed if size * per_row <= 0.8 * free], default=1)


def base_parameters(model: nn.Module) -> int:
    """Return the number of parameters of the model that an attachment, and LoRA, were added to."""
    added = (".utility_predictor.", ".lora_")
    return sum(p.numel() for name, p in model.named_parameters() if not any(part in name for part in added))


def check_sizes(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> None:
    """Check what the model's config alone tells, before its weights or any data are read.

    Raises:
        ValueError: if the model is not supported, rows are longer than its positions or within the window, or the
            tokenizer has more tokens than it embeds.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    find_decoder(model)
    if recipe.gates and recipe.window >= recipe.sequence_length:
        raise ValueError(
            f"nothing leaves a window of {recipe.window} tokens in rows of sequence_length {recipe.sequence_length}: "
            "choose a smaller window, or longer rows"
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and recipe.sequence_length > positions:
        raise ValueError(f"sequence_length {recipe.sequence_length} is beyond the model's {positions} positions")
    embedding: Any = model.get_input_embeddings()
    embedded = embedding.weight.shape[0]
    if len(tokenizer) > embedded:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, but the model embeds only {embedded}")


def check_leaves_window(rows: PackedRows, window: int) -> None:
    """Raise a ValueError if no document in the rows is longer than the window."""
    segments = (rows[index]["segment_ids"][None] for index in range(len(rows)))
    if not any(leaves_window(ids, window).any() for ids in segments):
        raise ValueError(
            f"no document of the data is longer than the window of {window} tokens, so that nothing would be pruned; "
            "choose a smaller window, or longer documents"
        )


def warn_of_sizes(recipe: Recipe, steps: int, parameters: int) -> None:
    """Warn of a learning rate found on a smaller model, and of steps that take many more tokens than were asked for.

    Args:
        recipe: of the run.
        steps: of the run.
        parameters: of the model alone.
    """
    rate = recipe.learning_rate
    if parameters > 1.5 * _PARAMETERS_OF_TRIALS and not recipe.makes_adapter and rate >= fast().learning_rate:
        logger.warning(
            "a learning rate of %g suits a model of %d M parameters; this one has %d M, and may want less, such as "
            "5e-5: held-out data given as validation will tell whether its loss rose",
            rate,
            _PARAMETERS_OF_TRIALS / 1e6,
            parameters / 1e6,
        )
    if recipe.tokens is not None and steps * recipe.tokens_per_step > _TOLERATED_ROUNDING * recipe.tokens:
        logger.warning(
            "%s tokens were asked for, and %d steps of %s are trained",
            f"{recipe.tokens:,}",
            steps,
            f"{recipe.tokens_per_step:,}",
        )
