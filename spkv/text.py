"""Reading documents from files.

Accepted are text files of any name, JSON lines with a `text` field (.jsonl, .ndjson), both also compressed (.gz,
.bz2, .xz), and directories that `datasets` saved with `save_to_disk`.
"""

from __future__ import annotations

import bz2
import gzip
import itertools
import json
import lzma
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

TEXT_FIELD = "text"

_DECOMPRESS: dict[str, Callable[[Any], Iterable[bytes]]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
}
_JSON_LINES = (".jsonl", ".ndjson")
_REFUSED = {
    ".json": "JSON is read one object a line; name it .jsonl if it is so",
    ".parquet": "load it with datasets.Dataset.from_parquet and pass the directory that its save_to_disk writes",
    ".arrow": "pass the directory that datasets' save_to_disk wrote, not a file in it",
    ".csv": "load it with datasets.Dataset.from_csv and pass the directory that its save_to_disk writes",
    ".zst": "decompress it, or compress it as .xz, .gz or .bz2",
    ".zip": "unpack it",
}
_BATCH_CHARACTERS = 2_000_000


def check_readable(path: Path) -> None:
    """Raise a FileNotFoundError or ValueError if `path` is not there or not of an accepted kind."""
    if not path.exists():
        raise FileNotFoundError(f"no such data file: {path}")
    suffix = path.suffix.lower()
    if path.is_dir():
        if (path / "dataset_dict.json").exists():
            splits = sorted(child.name for child in path.iterdir() if child.is_dir())
            raise ValueError(f"{path} holds several splits; pass one of {splits} in it")
        if not (path / "state.json").exists():
            raise ValueError(f"{path} is a directory, but none that datasets' save_to_disk wrote")
    elif suffix in _REFUSED:
        raise ValueError(f"{path}: {suffix} is not accepted: {_REFUSED[suffix]}")


def read_documents(path: Path) -> Iterator[tuple[str, int]]:
    """Yield each document of a file or dataset directory, with the bytes of it that have been read so far.

    Raises:
        ValueError: for content that is not what the name promises, naming file and line.
    """
    if path.is_dir():
        yield from _read_dataset(path)
        return
    with _open(path) as (raw, stream, kind):
        if kind in _JSON_LINES:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield _json_text(line, path, number), raw.tell()
        else:
            yield _decoded(b"".join(stream), str(path)), raw.tell()


def read_records(path: str | os.PathLike[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each object of a file of JSON lines, whatever its fields, with the number of its line.

    Raises:
        FileNotFoundError, ValueError: for a file that is missing or holds something else.
    """
    path = Path(path)
    check_readable(path)
    if path.is_dir():
        raise ValueError(f"{path} is a directory; objects are read from a file of JSON lines")
    with _open(path) as (_, stream, _):
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield number, _json_object(line, path, number)


def read_document(path: str | os.PathLike[str]) -> str:
    """Return the first document of a file that is not blank.

    Raises:
        FileNotFoundError, ValueError: if there is none, or the file is not of an accepted kind.
    """
    return read_some([path])[0][1]


def read_some(paths: Sequence[str | os.PathLike[str]], limit: int = 1) -> list[tuple[str, str]]:
    """Return the first documents of files, blank ones left out, each with a name: the file's, numbered if several.

    Raises:
        FileNotFoundError, ValueError: if a file holds none or is not of an accepted kind, or `limit` is below 1.
    """
    if limit < 1:
        raise ValueError(f"the number of documents must be at least 1, not {limit}")
    found = []
    for path in map(Path, paths):
        check_readable(path)
        texts = list(itertools.islice((text for text, _ in read_documents(path) if text.strip()), limit))
        if not texts:
            raise ValueError(f"{path} holds no text")
        found += [(f"{path.name} {n}" if len(texts) > 1 else path.name, text) for n, text in enumerate(texts, 1)]
    return found


@contextmanager
def _open(path: Path) -> Iterator[tuple[BinaryIO, Iterable[bytes], str]]:
    """Open a file: what lies on disk, its lines decompressed, and the suffix that says what they are."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    decompress = _DECOMPRESS.get(suffixes[-1]) if suffixes else None
    kind = ["", *suffixes][-1 if decompress is None else -2]
    with path.open("rb") as raw:
        try:
            yield raw, raw if decompress is None else decompress(raw), kind
        except (gzip.BadGzipFile, lzma.LZMAError, EOFError) as error:
            raise ValueError(f"{path} is damaged or no {path.suffix} file: {error}") from error


def _json(line: bytes, path: Path, number: int) -> Any:
    try:
        return json.loads(_decoded(line, f"{path}, line {number}"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number} is not JSON: {error}") from error


def _json_object(line: bytes, path: Path, number: int) -> dict[str, Any]:
    record = _json(line, path, number)
    if isinstance(record, dict):
        return record
    raise ValueError(f"{path}, line {number} must be an object, not {type(record).__name__}")


def _json_text(line: bytes, path: Path, number: int) -> str:
    record = _json(line, path, number)
    if isinstance(record, dict) and isinstance(record.get(TEXT_FIELD), str):
        return record[TEXT_FIELD]
    given = f"one with {sorted(record)}" if isinstance(record, dict) else type(record).__name__
    raise ValueError(f"{path}, line {number} must be an object with a string `{TEXT_FIELD}`, not {given}")


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 text: {error}") from error


def _read_dataset(path: Path) -> Iterator[tuple[str, int]]:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{path} is a directory of the package `datasets`, which is not installed; pip install "spkv[train]"',
            name="datasets",
        ) from error
    dataset = datasets.load_from_disk(str(path))
    if TEXT_FIELD not in dataset.column_names:
        raise ValueError(f"{path} has no column `{TEXT_FIELD}`; its columns are {dataset.column_names}")
    size = source_size(path)
    for index, text in enumerate(dataset[TEXT_FIELD], 1):
        if text is not None and not isinstance(text, str):
            raise ValueError(f"{path}: `{TEXT_FIELD}` of row {index - 1} must be a string, not {type(text).__name__}")
        yield text or "", size * index // len(dataset)


def document_files(path: Path) -> list[Path]:
    """Return the files that hold a source's documents: the file itself, or all of a dataset directory's."""
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def source_size(path: Path) -> int:
    """Return the bytes that a source takes on disk."""
    return sum(file.stat().st_size for file in document_files(path))


def prefix_ids(tokenizer: Any) -> list[int]:
    """The ids that a tokenizer puts in front of every text, such as `<bos>`; none, for many."""
    # A token that ends every text follows both; no other begins both.
    blank, some = (list(tokenizer([text], split_special_tokens=True, verbose=False).input_ids[0]) for text in ("", "a"))
    return blank[: next((i for i, (x, y) in enumerate(zip(blank, some, strict=False)) if x != y), len(blank))]


def document_batches(documents: Iterable[tuple[str, int]]) -> Iterator[tuple[list[str], int]]:
    """Group documents by characters: enough for the tokenizer's threads, little enough for memory."""
    texts: list[str] = []
    characters = position = 0
    for text, position in documents:
        if not text.strip():
            continue
        texts.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield texts, position
            texts, characters = [], 0
    if texts:
        yield texts, position
