"""The benchmarks' own arithmetic: turns, medians, tables."""

import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks import measure, memory


def test_candidates_take_turns_and_warm_up_rounds_do_not_count():
    calls, seconds = [], iter([99.0, 99.0, 1.0, 10.0, 2.0, 5.0, 30.0, 20.0])

    def timer(name):
        def call():
            calls.append(name)
            return next(seconds)

        return call

    timings = measure.interleave({"a": timer("a"), "b": timer("b")}, num_rounds=3)
    assert "".join(calls) == "abababab"
    assert timings["a"].seconds == (1.0, 2.0, 30.0)
    assert timings["a"].median == 2.0
    assert timings["b"].median == 10.0
    # The median of 0.1, 0.4 and 1.5: not the ratio of the medians, 0.2.
    assert timings["a"].ratio_to(timings["b"]) == pytest.approx(0.4)


def test_interleave_refuses_no_round():
    with pytest.raises(ValueError, match="num_rounds"):
        measure.interleave({}, num_rounds=0)


def test_cost_of_a_product_of_matrices():
    shapes = jax.ShapeDtypeStruct((8, 16), jnp.float32), jax.ShapeDtypeStruct((16, 4), jnp.float32)
    assert measure.counted_flops(jnp.matmul, *shapes) == 2 * 8 * 16 * 4
    compiled = jax.jit(jnp.matmul).lower(*shapes).compile()
    assert measure.counted_bytes(compiled) >= 4 * (8 * 16 + 16 * 4 + 8 * 4)


def test_operations_are_counted_without_computing():
    def twice(key, x):
        return jax.random.normal(key, ()) + x @ x

    shape = jax.ShapeDtypeStruct((50_000, 50_000), jnp.float32)
    for function in (twice, jax.jit(twice, compiler_options={"xla_embed_ir_in_executable": True})):
        flops = measure.counted_flops(function, jax.random.key(0), shape)
        assert flops == pytest.approx(2 * 50_000**3, rel=1e-4)
    measure.check_platform("cpu", "a peer")
    with pytest.raises(ValueError, match="a peer computes on gpu and jevb_jax on cpu"):
        measure.check_platform("gpu", "a peer")


def test_powers_of_settings():
    rows = [
        {"a": a, "b": b, "t": 3.0 * a**0.7 * b**-1.5} for a, b in ((1, 1), (4, 1), (1, 9), (5, 7))
    ]
    assert measure.exponents(rows, ("a", "b"), "t") == pytest.approx({"a": 0.7, "b": -1.5})
    assert measure.exponents(rows[:2], ("a",), "t") == pytest.approx({"a": 0.7})
    for few, names in ((rows[:2], ("a", "b")), (rows[:1], ("a",)), (rows[::2], ("a",))):
        with pytest.raises(ValueError, match="must vary independently"):
            measure.exponents(few, names, "t")


def test_growth_by_hand():
    rows = [
        {"batch": batch, "temporary, MiB": 3.0 * batch, "step, s": 0.5 * batch**2}
        for batch in (2, 4, 16)
    ]
    found = memory.growth("batch", rows)
    assert [found[name] for name in ("setting", "from", "to")] == ["batch", 2, 16]
    assert found["memory's exponent"] == pytest.approx(1)
    assert found["slope, KiB a unit"] == pytest.approx(3 * 1024)
    assert found["time's exponent"] == pytest.approx(2)
    assert [found["memory, last / first"], found["time, last / first"]] == [8, 64]


def test_table_and_files(tmp_path):
    rows = [{"": "x", "views/s": 1234.5, "ratio": 0.25}, {"": "y", "views/s": None, "ratio": 1e-5}]
    text = measure.write_results(
        tmp_path / "new", "speed", measure.environment("cmd", {"size": 3}), {"Speed": rows}
    )
    assert "* command: cmd" in text
    assert "### Speed\n\n|  | views/s | ratio |\n|---|---|---|\n| x | 1,234 | 0.250 |" in text
    assert "| y |  | 1.0e-05 |" in text
    assert (tmp_path / "new" / "speed.md").read_text() == text
    written = json.loads((tmp_path / "new" / "speed.json").read_text())
    assert written["tables"]["Speed"] == rows
    assert written["settings"] == {"size": "3"}
    assert written["jax"] == jax.__version__


def test_table_refuses_no_rows_and_ragged_ones():
    with pytest.raises(ValueError, match="at least one row"):
        measure.markdown_table([])
    with pytest.raises(ValueError, match="columns"):
        measure.markdown_table([{"a": 1}, {"b": 1}])


@pytest.mark.parametrize("batches", [["8"], ["8", "16"]])
def test_memory_writes_a_table_of_growth_where_there_is_any(batches, tmp_path, monkeypatch, capsys):
    def measure_steps(_, settings):
        return [{**one, "memory, MB": one["batch"], "step, ms": one["batch"]} for one in settings]

    one = ["--D=4", "--samples=1", "--small_crops=0", f"--out={tmp_path}"]
    monkeypatch.setattr("sys.argv", ["memory", "--batch", *batches, *one])
    monkeypatch.setattr(memory, "measure_steps", measure_steps)
    monkeypatch.setattr(memory, "growth", lambda name, rows: {"of": name, "rows": len(rows)})
    memory.main()
    assert ("Growth" in capsys.readouterr().out) == (len(batches) > 1)
    assert (tmp_path / "memory.md").exists()
