"""Reading single documents. (How files are read is tested with the training data, which come through the same code.)"""

import gzip
import json
import lzma

import pytest

from spkv.text import read_document, read_records, read_some


def test_the_first_document_that_is_not_blank(tmp_path):
    plain = tmp_path / "notes.md"
    plain.write_text("\n A text,\nas it is. \n")
    assert read_document(plain) == "\n A text,\nas it is. \n"
    lines = tmp_path / "many.jsonl.xz"
    with lzma.open(lines, "wt") as stream:
        stream.writelines(json.dumps({"text": text}) + "\n" for text in (" ", "first", "second"))
    assert read_document(str(lines)) == "first"


def test_the_first_documents_of_several_files(tmp_path):
    (tmp_path / "a.txt").write_text("plain")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in ("first", "", "second", "third"))
    (tmp_path / "b.jsonl").write_text(lines)
    assert read_some([tmp_path / "a.txt", tmp_path / "b.jsonl"]) == [("a.txt", "plain"), ("b.jsonl", "first")]
    assert read_some([tmp_path / "b.jsonl"], 2) == [("b.jsonl 1", "first"), ("b.jsonl 2", "second")]
    with pytest.raises(ValueError, match="the number of documents must be at least 1, not 0"):
        read_some([tmp_path / "a.txt"], 0)


def test_bad_files_are_named(tmp_path):
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"blank\.txt holds no text"):
        read_document(tmp_path / "blank.txt")
    with pytest.raises(FileNotFoundError, match=r"no such data file: .*absent"):
        read_document(tmp_path / "absent")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"words": "none"}\n'.replace("fine", " "))
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2 must be an object with a string `text`"):
        read_document(tmp_path / "bad.jsonl")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8 text"):
        read_document(tmp_path / "latin.txt")


def test_records_have_any_fields(tmp_path):
    path = tmp_path / "questions.jsonl.gz"
    with gzip.open(path, "wt") as stream:
        stream.write('{"question": "Why?"}\n\n{"answer": [1]}\n')
    assert list(read_records(path)) == [(1, {"question": "Why?"}), (3, {"answer": [1]})]


def test_bad_records_are_named(tmp_path):
    (tmp_path / "list.jsonl").write_text("{}\n[1]\n")
    with pytest.raises(ValueError, match=r"list\.jsonl, line 2 must be an object, not list"):
        list(read_records(tmp_path / "list.jsonl"))
    (tmp_path / "bad.jsonl").write_text("{\n")
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 1 is not JSON"):
        list(read_records(tmp_path / "bad.jsonl"))
    (tmp_path / "bad.jsonl.xz").write_text("{}")
    with pytest.raises(ValueError, match=r"bad\.jsonl\.xz is damaged or no \.xz file"):
        list(read_records(tmp_path / "bad.jsonl.xz"))
    with pytest.raises(FileNotFoundError, match=r"no such data file: .*absent"):
        list(read_records(tmp_path / "absent"))
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"saved is a directory; objects are read from a file of JSON lines"):
        list(read_records(tmp_path / "saved"))
