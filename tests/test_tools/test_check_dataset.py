# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""check_dataset.py finds what is wrong with the files of a dataset, and names them."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from mmcv.transforms import TRANSFORMS, BaseTransform
from PIL import Image
from tool_process import call_tool

from mmvil.cli.config import load_config, set_data_root
from mmvil.cli.dataset_check import check_dataset

ROOT = Path(__file__).parents[2]
CHECK = ROOT / 'tools/check_dataset.py'
CAMVID = ROOT / 'configs/upernet_vil_t_camvid.py'


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array.astype(np.uint8)).save(path)


@pytest.fixture
def camvid(tmp_path):
    """A sound dataset in the layout of CamVid: 4 training images, 1 validation image."""
    pytest.importorskip('mmseg')
    rng = np.random.default_rng(0)
    for split, number in (('training', 4), ('validation', 1)):
        for i in range(number):
            write(tmp_path / f'images/{split}/{i}.jpg', rng.integers(0, 255, (48, 64, 3)))
            write(tmp_path / f'annotations/{split}/{i}.png', rng.integers(0, 12, (48, 64)))
    return tmp_path


def check(config, root, *options, status):
    return call_tool(CHECK, config, '--data-root', root, '-j', 1, *options, status=status)


def test_check_dataset_finds_each_kind_of_bad_file(camvid):
    images, maps = camvid / 'images/training', camvid / 'annotations/training'
    rng = np.random.default_rng(0)
    cut = images / '0.jpg'
    cut.write_bytes(cut.read_bytes()[:-500])
    (images / '1.jpg').write_bytes(b'')
    (images / '2.jpg').write_text('<html>not found</html>')
    (maps / '3.png').unlink()
    for i in range(10, 15):
        write(images / f'{i}.jpg', rng.integers(0, 255, (48, 64, 3)))
    write(maps / '10.png', rng.integers(0, 12, (24, 32)))  # half the size
    write(maps / '11.png', rng.integers(0, 12, (48, 64, 3)))  # colors
    write(maps / '12.png', np.full((48, 64), 12))  # 1 to 11 are classes
    palette = Image.fromarray(rng.integers(0, 12, (48, 64)).astype(np.uint8), mode='P')
    palette.putpalette(list(range(48)))
    palette.save(maps / '13.png')  # fine
    Image.fromarray(np.full((48, 64), 300, np.uint16)).save(maps / '14.png')
    turned = Image.Exif()
    turned[0x0112] = 6  # the orientation: a quarter turn
    Image.new('RGB', (64, 48)).save(images / '15.jpg', exif=turned)
    write(maps / '15.png', np.zeros((48, 64)))
    (images / '16.jpg').write_bytes(cv2.imencode('.png', np.zeros((48, 64, 3), np.uint16))[1])
    write(maps / '16.png', np.zeros((48, 64)))
    write(maps / 'alone.png', np.zeros((48, 64)))

    said = check(CAMVID, camvid, '--out', camvid / 'new/found.txt', status=1)
    found = set((camvid / 'new/found.txt').read_text().splitlines())
    assert found == {
        f'{images}/0.jpg: image cut off',
        f'{images}/1.jpg: image empty',
        f'{images}/2.jpg: image damaged: no image format is recognized',
        f'{maps}/3.png: annotation missing',
        f'{maps}/10.png: annotation has another size than its image',
        f'{maps}/11.png: annotation has colors (mode RGB), not one label per pixel; declare '
        'the colors of the classes (docs/own_data.md)',
        f'{maps}/12.png: annotation has labels that less 1 (reduce_zero_label) are none of the 11 '
        'classes: [12]',
        f'{maps}/14.png: annotation has labels beyond 255, which loading truncates; declare '
        'the values of the classes (docs/own_data.md): [300]',
        f'{maps}/15.png: annotation has height and width of its image swapped: images, but not '
        'annotations, are loaded with their EXIF orientation',
        f'{images}/16.jpg: image has 16 or 32 bits, but the config loads 8 (docs/multiband.md)',
        f'{maps}/alone.png: annotation without an image',
    }
    assert 'Problems: 11.' in said and f'{maps}/12.png: [12]' in said


