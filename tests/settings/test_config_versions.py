"""Saved configs: what is written is read again, and what a later version wrote is refused."""

import json

import pytest

from configs import default, finetune_digits
from jevb_jax.settings.config_versions import VERSION, saved_config, saved_finetune, versioned
from jevb_jax.training.experiment import to_json_values
from jevb_jax.training.resume import refused_changes


def test_a_config_is_written_with_its_version_and_read_without_it():
    config = to_json_values(default.get_config())
    written = json.loads(json.dumps(versioned(config)))
    assert written["version"] == VERSION
    assert saved_config(written, "config.json") == config
    assert saved_config(config, "config.json") == config  # from before there were versions


def test_a_config_from_before_pictures_had_settings_reads_them_as_then():
    config = to_json_values(default.get_config())
    for name in ("exif", "skip_broken", "labels", "num_channels", "dtype", "value_range"):
        del config["data"][name]
    read = saved_config(config, "config.json")["data"]
    assert (read["exif"], read["skip_broken"], read["labels"]) == ("apply", "refuse", "given")
    assert (read["num_channels"], read["dtype"], read["value_range"]) == (0, "uint8", [])


@pytest.mark.parametrize("version", [VERSION + 1, "1", 1.5, None])
def test_another_version_is_refused_by_name(version):
    config = to_json_values(default.get_config()) | {"version": version}
    with pytest.raises(ValueError, match=r"runs/x/config\.json is of version .*update this one"):
        saved_config(config, "runs/x/config.json")


def test_runs_from_before_there_were_writers_had_events_where_they_could():
    for config, complete in (
        (default.get_config(), saved_config),
        (finetune_digits.get_config("full"), saved_finetune),
    ):
        now = to_json_values(config)
        older = {**now, "train": {k: v for k, v in now["train"].items() if k != "writers"}}
        assert complete(older, "config.json") == now
        assert now["train"]["writers"] == ["auto"]
    asked = to_json_values(default.get_config())
    asked["train"]["writers"] = ["wandb"]
    assert refused_changes(to_json_values(default.get_config()), asked) == {}
