"""What can be served, and what is refused with which words; without vLLM."""

import importlib.util
import subprocess
import sys
from types import SimpleNamespace

import pytest

import spkv
from spkv.checkpoint import fingerprint
from spkv.config import CONFIG_FILE, SPKVConfig, read_stored
from spkv.serving import settings


def vllm_config(**changes):
    config = SimpleNamespace(
        speculative_config=None,
        kv_transfer_config=None,
        lora_config=None,
        parallel_config=SimpleNamespace(decode_context_parallel_size=1, prefill_context_parallel_size=1),
        cache_config=SimpleNamespace(kv_offloading_size=None, cache_dtype="auto"),
    )
    for name, value in changes.items():
        *path, last = name.split("__")
        part = config
        for step in path:
            part = getattr(part, step)
        setattr(part, last, value)
    return config


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"speculative_config": object()}, r"speculative decoding \(drop --speculative-config\)"),
        ({"parallel_config__decode_context_parallel_size": 2}, "context parallelism"),
        ({"parallel_config__prefill_context_parallel_size": 2}, "context parallelism"),
        ({"kv_transfer_config": SimpleNamespace(kv_connector="NixlConnector")}, "disaggregated prefill"),
        ({"cache_config__kv_offloading_size": 4.0}, "KV offloading"),
        ({"cache_config__cache_dtype": "fp8"}, "a quantised KV cache"),
        ({"lora_config": object()}, "vLLM's own LoRA .drop --enable-lora; an adapter"),
    ],
)
def test_features_that_are_off_are_refused(change, words):
    settings.check_features(vllm_config())
    with pytest.raises(ValueError, match=f"self-pruned models are served without: {words}"):
        settings.check_features(vllm_config(**change))


def test_models_that_cannot_be_served_are_refused(tiny_llama, tmp_path):
    spkv.attach(tiny_llama, SPKVConfig(window=8))
    spkv.save(tiny_llama, tmp_path)
    stored = read_stored(tmp_path / CONFIG_FILE)
    assert settings.check_model(stored, tiny_llama.config).window == 8
    with pytest.raises(ValueError, match="an adapter: serve the model that it was trained on, with --hf-overrides"):
        settings.check_model(stored | {"base": {}}, tiny_llama.config)
    with pytest.raises(ValueError, match="a whole model, not an adapter"):
        settings.check_model(stored, tiny_llama.config, tmp_path)
    base = fingerprint(tiny_llama)
    assert settings.check_model(stored | {"base": base}, tiny_llama.config, tmp_path).window == 8
    with pytest.raises(ValueError, match="for another model: it needs hidden_size=64, this one has hidden_size=32"):
        settings.check_model(stored | {"base": base | {"hidden_size": 64}}, tiny_llama.config, tmp_path)
    coded = stored | {"config": stored["config"] | {"page_dtype": "int8"}}
    with pytest.raises(ValueError, match="page_dtype is 'int8'"):
        settings.check_model(coded, tiny_llama.config)
    layout = stored | {"config": stored["config"] | {"layout": [[0]] * tiny_llama.config.num_hidden_layers}}
    with pytest.raises(ValueError, match="static layout"):
        settings.check_model(layout, tiny_llama.config)
    with pytest.raises(ValueError, match="sliding-window"):
        settings.check_model(stored, SimpleNamespace(layer_types=["full_attention", "sliding_attention"]))


def test_files_that_are_not_there_are_named(tmp_path):
    plain = SimpleNamespace(model=str(tmp_path), revision=None, hf_config=SimpleNamespace())
    with pytest.raises(FileNotFoundError, match=f"holds no {CONFIG_FILE}: it is no self-pruned model"):
        settings.model_file(plain, CONFIG_FILE)
    plain.hf_config.spkv_adapter = str(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"spkv_adapter '{tmp_path}' is no adapter: it holds no {CONFIG_FILE}"):
        settings.model_file(plain, CONFIG_FILE)
    (tmp_path / CONFIG_FILE).touch()
    assert settings.model_file(plain, "anything") == tmp_path / "anything"


