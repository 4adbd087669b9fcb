"""A case of a parametrized test that runs nightly only: `parametrize("df", [0.5, nightly(5.0)])`."""

import functools

import pytest

nightly = functools.partial(pytest.param, marks=(pytest.mark.slow, pytest.mark.nightly))
