"""What conversions share, where it goes wrong."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from spkv.hf.packaged.conversion import dequantized_weights, meant_number, read_gguf

gguf = pytest.importorskip("gguf")


def test_a_gguf_of_another_kind_is_refused_with_what_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    field = SimpleNamespace(contents=lambda: "mamba")
    monkeypatch.setattr(gguf, "GGUFReader", lambda _: SimpleNamespace(get_field=lambda _: field))
    with pytest.raises(ValueError, match=r"general\.architecture is 'mamba'.*'llama' alone"):
        read_gguf(Path("other.gguf"), {"general.architecture": "llama"})


def test_missing_metadata_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "GGUFReader", lambda _: SimpleNamespace(get_field=lambda _: None))
    with pytest.raises(ValueError, match=r"no metadata 'general\.architecture'"):
        read_gguf(Path("other.gguf"), {"general.architecture": "llama"})


@pytest.mark.parametrize("content", [b"", b"GGU", b"PK\x03\x04 is what archives begin with", b"GGUF\x03\0\0\0"])
def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.gguf is damaged or no GGUF"):
        read_gguf(tmp_path / "model.gguf", {})


def test_an_unknown_tensor_is_named() -> None:
    reader = SimpleNamespace(tensors=[SimpleNamespace(name="blk.3.ssm_conv1d.weight")])
    with pytest.raises(ValueError, match=r"'blk\.3\.ssm_conv1d\.weight'; known there are .*ffn_norm"):
        next(dequantized_weights(reader, {"ffn_norm": "post_attention_layernorm"}, lambda _, weight: weight))


def test_float32_gives_back_the_decimal_that_was_meant() -> None:
    assert meant_number(9.999999974752427e-07) == 1e-6
