# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Four bands of 16 bits, from RGB weights, through every tool: the config is that of the docs."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image
from tool_process import call_tool

from mmvil import VisionLSTM
from mmvil.checkpoints import adapt_input_channels

pytest.importorskip('mmseg')
tifffile = pytest.importorskip('tifffile', reason='multi-band TIFF needs tifffile')
ROOT = Path(__file__).parents[2]
TOOLS = ROOT / 'tools'

SMALL = """
model = dict(
    data_preprocessor=dict(size=(48, 64)),
    backbone=dict(
        init_cfg=dict(checkpoint='{rgb}'),
        arch=dict(_delete_=True, embed_dims=16, depth=4),
        img_size=(48, 64),
        out_indices=(0, 1, 2, 3),
    ),
    decode_head=dict(in_channels=[16] * 4, channels=16),
    auxiliary_head=dict(in_channels=16, channels=16),
    test_cfg=dict(mode='whole', _delete_=True),
)
train_dataloader = dict(batch_size=2, dataset=dict(data_root='{data}'))
val_dataloader = dict(dataset=dict(data_root='{data}'))
test_dataloader = val_dataloader
train_cfg = dict(max_iters=2, val_interval=2)
param_scheduler = []
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=2))
randomness = dict(seed=0)
"""
WRONG = ('--cfg-options', 'model.backbone.in_channels=3')


def write_tiff(path, image):
    tifffile.imwrite(path, image, photometric='minisblack', planarconfig='contig')


@pytest.fixture(scope='module')
def fields(tmp_path_factory):
    """The config of the docs over a small model, the images, and weights of an RGB backbone."""
    folder = tmp_path_factory.mktemp('multiband')
    rng = np.random.default_rng(0)
    images = []
    for split, number in (('training', 4), ('validation', 2)):
        for kind in ('images', 'annotations'):
            (folder / f'data/{kind}/{split}').mkdir(parents=True)
        for i in range(number):
            labels = np.kron(rng.integers(0, 12, (3, 4)), np.ones((16, 16))).astype(np.uint8)
            image = labels[..., None] * [100, 300, 20, 5] + rng.integers(0, 900, (48, 64, 4))
            image = image.astype(np.uint16) + 10000
            tifffile.imwrite(
                folder / f'data/images/{split}/{i}.tif', image, photometric='minisblack'
            )
            Image.fromarray(labels).save(folder / f'data/annotations/{split}/{i}.png')
            images += [image] if split == 'training' else []

    documented = re.search(
        r'```python\n(_base_.+?)```', (ROOT / 'docs/multiband.md').read_text(), re.S
    )
    (folder / 'documented.py').write_text(documented[1].replace("'./", f"'{ROOT}/configs/"))
    config = folder / 'config.py'
    small = SMALL.format(data=folder / 'data', rgb=folder / 'backbone.pth')
    config.write_text("_base_ = 'documented.py'\n" + small)
    torch.manual_seed(0)
    rgb = VisionLSTM(arch=dict(embed_dims=16, depth=4), img_size=(48, 64))
    torch.save(rgb.state_dict(), folder / 'backbone.pth')
    whole = {f'backbone.{name}': 2 * value for name, value in rgb.state_dict().items()}
    torch.save(dict(state_dict=whole), folder / 'whole.pth')
    return config, np.stack(images), folder


@pytest.fixture(scope='module')
def trained(fields):
    """A checkpoint that was trained from the RGB backbone, and the log of its training."""
    config, _, folder = fields
    log = call_tool(TOOLS / 'train.py', config, '--work-dir', folder / 'work')
    return folder / 'work/iter_2.pth', log


def test_training_starts_from_rgb_weights_by_init_cfg(trained):
    checkpoint, log = trained
    assert 'from 3 to 4 input channels' in log and 'mIoU' in log
    state = torch.load(checkpoint, weights_only=False)['state_dict']
    assert state['backbone.patch_embed.projection.weight'].shape[1] == 4


