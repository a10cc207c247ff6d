# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tool_process import call_tool

TOOLS = Path(__file__).parents[2] / 'tools'

CONFIG = """
_base_ = '{configs}/vil_t_imagenet.py'

model = dict(
    backbone=dict(arch=dict(_delete_=True, embed_dims=32, depth=2), img_size=16, patch_size=4)
)
test_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='Resize', scale=(16, 16)),
            dict(type='PackInputs'),
        ]
    )
)
"""


@pytest.fixture
def folder(tmp_path):
    """Digits as a folder of images per class, a config and a checkpoint in the official layout."""
    pytest.importorskip('mmpretrain')
    import mmvil

    data = pytest.importorskip('sklearn.datasets').load_digits()
    for i in range(400):
        split, name = ('train' if i < 300 else 'val'), f'digit{data.target[i]}'
        (tmp_path / 'data' / split / name).mkdir(parents=True, exist_ok=True)
        image = np.kron(data.images[i] * 15, np.ones((2, 2))).astype(np.uint8)
        Image.fromarray(image).save(tmp_path / 'data' / split / name / f'{i:04}.png')
    (tmp_path / 'config.py').write_text(CONFIG.format(configs=TOOLS.parent / 'configs'))
    torch.manual_seed(0)
    backbone = mmvil.VisionLSTM(
        arch=dict(embed_dims=32, depth=2), img_size=16, patch_size=4, out_type='bilateral_concat'
    )
    state = {f'backbone.{name}': value for name, value in backbone.state_dict().items()}
    torch.save(dict(state_dict=state), tmp_path / 'weights.pth')
    return tmp_path


def test_eval_features_on_a_folder_of_images(folder):
    command = (
        *(TOOLS / 'eval_features.py', folder / 'config.py', folder / 'weights.pth'),
        *('--workers', 0, '--features', folder / 'features.pt', '--data-root', folder / 'data'),
    )
    said = call_tool(*command)
    assert '300 training and 100 validation images, 64 features' in said
    found = dict(re.findall(r'(weighted|plain|linear probe): ([\d.]+) %', said))
    assert len(found) == 3
    # Random features of 10 classes tell something, too.
    assert all(float(value) > 30 for value in found.values())

    again = call_tool(*command)  # from the file
    assert found == dict(re.findall(r'(weighted|plain|linear probe): ([\d.]+) %', again))
    assert 'NN' not in call_tool(*command, '--check')
    said = call_tool(*command[:-1], folder / 'data/..', status=2)
    assert 'was made from' in said
    weights = torch.load(folder / 'weights.pth')
    torch.save(dict(state_dict=weights['state_dict'], meta={}), folder / 'weights.pth')
    assert 'was made from' in call_tool(*command, status=2)  # other weights in the same file
    said = call_tool(*command[:6], folder / 'weights.pth/features.pt', *command[7:], status=2)
    assert 'cannot use the folder' in said and 'it is a file' in said
    (folder / 'features.pt').write_text('?')
    assert 'was not written by --features' in call_tool(*command, status=2)
    said = call_tool(*command[:3], '--data-root', folder, status=2)
    assert 'expected' in said and 'train/CLASS/IMAGE' in said


def test_eval_features_heeds_the_options_that_it_has(folder):
    command = (
        *(TOOLS / 'eval_features.py', folder / 'config.py', folder / 'weights.pth'),
        *('--workers', 0, '--data-root', folder / 'data'),
    )
    said = call_tool(*command, '--check')
    assert 'Config, data and checkpoint are in place' in said and 'images' not in said
    pretraining = (TOOLS.parent / 'configs/simmim_vil_t_pretrain192.py', *command[2:])
    assert 'is not of a classifier' in call_tool(command[0], *pretraining, status=2)
    assert "Unknown arch 'x'" in call_tool(*command, '--backbone', 'vil-x', status=2)
    config = folder / 'config.py'  # like mmpretrain's, with the preprocessor beside the model
    beside = 'data_preprocessor = dict(mean=[128] * 3, std=[64] * 3)\n'
    config.write_text(
        config.read_text().replace('model = dict(', 'model = dict(data_preprocessor=None,') + beside
    )
    out = folder / 'new/features.pt'
    assert 'linear probe' in call_tool(*command, '--features', out) and out.is_file()
    said = call_tool(*command, '--work-dir', folder, status=2)  # it has no log
    assert 'unrecognized arguments: --work-dir' in said
