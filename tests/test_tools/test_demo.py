# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Videos and folders in tools/demo.py; single images: test_train_and_test.py."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from test_export import CLASSIFIER, SEGMENTOR, save_random_model
from tool_process import call_tool

from mmvil.cli.errors import UserError

cv2 = pytest.importorskip('cv2')
DEMO = Path(__file__).parents[2] / 'tools/demo.py'

SEGMENTOR_CONFIG = (
    SEGMENTOR
    + """
test_dataloader = dict(dataset=dict(type='BaseSegDataset'))
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='PackSegInputs')]
test_dataloader['dataset']['pipeline'] = test_pipeline
visualizer = dict(type='SegLocalVisualizer', name='visualizer')
"""
)
CLASSIFIER_CONFIG = (
    CLASSIFIER
    + """
test_pipeline = [
    dict(type='LoadImageFromFile'), dict(type='Resize', scale=(32, 32)), dict(type='PackInputs')]
test_dataloader = dict(dataset=dict(type='CustomDataset', pipeline=test_pipeline))
"""
)


def write_video(path, frames, size=(48, 64)):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*'MJPG'), 10, size[::-1])
    assert writer.isOpened()
    for i in range(frames):
        writer.write(np.full((*size, 3), 20 * i, np.uint8))
    writer.release()


def read_video(path):
    capture = cv2.VideoCapture(str(path))
    frames = []
    while capture.grab():
        frames.append(capture.retrieve()[1])
    return frames, capture.get(cv2.CAP_PROP_FPS)


def test_demo_draws_every_nth_frame_of_a_video(tmp_path):
    config, checkpoint = save_random_model(tmp_path, SEGMENTOR_CONFIG)
    video = tmp_path / 'drive.avi'
    write_video(video, frames=9)
    said = call_tool(
        DEMO, video, config, checkpoint, '--out-dir', tmp_path / 'out', '--every', 2, '--opacity', 1
    )
    assert '5 frames' in said and 'per second' in said
    frames, fps = read_video(tmp_path / 'out/drive.mp4')
    assert len(frames) == 5 and frames[0].shape == (48, 64, 3)
    assert fps == pytest.approx(5)


@pytest.mark.parametrize(
    'option, words',
    [
        (('--opacity', 2), 'argument --opacity: must be 0 to 1, but is 2'),
        (('--out-dir', DEMO), '--out-dir must be a folder, but'),
    ],
)
def test_demo_rejects_what_it_cannot_draw_with(option, words):
    said = call_tool(DEMO, 'a.jpg', 'config.py', 'model.pth', *option, status=2)
    assert words in said


def test_demo_captions_a_video_of_a_classifier(tmp_path):
    backbone = dict(arch=dict(embed_dims=16, depth=2), img_size=32, out_type='bilateral_concat')
    text = CLASSIFIER_CONFIG.format(backbone=backbone, width=32, classes=3)
    config, checkpoint = save_random_model(tmp_path, text)
    video = tmp_path / 'drive.avi'
    write_video(video, frames=6)
    said = call_tool(
        DEMO, video, config, checkpoint, '--out-dir', tmp_path / 'out', '--max-frames', 2
    )
    assert '2 frames' in said
    frames, _ = read_video(tmp_path / 'out/drive.mp4')
    assert len(frames) == 2
    assert frames[0].max() > 100  # the caption on a black frame


def test_demo_names_and_colors_outputs_beyond_the_classes(tmp_path):
    text = SEGMENTOR_CONFIG.replace('num_classes=3', 'num_classes=5')
    config, checkpoint = save_random_model(tmp_path, text)
    weights = torch.load(checkpoint)
    weights['state_dict']['decode_head.conv_seg.bias'][4] = 99.0
    torch.save(weights, checkpoint)
    cv2.imwrite(str(tmp_path / 'a.png'), np.zeros((48, 64, 3), np.uint8))
    said = call_tool(DEMO, tmp_path / 'a.png', config, checkpoint, '--out-dir', tmp_path / 'out')
    assert said.rstrip().endswith('a.png: class 4 100%')


def test_demo_writes_a_picture_for_each_image_and_over_none(tmp_path):
    draw_images = runpy.run_path(str(DEMO))['draw_images']
    images = [tmp_path / name for name in ('a.jpg', 'a.tif', 'b.png')]

    def draw(image):
        return np.full((4, 4, 3), images.index(image), np.uint8), 'sky'

    draw_images(images, lambda image: image, draw, tmp_path / 'out')
    found = {path.name: cv2.imread(str(path))[0, 0, 0] for path in (tmp_path / 'out').iterdir()}
    assert found == {'a.jpg.png': 0, 'a.tif.png': 1, 'b.png': 2}
    with pytest.raises(UserError, match='b.png is the input; choose another --out-dir'):
        draw_images(images, lambda image: image, draw, tmp_path)
    assert not list(tmp_path.glob('*.png'))


def test_demo_reports_invalid_inputs(tmp_path):
    config, checkpoint = save_random_model(tmp_path, SEGMENTOR_CONFIG)
    said = call_tool(DEMO, tmp_path / 'none.mp4', config, checkpoint, status=2)
    assert 'error: video not found' in said
    (tmp_path / 'broken.mp4').write_text('no video')
    said = call_tool(DEMO, tmp_path / 'broken.mp4', config, checkpoint, status=2)
    assert 'error: cannot open the video' in said
