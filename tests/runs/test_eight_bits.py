"""Arrays of 8 bits: rounded by a known amount, and stored without loss."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as np_st

from jevb_jax.runs import eight_bits

SHAPES = np_st.array_shapes(min_dims=2, max_dims=4)
FINITE = np_st.arrays(np.float32, SHAPES, elements=st.floats(-(2.0**126), 2.0**126, width=32))


def bits(array):
    return np.ascontiguousarray(array).view(np.uint32)


@settings(deadline=None, max_examples=300)
@given(FINITE)
def test_no_value_moves_far_and_what_is_rounded_is_stored_without_loss(array):
    rounded = eight_bits.rounded(array)
    assert (rounded.shape, rounded.dtype) == (array.shape, np.float32)
    wide = array.astype(np.float64)
    largest = np.abs(wide).reshape(-1, array.shape[-1]).max(axis=0)
    assert np.all(np.abs(rounded - wide) <= largest / 252 + 1.5e-36)
    np.testing.assert_array_equal(bits(eight_bits.rounded(rounded)), bits(rounded))
    stored, names = eight_bits.pack({"kernel": rounded})
    assert names == ["kernel"]
    assert stored["kernel"].dtype == np.int8
    scale = stored["kernel:scale"]
    np.testing.assert_array_equal(scale, scale.astype(ml_dtypes.bfloat16).astype(np.float32))
    again = eight_bits.unpack(stored, names)
    assert list(again) == ["kernel"]
    np.testing.assert_array_equal(bits(again["kernel"]), bits(rounded))


@pytest.mark.slow
@settings(deadline=None, max_examples=300)
@given(np_st.arrays(np.float32, SHAPES, elements=st.floats(width=32)) | FINITE)
def test_any_arrays_come_back_with_every_bit(array):
    arrays = {
        "kernel": array,
        "bias": np.array([1, 2], np.float32),
        "counts": np.arange(4).reshape(2, 2),
    }
    stored, names = eight_bits.pack(arrays)
    again = eight_bits.unpack(stored, names)
    assert again.keys() == arrays.keys()
    for name, expected in arrays.items():
        assert again[name].dtype == expected.dtype
        np.testing.assert_array_equal(again[name].tobytes(), expected.tobytes())


def test_every_scale_of_bfloat16_is_found_again():
    # All 128 significands, with both largest numbers: 126 times one scale may be 127 times another.
    scales = (np.arange(128, 256) / 4096).astype(np.float32)
    for largest in (126, 127):
        whole = np.full((3, 128), 5, np.float32)
        whole[0] = largest
        whole[1] = -largest + 1
        stored, names = eight_bits.pack({"kernel": whole * scales})
        assert names == ["kernel"]
        np.testing.assert_array_equal(eight_bits.unpack(stored, names)["kernel"], whole * scales)


def test_ordinary_weights_are_not_packed():
    kernel = np.random.default_rng(0).normal(size=(3, 3, 8, 16)).astype(np.float32)
    stored, names = eight_bits.pack({"kernel": kernel, "zero": -np.zeros((2, 2), np.float32)})
    assert (names, list(stored)) == ([], ["kernel", "zero"])
    rounded = eight_bits.rounded(kernel)
    packed = sum(array.nbytes for array in eight_bits.pack({"kernel": rounded})[0].values())
    assert packed == kernel.size + 4 * 16
    assert 0.002 < np.std(rounded - kernel) < 0.02


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(3, np.float32), "two dimensions"),
        (np.zeros((3, 3), np.float16), "float16"),
        (np.full((2, 2), np.nan, np.float32), "NaN"),
        (np.full((2, 2), np.inf, np.float32), "infinity"),
        (np.full((2, 2), 2e38, np.float32), "magnitudes above 1e"),
    ],
)
def test_what_cannot_be_rounded_is_an_error(array, message):
    with pytest.raises(ValueError, match=message):
        eight_bits.rounded(array)


def test_a_missing_scale_is_an_error():
    stored, names = eight_bits.pack({"kernel": np.full((2, 2), 127, np.float32)})
    del stored["kernel:scale"]
    with pytest.raises(KeyError, match="kernel:scale"):
        eight_bits.unpack(stored, names)
