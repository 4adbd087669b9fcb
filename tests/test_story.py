"""The pictures of examples/story.py, from a training of seconds."""

import pytest
from PIL import Image

from examples import story


@pytest.mark.slow
@pytest.mark.nightly
def test_tells_the_story(tmp_path, monkeypatch):
    monkeypatch.setattr(story, "CORRUPTIONS", ("rotation", "contrast"))  # each compiles by itself
    monkeypatch.setattr(story, "SEVERITIES", (5,))
    story.main([f"--out={tmp_path}", "--num_epochs=2"])
    names = [path.name for path in sorted(tmp_path.glob("*.png"))]
    assert names == [
        "1_views.png",
        "2_training.png",
        "3_map.png",
        "4_uncertainty.png",
        "5_detection.png",
    ]
    for name in names:
        with Image.open(tmp_path / name) as image:
            assert image.width > 500
            assert len(set(image.convert("L").tobytes())) > 10  # not a blank page
