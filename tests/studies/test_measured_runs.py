"""The command line that measures runs."""

from studies import measured_runs


def test_rows_of_every_run_are_one_table(tmp_path, capsys):
    def measure(directory):
        return [{"run": directory, "far": 0.123456, "near": 1}, {"run": directory, "far": 2.0}]

    measured_runs.write_table(
        measure,
        ("run", "near"),
        "table.csv",
        about="Help.",
        arguments=["--runs", "a", "b", f"--out={tmp_path / 'new'}"],
    )
    expected = "run,near,far\na,1,0.1235\na,,2.0000\nb,1,0.1235\nb,,2.0000\n"
    assert (tmp_path / "new" / "table.csv").read_text() == expected
    assert capsys.readouterr().out == expected
