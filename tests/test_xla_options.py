import functools
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.compilation_cache import compilation_cache

from configs import smoke
from jevb_jax import xla_options
from jevb_jax.evaluation import features
from jevb_jax.images.augmentations import ViewAugmentation
from jevb_jax.images.source import ArraySource
from jevb_jax.networks.joint import make_model


def draw(key, scale):
    return {"w": scale * jax.random.normal(key, (4, 3))}


def test_same_numbers_and_the_fast_compilation_at_the_top_only(monkeypatch):
    seen = []
    draw_once = xla_options.jit_once(draw)
    draw_once(jax.random.key(0), jnp.float32(1.0))  # asks the compiler what it knows
    jit = jax.jit

    def recorded(function, **keywords):
        compiled = jit(function, **keywords)
        return lambda *args, **kwargs: (
            seen.append(bool(keywords.get("compiler_options"))),
            compiled(*args, **kwargs),
        )[1]

    monkeypatch.setattr(jax, "jit", recorded)
    once = xla_options.jit_once(draw)
    key, scale = jax.random.key(3), jnp.float32(2.0)
    np.testing.assert_allclose(once(key, scale=scale)["w"], draw(key, scale)["w"], rtol=1e-6)
    assert seen == [True]
    monkeypatch.undo()
    # compiler_options inside another compilation are an error of JAX.
    assert jax.eval_shape(once, key, scale)["w"].shape == (4, 3)
    inner = jax.jit(lambda scale: once(key, scale))(scale)
    np.testing.assert_allclose(inner["w"], draw(key, scale)["w"], rtol=1e-6)
    # An option that this version of XLA has lost is left out.
    of_now = xla_options._QUICK_ON_CPU
    monkeypatch.setattr(xla_options, "_QUICK_ON_CPU", {**of_now, "no_such_option": True})
    np.testing.assert_array_equal(
        xla_options.jit_once(draw)(key, scale)["w"], once(key, scale)["w"]
    )
    # Other platforms get none.
    unreadable = dict.fromkeys(of_now, "perhaps")
    monkeypatch.setattr(xla_options, "_QUICK_ON_CPU", unreadable)
    with pytest.raises(jax.errors.JaxRuntimeError, match="perhaps"):
        xla_options.jit_once(draw)(key, scale)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert xla_options.jit_once(draw)(key, scale)["w"].shape == (4, 3)


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def convolve(x, kernel, stride):
    padding = ((kernel.shape[0] // 2,) * 2,) * 2
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def gradients(x, kernel, cotangent, stride):
    return jax.vjp(lambda x, kernel: convolve(x, kernel, stride), x, kernel)[1](cotangent)


def by_definition(x, kernel, cotangent, stride):
    """Both gradients of a convolution in float64, tap by tap."""
    size, side = kernel.shape[0], cotangent.shape[1]
    padded = np.pad(x.astype(np.float64), ((0, 0), *((size // 2,) * 2,) * 2, (0, 0)))
    of_x, of_kernel = np.zeros_like(padded), np.zeros(kernel.shape)
    for i in range(size):
        for j in range(size):
            rows, columns = (slice(k, k + stride * (side - 1) + 1, stride) for k in (i, j))
            taps = padded[:, rows, columns]
            of_kernel[i, j] = np.einsum("nhwi,nhwo->io", taps, cotangent)
            of_x[:, rows, columns] += np.einsum("nhwo,io->nhwi", cotangent, kernel[i, j])
    inner = slice(size // 2, size // 2 + x.shape[1])
    return of_x[:, inner, inner], of_kernel


@pytest.mark.usefixtures("optimized", "one_device")
@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (1, 1), (1, 2), (7, 2)])
def test_gradients_of_convolutions_with_the_options_for_them(size, stride):
    generator = np.random.default_rng(0)
    shapes = (5, 8, 8, 16), (size, size, 16, 32), (5, 8 // stride, 8 // stride, 32)
    x, kernel, cotangent = (generator.normal(size=shape).astype(np.float32) for shape in shapes)
    expected = by_definition(x, kernel, cotangent, stride)
    for compiler_options in ({}, xla_options.network_options()):
        of_stride = functools.partial(gradients, stride=stride)
        function = jax.jit(of_stride, compiler_options=compiler_options)
        compiled: Any = function.lower(x, kernel, cotangent).compile()
        found = compiled(x, kernel, cotangent)
        for actual, exact in zip(found, expected, strict=True):
            # Sums of up to 5 * 64 products of normal numbers, in float32.
            np.testing.assert_allclose(actual, exact, rtol=1e-5, atol=5e-5)
    # Of the last one, the compilation with them.
    text = compiled.as_text()
    assert "ynn" not in text
    assert "convolution(" in text


@pytest.mark.usefixtures("one_device")
def test_options_are_given_where_the_compiler_knows_them(monkeypatch):
    (option,) = known = xla_options.network_options()
    monkeypatch.setattr(xla_options, "_WITHOUT_YNNPACK", {**known, "no_such_option": ""})
    assert xla_options.network_options() == known
    # What it knows and cannot read is an error, not another version's option.
    monkeypatch.setattr(xla_options, "_WITHOUT_YNNPACK", {option: "perhaps"})
    with pytest.raises(jax.errors.JaxRuntimeError, match="perhaps"):
        xla_options.network_options()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert xla_options.network_options() == {}


def test_several_devices_get_no_options():
    assert jax.device_count() == 8
    assert xla_options.network_options() == {}


@pytest.mark.slow
def test_features_are_extracted_with_the_options(monkeypatch):
    # Which options is known by the error of the compiler that gets one that it does not know.
    monkeypatch.setattr(features, "network_options", lambda: {"no_such_option": ""})
    config: Any = smoke.get_config()
    model = make_model(head="none", has_likelihood_scale=False, **config.model.to_dict())
    extract = features.FeatureExtractor(
        model, view=ViewAugmentation(8, (0.5,), (0.5,)), batch_size=2
    )
    variables = model.init(jax.random.key(0), jnp.zeros((2, 8, 8, 1)), train=False)
    with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option"):
        extract(variables, ArraySource(np.zeros((2, 8, 8, 1), np.uint8)))


# --- Programs of earlier processes ---

ROOT = Path(__file__).resolve().parent.parent
KEEPING = """
import jax
from jevb_jax import xla_options
jax.jit(lambda x: x + 1)(1.0)  # compiled before anything is kept
print(xla_options.keep_compiled_programs())
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name.endswith("cache_hits")))
print(float(jax.jit(lambda x: jax.numpy.sin(x) * 3)(2.0)), sum(hits))
"""


def run_keeping(**variables: str) -> list[str]:
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMP", "JAX_PERS"))
    }
    environment = environment | {"PYTHONPATH": str(ROOT)} | variables
    ended = subprocess.run(
        [sys.executable, "-c", KEEPING],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
    )
    return [*ended.stdout.split(), ended.stderr]


@pytest.mark.slow
def test_programs_are_kept_for_the_next_process(tmp_path):
    directory = tmp_path / "cache" / "jevb_jax" / "compiled"
    first, second = (run_keeping(XDG_CACHE_HOME=str(tmp_path / "cache")) for _ in range(2))
    assert first[:3] == [str(directory), first[1], "0"]
    assert second[:3] == [str(directory), first[1], "1"]
    assert not first[3] + second[3]


@pytest.mark.slow
@pytest.mark.nightly
def test_a_file_of_a_program_that_is_cut_short_is_compiled_again(tmp_path):
    first = run_keeping(JEVB_JAX_COMPILE_CACHE=str(tmp_path))
    for share in (2, 10**9):  # the second time, nothing is left
        for path in tmp_path.iterdir():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // share])
        assert run_keeping(JEVB_JAX_COMPILE_CACHE=str(tmp_path))[1:3] == [first[1], "0"]
    assert run_keeping(JEVB_JAX_COMPILE_CACHE=str(tmp_path))[1:3] == [first[1], "1"]


@pytest.fixture
def no_cache(monkeypatch):
    """JAX as in a process that was given no cache."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    for name in ("JEVB_JAX_COMPILE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_where_programs_are_kept_is_the_users_choice(no_cache, tmp_path, monkeypatch, caplog):
    del no_cache
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("JEVB_JAX_COMPILE_CACHE", "OFF")
    assert xla_options.keep_compiled_programs() is None
    assert jax.config.jax_compilation_cache_dir is None  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setenv("JEVB_JAX_COMPILE_CACHE", "~/mine")
    assert xla_options.keep_compiled_programs() == tmp_path / "mine"
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")  # pyright: ignore[reportAttributeAccessIssue]
    # JAX's own setting is left alone.
    monkeypatch.delenv("JEVB_JAX_COMPILE_CACHE")
    assert xla_options.keep_compiled_programs() is None
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_compilation_cache_dir", None)
    (tmp_path / ".cache").write_text("a file where the directory should be")
    with caplog.at_level(logging.WARNING):
        assert xla_options.keep_compiled_programs() is None
    assert "Compiled programs are not kept for later processes" in caplog.text
    assert "JEVB_JAX_COMPILE_CACHE can name another directory" in caplog.text


def test_several_processes_keep_programs_only_where_they_are_told_to(
    no_cache, tmp_path, monkeypatch
):
    del no_cache
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert xla_options.keep_compiled_programs() is None
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("JEVB_JAX_COMPILE_CACHE", str(tmp_path / "shared"))
    assert xla_options.keep_compiled_programs() == tmp_path / "shared"


def test_the_directory_stays_small(no_cache, tmp_path, monkeypatch):
    del no_cache
    monkeypatch.setenv("JEVB_JAX_COMPILE_CACHE", str(tmp_path))
    monkeypatch.setattr(xla_options, "_MOST_CACHED_BYTES", 250)
    (tmp_path / "directory").mkdir()
    for age, name in enumerate(("new", "middle", "old", "oldest")):
        (tmp_path / name).write_bytes(bytes(100))
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    os.utime(tmp_path / "oldest", (1e9, 1e8))  # written long ago, and read just now
    xla_options.keep_compiled_programs()
    assert {path.name for path in tmp_path.iterdir()} == {"new", "oldest", "directory"}


COUNTING = """
import collections, sys
import jax
from configs import smoke
from jevb_jax import commands
from jevb_jax.evaluation import evaluate as whole
programs, part = collections.Counter(), ["train"]
def count(event, _, fun_name="", **__):
    if event.endswith("backend_compile_duration"):
        programs[part[0], fun_name] += 1
jax.monitoring.register_event_duration_secs_listener(count)
evaluate = whole.evaluate
def of_evaluation(*args, **keywords):
    part[0] = "evaluation"
    return evaluate(*args, **keywords)
whole.evaluate = of_evaluation
commands.train(smoke.get_config(), sys.argv[1])
for (part, name), number in sorted(programs.items(), key=str):
    print("COUNTED", part, number, name)
"""


@pytest.mark.slow
@pytest.mark.nightly
def test_a_run_compiles_few_programs(tmp_path):
    # Each costs a user tens of milliseconds at the least. Most were single operations of NumPy's size.
    ended = subprocess.run(
        [sys.executable, "-c", COUNTING, str(tmp_path / "run")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
        timeout=500,
    )
    lines = [line.split() for line in ended.stdout.splitlines() if line.startswith("COUNTED")]
    of_part = {
        part: {name: int(number) for _, one, number, name in lines if one == part}
        for part in ("train", "evaluation")
    }
    assert sum(of_part["train"].values()) <= 18, of_part["train"]
    assert sum(of_part["evaluation"].values()) <= 55, of_part["evaluation"]
    assert of_part["evaluation"]["jit(forward)"] == 2
    # Scores of the image, scores of its views, scores with labels; those that are saved are the same.
    assert of_part["evaluation"]["jit(_score_group)"] == 3