def test_training_starts_from_rgb_weights_by_load_from(fields, tmp_path):
    config, _, folder = fields
    options = (f'load_from={folder / "whole.pth"}', 'optim_wrapper.optimizer.lr=0')
    log = call_tool(
        *(TOOLS / 'train.py', config, '--work-dir', tmp_path, '--no-validate'),
        *('--cfg-options', *options),
    )
    assert 'Adapted backbone.patch_embed.projection.weight from 3 to 4 input channels' in log
    name = 'backbone.patch_embed.projection.weight'
    state = torch.load(tmp_path / 'iter_2.pth', weights_only=False)['state_dict']
    rgb = torch.load(folder / 'whole.pth', weights_only=True)['state_dict']
    torch.testing.assert_close(state[name], adapt_input_channels(rgb[name], 4))


def test_a_trained_model_is_not_adapted_to_mistyped_channels(fields, trained, tmp_path):
    config, checkpoint = fields[0], trained[0]
    calls = [
        (TOOLS / 'test.py', config, checkpoint, '--work-dir', tmp_path),
        (TOOLS / 'train.py', config, '--resume', checkpoint, '--work-dir', tmp_path),
        (TOOLS / 'demo.py', fields[2] / 'data/images/validation', config, checkpoint),
    ]
    for call in calls:
        said = call_tool(*call, *WRONG, status=2)
        assert 'does not fit the config' in said and '(16, 4, 16, 16) in the file' in said
    said = call_tool(
        *(TOOLS / 'train.py', config, '--work-dir', tmp_path / 'new', *WRONG),
        f'load_from={checkpoint}',
        status=2,
    )
    assert 'error: The checkpoint has 4 input channels' in said


def test_training_reports_statistics_of_other_images(fields, tmp_path):
    statistics = [f'model.data_preprocessor.{name}=[1,2,3]' for name in ('mean', 'std')]
    options = ('--work-dir', tmp_path, '--cfg-options', *statistics)
    said = call_tool(TOOLS / 'train.py', fields[0], *options, status=2)
    line = 'error: images have 4 channels, but mean of the data_preprocessor has 3 values'
    assert line in said and 'Traceback' not in said


def test_trained_model_is_tested_shown_and_exported(fields, trained, tmp_path):
    config, checkpoint, images = fields[0], trained[0], fields[2] / 'data/images/validation'
    said = call_tool(TOOLS / 'test.py', config, checkpoint, '--work-dir', tmp_path)
    assert 'mIoU' in said

    shown = ('--out-dir', tmp_path / 'shown', '--no-legend', '--opacity', 0)
    call_tool(TOOLS / 'demo.py', images, config, checkpoint, *shown)
    drawn = np.asarray(Image.open(tmp_path / 'shown/0.png'))
    assert drawn.shape == (48, 64, 3) and drawn.std() > 30  # 16 bits, scaled
    bands = tifffile.imread(images / '0.tif')[..., :3]  # first band red
    for i in range(3):
        assert np.corrcoef(drawn[..., i].ravel(), bands[..., i].ravel())[0, 1] > 0.99

    for script, out in (('look_inside.py', 'pca.png'), ('plot_predictions.py', 'predictions.png')):
        arguments = ('pca', images) if script == 'look_inside.py' else ()
        call_tool(
            *(TOOLS / 'visualization' / script, *arguments, config, checkpoint),
            *('--out', tmp_path / out),
        )
        assert np.asarray(Image.open(tmp_path / out)).std() > 0

    said = call_tool(TOOLS / 'test.py', config, checkpoint, '--show-dir', tmp_path, status=2)
    assert 'error: --show and --show-dir draw photographs only' in said and 'Traceback' not in said

    if hasattr(torch.compiler, 'is_exporting'):
        out = tmp_path / 'model.pt2'
        said = call_tool(TOOLS / 'deployment/export.py', config, checkpoint, '--out', out)
        assert '1x4x48x64' in said and '(batch, 4, height, width)' in said
        scores = torch.export.load(out).module()(torch.rand(1, 4, 50, 70) * 20000)
        assert scores.shape == (1, 11, 50, 70)


# ------------------------------------------------------------------------------------- statistics

STATISTICS = TOOLS / 'analysis_tools/channel_statistics.py'


def printed(said):
    """The settings that the tool prints, as a config reads them."""
    line = re.search('^data_preprocessor=.+', said, re.MULTILINE)[0]
    return Config.fromstring(line, '.py').data_preprocessor


