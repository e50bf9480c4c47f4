from __future__ import annotations

import bz2
import gzip
import itertools
import json
import lzma
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from spkv.training.tokens import Tokens, document_marks, load_tokens, save_tokens, tokenize_files

DOCUMENTS = ["first text", "second, longer text\nof two lines", "<|endoftext|> spelt out"]


def decode(tokens: Tokens, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The documents again, each checked to end with the separator."""
    bounds = [*tokens.document_starts.tolist(), len(tokens.tokens)]
    documents = [tokens.tokens[a:b].tolist() for a, b in itertools.pairwise(bounds)]
    assert all(ids[-1] == 0 for ids in documents)
    return ["".join(tokenizer.convert_ids_to_tokens(ids[:-1])) for ids in documents]


def json_lines(documents: list[str]) -> bytes:
    return "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(documents)).encode()


@pytest.mark.parametrize(
    ("name", "compress"),
    [("a.jsonl", bytes), ("a.ndjson", bytes), ("a.jsonl.xz", lzma.compress), ("a.jsonl.gz", gzip.compress)],
)
def test_json_lines_hold_a_document_a_line(tmp_path, tokenizer, name, compress) -> None:
    path = tmp_path / name
    path.write_bytes(compress(json_lines(DOCUMENTS) + b"\n"))
    tokens = tokenize_files([path], tokenizer, progress=False)
    assert decode(tokens, tokenizer) == DOCUMENTS
    assert tokens.tokens.dtype == np.uint16


@pytest.mark.parametrize(
    ("name", "compress"), [("a.txt", bytes), ("b.tar.py", bytes), ("README", bytes), ("a.md.bz2", bz2.compress)]
)
def test_a_text_file_is_a_document(tmp_path, tokenizer, name, compress) -> None:
    path = tmp_path / name
    path.write_bytes(compress(b"\xef\xbb\xbf" + DOCUMENTS[1].encode()))
    assert decode(tokenize_files([path], tokenizer, progress=False), tokenizer) == [DOCUMENTS[1]]


def test_dataset_directories(tmp_path, tokenizer) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": [*DOCUMENTS, ""]}).save_to_disk(tmp_path / "set")
    assert decode(tokenize_files([tmp_path / "set"], tokenizer, progress=False), tokenizer) == DOCUMENTS
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": DOCUMENTS})}).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match="train"):
        tokenize_files([tmp_path / "splits"], tokenizer)
    datasets.Dataset.from_dict({"body": DOCUMENTS}).save_to_disk(tmp_path / "other")
    with pytest.raises(ValueError, match="body"):
        tokenize_files([tmp_path / "other"], tokenizer, progress=False)


def test_dataset_directory_without_the_package(tmp_path, tokenizer, monkeypatch) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "state.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"spkv\[train\]"):
        tokenize_files([tmp_path / "set"], tokenizer, progress=False)


def test_files_come_in_order_and_empty_documents_are_left_out(tmp_path, tokenizer) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "b.jsonl").write_bytes(json_lines(["two", "", "three"]))
    save_tokens(tokenize_files([tmp_path / "a.txt"], tokenizer, progress=False), tmp_path / "c.npz")
    names = ["b.jsonl", "empty.txt", "c.npz", "a.txt"]
    tokens = tokenize_files([tmp_path / name for name in names], tokenizer, progress=False)
    assert decode(tokens, tokenizer) == ["two", "three", "one", "one"]


def test_tokens_are_kept_by_content(tmp_path, tokenizer, monkeypatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    first = tokenize_files([path], tokenizer, progress=False)
    moved = tmp_path / "b.txt"
    moved.write_text("one")
    with monkeypatch.context() as patch:
        patch.setattr("spkv.training.tokens._tokenize", lambda *args: pytest.fail("tokenised again"))
        again = tokenize_files([moved], tokenizer, progress=False)
    assert (again.tokens == first.tokens).all()
    path.write_text("two")
    assert decode(tokenize_files([path], tokenizer, progress=False), tokenizer) == ["two"]


def test_a_failed_run_leaves_nothing_behind(tmp_path, tokenizer) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\nbroken\n')
    for _ in range(2):
        with pytest.raises(ValueError, match="line 2"):
            tokenize_files([path], tokenizer, cache_dir=tmp_path / "own", progress=False)
    assert list((tmp_path / "own" / "tokens").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"body": "x"}\n', "line 2 must be an object with a string `text`"),
        ("a.jsonl", b'{"text": "x"}\n["x"]\n', "not list"),
        ("a.jsonl", b'{"text": 3}\n', "line 1"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.txt", b"  \n", "no text"),
        ("a.jsonl.gz", b"no gzip", "damaged"),
        ("a.jsonl.xz", lzma.compress(b'{"text": "x"}')[:-9], "damaged"),
        ("a.json", b"[]", "not accepted"),
        ("a.parquet", b"", "save_to_disk"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, tokenizer, name, content, message) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        tokenize_files([tmp_path / name], tokenizer, progress=False)


def test_missing_files(tmp_path, tokenizer) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        tokenize_files([tmp_path / "nowhere.txt"], tokenizer)
    with pytest.raises(ValueError, match="no data files"):
        tokenize_files([], tokenizer)
    with pytest.raises(ValueError, match="save_to_disk"):
        tokenize_files([tmp_path], tokenizer)


def test_archives_round_trip_and_are_checked(tmp_path, tokenizer) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(DOCUMENTS))
    tokens = tokenize_files([tmp_path / "a.jsonl"], tokenizer, progress=False)
    path = save_tokens(tokens, tmp_path / "sub" / "a.npz")
    loaded = tokenize_files([path], tokenizer)
    assert (loaded.tokens == tokens.tokens).all()
    assert loaded.tokens.dtype == tokens.tokens.dtype
    assert (loaded.document_starts == tokens.document_starts).all()
    save_tokens(Tokens(tokens.tokens, tokens.document_starts, "another"), path)
    with pytest.raises(ValueError, match="another vocabulary"):
        tokenize_files([path], tokenizer)
    save_tokens(Tokens(np.array([3, 999], dtype=np.uint16), np.array([0])), path)
    with pytest.raises(ValueError, match="another vocabulary"):
        tokenize_files([path], tokenizer)
    np.savez(path, tokens=tokens.tokens)
    with pytest.raises(ValueError, match="document_starts"):
        load_tokens(path)
    with pytest.raises(ValueError, match=r"\.npz"):
        save_tokens(tokens, tmp_path / "a.npy")


@pytest.mark.parametrize(
    ("tokens", "starts"),
    [([], [0]), ([1, 2], []), ([1, 2], [1]), ([1, 2], [0, 2]), ([1, 2, 3], [0, 2, 1]), ([0.5, 1.0], [0])],
)
def test_tokens_that_do_not_fit_together(tokens, starts) -> None:
    with pytest.raises(ValueError, match=r"tokens|document_starts"):
        Tokens(np.array(tokens, dtype=None if tokens else np.uint16), np.array(starts, dtype=np.int64))


def special(*tokens: str, **roles: str) -> PreTrainedTokenizerFast:
    names = ["a", *tokens]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(names)}, unk_token="a"))
    tokenizer.add_special_tokens(list(tokens))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)


def test_the_separator_is_what_pretraining_used() -> None:
    assert document_marks(special("<|endoftext|>", "<|im_end|>", eos_token="<|im_end|>")) == ([], 1)
    assert document_marks(special("<|im_end|>", eos_token="<|im_end|>")) == ([], 1)
    assert document_marks(special("<|endoftext|>", "</s>", eos_token="</s>")) == ([], 2)
    with pytest.raises(ValueError, match="neither eos"):
        document_marks(special())


def test_a_bos_that_the_tokenizer_adds_starts_documents(tmp_path) -> None:
    tokenizer = special("<s>", "</s>", bos_token="<s>", eos_token="</s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    assert document_marks(tokenizer) == ([1], 2)
    (tmp_path / "a.txt").write_text("a")
    assert tokenize_files([tmp_path / "a.txt"], tokenizer, progress=False).tokens.tolist() == [1, 0, 2]
