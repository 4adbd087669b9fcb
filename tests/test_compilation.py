import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jevb_jax import compilation


def draw(key, scale):
    return {"w": scale * jax.random.normal(key, (4, 3))}


def test_same_numbers_and_the_fast_compilation_at_the_top_only(monkeypatch):
    seen = []
    jit = jax.jit

    def recorded(function, **keywords):
        compiled = jit(function, **keywords)
        return lambda *args, **kwargs: (
            seen.append(bool(keywords.get("compiler_options"))),
            compiled(*args, **kwargs),
        )[1]

    monkeypatch.setattr(jax, "jit", recorded)
    once = compilation.jit_once(draw)
    key, scale = jax.random.key(3), jnp.float32(2.0)
    np.testing.assert_allclose(once(key, scale=scale)["w"], draw(key, scale)["w"], rtol=1e-6)
    assert seen == [True]
    monkeypatch.undo()
    # compiler_options inside another compilation are an error of JAX.
    assert jax.eval_shape(once, key, scale)["w"].shape == (4, 3)
    inner = jax.jit(lambda scale: once(key, scale))(scale)
    np.testing.assert_allclose(inner["w"], draw(key, scale)["w"], rtol=1e-6)
    # Options that other platforms do not know are not given to them.
    monkeypatch.setattr(compilation, "_QUICK_ON_CPU", {"no_such_option": True})
    with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option"):
        compilation.jit_once(draw)(key, scale)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert compilation.jit_once(draw)(key, scale)["w"].shape == (4, 3)
