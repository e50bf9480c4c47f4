"""Adapting a model: data, schedule, recipes, trainer, and `adapt`, which puts them together."""

from spkv.training.adapt import adapt
from spkv.training.recipes import RECIPES, Recipe, get_recipe
from spkv.training.tokens import Tokens, load_tokens, save_tokens, tokenize_files

__all__ = [
    "RECIPES",
    "Recipe",
    "Tokens",
    "adapt",
    "get_recipe",
    "load_tokens",
    "save_tokens",
    "tokenize_files",
]
