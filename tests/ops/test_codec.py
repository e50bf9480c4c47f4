"""Coding rows in fewer bits: how far the codes may be off, and what a page takes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spkv.ops.codec import CODECS, codec


@settings(max_examples=40)
@given(
    name=st.sampled_from(sorted(CODECS)),
    rows=st.integers(0, 5),
    head_size=st.sampled_from([64, 128, 256]),
    magnitude=st.sampled_from([1e-6, 1e-3, 1.0, 300.0]),
    offset=st.sampled_from([0.0, 5.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 999),
)
def test_codes_are_off_by_half_a_step_at_most(name, rows, head_size, magnitude, offset, dtype, seed):
    torch.manual_seed(seed)
    exact = ((torch.randn(rows, head_size) + offset) * magnitude).to(dtype)
    codes, scales = CODECS[name].encode(exact)
    assert codes.dtype == torch.uint8
    assert scales.dtype == torch.float16
    assert codes.shape == (rows, CODECS[name].code_bytes(head_size))
    assert scales.shape == (rows, CODECS[name].scales(head_size))
    error = (CODECS[name].decode(codes, scales) - exact.float()).abs()
    if name == "int4":
        step, least = scales.float().unflatten(-1, (-1, 2)).unbind(-1)
        # float16 rounds the step (15 of them may be added up) and the least value, by 2 ** -25 at least.
        allowed = step / 2 + 15 * (step * 2**-11 + 2**-25) + least.abs() * 2**-10 + 2**-24
        allowed = allowed.repeat_interleave(32, -1)
    elif name == "int8":
        allowed = scales.float() * (0.5 + 127 * 2**-11) + 2**-17
    else:  # e4m3 has 3 bits behind the point, and 2 ** -9 is its least step
        allowed = exact.float().abs() * 2**-4 + scales.float() * (2**-10 + 448 * 2**-11) + 2**-15
    assert (error <= allowed).all()


@pytest.mark.parametrize("name", sorted(CODECS))
def test_zeros_and_constant_rows_stay_what_they_are(name):
    assert not CODECS[name].round(torch.zeros(2, 64)).any()
    ones = torch.ones(2, 64, dtype=torch.bfloat16)
    torch.testing.assert_close(CODECS[name].round(ones), ones, rtol=2**-8, atol=0)
    assert CODECS[name].round(ones).dtype == torch.bfloat16


@pytest.mark.parametrize(("name", "page_bytes"), [("int8", 4160), ("fp8", 4160), ("int4", 2560)])
def test_bytes_of_a_page(name, page_bytes):
    # bfloat16 takes 8,192 bytes for 16 pairs of 128.
    assert codec(name).page_bytes(16, 128) == page_bytes


@pytest.mark.parametrize("name", sorted(CODECS))
def test_numbers_beyond_float16_stay_finite(name):
    assert CODECS[name].round(torch.tensor([[1e5, -7e4] * 32])).isfinite().all()


def test_what_cannot_be_coded_is_named():
    with pytest.raises(ValueError, match="one of int8, fp8, int4, .* not 'int2'"):
        codec("int2")
    assert codec("int8").obstacle(24) is None
    assert codec("int4").obstacle(96) == "int4 takes head sizes that are multiples of 64, not 96"
