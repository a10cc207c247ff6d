# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""What the tools write into a config about a user's own data."""

import re
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import DATASETS, TRANSFORMS, init_default_scope
from PIL import Image

from mmvil.cli.config import list_files, load_config, set_data_root
from mmvil.cli.dataset_check import check_dataset
from mmvil.cli.errors import UserError
from mmvil.cli.own_data import MAPPED_LOADER, MAPPING_OPTIONS, read_classes
from mmvil.cli.preflight import check_data, check_folders
from mmvil.engine.config_nodes import dicts
from tests.conftest import ROOT

SEGMENTOR, CLASSIFIER = (
    str(ROOT / f'configs/{name}.py') for name in ('upernet_vil_t_own', 'vil_t_own')
)
LABELS = np.uint8([[0, 1], [2, 255]])
COLORS = np.uint8([[0, 0, 0], [128, 64, 128], [64, 0, 128]])


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(path)


def write_data(root, mask, image_suffix='.jpg'):
    for split in ('train', 'val'):
        save(root / f'images/{split}/a{image_suffix}', np.zeros((2, 2, 3), np.uint8))
        save(root / f'masks/{split}/a.png', mask)


def described(config, root, file, text):
    (root / file).write_text(text)
    cfg = load_config(config, {})
    set_data_root(cfg, str(root))
    return cfg


def mapped(values):
    """Labels with other values instead of 0, 1, 2 and the ignored 255."""
    return np.array([*values[:3], *[0] * 252, values[3]])[LABELS]


NAMES = 'classes: [other, road, car]\n'


@pytest.mark.parametrize(
    'mask, file, text',
    [
        (LABELS, 'classes.txt', 'other\nroad\n# a comment\n\ncar\n'),
        (
            Image.fromarray(LABELS).convert('P'),
            'classes.txt',
            'other 0 0 0\nroad 128, 64, 128\ncar\t64 0 128\n',
        ),
        (
            np.vstack([COLORS, np.uint8([[9, 9, 9]])])[np.minimum(LABELS, 3)],
            'classes.yaml',
            NAMES + f'colors: {COLORS.tolist()}\nignore: [[9, 9, 9]]\n',
        ),
        (
            mapped([100, 1000, 60000, 65535]).astype(np.uint16),
            'classes.yaml',
            NAMES + 'values: [100, 1000, 60000]\nignore: 65535\n',
        ),
        (
            mapped([0, 128, 255, 7]).astype(np.uint8),
            'classes.yaml',
            NAMES + 'values: [0, 128, 255]\nignore: [7]\n',
        ),
    ],
    ids=['index', 'palette', 'colors', '16-bit', 'gray'],
)
def test_masks_of_each_kind_give_the_same_labels(tmp_path, mask, file, text):
    pytest.importorskip('mmseg')
    write_data(tmp_path, mask)
    cfg = described(SEGMENTOR, tmp_path, file, text)
    init_default_scope('mmseg')
    dataset_cfg = cfg.val_dataloader.dataset
    dataset_cfg.pipeline = [
        step for step in dataset_cfg.pipeline if step['type'] not in ('Resize', 'PackSegInputs')
    ]
    dataset = DATASETS.build(dataset_cfg)
    assert dataset[0]['gt_seg_map'].tolist() == LABELS.tolist()
    assert dataset.metainfo['classes'] == ['other', 'road', 'car']
    if 'colors' in text or '64' in text:
        assert dataset.metainfo['palette'] == COLORS.tolist()