def test_options_stand_in_for_what_the_checkpoint_says(caplog):
    stored = {"config": SPKVConfig(threshold=0.5).to_dict(), "base": None, "training": {"density": 0.3, "step": 7}}

    def read(options):
        hf_config = SimpleNamespace(spkv=settings.with_options(stored, options))
        config = SimpleNamespace(model_config=SimpleNamespace(hf_config=hf_config))
        return settings.stored_config(config).threshold, settings.expected_density(config)

    assert read({}) == read({"spkv_threshold": 0.5}) == (0.5, 0.3)
    assert read({"spkv_density": 0.4}) == (0.5, 0.4)
    assert read({"spkv_threshold": 0.7, "spkv_density": 0}) == (0.7, 0.0)
    assert not caplog.records
    assert read({"spkv_threshold": 0.7}) == (0.7, 1.0)
    assert "No density is known at threshold 0.7" in caplog.text
    assert stored["training"] == {"density": 0.3, "step": 7}
    stored["training"] = None
    assert read({}) == (0.5, 1.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"spkv_density": 2}, r"spkv_density must lie in \[0, 1\], not 2"),
        ({"spkv_density": "0.3"}, r"spkv_density must lie in \[0, 1\], not '0.3'"),
        ({"spkv_threshold": 1}, "spkv_threshold: threshold must lie strictly between 0 and 1, not 1"),
        ({"spkv_threshold": "0.5"}, "spkv_threshold: threshold must be a number in"),
    ],
)
def test_values_that_make_no_sense_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        settings.with_options({"config": {"threshold": 0.5}, "training": {}}, options)


def test_options_are_told_from_others_and_misspelt_ones_refused():
    def read(said, **overrides):
        model_config = SimpleNamespace(hf_config=SimpleNamespace(hidden_size=8, **overrides))
        return settings.read_options(SimpleNamespace(additional_config=said, model_config=model_config))

    assert read({"spkv_density": 0.3, "of_somebody_else": 1}, spkv_adapter="x") == {"spkv_density": 0.3}
    assert read(object()) == {}
    for said, overrides, name in [
        ({"spkv_treshold": 0.5}, {}, "spkv_treshold"),
        ({"spkv_adapter": "x"}, {}, "spkv_adapter"),
        ({}, {"spkv_adaptor": "x"}, "spkv_adaptor"),
        ({}, {"spkv_threshold": 0.7}, "spkv_threshold"),
    ]:
        with pytest.raises(
            ValueError, match=f"no such options there: {name}; there are spkv_density and spkv_threshold in"
        ):
            read(said, **overrides)


def test_the_base_of_an_adapter_is_read_by_the_names_that_transformers_has():
    def check(quantization=None, model_type="llama", load_format="auto"):
        config = SimpleNamespace(
            model_config=SimpleNamespace(quantization=quantization, hf_config=SimpleNamespace(model_type=model_type)),
            load_config=SimpleNamespace(load_format=load_format),
        )
        settings.check_base(config)
        return config.load_config.load_format

    assert check() == "hf"
    assert check(load_format="safetensors") == "safetensors"
    with pytest.raises(ValueError, match="which --load-format tensorizer does not show"):
        check(load_format="tensorizer")
    with pytest.raises(ValueError, match="quantised by fp8"):
        check(quantization="fp8")
    with pytest.raises(ValueError, match="add --config-format hf"):
        check(model_type="transformer")


def test_serving_does_without_the_transformers_integration():
    code = (
        "import sys, spkv.serving, spkv.serving.settings, spkv.serving.ledger, spkv.serving.slabs;"
        "print([m for m in sys.modules if m.startswith(('spkv.hf', 'spkv.checkpoint', 'vllm'))])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_the_extra_is_named():
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'spkv\[vllm\]'"):
        spkv.serving.register()
