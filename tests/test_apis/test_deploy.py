# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Exported models decide as ``predict`` of the model does."""

import inspect
import math

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.registry import MODELS, init_default_scope

from mmvil.apis.deploy import (
    OUTPUTS,
    Deployed,
    compare_output,
    head_decision,
    load_exported,
    save_onnx,
    save_pt2,
    trace,
)

needs_exporter = pytest.mark.skipif(
    not hasattr(torch.compiler, 'is_exporting'), reason='export needs a newer PyTorch'
)

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
    for library in ('mmseg', 'mmpretrain'):
        pytest.importorskip(library)
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
def test_output_equals_predict(name, output):
    model = build_with_head(name)
    images = torch.randn(3, 3, 32, 40)
    expected = predicted(model, images, output)
    torch.testing.assert_close(Deployed(model, output)(images), expected, rtol=0, atol=0)


@needs_exporter
@torch.no_grad()
@pytest.mark.parametrize(
    'name', ['binary', 'linear', 'threshold', 'top_2', 'two_branches', 'tasks']
)
def test_traced_labels_equal_predict(name):
    model = build_with_head(name)
    images = torch.randn(3, 3, 48, 36)
    program = trace(Deployed(model, 'labels'), (32, 40))
    torch.testing.assert_close(program.module()(images), predicted(model, images, 'labels'))


@needs_exporter
def test_export_writes_tasks_to_onnx_by_name(tmp_path):
    pytest.importorskip('onnxscript')
    model = build_with_head('tasks')
    deployed = Deployed(model, 'labels')
    program = trace(deployed, (32, 40))
    save_onnx(program, tmp_path / 'model.onnx', deployed.names)
    images = torch.randn(3, 3, 48, 36)
    actual = load_exported(tmp_path / 'model.onnx')(images)
    torch.testing.assert_close(actual, predicted(model, images, 'labels'))


def test_every_head_of_mmpretrain_is_tested_or_rejected():
    heads = pytest.importorskip('mmpretrain.models').heads
    tested = {head['type'] for head in CLASSIFIER_HEADS.values()}
    for name, head in inspect.getmembers(heads, inspect.isclass):
        if name in tested - {'MultiTaskHead'}:
            continue
        with pytest.raises(ValueError, match=f'{name} has its own rule'):
            head_decision(head.__new__(head), 'labels')


@pytest.mark.parametrize(
    ('name', 'owner', 'method', 'rejected'),
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
def test_method_of_a_subclass_is_rejected_by_name(name, owner, method, rejected):
    model = build_with_head(name)
    module = getattr(model, owner) if owner else model
    own = {method: lambda self, *args: getattr(super(type(self), self), method)(*args)}
    module.__class__ = type('Own', (type(module),), own)
    for output in OUTPUTS:
        if output in rejected:
            with pytest.raises(ValueError, match='Own has its own rule'):
                Deployed(model, output)
        else:
            Deployed(model, output)


@needs_exporter
def test_scores_that_are_no_tensor_are_rejected_by_name():
    model = build_with_head('plain')
    model.head = None
    with pytest.raises(ValueError, match='ImageClassifier returns a tuple'):
        trace(Deployed(model), (32, 32))


def test_binary_cascade_is_rejected():
    head = [BINARY, dict(DECODE_HEADS['cascade'][1], num_classes=2, out_channels=1)]
    model = build_with_head('cascade', head)
    with pytest.raises(AttributeError, match='threshold'):
        model.predict(torch.randn(1, 3, 32, 40))
    with pytest.raises(ValueError, match='CascadeEncoderDecoder with one logit'):
        Deployed(model, 'labels')


def test_compare_output_does_not_overlook_nan():
    scores = torch.randn(1, 3)
    difference, _ = compare_output(scores * torch.nan, scores)
    assert math.isnan(difference)


@needs_exporter
def test_save_onnx_writes_no_other_opset(tmp_path):
    pytest.importorskip('onnxscript')
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),))
    save_onnx(program, tmp_path / 'model.onnx', ['same'], opset=19)
    with pytest.raises(ValueError, match='cannot write opset 5, but could write 18'):
        save_onnx(program, tmp_path / 'old.onnx', ['same'], opset=5)
    assert not (tmp_path / 'old.onnx').exists()


@needs_exporter
@pytest.mark.parametrize('format, dtype', [('pt2', torch.bfloat16), ('onnx', torch.float16)])
def test_exported_file_keeps_the_precision_of_the_model(tmp_path, format, dtype):
    pytest.importorskip('mmpretrain')
    if format == 'onnx':
        pytest.importorskip('onnxruntime')
        pytest.importorskip('onnxscript')
    init_default_scope('mmpretrain')
    backbone = dict(type='VisionLSTM', arch=dict(embed_dims=16, depth=2), img_size=32, patch_size=8)
    head = dict(type='LinearClsHead', in_channels=32, num_classes=5)
    cfg = dict(type='ImageClassifier', backbone=dict(backbone, out_type='bilateral_concat'))
    model = Deployed(MODELS.build(dict(cfg, head=head)).to(dtype), normalize=False).eval()
    description = model.describe((32, 32))
    assert str(dtype).removeprefix('torch.') in description['input']
    path, program = tmp_path / f'model.{format}', trace(model, (32, 32))
    if format == 'onnx':
        save_onnx(program, path, model.names, description)
    else:
        save_pt2(program, path, description)
    images = torch.randn(3, 3, 40, 32).to(dtype)
    actual = load_exported(path, format)(images)
    actual = actual['logits'] if format == 'onnx' else actual
    assert actual.dtype == dtype and compare_output(actual, model(images).detach())[0] < 0.01