def test_configure_own_data_writes_plain_values_that_stay(tmp_path):
    write_data(tmp_path / 'data', LABELS, image_suffix='.png')
    text = NAMES + 'values: [0, 1, 2]\nclass_weight: [1, 1, 3]\n'
    cfg = described(SEGMENTOR, tmp_path / 'data', 'classes.yaml', text)
    assert cfg.model.decode_head.num_classes == cfg.model.auxiliary_head.num_classes == 3
    assert cfg.model.auxiliary_head.loss_decode.class_weight == [1, 1, 3]
    assert cfg.train_dataloader.dataset.img_suffix == '.png'
    kinds = [str(node.get('type')).rpartition('.')[2] for node in dicts(cfg)]
    assert 'LoadAnnotations' not in kinds and kinds.count('LoadMappedAnnotations') > 4

    cfg.dump(tmp_path / 'dumped.py')
    (tmp_path / 'data/classes.yaml').unlink()
    again = load_config(str(tmp_path / 'dumped.py'), {})
    set_data_root(again, None)
    assert again.to_dict() == cfg.to_dict()


def test_configure_own_data_leaves_other_configs_alone(tmp_path):
    (tmp_path / 'classes.txt').write_text('a\nb\n')
    cfg = Config(
        dict(
            model=dict(num_classes=9),
            default_scope='mmseg',
            val_dataloader=dict(dataset=dict(type='BaseSegDataset')),
        )
    )
    set_data_root(cfg, str(tmp_path))
    assert cfg.model.num_classes == 9 and 'metainfo' not in cfg.val_dataloader.dataset


def test_classes_named_in_the_users_config_need_no_file(tmp_path):
    config = tmp_path / 'mine.py'
    named = "dict(dataset=dict(metainfo=dict(classes=['a', 'b'])))"
    config.write_text(
        f"_base_ = '{SEGMENTOR}'\ntrain_dataloader = {named}\nval_dataloader = {named}\n"
        'test_dataloader = val_dataloader\n'
    )
    cfg = load_config(str(config), {})
    before = cfg.to_dict()
    set_data_root(cfg, None)
    assert cfg.to_dict() == before


def test_folders_and_suffixes_have_any_names(tmp_path):
    save(tmp_path / 'photos/a.JPG', np.zeros((2, 2, 3), np.uint8))
    save(tmp_path / 'labels/a_mask.png', LABELS)
    config = tmp_path / 'mine.py'
    prefix = "data_prefix=dict(img_path='photos', seg_map_path='labels')"
    own = f"dict(dataset=dict({prefix}, seg_map_suffix='_mask.png'))"
    config.write_text(
        f"_base_ = '{SEGMENTOR}'\ntrain_dataloader = {own}\nval_dataloader = {own}\n"
        'test_dataloader = val_dataloader\n'
    )
    cfg = described(str(config), tmp_path, 'classes.yaml', NAMES)
    for loader in (cfg.train_dataloader, cfg.test_dataloader):
        assert (loader.dataset.img_suffix, loader.dataset.seg_map_suffix) == ('.JPG', '_mask.png')


def test_images_of_a_folder_have_several_suffixes(tmp_path):
    pytest.importorskip('mmseg')
    write_data(tmp_path, LABELS)
    save(tmp_path / 'images/train/sub/b.PNG', np.zeros((2, 2, 3), np.uint8))
    save(tmp_path / 'masks/train/sub/b.png', LABELS)
    cfg = described(SEGMENTOR, tmp_path, 'classes.yaml', NAMES)
    inner = cfg.train_dataloader.dataset
    assert list(inner.img_suffix) == ['.PNG', '.jpg']
    assert cfg.val_dataloader.dataset.img_suffix == '.jpg'
    dataset = list_files(inner, 'mmseg')
    names = [
        [Path(sample[key]).name for key in ('img_path', 'seg_map_path')]
        for sample in map(dataset.get_data_info, range(len(dataset)))
    ]
    assert names == [['a.jpg', 'a.png'], ['b.PNG', 'b.png']]
    check_data(cfg, 'train_dataloader')
    number, _, problems, _ = check_dataset(inner, cfg)
    assert (number, problems) == (2, [])
    (tmp_path / 'masks/train/sub/b.png').unlink()
    with pytest.raises(UserError, match=r'1 of 2 images .* no annotation .*sub/b\.png'):
        check_data(cfg, 'train_dataloader')


