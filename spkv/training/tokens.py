"""From documents to tokens, kept for the next run."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from spkv.text import (
    check_readable,
    document_batches,
    document_files,
    read_documents,
    source_size,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens that end a document in pretraining. A chat model's eos often ends a turn instead, so these are tried first.
_DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>", "<|end▁of▁sentence|>", "</s>", "<eos>")
# Part of the cache's key: raise it whenever the same files would give other tokens.
_CACHE_VERSION = 1


@dataclass(frozen=True)
class Tokens:
    """A tokenised corpus.

    Attributes:
        tokens: [n] uint16 or uint32, all documents one after the other, each closed by its separator.
        document_starts: [documents] int64, strictly increasing from 0: the index of each document's first token.
        vocabulary: digest of the tokenizer's vocabulary, "" if unknown.
    """

    tokens: np.ndarray
    document_starts: np.ndarray
    vocabulary: str = ""

    def __post_init__(self) -> None:
        starts = self.document_starts
        if self.tokens.ndim != 1 or self.tokens.dtype.kind not in "ui":
            raise ValueError(f"tokens must be 1-D integers, not {self.tokens.ndim}-D {self.tokens.dtype}")
        if starts.ndim != 1 or starts.dtype.kind not in "ui":
            raise ValueError(f"document_starts must be 1-D integers, not {starts.ndim}-D {starts.dtype}")
        if len(self.tokens) == 0 or len(starts) == 0:
            raise ValueError("the data hold no tokens")
        if starts[0] != 0 or starts[-1] >= len(self.tokens) or (np.diff(starts.astype(np.int64)) <= 0).any():
            raise ValueError("document_starts must increase strictly from 0 and stay below the number of tokens")


def tokenize_files(
    paths: Sequence[str | os.PathLike[str]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Tokens:
    """Tokenise files, or find them tokenised: the result is kept under a digest of files and tokenizer.

    Special tokens that occur in the text are encoded as the text they are. Empty documents are left out.

    Args:
        paths: files and directories, see the module; .npz archives are read as they are.
        tokenizer: a fast tokenizer.
        cache_dir: where to keep tokens; None takes `$SPKV_CACHE`, else `$XDG_CACHE_HOME/spkv`, else `~/.cache/spkv`.
        progress: show a progress bar.

    Raises:
        FileNotFoundError, ValueError: for files that are missing, empty, or of a kind or content not accepted.
        ModuleNotFoundError: for a dataset directory without the package `datasets`.
    """
    if not paths:
        raise ValueError("no data files were given")
    sources = [Path(path) for path in paths]
    for source in sources:
        check_readable(source)
    if len(sources) == 1 and sources[0].suffix == ".npz":
        return _load_checked(sources[0], tokenizer)
    root = Path(cache_dir) if cache_dir else _cache_root()
    directory = root / "tokens" / _cache_key(sources, tokenizer)
    if not directory.exists():
        # Written aside and renamed at the end: a folder that exists is complete, whoever else writes it.
        scratch = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}")
        scratch.mkdir(parents=True)
        try:
            _tokenize(sources, tokenizer, scratch, progress)
            try:
                os.rename(scratch, directory)
            except OSError:
                if not directory.is_dir():
                    raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return Tokens(
        np.load(directory / "tokens.npy", mmap_mode="r"),
        np.load(directory / "document_starts.npy"),
        vocabulary_digest(tokenizer),
    )


def save_tokens(tokens: Tokens, path: str | os.PathLike[str]) -> Path:
    """Write a compressed archive that `tokenize_files` accepts in place of the text; returns its path (.npz)."""
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"tokens are saved as .npz, not {path.name!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        path,
        tokens=tokens.tokens,
        document_starts=tokens.document_starts,
        vocabulary=np.array(tokens.vocabulary),
    )
    return path


def load_tokens(path: str | os.PathLike[str]) -> Tokens:
    """Read what `save_tokens` wrote, or any .npz with integer arrays `tokens` and `document_starts`."""
    with np.load(path, allow_pickle=False) as archive:
        missing = [name for name in ("tokens", "document_starts") if name not in archive]
        if missing:
            raise ValueError(f"{path} lacks the arrays {missing}; it holds {sorted(archive)}")
        vocabulary = str(archive["vocabulary"]) if "vocabulary" in archive else ""
        return Tokens(archive["tokens"], archive["document_starts"], vocabulary)


def document_marks(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    """Return the ids put before each document (`document_prefix`) and the separator after it.

    The separator is the token that ended documents in pretraining (`<|endoftext|>` and the like) if the tokenizer
    has one as a special token, else eos.

    Raises:
        ValueError: if the tokenizer has neither.
    """
    special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    names = [name for name in _DOCUMENT_ENDS if name in special]
    separator = tokenizer.eos_token if tokenizer.eos_token in names or not names else names[0]
    if separator is None:
        raise ValueError(
            "the tokenizer has no token that ends a document: neither eos nor " + ", ".join(_DOCUMENT_ENDS)
        )
    return document_prefix(tokenizer), int(tokenizer.get_vocab()[separator])


def document_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids put before each document: the tokenizer's own bos, if it adds one."""
    prefix = list(tokenizer("", add_special_tokens=True).input_ids)
    if prefix and prefix[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id:
        prefix.pop()
    return prefix


def _tokenize(sources: list[Path], tokenizer: PreTrainedTokenizerBase, directory: Path, progress: bool) -> None:
    prefix, separator = document_marks(tokenizer)
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)
    lengths: list[int] = []
    size = sum(map(source_size, sources))
    with (directory / "tokens.raw").open("w+b") as raw:
        with tqdm(total=size, unit="B", unit_scale=True, desc="tokenising", disable=not progress) as bar:
            for source in sources:
                before = bar.n
                if source.suffix == ".npz":
                    ready = _load_checked(source, tokenizer)
                    raw.write(ready.tokens.astype(dtype).tobytes())
                    lengths += np.diff(ready.document_starts, append=len(ready.tokens)).tolist()
                else:
                    for texts, position in document_batches(read_documents(source)):
                        encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)
                        for ids in encoded.input_ids:
                            document = np.array([*prefix, *ids, separator], dtype=dtype)
                            raw.write(document.tobytes())
                            lengths.append(len(document))
                        bar.update(before + position - bar.n)
                bar.update(before + source_size(source) - bar.n)
        if not lengths:
            raise ValueError(f"the data hold no text: {', '.join(map(str, sources))}")
        # The length is known only now; a .npy states it in front.
        tokens = np.lib.format.open_memmap(directory / "tokens.npy", mode="w+", dtype=dtype, shape=(sum(lengths),))
        raw.seek(0)
        shutil.copyfileobj(raw, _ArrayWriter(tokens), 1 << 24)
        tokens.flush()
    (directory / "tokens.raw").unlink()
    np.save(directory / "document_starts.npy", np.cumsum([0, *lengths[:-1]], dtype=np.int64))


