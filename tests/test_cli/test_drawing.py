# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
import numpy as np
import pytest

pytest.importorskip('cv2')
from mmvil.cli.drawing import write_legend  # noqa: E402


def test_legend_names_the_classes_and_keeps_the_size():
    frame = np.full((200, 300, 3), 128, np.uint8)
    color = (10, 200, 30)
    drawn = write_legend(frame, [('sky', color), ('grass', (200, 10, 30))])
    assert drawn.shape == frame.shape
    assert (drawn == color).all(-1).sum() > 30
    assert (drawn[:100] == 128).all() and (frame == 128).all()
    tiny = write_legend(frame[:16, :16], [('a very long name of a class', color)] * 9)
    assert tiny.shape == (16, 16, 3)
