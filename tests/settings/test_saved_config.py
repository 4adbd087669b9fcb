"""Saved configs: what is written is read again, and what a later version wrote is refused."""

import json

import pytest

from configs import default
from jevb_jax.settings.saved_config import VERSION, saved_config, versioned
from jevb_jax.training.experiment import to_json_values


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