class _ArrayWriter(io.RawIOBase):
    """A file whose bytes land in an array."""

    def __init__(self, array: np.ndarray):
        self._bytes, self._at = array.view(np.uint8), 0

    def write(self, data: Any) -> int:
        self._bytes[self._at : self._at + len(data)] = np.frombuffer(data, dtype=np.uint8)
        self._at += len(data)
        return len(data)


def vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of the tokens and their ids, the same for every version of the tokenizer libraries."""
    vocabulary = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]


def _load_checked(path: Path, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    tokens = load_tokens(path)
    same = tokens.vocabulary in ("", vocabulary_digest(tokenizer))
    if not same or int(tokens.tokens.max()) >= len(tokenizer):
        raise ValueError(f"{path} was tokenised with another vocabulary than this model's; tokenise its text anew")
    return tokens


def _cache_key(sources: list[Path], tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"a fast tokenizer is needed, not {type(tokenizer).__name__}")
    digest = hashlib.sha256(repr((_CACHE_VERSION, document_marks(tokenizer))).encode())
    digest.update(backend.to_str().encode())
    for source in sources:
        for file in document_files(source):
            # The kind is read off the name's end, so that belongs to the content.
            digest.update(repr((file.suffixes[-2:], file.stat().st_size)).encode())
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()[:32]


def _cache_root() -> Path:
    if own := os.environ.get("SPKV_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "spkv"
