"""SPKVConfig: checked when made, JSON and back."""

import json

import pytest

from spkv.config import PAGE_DTYPES, SPKVConfig, check_threshold
from spkv.ops.codec import CODECS


def test_every_page_dtype_has_a_codec():
    assert set(PAGE_DTYPES) == set(CODECS)
    assert SPKVConfig.from_dict(SPKVConfig(page_dtype="int4").to_dict()).page_dtype == "int4"
    by_layer = SPKVConfig(page_dtype=["int4", None])
    assert SPKVConfig.from_dict(by_layer.to_dict()) == by_layer
    assert by_layer.page_dtype == ("int4", None)


def test_a_config_survives_json():
    config = SPKVConfig(window=3, threshold=0.7, predictor_width=5, layers=(4, 1, 4))
    assert config.layers == (1, 4)
    assert SPKVConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.replace(window=9).window == 9


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"window": 0}, ValueError, "window must be at least 1, not 0"),
        (
            {"page_dtype": ["int8", "int3"]},
            ValueError,
            "or a list of these, one for each layer; not .*int3",
        ),
        (
            {"page_dtype": "int3"},
            ValueError,
            "one of int8, fp8, int4, or a list of these, .*; not 'int3'",
        ),
        ({"window": 1.5}, TypeError, "window must be a whole number of at least 1, not 1.5"),
        ({"window": True}, TypeError, "not True"),
        ({"threshold": 0.0}, ValueError, "strictly between 0 and 1, not 0.0"),
        ({"threshold": 1}, ValueError, "strictly between 0 and 1, not 1"),
        ({"threshold": "high"}, TypeError, "a number in \\(0, 1\\), not 'high'"),
        ({"predictor_width": 0}, ValueError, "predictor_width must be at least 1, not 0"),
        ({"predictor_depth": 0}, ValueError, "predictor_depth must be at least 1, not 0"),
        ({"initial_bias": None}, TypeError, "initial_bias must be a number, not None"),
        ({"layers": ()}, ValueError, "layers must be None or non-negative layer indices"),
        ({"layers": (1, -1)}, ValueError, "non-negative layer indices"),
        ({"layout": [[0], [-1]]}, ValueError, r"layout must list KV heads, counted from 0, for each layer, not \[-1\]"),
        ({"layout": [[0]], "layers": (0,)}, ValueError, "layers and layout exclude each other"),
        ({"page_size": 0}, ValueError, "page_size must be at least 1"),
        ({"layout": [[]], "sinks": -1}, ValueError, "sinks must be a whole number of at least 0, not -1"),
    ],
)
def test_bad_fields_are_named(fields, error, message):
    with pytest.raises(error, match=message):
        SPKVConfig(**fields)


def test_a_layout_round_trips_as_json():
    config = SPKVConfig(layout=((1, 0, 1), (), (2,)), sinks=4)
    assert config.layout == ((0, 1), (), (2,))
    assert SPKVConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_learned_gates_may_have_sinks():
    assert SPKVConfig.from_dict(SPKVConfig(sinks=4).to_dict()).sinks == 4


def test_unknown_fields_are_named():
    with pytest.raises(ValueError, match=r"unknown SPKVConfig fields \['windw'\]; known are .*'window'"):
        SPKVConfig.from_dict({"windw": 3})


def test_check_threshold_returns_what_it_was_given():
    assert check_threshold(0.25) == 0.25
    with pytest.raises(ValueError, match="not nan"):
        check_threshold(float("nan"))
