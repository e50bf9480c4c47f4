"""A tiny model and tokenizer on disk, and text for them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback, TrainingArguments

from spkv.checkpoint import load_base
from spkv.hf.attach import attach
from spkv.training.data import PackedRows, TrainingRows
from spkv.training.parameters import prepare_parameters
from spkv.training.recipes import Recipe, get_recipe
from spkv.training.tokens import tokenize_files
from spkv.training.trainer import AdaptationTrainer

VOCABULARY = ["<|endoftext|>", "<unk>", *map(chr, range(32, 127)), "\n"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", unk_token="<unk>")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A random Llama of two layers, 4 query and 2 KV heads, as a checkpoint with its tokenizer."""
    path = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def make_documents(count: int, seed: int) -> list[str]:
    """Documents of 20 to 400 characters, half of them a phrase that comes back."""
    draw = random.Random(seed)
    letters = "abcdefgh "
    documents = []
    for _ in range(count):
        phrase = "".join(draw.choices(letters, k=12))
        pieces = [phrase if draw.random() < 0.5 else "".join(draw.choices(letters, k=12)) for _ in range(30)]
        documents.append("".join(pieces)[: draw.randint(20, 360)])
    return documents


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 9,500 tokens as JSON lines."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in make_documents(50, 1)))
    return path


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPKV_CACHE", str(tmp_path / "cache"))


def small_recipe(name: str = "fast", **changes: object) -> Recipe:
    """A dozen steps of four rows of 64 tokens: 6 soft, 3 annealed, 3 hard."""
    small: dict[str, object] = dict(
        steps=12,
        sequence_length=64,
        tokens_per_step=256,
        window=8,
        learning_rate=3e-3,
        predictor_lr_multiplier=3.0,
        soft_fraction=0.5,
        anneal_steps=3,
        warmup_fraction=0.2,
        regulariser_form="linear",
        target_density=None,  # a dozen steps meet none; tests that want one say so
    )
    if name == "fast-lora":
        small |= dict(lora_rank=4, lora_alpha=8)
    if name == "fast-frozen":
        # Each process draws noise of its own, so that two of them would not compute what one does.
        small |= dict(soft_fraction=1.0, anneal_steps=0, gate_noise=0.0)
    return get_recipe(name, **{**small, **changes})


@pytest.fixture(scope="session")
def recipe_of() -> Callable[..., Recipe]:
    return small_recipe


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    # Such small models gain nothing from threads, and wait for them on a busy machine.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Watch(TrainerCallback):
    """Calls a function with the trainer before every step, and once at the end."""

    def __init__(self, look: Callable[[AdaptationTrainer], None]):
        self.look = look
        self.trainer: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.look(self.trainer)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.look(self.trainer)


@pytest.fixture
def make_trainer(model_directory: Path, text_file: Path, tokenizer: Any, tmp_path: Path) -> Callable[..., Any]:
    def make(
        recipe: Recipe,
        batch_size: int = 2,
        look: Callable[[AdaptationTrainer], None] | None = None,
        **arguments: Any,
    ) -> AdaptationTrainer:
        rows = PackedRows(tokenize_files([text_file], tokenizer, progress=False), recipe.sequence_length)
        torch.manual_seed(0)
        model = prepare_parameters(attach(load_base(model_directory), recipe.config()), recipe)
        rows_per_step = recipe.tokens_per_step // recipe.sequence_length
        args = TrainingArguments(
            output_dir=str(tmp_path / "run"),
            max_steps=recipe.total_steps(0),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=rows_per_step // batch_size,
            max_grad_norm=recipe.max_grad_norm,
            logging_steps=1,
            save_strategy="no",
            remove_unused_columns=False,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            **arguments,
        )
        training_rows = TrainingRows(rows, recipe.total_steps(0) * rows_per_step, 0)
        trainer = AdaptationTrainer(model, args, recipe, training_rows)
        if look is not None:
            watch = Watch(look)
            watch.trainer = trainer
            trainer.add_callback(watch)
        return trainer

    return make