def test_masks_and_images_beside_masks_have_one_suffix(tmp_path):
    write_data(tmp_path, LABELS)
    save(tmp_path / 'masks/train/b.tif', LABELS)
    with pytest.raises(UserError, match=r'masks/train must have .* one suffix.*: \.png, \.tif'):
        described(SEGMENTOR, tmp_path, 'classes.yaml', NAMES)
    config = tmp_path / 'mine.py'
    prefix = "data_prefix=dict(img_path='images', seg_map_path='images/masks')"
    own = f"dict(dataset=dict({prefix}, seg_map_suffix='.png'))"
    config.write_text(f"_base_ = '{SEGMENTOR}'\ntrain_dataloader = {own}\n")
    save(tmp_path / 'images/masks/a.png', LABELS)
    with pytest.raises(UserError, match=r'images must have .* one suffix.*set img_suffix'):
        described(str(config), tmp_path, 'classes.yaml', NAMES)


def test_split_without_images_takes_the_suffixes_of_the_training(tmp_path):
    write_data(tmp_path, LABELS, image_suffix='.png')
    (tmp_path / 'images/val/a.png').unlink()
    cfg = described(SEGMENTOR, tmp_path, 'classes.yaml', NAMES)
    assert cfg.test_dataloader.dataset.img_suffix == '.png'
    with pytest.raises(UserError, match=r'no \*\.png in .*images/val\. .*--no-validate'):
        check_folders(cfg, 'train_dataloader', 'val_dataloader')


def test_class_weights_without_a_loss_for_them_are_rejected(tmp_path):
    config = tmp_path / 'mine.py'
    dice = "dict(loss_decode=dict(_delete_=True, type='DiceLoss'))"
    config.write_text(
        f"_base_ = '{SEGMENTOR}'\nmodel = dict(decode_head={dice}, auxiliary_head={dice})\n"
    )
    with pytest.raises(UserError, match='class_weight needs a CrossEntropyLoss or'):
        described(str(config), tmp_path, 'classes.yaml', NAMES + 'class_weight: [1, 1, 2]\n')


@pytest.mark.parametrize(
    'file, text, message',
    [
        ('classes.txt', 'cell\n', 'at least two classes'),
        ('classes.txt', 'a\nb\na\n', 'at least two classes, each once'),
        ('classes.txt', 'a 1 2 3\nb\n', 'colors needs one entry for each of the 2 .* has 1'),
        ('classes.txt', 'a 1 2 3\nb 1 2 256\n', r'from 0 to 255, but one is \[1, 2, 256\]'),
        ('classes.yaml', 'classes: [a, b]\nclass_weight: [1]\n', 'class_weight needs one .* has 1'),
        ('classes.yaml', 'classes: [a, b]\nclass_weight: 1\n', 'class_weight needs one .* has 1'),
        ('classes.yaml', 'classes: [a, b]\ncolors: [[0, 0], [1, 1]]\n', r'one is \[0, 0\]'),
        ('classes.yaml', 'classes: [a, b]\ncolors: [0, 1]\n', 'one is 0'),
        ('classes.yaml', 'classes: [yes, no]\n', 'YAML reads as True; write it in quotes'),
        ('classes.yaml', 'classes: a, b\n', 'at least two classes.* has: a, b'),
        ('classes.yaml', 'classes: [a, b]\ncolours: []\n', 'unknown keys: colours. .* colors'),
        ('classes.yaml', 'classes: [a, b\n', 'cannot read .*classes.yaml'),
        ('classes.yaml', 'road\n', 'at least two classes.* has: road'),
        ('classes.yaml', '', 'at least two classes'),
    ],
)
def test_read_classes_rejects_invalid_files(tmp_path, file, text, message):
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=message):
        read_classes(tmp_path / file)


def test_read_classes_takes_empty_keys_bare_lists_and_semicolons(tmp_path):
    yaml, text = tmp_path / 'classes.yaml', tmp_path / 'classes.txt'
    yaml.write_text('classes: [a, b]\ncolors:\nignore: 3\n')
    assert read_classes(yaml) == dict(classes=['a', 'b'], ignore=[3])
    yaml.write_text('- a\n- b\n')
    assert read_classes(yaml) == dict(classes=['a', 'b'])
    text.write_text('a;1;2;3\nb; 4; 5; 6\n')
    assert read_classes(text) == dict(classes=['a', 'b'], colors=[[1, 2, 3], [4, 5, 6]])


