# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
import numpy as np
import pytest
from PIL import Image

pytest.importorskip('mmseg')

from mmengine.registry import TRANSFORMS, init_default_scope

from mmvil.apis.annotations import LoadMappedAnnotations

KIND = 'mmvil.apis.annotations.LoadMappedAnnotations'
RED, GREEN, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 0)


def load(path, **options):
    init_default_scope('mmseg')
    transform = TRANSFORMS.build(dict(type=KIND, **options))
    return transform(dict(seg_map_path=str(path), seg_fields=[], reduce_zero_label=False))


def save(path, array, mode=None):
    image = Image.fromarray(np.asarray(array))
    (image if mode is None else image.convert(mode)).save(path)
    return path


@pytest.mark.parametrize(
    'mask, options, expected',
    [
        (np.uint8([[0, 1, 255]]), {}, [[0, 1, 255]]),
        (np.uint8([[0, 1, 11]]), dict(ignore=[11]), [[0, 1, 255]]),
        (np.uint8([[0, 255, 0]]), dict(values=[0, 255]), [[0, 1, 0]]),
        (np.uint8([[0, 255, 9]]), dict(values=[255, 0], ignore=[9]), [[1, 0, 255]]),
        (np.uint8([[0, 3, 5]]), dict(values=[[0, 3], 5]), [[0, 0, 1]]),
        (np.uint16([[7, 300, 65535]]), dict(values=[300, 7], ignore=[65535]), [[1, 0, 255]]),
        (np.array([[True, False]]), dict(values=[1, 0]), [[0, 1]]),
        (
            np.uint8([[RED, GREEN, BLACK]]),
            dict(colors=[GREEN, RED], ignore=[BLACK, 3]),
            [[1, 0, 255]],
        ),
    ],
    ids=['index', 'void', 'binary', 'swapped', 'merged', '16-bit', '1-bit', 'colors'],
)
def test_load_mapped_annotations_maps_values_and_colors(tmp_path, mask, options, expected):
    loaded = load(save(tmp_path / 'a.png', mask), **options)
    assert loaded['gt_seg_map'].dtype == np.uint8 and loaded['seg_fields'] == ['gt_seg_map']
    assert loaded['gt_seg_map'].tolist() == expected


def test_load_mapped_annotations_leaves_opacity_and_palettes_aside(tmp_path):
    colored = np.uint8([[RED, GREEN]])
    path = save(tmp_path / 'rgba.png', colored, 'RGBA')
    assert load(path, colors=[GREEN, RED])['gt_seg_map'].tolist() == [[1, 0]]
    path = save(tmp_path / 'la.png', np.uint8([[0, 255]]), 'LA')
    assert load(path, values=[0, 255])['gt_seg_map'].tolist() == [[0, 1]]
    indexed = Image.fromarray(np.uint8([[1, 0]])).convert('P')
    indexed.putpalette([*RED, *GREEN])
    indexed.save(tmp_path / 'p.png')
    loaded = load(tmp_path / 'p.png', colors=[GREEN, RED])  # the palette is for viewers
    assert loaded['gt_seg_map'].tolist() == [[1, 0]]


@pytest.mark.parametrize(
    'mask, options, message',
    [
        (np.uint8([[0, 85, 170]]), dict(values=[0, 255]), r'values of no class: \[85, 170\]'),
        (np.uint16([[1, 256]]), {}, r'values of no class: \[256\]'),
        (np.int32([[-2, 70000]]), dict(values=[0, 65535]), r'values of no class: \[-2, 70000\]'),
        (np.arange(9, dtype=np.uint8)[None], dict(values=[0, 1]), r'\[2, 3, 4, 5, 6, …\]'),
        (np.uint8([[RED, (1, 2, 3)]]), dict(colors=[RED, GREEN]), r'no class: \[\(1, 2, 3\)\]'),
        (np.uint8([[RED]]), dict(values=[0, 1]), 'no class colors are declared'),
    ],
)
def test_load_mapped_annotations_names_unknown_values_and_file(tmp_path, mask, options, message):
    path = save(tmp_path / ('a.tif' if mask.dtype == np.int32 else 'a.png'), mask)
    with pytest.raises(ValueError, match=f'the annotation {path} has .*{message}'):
        load(path, **options)


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(values=[0, [1, 0]]), 'two labels, 0 and 1'),
        (dict(colors=[RED, RED]), 'two labels, 0 and 1'),
        (dict(values=[0, 1], ignore=[1]), 'two labels, 1 and 255'),
        (dict(values=[0, 70000]), 'values must be 0 to 65535'),
        (dict(values=range(255)), 'at most 254 classes'),
    ],
)
def test_load_mapped_annotations_rejects_what_is_ambiguous(options, message):
    with pytest.raises(ValueError, match=message):
        LoadMappedAnnotations(**options)


def test_load_mapped_annotations_passes_an_image_without_annotation():
    assert LoadMappedAnnotations()(dict(img_path='a.jpg')) == dict(img_path='a.jpg')


def test_load_mapped_annotations_rejects_a_second_mapping(tmp_path):
    path = save(tmp_path / 'a.png', np.uint8([[0, 1]]))
    with pytest.raises(ValueError, match='use values and ignore instead'):
        LoadMappedAnnotations()(dict(seg_map_path=str(path), reduce_zero_label=True))
