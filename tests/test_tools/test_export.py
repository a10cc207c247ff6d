# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Exported files give the numbers of PyTorch, for images that they were not traced with, and decide
as ``predict`` of the model does.
"""

import inspect
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config, ConfigDict
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


def test_export_says_what_is_wrong(tmp_path):
    config, checkpoint = save_random_model(tmp_path, SEGMENTOR)
    said = call_tool(EXPORT, config, checkpoint, '--out', tmp_path / 'model.txt', status=2)
    assert "error: --out ends with '.txt'" in said
    if not hasattr(torch.compiler, 'is_exporting'):
        said = call_tool(EXPORT, config, checkpoint, status=2)
        assert 'error: export needs a newer PyTorch than' in said


# -- The decision ----------------------------------------------------------------------------------

CLASSIFIER_HEADS = dict(
    plain=dict(type='ClsHead'),
    linear=dict(type='LinearClsHead', in_channels=8, num_classes=5),
    hidden=dict(type='VisionTransformerClsHead', in_channels=8, num_classes=5, hidden_dim=6),
    stacked=dict(type='StackedLinearClsHead', in_channels=8, num_classes=5, mid_channels=[6]),
    distilled=dict(type='DeiTClsHead', in_channels=8, num_classes=5),
    efficientformer=dict(type='EfficientFormerClsHead', in_channels=8, num_classes=5),
    levit=dict(type='LeViTClsHead', in_channels=8, num_classes=5),
    vig=dict(type='VigClsHead', in_channels=8, num_classes=5, hidden_dim=6),
    cosine=dict(type='ArcFaceClsHead', in_channels=8, num_classes=5),
    two_branches=dict(type='ConformerHead', in_channels=[8, 8], num_classes=5),
    multi_label=dict(type='MultiLabelClsHead'),
    threshold=dict(type='MultiLabelLinearClsHead', in_channels=8, num_classes=5, thr=0.7),
    top_2=dict(type='MultiLabelLinearClsHead', in_channels=8, num_classes=5, topk=2),
    residual_attention=dict(type='CSRAClsHead', in_channels=8, num_classes=5, num_heads=2, lam=0.1),
)
CLASSIFIER_HEADS['tasks'] = dict(
    type='MultiTaskHead',
    task_heads={name: CLASSIFIER_HEADS[name] for name in ('linear', 'threshold', 'top_2')},
)


def decode_head(kind, num_classes=3, **settings):
    return dict(type=kind, in_channels=8, channels=8, num_classes=num_classes, **settings)


FCN = decode_head('FCNHead', num_convs=1)
BINARY = dict(FCN, num_classes=2, out_channels=1, threshold=0.7)
DECODE_HEADS = dict(
    binary=BINARY,
    one_class=dict(BINARY, num_classes=1, threshold=0.2),
    corners=dict(FCN, align_corners=True),
    attentions=decode_head('DAHead', pam_channels=4),
    encoding=dict(decode_head('EncHead', num_codes=4), in_channels=[8], in_index=[0]),
    cascade=[FCN, decode_head('OCRHead', ocr_channels=4)],
)
HEADS = {**CLASSIFIER_HEADS, **DECODE_HEADS}


@pytest.fixture(scope='module')
def export():
    """The tool as a module."""
    for library in ('mmseg', 'mmpretrain'):
        pytest.importorskip(library)
    sys.path.insert(0, str(EXPORT.parent))
    try:
        import export

        return export
    finally:
        sys.path.remove(str(EXPORT.parent))


class Features(torch.nn.Module):
    """A backbone that gives a head what it reads: a 'map', a 'vector' or a 'pair' of vectors."""

    def __init__(self, form):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 8, 4, stride=4)
        self.form = form

    def forward(self, images):
        features = self.stem(images)
        if self.form == 'map':
            return (features,)
        features = features.mean((2, 3))
        return ([features, features.flip(1)],) if self.form == 'pair' else (features,)


def build_with_head(name, head=None, **settings):
    """A model whose scores are far apart."""
    head = head or HEADS[name]
    if name in DECODE_HEADS:
        init_default_scope('mmseg')
        settings = dict(
            type='EncoderDecoder', decode_head=head, test_cfg=ConfigDict(mode='whole'), **settings
        )
        if isinstance(head, list):
            settings.update(type='CascadeEncoderDecoder', num_stages=len(head))
    else:
        init_default_scope('mmpretrain')
        settings = dict(type='ImageClassifier', head=head, **settings)
    form = 'map' if name in (*DECODE_HEADS, 'residual_attention') else 'vector'
    form = 'pair' if name in ('distilled', 'two_branches') else form
    torch.manual_seed(0)
    model = MODELS.build(dict(settings, backbone=dict(type=Features, form=form))).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def predicted(model, images, output):
    """What ``predict`` of the model says, as tensors of the batch."""
    samples = model.predict(images)
    if hasattr(model, 'decode_head'):
        if output == 'labels':
            return torch.cat([sample.pred_sem_seg.data for sample in samples]).long()
        scores = torch.stack([sample.seg_logits.data for sample in samples])
        return scores if scores.shape[1] == 1 else scores.softmax(1)
    if hasattr(model.head, 'task_heads'):
        return {
            f'{output}.{task}': of_samples([sample.get(task) for sample in samples], head, output)
            for task, head in model.head.task_heads.items()
        }
    return of_samples(samples, model.head, output)


def of_samples(samples, head, output):
    scores = torch.stack([sample.pred_score for sample in samples])
    if output == 'probabilities':
        return scores
    labels = [sample.pred_label for sample in samples]
    if not hasattr(head, 'thr'):
        return torch.cat(labels)
    return torch.stack(
        [torch.zeros(scores.shape[1]).index_fill(0, label, 1) for label in labels]
    ).long()


@torch.no_grad()
@pytest.mark.parametrize('output', ['probabilities', 'labels'])
@pytest.mark.parametrize('name', HEADS)
def test_output_is_what_predict_says(name, output, export):
    model = build_with_head(name)
    images = torch.randn(3, 3, 32, 40)
    expected = predicted(model, images, output)
    torch.testing.assert_close(export.Deployed(model, output)(images), expected, rtol=0, atol=0)


@needs_exporter
@torch.no_grad()
@pytest.mark.parametrize(
    'name', ['binary', 'linear', 'threshold', 'top_2', 'two_branches', 'tasks']
)
def test_traced_labels_are_what_predict_says(name, export):
    model = build_with_head(name)
    images = torch.randn(3, 3, 48, 36)
    program = export.trace(export.Deployed(model, 'labels'), (32, 40))
    torch.testing.assert_close(program.module()(images), predicted(model, images, 'labels'))


@needs_exporter
def test_export_writes_tasks_to_onnx_by_name(tmp_path, export):
    pytest.importorskip('onnxscript')
    model = build_with_head('tasks')
    deployed = export.Deployed(model, 'labels')
    program = export.trace(deployed, (32, 40))
    export.save_onnx(program, tmp_path / 'model.onnx', 20, deployed.names, {})
    images = torch.randn(3, 3, 48, 36)
    actual = export.load(tmp_path / 'model.onnx', 'onnx')(images)
    torch.testing.assert_close(actual, predicted(model, images, 'labels'))


def test_every_head_of_mmpretrain_is_tested_or_refused(export):
    from mmpretrain.models import heads

    tested = {head['type'] for head in CLASSIFIER_HEADS.values()}
    for name, head in inspect.getmembers(heads, inspect.isclass):
        if name in tested - {'MultiTaskHead'}:
            continue
        with pytest.raises(export.UserError, match=f'{name} has a rule of its own'):
            export.head_decision(head.__new__(head), 'labels')


@pytest.mark.parametrize(
    ('name', 'owner', 'method', 'refused'),
    [
        ('linear', 'head', '_get_predictions', ('probabilities', 'labels')),
        ('threshold', 'head', 'predict', ('probabilities', 'labels')),
        ('tasks', 'head', 'predict', ('probabilities', 'labels')),
        ('linear', None, 'predict', ('probabilities', 'labels')),
        ('binary', None, 'postprocess_result', ('probabilities', 'labels')),
        ('binary', None, 'inference', ('probabilities', 'labels')),
        ('corners', 'decode_head', 'predict', ('probabilities',)),
        ('corners', 'decode_head', 'predict_by_feat', ('probabilities',)),
    ],
)
def test_method_of_a_subclass_is_refused_by_name(name, owner, method, refused, export):
    model = build_with_head(name)
    module = getattr(model, owner) if owner else model
    own = {method: lambda self, *args: getattr(super(type(self), self), method)(*args)}
    module.__class__ = type('Own', (type(module),), own)
    for output in export.OUTPUTS:
        if output in refused:
            with pytest.raises(export.UserError, match='Own has a rule of its own'):
                export.Deployed(model, output)
        else:
            export.Deployed(model, output)


@needs_exporter
def test_scores_that_are_no_tensor_are_refused_by_name(export):
    model = build_with_head('plain')
    model.head = None
    with pytest.raises(export.UserError, match='ImageClassifier returns a tuple'):
        export.trace(export.Deployed(model), (32, 32))


def test_binary_cascade_is_refused(export):
    head = [BINARY, dict(DECODE_HEADS['cascade'][1], num_classes=2, out_channels=1)]
    model = build_with_head('cascade', head)
    with pytest.raises(AttributeError, match='threshold'):
        model.predict(torch.randn(1, 3, 32, 40))
    with pytest.raises(export.UserError, match='CascadeEncoderDecoder with one logit'):
        export.Deployed(model, 'labels')


def test_check_does_not_overlook_nan(export):
    model = export.Deployed(build_with_head('linear'))
    worst = export.check(model, lambda images: model(images) * torch.nan, [(1, 3, 32, 32)])
    assert torch.isnan(torch.tensor(worst))
