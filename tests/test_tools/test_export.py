# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Exported files give the numbers of PyTorch, for images that they were not traced with."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from tool_process import call_tool

import mmvil  # noqa: F401
from mmvil.checkpoints import vil_to_mmvil
from tests.conftest import relative_error

EXPORT = Path(__file__).parents[2] / 'tools/deployment/export.py'
CLASSES = ['sky', 'brick', 'grass']

needs_exporter = pytest.mark.skipif(
    not hasattr(torch.compiler, 'is_exporting'), reason='export needs a newer PyTorch'
)

SEGMENTOR = """
default_scope = 'mmseg'
norm_cfg = dict(type='SyncBN')
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor', mean=[120., 110., 100.], std=[60., 50., 40.], bgr_to_rgb=True),
    backbone=dict(
        type='mmvil.VisionLSTM', arch=dict(embed_dims=16, depth=2), img_size=64,
        out_indices=(0, 1), final_norm=False,
        pyramid=dict(strides=(8, 16), norm_cfg=norm_cfg)),
    decode_head=dict(
        type='UPerHead', in_channels=[16, 16], in_index=[0, 1], pool_scales=(1, 2, 3, 6),
        channels=8, num_classes=3, norm_cfg=norm_cfg, align_corners=False),
    test_cfg=dict(mode='slide', crop_size=(64, 64), stride=(40, 40)))
"""

CLASSIFIER = """
default_scope = 'mmpretrain'
model = dict(
    type='ImageClassifier',
    data_preprocessor=dict(mean=[120., 110., 100.], std=[60., 50., 40.], to_rgb=True),
    backbone=dict(type='mmvil.VisionLSTM', **{backbone}),
    head=dict(type='LinearClsHead', in_channels={width}, num_classes={classes}))
"""


def save_random_model(folder, text):
    """A config and a checkpoint whose gates depend on the image."""
    pytest.importorskip('mmseg')
    config, checkpoint = folder / 'config.py', folder / 'model.pth'
    config.write_text(text)
    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    for name, parameter in model.named_parameters():
        if 'gate.weight' in name or 'fc.weight' in name:
            torch.nn.init.normal_(parameter, std=0.2)
    meta = dict(dataset_meta=dict(classes=CLASSES, palette=[[1, 2, 3]] * 3))
    torch.save(dict(state_dict=model.state_dict(), meta=meta), checkpoint)
    return config, checkpoint


def run_onnx(path, images):
    onnxruntime = pytest.importorskip('onnxruntime')
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    return session, torch.from_numpy(session.run(None, {'images': np.asarray(images)})[0])


@needs_exporter
def test_export_writes_a_segmentor_to_onnx(tmp_path):
    pytest.importorskip('onnxscript')
    config, checkpoint = save_random_model(tmp_path, SEGMENTOR)
    out = tmp_path / 'new/model.onnx'
    said = call_tool(EXPORT, config, checkpoint, '--out', out, '--output', 'probabilities')
    differences = re.findall(r'relative (\S+),', said)
    assert len(differences) == 2 and max(map(float, differences)) < 1e-5, said
    assert '1x3x64x64' in said and '3x3x81x47' in said

    images = torch.rand(1, 3, 50, 130) * 255  # another size than the tool has tried
    session, scores = run_onnx(out, images)
    assert scores.shape == (1, 3, 50, 130)
    torch.testing.assert_close(scores.sum(1), torch.ones(1, 50, 130))
    about = session.get_modelmeta().custom_metadata_map
    assert about['classes'] == '["sky", "brick", "grass"]'
    assert 'RGB, 0 to 255' in about['input']


@needs_exporter
def test_export_writes_a_classifier_that_needs_torch_alone(tmp_path):
    backbone = dict(arch=dict(embed_dims=16, depth=1), img_size=32, out_type='bilateral_concat')
    text = CLASSIFIER.format(backbone=backbone, width=32, classes=3)
    config, checkpoint = save_random_model(tmp_path, text)
    out = tmp_path / 'model.pt2'
    said = call_tool(EXPORT, config, checkpoint, '--out', out, '--output', 'labels')
    assert said.count('0.0e+00 of the labels differ') == 2, said
    program = torch.export.load(out)
    assert not [node for node in program.graph.nodes if 'mmvil' in str(node.target)]
    assert program.module()(torch.rand(1, 3, 16, 100) * 255).shape == (1,)


@needs_exporter
def test_export_checks_images_of_at_least_one_patch(tmp_path):
    backbone = dict(
        arch=dict(embed_dims=16, depth=1), img_size=32, patch_size=32, out_type='bilateral_concat'
    )
    text = CLASSIFIER.format(backbone=backbone, width=32, classes=3)
    config, checkpoint = save_random_model(tmp_path, text)
    said = call_tool(EXPORT, config, checkpoint, '--out', tmp_path / 'model.pt2')
    assert '3x3x41x32' in said


@needs_exporter
@pytest.mark.slow  # half a minute each
@pytest.mark.parametrize('name', ['vil2_dim32', 'vil1_dim32', 'vil1_dim32_stride8'])
def test_reference_logits_pass_through_onnx(name, reference, tmp_path):
    pytest.importorskip('mmpretrain')
    pytest.importorskip('onnxscript')
    data = reference(name)
    meta = data['meta']
    depth = meta['depth'] * (2 if meta['version'] == 2 else 1)  # v2 counts pairs
    backbone = dict(
        arch=dict(embed_dims=meta['dim'], depth=depth),
        version=meta['version'],
        img_size=meta['image_size'],
        patch_size=meta['patch_size'],
        stride=meta['stride'],
        out_type='bilateral_concat' if meta['version'] == 2 else 'bilateral_avg',
    )
    width = meta['dim'] * meta['version']
    config, checkpoint, out = (tmp_path / name for name in ('config.py', 'model.pth', 'model.onnx'))
    config.write_text(
        CLASSIFIER.format(backbone=backbone, width=width, classes=meta['num_classes'])
    )
    torch.save(dict(state_dict=vil_to_mmvil(data['checkpoint']['state_dict'])), checkpoint)
    call_tool(EXPORT, config, checkpoint, '--out', out, '--normalized-input', '--size', '96', '80')
    for case in data['cases']:
        _, logits = run_onnx(out, case['image'])
        assert relative_error(logits, case['logits']) < 1e-5


def test_export_reports_user_errors(tmp_path):
    config, checkpoint = save_random_model(tmp_path, SEGMENTOR)
    said = call_tool(EXPORT, config, checkpoint, '--out', tmp_path / 'model.txt', status=2)
    assert "error: --out ends with '.txt'" in said
    if hasattr(torch.compiler, 'is_exporting'):
        said = call_tool(
            EXPORT, config, checkpoint, '--out', tmp_path / 'a.pt2', '--size', 99, 8, status=2
        )
        assert 'error: --size must be at least one patch (16), but is 99 8' in said
    if not hasattr(torch.compiler, 'is_exporting'):
        said = call_tool(EXPORT, config, checkpoint, status=2)
        assert 'error: export needs a newer PyTorch than' in said


def test_check_does_not_overlook_nan(monkeypatch):
    monkeypatch.syspath_prepend(EXPORT.parent)
    import export

    class Model(torch.nn.Identity):
        output, names, normalize = 'logits', ['logits'], True

    shapes = [(1, 3, 32, 32)] * 2
    factors = iter([1, torch.nan])
    worst = export.check(Model(), lambda images: images * next(factors), shapes)
    assert math.isnan(worst)
