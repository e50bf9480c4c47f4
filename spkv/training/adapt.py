"""Adapting a model from start to end: data, attaching, training, evaluation, saving."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import logging
import math
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spkv.training.recipes import RECIPES, Recipe, with_layout

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainerCallback, TrainingArguments

    from spkv.training.trainer import AdaptationTrainer

# torch and transformers are imported where they are used: reading recipes, on a command line say, must not wait.

logger = logging.getLogger(__name__)

# Training tokens that a target density is met on in the end: a share of the run's, so that it costs little.
_CALIBRATED, _LEAST_CALIBRATED, _MOST_CALIBRATED = 0.02, 16_384, 262_144
# A loss that training and pruning leave this much higher is worth a word.
_TOLERATED_RISE = 1.01


def adapt(
    model: str | os.PathLike[str],
    data: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    recipe: Recipe,
    *,
    validation: Sequence[str | os.PathLike[str]] | None = None,
    validation_tokens: int = 1_000_000,
    resume: bool = False,
    seed: int = 0,
    batch_size: int | None = None,
    gradient_checkpointing: bool = False,
    compile: bool = False,
    save_every: int | None = None,
    log_every: int = 10,
    keep_checkpoints: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Train a model to prune its own KV cache, and save it.

    Run under `torchrun` or `accelerate launch` it uses all their processes (DistributedDataParallel, or FSDP if
    accelerate is configured for it); the step stays the recipe's. Weights are trained in float32, computed with in
    bfloat16 where the GPU can; adapters are stored in bfloat16.

    Args:
        model: a directory, hub name or packaged model ("smollm2", "gemma3-270m"). One with a static layout is trained
            with it; its gates are constant, so nothing is learned about them.
        data: files to train on; see `spkv.training.tokens.tokenize_files`.
        output: directory for the result: a whole model, or an adapter where the recipe leaves the model's weights as
            they are; with `summary.json`, TensorBoard logs (if it is installed) and, while training, checkpoints.
        recipe: from `get_recipe`.
        validation: held-out files; their loss and density are evaluated before and after.
        validation_tokens: tokens of them to use at most, spread evenly.
        resume: go on from the last complete checkpoint in `output`, if there is one; the result is the same as
            without the interruption. A run that is finished already returns its summary.
        seed: of the predictor's start and the order of the data.
        batch_size: rows that a process computes at once; must divide its share of a step. None takes what should
            fit into GPU memory, and 1 on a CPU.
        gradient_checkpointing: recompute activations in the backward pass, to save memory.
        compile: fuse small operations and the loss with torch.compile, which takes some half a minute at the start
            and makes steps shorter; see `spkv.hf.compiled`. MLPs are fused where they are plain, which LoRA's are
            not. Not with FSDP. A run that is resumed wants the same again.
        save_every: steps between checkpoints; None makes ten in a run.
        log_every: steps between log entries.
        keep_checkpoints: keep them when the run is finished.
        cache_dir: where tokenised data are kept; None takes the user's cache.
        progress: show progress bars.
        callbacks: transformers' own, called as training goes on. One that raises in `on_save` ends the run at a
            checkpoint that `resume` goes on from.

    Returns:
        The summary, as in `summary.json`: recipe, steps, tokens, seconds, tokens_per_second, train_loss, versions,
        device and seed; with a target density also calibration, as `spkv.training.calibration` says (but not with
        FSDP); with `validation` also base_validation_loss (all gates open, before training),
        validation_loss, density and densities (layer -> head -> density).

    Raises:
        FileNotFoundError, ValueError: for data that cannot be used, sizes that do not fit, or an `output` that holds
            another run.
        FloatingPointError: if the loss stops being finite.
    """
    import torch
    from accelerate import PartialState
    from transformers import AutoConfig, AutoTokenizer, set_seed

    from spkv.checkpoint import PACKAGED_MODELS, check_no_adapter, load_base, resolve_model, stored_config
    from spkv.hf.attach import attach
    from spkv.training.calibration import calibrate
    from spkv.training.checkpoints import STATE_FILE, last_checkpoint, stored_batch_size
    from spkv.training.data import PackedRows, TrainingRows, spread
    from spkv.training.inputs import fold_inputs
    from spkv.training.parameters import (
        ADAPTER_DTYPE,
        enable_recomputation,
        prepare_parameters,
        round_trained_parameters,
    )
    from spkv.training.result import circumstances, finished_run, save_result
    from spkv.training.sizes import (
        accumulation_steps,
        allowed_batch_sizes,
        base_parameters,
        check_leaves_window,
        check_sizes,
        default_batch_size,
        warn_of_sizes,
    )
    from spkv.training.tokens import document_prefix, tokenize_files
    from spkv.training.trainer import AdaptationTrainer

    if not data:
        raise ValueError("no data files were given")
    if compile and _uses_fsdp():
        raise ValueError("compile is not supported with FSDP; leave it out")
    check_no_adapter(model)
    output = Path(output)
    stored = stored_config(model)
    if stored is not None and stored.layout is not None and recipe.gates:
        named = RECIPES.get(recipe.name)
        if recipe.target_density not in (None, named and named().target_density):
            logger.warning("the static layout of the model fixes its density, so target_density has no effect")
        if recipe.freeze_model:
            raise ValueError(
                f"the model has a static layout, so that there are no gates to train, and {recipe.name} trains "
                "nothing else; take another recipe"
            )
        recipe = with_layout(recipe, stored)
    config = recipe.config()
    if stored is not None:
        config = dataclasses.replace(config, page_size=stored.page_size, page_dtype=stored.page_dtype)
    run: dict[str, Any] = {
        "model": os.fspath(model) if os.fspath(model) in PACKAGED_MODELS else Path(model).name,
        "data": [Path(path).name for path in data],
        "seed": seed,
    }
    if (finished := finished_run(output, resume, {"recipe": recipe.to_dict(), **run})) is not None:
        return finished
    checkpoint = last_checkpoint(output) if resume else None

    processes = PartialState(cpu=not torch.cuda.is_available())
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(model))
    check_sizes(AutoConfig.from_pretrained(resolve_model(model)), tokenizer, recipe)  # before data are read
    with processes.local_main_process_first():
        # The others find it in the cache.
        progress_bar = progress and processes.is_local_main_process
        corpora = [
            PackedRows(
                tokenize_files(files, tokenizer, cache_dir=cache_dir, progress=progress_bar),
                recipe.sequence_length,
                document_prefix(tokenizer),
            )
            for files in (data, validation)
            if files
        ]
    rows = corpora[0]
    if recipe.gates:
        check_leaves_window(rows, recipe.window)
    held_out = spread(corpora[1], validation_tokens) if validation else None

    # Weights that stay as they are need no more precision than they are computed with, which is faster.
    frozen_base = recipe.makes_adapter and _computes_in_bfloat16() and not _uses_fsdp()

    def build() -> nn.Module:
        base = load_base(model, dtype=torch.bfloat16 if frozen_base else torch.float32)
        if gradient_checkpointing:
            enable_recomputation(base)
        set_seed(seed)
        return prepare_parameters(attach(base, config), recipe)

    prepared = build()
    parameters = base_parameters(prepared)
    steps = recipe.total_steps(parameters)
    warn_of_sizes(recipe, steps, parameters)
    if batch_size is None:
        known = None if checkpoint is None else stored_batch_size(checkpoint)
        if known in allowed_batch_sizes(recipe, processes.num_processes):
            batch_size = known  # with another one a resumed run is not exact
        else:
            batch_size = default_batch_size(prepared, recipe, processes.num_processes, gradient_checkpointing)
    args = training_arguments(
        output,
        recipe,
        steps,
        batch_size=batch_size,
        accumulation=accumulation_steps(recipe, batch_size, processes.num_processes),
        save_every=save_every,
        log_every=log_every,
        seed=seed,
        progress=progress,
    )
    wanted = steps * (recipe.tokens_per_step // recipe.sequence_length)
    if wanted > len(rows):
        logger.warning("the run takes %d rows and the data hold %d: they are seen again", wanted, len(rows))
    trainer = AdaptationTrainer(prepared, args, recipe, TrainingRows(rows, wanted, seed), tokenizer=tokenizer)
    # Noise on gates differs between the processes' rows; a resumed run gets its state of each process back.
    torch.manual_seed(seed + processes.process_index)
    for callback in callbacks:
        trainer.add_callback(callback)

    summary: dict[str, Any] = {
        "recipe": recipe.to_dict(),
        "steps": steps,
        "tokens": steps * recipe.tokens_per_step,
        "passes": wanted / len(rows),
    }
    # A model that is sharded first as it starts to train cannot be run before.
    if held_out is not None and not trainer.is_fsdp_enabled:
        summary["base_validation_loss"] = trainer.evaluate_rows(held_out, open_gates=True).loss
    if checkpoint is None and not trainer.is_fsdp_enabled:
        trainer.measure_inputs()  # before parts are compiled
    summary |= _train(trainer, checkpoint, compile)
    if not trainer.is_fsdp_enabled:  # a sharded one is folded as it is saved
        fold_inputs(prepared)
    if recipe.makes_adapter:
        # What is evaluated is what is stored (but where FSDP folds inputs later).
        round_trained_parameters(prepared, ADAPTER_DTYPE)
    if recipe.target_density is not None and not trainer.is_fsdp_enabled:
        sample = spread(rows, max(_LEAST_CALIBRATED, min(_MOST_CALIBRATED, int(_CALIBRATED * summary["tokens"]))))
        done = calibrate(prepared, sample, trainer.accelerator, recipe.target_density)
        summary["calibration"] = dataclasses.asdict(done)
        if recipe.makes_adapter:
            round_trained_parameters(prepared, ADAPTER_DTYPE)
    if held_out is not None:
        result = trainer.evaluate_rows(held_out)
        summary |= {"validation_loss": result.loss, "validation_tokens": result.tokens}
        before = summary.get("base_validation_loss", math.inf)
        if result.loss > _TOLERATED_RISE * before and args.should_save:
            logger.warning("the held-out loss rose from %.4f to %.4f: %s", before, result.loss, _cause_of_rise(recipe))
        if recipe.gates:
            densities = {str(layer): heads for layer, heads in result.densities.items()}
            summary |= {"density": result.density, "densities": densities}
    summary |= {**run, "batch_size": batch_size, "compiled": compile}
    summary |= circumstances(trainer)
    save_result(trainer, build, output, summary)
    if args.should_save and not keep_checkpoints:
        for state in output.glob(f"checkpoint-*/{STATE_FILE}"):
            shutil.rmtree(state.parent)
    trainer.accelerator.wait_for_everyone()
    return summary


def training_arguments(
    output: Path,
    recipe: Recipe,
    steps: int,
    *,
    batch_size: int,
    accumulation: int,
    save_every: int | None,
    log_every: int,
    seed: int,
    progress: bool,
) -> TrainingArguments:
    import torch
    from transformers import TrainingArguments

    args = TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        adam_beta1=recipe.betas[0],
        adam_beta2=recipe.betas[1],
        max_grad_norm=recipe.max_grad_norm,
        use_cpu=not torch.cuda.is_available(),
        bf16=_computes_in_bfloat16(),
        logging_steps=min(log_every, steps),
        logging_first_step=True,
        # Looking for NaN in every step would wait for the device; `log` looks when it reads the loss anyway.
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=max(1, steps // 10) if save_every is None else save_every,
        save_total_limit=2,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        average_tokens_across_devices=True,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # they are the same everywhere
        report_to=["tensorboard"] if importlib.util.find_spec("tensorboard") else [],
        disable_tqdm=not progress,
        seed=seed,
    )
    # Several visible GPUs and one process would mean DataParallel, which copies modules without their hooks' state.
    if args.n_gpu > 1:
        args._n_gpu = 1
    return args


def _cause_of_rise(recipe: Recipe) -> str:
    if recipe.freeze_model:
        return "the frozen model misses what is dropped; a lower threshold or a target nearer to 1 may keep it"
    cause = "the learning rate may be too high for this model"
    return cause if recipe.is_control else f"{cause}; if the recipe dense-control does not raise it, pruning does"


def _computes_in_bfloat16() -> bool:
    import torch

    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def _uses_fsdp() -> bool:
    # accelerate's own switch, set by `accelerate launch`.
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def _train(trainer: AdaptationTrainer, checkpoint: str | None, compile: bool) -> dict[str, Any]:
    import torch
    from peft.helpers import disable_input_dtype_casting

    from spkv.hf.compiled import compiled_parts

    start = time.perf_counter()
    before = 0 if checkpoint is None else int(checkpoint.rpartition("-")[2])
    # PEFT would cast every input of a LoRA layer to float32, only for autocast to cast it back.
    model: Any = trainer.model
    with contextlib.ExitStack() as around:
        lora = trainer.recipe.lora_rank is not None
        around.enter_context(disable_input_dtype_casting(model, active=trainer.args.bf16 and lora))
        if compile:
            around.enter_context(compiled_parts(model.get_base_model() if lora else model, training=True))
        trainer.train(resume_from_checkpoint=checkpoint)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    done = trainer.state.global_step - before
    return {
        "train_loss": losses[-1] if losses else None,
        "seconds": seconds,
        "tokens_per_second": done * trainer.recipe.tokens_per_step / seconds,
    }