def test_own_data_without_classes_is_rejected(tmp_path):
    cfg = load_config(SEGMENTOR, {})
    with pytest.raises(UserError, match=r'no classes: write their names into .*classes\.txt'):
        set_data_root(cfg, str(tmp_path))


def documented(language):
    """The last block of a language in the page on a user's own data."""
    page = (ROOT / 'docs/own_data.md').read_text()
    return re.findall(rf'^```{language}\n(.*?)^```', page, re.DOTALL | re.MULTILINE)[-1]


def test_documented_config_reads_masks_of_0_and_255(tmp_path, monkeypatch):
    pytest.importorskip('mmseg')
    write_data(tmp_path / 'my_data', np.uint8([[0, 255], [255, 0]]), image_suffix='.tif')
    monkeypatch.chdir(tmp_path)
    block = documented('python')
    assert len(block.splitlines()) <= 12
    Path('mine.py').write_text(block.replace('configs/upernet_vil_t_own.py', SEGMENTOR))
    cfg = load_config('mine.py', {})
    before = cfg.to_dict()
    set_data_root(cfg, None)
    assert cfg.to_dict() == before
    for head, weight in ((cfg.model.decode_head, 1.0), (cfg.model.auxiliary_head, 0.4)):
        assert head.num_classes == len(cfg.metainfo.classes) == 2
        assert head.loss_decode.loss_weight == weight
    init_default_scope('mmseg')
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        sample = DATASETS.build(loader.dataset)[0]
        assert set(sample['data_samples'].gt_sem_seg.data.unique().tolist()) == {0, 1}


def test_documented_file_of_classes_is_read(tmp_path):
    (tmp_path / 'classes.yaml').write_text(documented('yaml'))
    own = read_classes(tmp_path / 'classes.yaml')
    assert own['ignore'] == [254] and own['class_weight'] == [1, 1, 5]
    assert TRANSFORMS.build(dict(type=MAPPED_LOADER, **{key: own[key] for key in MAPPING_OPTIONS}))


# -- Classification --------------------------------------------------------------------------------


@pytest.fixture
def flowers(tmp_path):
    for split in ('train', 'val'):
        for name in ('daisy', 'rose'):
            (tmp_path / split / name).mkdir(parents=True)
    return tmp_path


def test_classes_of_a_classifier_are_its_folders(flowers):
    cfg = load_config(CLASSIFIER, {})
    set_data_root(cfg, str(flowers))
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        assert loader.dataset.metainfo.classes == ['daisy', 'rose']
    assert cfg.model.head.num_classes == cfg.model.data_preprocessor.num_classes == 2


def test_class_weights_of_a_classifier_reach_its_loss(flowers):
    text = 'classes: [daisy, rose]\nclass_weight: [1, 2]\n'
    assert described(CLASSIFIER, flowers, 'classes.yaml', text).model.head.loss.class_weight == [
        1,
        2,
    ]
    (flowers / 'classes.yaml').unlink()
    with pytest.raises(UserError, match=r'alphabetical order \(rose, daisy\)'):
        described(CLASSIFIER, flowers, 'classes.txt', 'rose\ndaisy\n')


def test_images_outside_class_folders_are_rejected(tmp_path):
    (tmp_path / 'train').mkdir()
    with pytest.raises(UserError, match='train must .* folders, one per class, but has: none'):
        set_data_root(load_config(CLASSIFIER, {}), str(tmp_path))


def test_splits_with_different_class_folders_are_rejected(flowers):
    (flowers / 'val/rose').rename(flowers / 'val/tulip')
    cfg = load_config(CLASSIFIER, {})
    with pytest.raises(UserError, match=r'val must .* \(daisy, rose\), but has: daisy, tulip'):
        set_data_root(cfg, str(flowers))