def test_check_dataset_counts_classes_and_passes_a_sound_dataset(camvid):
    for path in camvid.rglob('*.png'):  # 0 is no label, 1 and 2 are sky and building
        write(path, np.repeat([[0, 1, 2, 2]], 48, 0).repeat(16, 1))
    said = check(CAMVID, camvid, status=0)
    assert 'No problems found' in said
    assert '33.33%      4 sky' in said and '66.67%      4 building' in said
    assert 'never occur (9): pole, road' in said


def test_check_dataset_of_a_split_that_shows_background_only(camvid, tmp_path):
    config = tmp_path / 'config.py'  # 0 is the first class, 255 no label
    config.write_text(
        f"_base_ = '{CAMVID}'\n"
        'train_dataloader = dict(dataset=dict(reduce_zero_label=False))\n'
        'val_dataloader = dict(dataset=dict(reduce_zero_label=False))\n'
        'test_dataloader = val_dataloader\n'
    )
    for path in camvid.rglob('*.png'):
        labels = [0, 1, 2, 255] if 'training' in str(path) else [0, 255]
        write(path, np.resize(labels, (48, 64)))
    assert 'No problems found' in check(config, camvid, status=0)
    said = check(config, camvid, '--splits', 'val', status=1)
    assert 'annotations have only the labels 0 and 255' in said


def test_check_dataset_without_any_label(camvid):
    for path in (camvid / 'annotations/training').iterdir():
        write(path, np.zeros((48, 64)))  # reduce_zero_label ignores 0
    said = check(CAMVID, camvid, status=1)
    assert 'Problems: 1.' in said and 'every pixel of every annotation is ignored' in said


@TRANSFORMS.register_module()
class DropFirstForTest(BaseTransform):
    """Drop the first image of the training, as a crop without objects is dropped."""

    drops = True

    def transform(self, results):
        dropped, self.drops = self.drops, False
        return None if dropped else results


def test_check_dataset_accepts_randomly_dropped_images(camvid):
    cfg = load_config(str(CAMVID), {})
    set_data_root(cfg, str(camvid))
    dataset = cfg.train_dataloader.dataset
    dataset.pipeline.insert(2, dict(type='DropFirstForTest'))
    assert check_dataset(dataset, cfg)[2] == []
    for path in sorted((camvid / 'images/training').iterdir())[1:]:
        path.unlink()
        (camvid / f'annotations/training/{path.stem}.png').unlink()
    (problem,) = check_dataset(dataset, cfg)[2]
    assert problem.what == 'image is dropped by the pipeline of the config'


def test_check_dataset_rejects_a_model_for_other_classes(camvid):
    options = ('--splits', 'val', '-j', 1, '--cfg-options', 'model.decode_head.num_classes=12')
    said = check(CAMVID, camvid, *options, status=1)
    assert 'num_classes=12 in UPerHead, but the dataset has 11' in said


def test_check_dataset_of_a_classifier_reads_every_image(tmp_path):
    pytest.importorskip('mmpretrain')
    dataset = "dict(dataset=dict(type='CustomDataset', data_root='data', data_prefix='{}'))"
    config = tmp_path / 'config.py'
    config.write_text(
        "default_scope = 'mmpretrain'\n"
        "rpn_head = dict(type='CascadeRPNHead', num_classes=1)  # objects, of any class\n"
        "model = dict(head=dict(type='LinearClsHead', num_classes=2), rpn_head=rpn_head)\n"
        f'train_dataloader = {dataset.format("train")}\nval_dataloader = {dataset.format("val")}\n'
    )
    for split in ('train', 'val'):
        for name in ('cat', 'dog'):
            image = np.random.default_rng(0).integers(0, 255, (40, 40, 3))
            write(tmp_path / f'{split}/{name}/a.jpg', image)
    said = check(config, tmp_path, status=0)
    assert 'train: 2 images, 2 classes' in said and '50.00%      1 dog' in said
    broken = tmp_path / 'train/dog/a.jpg'
    broken.write_bytes(broken.read_bytes()[:-500])
    said = check(config, tmp_path, status=1)
    assert '1 × image cut off' in said and str(broken) in said


def test_missing_dataset_is_one_line(tmp_path):
    pytest.importorskip('mmseg')
    said = check(CAMVID, tmp_path / 'nowhere', status=2)
    assert 'error: data not found' in said and 'Traceback' not in said