def test_channel_statistics_are_those_of_all_pixels(fields):
    config, images, _ = fields
    said = call_tool(STATISTICS, config, '-j', 2, '--num', 7)  # more than there are
    found = printed(said)
    assert '4 of 4 images, 12288 pixels, 4 channels' in said
    np.testing.assert_allclose(found['mean'], images.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(found['std'], images.std((0, 1, 2)), rtol=1e-5)
    assert found['type'].endswith('MultibandSegDataPreProcessor')


def test_channel_statistics_of_photographs_are_in_the_order_of_the_config(fields, tmp_path):
    folder = tmp_path / 'images/training'
    folder.mkdir(parents=True)
    (tmp_path / 'annotations/training').mkdir(parents=True)
    rgb = np.random.default_rng(0).integers(0, 255, (48, 64, 3)).astype(np.uint8) // [1, 2, 4]
    Image.fromarray(rgb.astype(np.uint8)).save(folder / 'a.jpg', quality=100, subsampling=0)
    Image.new('L', (64, 48)).save(tmp_path / 'annotations/training/a.png')
    said = call_tool(STATISTICS, ROOT / 'configs/upernet_vil_t_camvid.py', '--data-root', tmp_path)
    assert 'type' not in printed(said)
    np.testing.assert_allclose(printed(said)['mean'], rgb.mean((0, 1)), rtol=0.02)


@pytest.mark.parametrize(
    'image, message',
    [
        (None, 'a.tif: '),
        (np.full((48, 64, 4), np.nan, np.float32), 'a.tif has values that are not finite'),
        (np.ones((48, 64, 5), np.uint16), 'a.tif has 5 channels, the images before have 4'),
    ],
)
def test_channel_statistics_ignore_nothing(fields, tmp_path, image, message):
    for kind in ('images', 'annotations'):
        (tmp_path / kind / 'training').mkdir(parents=True)
    for name in ('0', 'a'):
        file = tmp_path / f'images/training/{name}.tif'
        write_tiff(file, fields[1][0] if name == '0' or image is None else image)
        Image.new('L', (64, 48)).save(tmp_path / f'annotations/training/{name}.png')
    if image is None:
        file.write_text('no image')
    said = call_tool(STATISTICS, fields[0], '--data-root', tmp_path, '-j', 1, status=2)
    assert message in said and 'Traceback' not in said


def test_channel_statistics_do_not_cancel():
    sys.path.insert(0, str(STATISTICS.parent))
    try:
        from channel_statistics import merge
    finally:
        sys.path.remove(str(STATISTICS.parent))

    rng = np.random.default_rng(0)
    images = [1e8 + rng.standard_normal((2, 5 * size)) for size in (3, 40, 7)]
    found = [(image.shape[1], image.mean(1), image.var(1)) for image in images]
    mean, std = merge(*zip(*found))
    pixels = np.concatenate(images, axis=1)
    np.testing.assert_allclose(mean, pixels.mean(1), rtol=1e-12)
    np.testing.assert_allclose(std, pixels.std(1), rtol=1e-6)


# ---------------------------------------------------------------------------------- check_dataset


def test_check_dataset_passes_images_that_fit(fields):
    assert 'No problems found' in call_tool(TOOLS / 'check_dataset.py', fields[0], '-j', 1)


@pytest.mark.parametrize(
    'option, message',
    [
        ('model.backbone.in_channels=3', '4 channels after .* the backbone has in_channels=3'),
        ('model.data_preprocessor.mean=[1.,2.,3.]', 'mean of the data_preprocessor has 3 values'),
    ],
)
def test_check_dataset_reports_mismatched_channels(fields, option, message):
    options = ('-j', 1, '--splits', 'val', '--cfg-options', option)
    said = call_tool(TOOLS / 'check_dataset.py', fields[0], *options, status=1)
    assert re.search(message, said)


def test_check_dataset_reports_transforms_for_rgb_only(fields, tmp_path):
    config = tmp_path / 'config.py'
    config.write_text(
        f"_base_ = '{fields[0]}'\n"
        'steps = [*_base_.train_pipeline]\n'
        "steps.insert(2, dict(type='Resize', scale=(64, 48), backend='pillow'))\n"
        'train_dataloader = dict(dataset=dict(pipeline=steps))\n'
    )
    said = call_tool(TOOLS / 'check_dataset.py', config, '-j', 1, '--splits', 'train', status=1)
    assert 'image cannot pass the pipeline of the config' in said
