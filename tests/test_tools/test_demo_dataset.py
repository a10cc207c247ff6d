# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image

pytest.importorskip('skimage')
pytest.importorskip('sklearn')

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / 'tools/dataset_converters/make_demo_dataset.py'
SIZE = (96, 64)


def load_script():
    spec = importlib.util.spec_from_file_location('make_demo_dataset', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def demo():
    return load_script()


@pytest.fixture(scope='module')
def data(demo, tmp_path_factory):
    out = tmp_path_factory.mktemp('demo')
    demo.make_dataset(out, train=12, val=4, size=SIZE, seed=0)
    return out


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob('*.*')}


def test_demo_dataset_has_ade20k_layout(data):
    for split, count in (('training', 12), ('validation', 4)):
        images = sorted((data / 'images' / split).glob('*.jpg'))
        labels = sorted((data / 'annotations' / split).glob('*.png'))
        assert len(images) == count
        assert [path.stem for path in images] == [path.stem for path in labels]
        for image, label in zip(images, labels):
            assert Image.open(image).size == Image.open(label).size == SIZE
            assert Image.open(image).mode == 'RGB'
            assert Image.open(label).mode == 'L'


def test_demo_dataset_labels_cover_all_classes_and_ignore_little(demo, data):
    labels = np.stack([np.array(Image.open(p)) for p in data.glob('annotations/*/*.png')])
    assert set(np.unique(labels)) == set(range(len(demo.CLASSES) + 1))
    assert 0 < (labels == demo.IGNORED).mean() < 0.1


def test_demo_dataset_has_instances_that_agree_with_the_labels(demo, data):
    for split, count in (('training', 12), ('validation', 4)):
        coco = json.loads((data / f'annotations/instances_{split}.json').read_text())
        assert [image['id'] for image in coco['images']] == list(range(count))
        names = {category['id']: category['name'] for category in coco['categories']}
        assert tuple(names.values()) == demo.OBJECTS
        ids = [instance['id'] for instance in coco['annotations']]
        assert len(ids) == len(set(ids)) >= 2 * count
        for image in coco['images']:
            assert (data / f'images/{split}' / image['file_name']).exists()
            path = data / f'annotations/{split}' / image['file_name']
            labels = np.array(Image.open(path.with_suffix('.png')))
            assert labels.shape == (image['height'], image['width'])
            covered = np.zeros(labels.shape, int)
            for instance in coco['annotations']:
                if instance['image_id'] == image['id']:
                    mask = decode(**instance['segmentation'])
                    covered += mask
                    ys, xs = mask.nonzero()
                    box = [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
                    assert instance['bbox'] == box and instance['area'] == len(xs)
                    label = instance['category_id']
                    assert demo.CLASSES[label - 1] == names[label]
                    assert set(labels[mask]) <= {label, demo.IGNORED}
            assert covered.max() == 1
            is_object = labels > len(demo.CLASSES) - len(demo.OBJECTS)
            assert covered[is_object].all()


def decode(size, counts):
    """Mask of COCO's uncompressed run lengths."""
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(size[::-1]).T


def test_demo_dataset_is_deterministic(demo, data, tmp_path):
    demo.make_dataset(tmp_path / 'again', train=12, val=4, size=SIZE, seed=0)
    assert contents(tmp_path / 'again') == contents(data)
    demo.make_dataset(tmp_path / 'other', train=12, val=4, size=SIZE, seed=1)
    ours, theirs = contents(data), contents(tmp_path / 'other')
    assert ours.keys() == theirs.keys()
    assert all(ours[name] != theirs[name] for name in ours if name.suffix == '.jpg')


def test_demo_dataset_image_does_not_depend_on_their_number(demo, data, tmp_path):
    demo.make_dataset(tmp_path, train=3, val=1, size=SIZE, seed=0)
    everything = contents(data)
    few = contents(tmp_path)
    pictures = {name for name in few if name.suffix != '.json'}
    assert len(pictures) == 8
    assert all(everything[name] == few[name] for name in pictures)
    for name in few.keys() - pictures:
        shorter, longer = json.loads(few[name]), json.loads(everything[name])
        count = len(shorter['annotations'])
        assert shorter['annotations'] == longer['annotations'][:count] and count


def test_demo_dataset_splits_share_no_texture_and_no_coin(demo):
    textures, objects = demo.load_photographs('training')
    other_textures, other_objects = demo.load_photographs('validation')
    for name, texture in textures.items():
        other = other_textures[name]
        assert texture.height == other.height
        assert texture.tobytes() != other.tobytes()
    coins, others = (
        {coin.tobytes() for coin in photos['coin']} for photos in (objects, other_objects)
    )
    assert coins and others and not coins & others


def test_demo_dataset_classes_equal_those_of_config(demo):
    metainfo = Config.fromfile(ROOT / 'configs/upernet_vil_t_demo.py').metainfo
    assert tuple(metainfo.classes) == demo.CLASSES
    assert len({tuple(color) for color in metainfo.palette}) == len(demo.CLASSES)
    objects = Config.fromfile(ROOT / 'configs/mask_rcnn_vil_t_demo.py').metainfo
    assert tuple(objects.classes) == demo.OBJECTS
    assert [list(color) for color in objects.palette] == metainfo.palette[-len(demo.OBJECTS) :]


@pytest.mark.parametrize('options', [['--size', '16', '16'], ['--seed', '-1']])
def test_demo_dataset_rejects_tiny_images_and_negative_numbers(tmp_path, options):
    command = [sys.executable, SCRIPT, tmp_path, *options]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert 'at least 32 pixels, and numbers must not be negative' in result.stderr
