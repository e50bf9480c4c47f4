"""The training loop: transformers' Trainer with gates, a predictor's own learning rate, and the density regulariser.

Legend: B rows of a batch, T tokens of a row, L layers with a predictor, Hkv KV heads, w window.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, Sampler, SequentialSampler, Subset
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from spkv.checkpoint import save, save_adapter
from spkv.gates import Gate, OpenGate
from spkv.hf.attach import Record, attachment
from spkv.training.checkpoints import (
    STATE_FILE,
    check_same_run,
    load_trained_predictors,
    save_trained_predictors,
)
from spkv.training.data import TrainingRows, collate, leaves_window
from spkv.training.evaluation import Evaluation, evaluate_rows
from spkv.training.inputs import inputs_of, measure_inputs
from spkv.training.logits import without_logits
from spkv.training.parameters import parameter_groups
from spkv.training.recipes import START_OF_CONTROL, Recipe
from spkv.training.regularisers import FORMS
from spkv.training.schedule import DensityController

logger = logging.getLogger(__name__)

# Indices of the sums that a trainer keeps on its device between two looks at them.
_LOSS, _UTILITY, _KEPT, _LEFT = range(4)


class AdaptationTrainer(Trainer):
    """Trains an attached model by a recipe; checkpoints and resumes exactly.

    Args:
        model: an attached model, wrapped by PEFT or not.
        args: `max_steps` sets the length of the schedule.
        recipe: what to do.
        rows: the rows of the whole run, in order.
        tokenizer: saved with every checkpoint.
        validation: rows that `evaluate` uses.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        recipe: Recipe,
        rows: TrainingRows,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        validation: Dataset[dict[str, Tensor]] | None = None,
    ):
        self.recipe, self.rows, self.schedule = recipe, rows, recipe.schedule(args.max_steps)
        self.attachment, self.tokenizer = attachment(model), tokenizer
        self.controller: DensityController | None = None
        if recipe.target_density is not None:
            start = recipe.regulariser or START_OF_CONTROL
            self.controller = DensityController(recipe.target_density, self.schedule.soft_steps, start)
        super().__init__(
            model=model,
            args=args,
            data_collator=collate,
            train_dataset=rows,
            eval_dataset=validation,
            processing_class=tokenizer,
            callbacks=[_StepCallback(self)],
        )
        if self.accelerator.ddp_handler is not None:
            # Gradients lie where they are sent from, and are not copied there and back.
            self.accelerator.ddp_handler.gradient_as_bucket_view = True
        self.regulariser = 0.0
        self._logged = torch.zeros(4, dtype=torch.float64, device=args.device)
        self._logged_steps = 0
        self._measured = torch.zeros(4, dtype=torch.float64, device=args.device)
        self._leaving = torch.zeros((), device=args.device)

    def set_step(self, step: int) -> None:
        """Put the gate and lambda of `step` in force."""
        self.attachment.gate = self._gate(step)
        self.regulariser = self._regulariser(step)

    def measure_inputs(self) -> None:
        """Let predictors see the rows of the first step, if the recipe wants their inputs standardised.

        Done as training starts, unless it has been done. With compiled parts it is better done before: rows come one by
        one here, and every shape is compiled.
        """
        assert self.model is not None
        if self.recipe.gates and self.recipe.standardised_inputs and not inputs_of(self.model):
            rows = self.recipe.tokens_per_step // self.recipe.sequence_length
            measure_inputs(self.model, Subset(self.rows, range(rows)), self.accelerator)

    def _gate(self, step: int) -> Gate:
        if self.recipe.gates:
            return self.schedule.gate(step)
        return OpenGate() if self.recipe.layout is None else self.attachment.default_gate

    def _regulariser(self, step: int) -> float:
        """Return the lambda of `step`; 0 once the predictor is frozen."""
        if not self.recipe.gates or self.schedule.phase(step) != "soft":
            return 0.0
        return self.recipe.regulariser if self.controller is None else self.controller.weight

    def finish_step(self, step: int) -> None:
        """Let the controller see what `step` completed."""
        self._logged_steps += 1
        if self.controller is not None and self.controller.due(step):
            measured = self.accelerator.reduce(self._measured, "sum").tolist()
            self.controller.update(step, measured[_KEPT] / max(1.0, measured[_LEFT]))
            self._measured.zero_()

    # What the optimiser does

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make AdamW over the recipe's parameter groups."""
        if self.optimizer is None:
            trained = self.model if model is None else model
            assert trained is not None
            groups = parameter_groups(trained, self.recipe)
            self.optimizer = torch.optim.AdamW(
                groups,
                lr=self.recipe.learning_rate,
                betas=self.recipe.betas,
                eps=self.args.adam_epsilon,
                fused=self.args.device.type == "cuda",
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """Make the schedule of learning rates, one factor for the model's groups and one for the predictor's."""
        if self.lr_scheduler is None:
            optimizer = self.create_optimizer() if optimizer is None else optimizer
            factors: list[Any] = [
                self.schedule.predictor_learning_rate if group["predictor"] else self.schedule.learning_rate
                for group in optimizer.param_groups
            ]
            self.lr_scheduler = LambdaLR(optimizer, factors)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int]:
        # The rows come in their final order; see TrainingRows.
        return SequentialSampler(self.rows)

    # What a step computes

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; see transformers' `Trainer.train`."""
        assert self.model is not None
        with without_logits(self.model):
            return super().train(*args, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor | int | None]:
        """Collect the batches of a step, and count the tokens in it, over all processes, that leave the window."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.recipe.gates:
            counts = [leaves_window(batch["segment_ids"], self.recipe.window).sum() for batch in batches]
            leaving = torch.stack(counts).sum() if counts else torch.zeros((), dtype=torch.long)
            self._leaving = self.accelerator.reduce(leaving.to(device), "sum")
        return batches, items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return cross-entropy + lambda * mean(penalty(u)) over pairs that leave the window; logs get both apart."""
        keywords: dict[str, Any] = {**inputs, "use_cache": False}
        with self.attachment.record() as record:
            loss, outputs = super().compute_loss(
                model, keywords, return_outputs=True, num_items_in_batch=num_items_in_batch
            )
        # transformers divides a loss that knows nothing of the other micro-batches by their number, afterwards.
        scaled = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        parts = 1 if scaled else self.current_gradient_accumulation_steps
        processes = self.accelerator.num_processes
        self._logged[_LOSS] += loss.detach() / (parts * processes)
        if self.recipe.gates:
            penalty, pairs = self._penalty_sum(record, inputs["segment_ids"])
            # Divided by the count of the whole step and undoing the mean over processes: a sum over all parts of
            # the step gives the mean over all its pairs, however they are spread. With lambda 0 it still ties the
            # predictor to the loss, as DistributedDataParallel demands.
            weight = self.regulariser * parts * processes
            loss = loss + weight * penalty / (self._leaving * pairs).clamp_min(1)
        return (loss, outputs) if return_outputs else loss

    def _penalty_sum(self, record: Record, segment_ids: Tensor) -> tuple[Tensor, int]:
        """Return the sum of penalties over the pairs that leave the window, and L * Hkv; log utility and density."""
        utility = torch.stack([record.utilities[layer] for layer in self.attachment.layers])  # [L, B, Hkv, T]
        left = leaves_window(segment_ids, self.recipe.window)[None, :, None]
        penalty = (FORMS[self.recipe.regulariser_form](utility) * left).sum()
        pairs = utility.shape[0] * utility.shape[2]
        with torch.no_grad():
            total = (utility * left).sum()
            kept = ((utility >= self.recipe.threshold) & left).sum()
            sums = torch.stack([total.new_zeros(()), total, kept, left.sum() * pairs]).double()
            self._logged += sums
            self._measured += sums
        return penalty, pairs

    # What is written down

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add density and the schedule's values to the training logs; `loss` is the cross-entropy alone.

        Raises:
            FloatingPointError: if the loss is not finite, as in `_save_checkpoint`.
        """
        if "loss" in logs and self._logged_steps:
            step = self.state.global_step - 1
            loss, utility, kept, left = self.accelerator.reduce(self._logged, "sum").tolist()
            logs["loss"] = loss / self._logged_steps
            _check_finite(logs["loss"], step)
            if self.recipe.gates:
                rate = self.recipe.learning_rate * self.recipe.predictor_lr_multiplier
                logs |= {
                    "density": kept / max(1.0, left),
                    "mean_utility": utility / max(1.0, left),
                    "lambda": self.regulariser,
                    "alpha": self.schedule.alpha(step),
                    "predictor_learning_rate": rate * self.schedule.predictor_learning_rate(step),
                }
            self._logged.zero_()
            self._logged_steps = 0
        super().log(logs, start_time)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Return and log the loss and density with hard gates, whatever phase training is in."""
        rows: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        result = self.evaluate_rows(rows)
        metrics = {f"{metric_key_prefix}_loss": result.loss, f"{metric_key_prefix}_density": result.density}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def evaluate_rows(self, rows: Dataset[dict[str, Tensor]], open_gates: bool = False) -> Evaluation:
        """Evaluate rows, spread over the processes, with hard gates or all of them open."""
        assert self.model is not None
        return evaluate_rows(self.model, rows, self.accelerator, open_gates or self.recipe.is_control)

    # Checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # On every process: the sums since the controller's last look, and since the last log, are spread over them.
        measured = self.accelerator.reduce(self._measured, "sum").tolist()
        # What has diverged since the last log is not to be resumed from.
        _check_finite(self.accelerator.reduce(self._logged, "sum")[_LOSS].item(), self.state.global_step - 1)
        super()._save_checkpoint(model, trial)
        path = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if self.recipe.gates:
            trained: Any = model if self.is_fsdp_enabled else self.model
            save_trained_predictors(
                trained,
                path,
                sharded=self.is_fsdp_enabled,
                write=self.args.should_save,
                weights=not self._stored_with_the_model,
            )
        if self.args.should_save:
            state = {
                "step": self.state.global_step,
                "run": self._identity(),
                "measured": measured,
                "controller": None if self.controller is None else self.controller.state_dict(),
                "batch_size": self.args.per_device_train_batch_size,
            }
            (path / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        self.accelerator.wait_for_everyone()

    @property
    def _stored_with_the_model(self) -> bool:
        """Whether transformers itself stores the weights of predictors: of a sharded model, unless it has LoRA."""
        return self.is_fsdp_enabled and self.recipe.lora_rank is None

    def _identity(self) -> dict[str, Any]:
        return {**self.recipe.to_dict(), **self.rows.identity()}

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        # Sharded weights are stored beside the optimiser's state, in a form of their own.
        if not self.args.should_save or self.is_fsdp_enabled:
            return
        assert self.model is not None
        path = Path(self.args.output_dir or "." if output_dir is None else output_dir)
        write = save_adapter if self.recipe.makes_adapter else save
        write(self.model, path, training={"recipe": self.recipe.to_dict(), "step": self.state.global_step})
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(path)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        state = json.loads(Path(resume_from_checkpoint, STATE_FILE).read_text(encoding="utf-8"))
        check_same_run(state["run"], self._identity(), resume_from_checkpoint)
        if self.controller is not None:
            self.controller.load_state_dict(state["controller"])
        if self.accelerator.is_main_process:
            self._measured.copy_(torch.tensor(state["measured"], dtype=torch.float64))
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            if self.recipe.gates:
                assert model is not None
                load_trained_predictors(model, Path(resume_from_checkpoint), weights=not self._stored_with_the_model)
            return
        model = self.model if model is None else model
        assert model is not None
        if self.recipe.lora_rank is not None:
            from peft import load_peft_weights, set_peft_model_state_dict

            loaded: Any = set_peft_model_state_dict(model, load_peft_weights(resume_from_checkpoint, device="cpu"))
            if loaded.unexpected_keys:
                raise ValueError(f"{resume_from_checkpoint} holds other LoRA weights: {loaded.unexpected_keys[:3]}")
        elif not self.recipe.freeze_model:
            # Through from_pretrained, which knows how each family's weights are named and merged on disk.
            saved = AutoModelForCausalLM.from_pretrained(resume_from_checkpoint, dtype=torch.float32)
            result = model.load_state_dict(saved.state_dict(), strict=False)
            missing = [key for key in result.missing_keys if ".utility_predictor." not in key]
            if missing or result.unexpected_keys:
                raise ValueError(
                    f"{resume_from_checkpoint} does not fit the model: {missing[:3]} are missing, "
                    f"{result.unexpected_keys[:3]} are not wanted"
                )
        if self.recipe.gates:
            load_trained_predictors(model, Path(resume_from_checkpoint))


def _check_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss} at step {step}; the learning rate may be too high")


class _StepCallback(TrainerCallback):
    """Tells the trainer which step it is in; the Trainer offers no method to override for it."""

    def __init__(self, trainer: AdaptationTrainer):
        self.trainer = trainer

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0:
            self.trainer.measure_inputs()
        self.trainer.set_step(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.finish_step(state.global_step - 1)
