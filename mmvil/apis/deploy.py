# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Export segmentors and classifiers with ONNX or torch.export, and compare the files with PyTorch.

deployed = Deployed(model, output='labels').eval()
save_onnx(trace(deployed, (512, 512)), 'model.onnx', deployed.names)
"""

import copy
import json

import torch
from torch import nn

from .. import __version__
from ..layers import ViLBlock

OUTPUTS = ('logits', 'probabilities', 'labels')


class Deployed(nn.Module):
    """Segmentor or classifier as a module from images to scores or labels.

    Args:
        model (nn.Module): An ``EncoderDecoder`` of mmseg or an ``ImageClassifier`` of mmpretrain.
        output (str): 'logits', 'probabilities' or 'labels'. Default: 'logits'.
        normalize (bool): Subtract the mean and divide by the standard deviation. Default: True.

    Raises:
        ValueError: If the model derives ``output`` by an unknown rule.
    """

    def __init__(self, model, output='logits', normalize=True):
        super().__init__()
        self.model = model
        self.output = output
        self.decide = decision(model, output)
        preprocessor = model.data_preprocessor
        self.normalize = normalize and getattr(preprocessor, '_enable_normalize', False)
        if self.normalize:
            self.register_buffer('mean', preprocessor.mean.detach().clone())
            self.register_buffer('std', preprocessor.std.detach().clone())

    def forward(self, images):
        """Map images (B, C, H, W) to scores (B, classes, H, W) or (B, classes), to labels (B, H, W)
        or (B,), or to multi-label 0 and 1 (B, classes). With several tasks, return a dict of these.
        """
        x = (images - self.mean) / self.std if self.normalize else images
        if hasattr(self.model, 'encode_decode'):
            return self.decide(self.model.encode_decode(x, [dict(img_shape=x.shape[2:])]))
        return self.decide(self.model(x, mode='tensor'))

    @property
    def names(self):
        """Names of the outputs: one, or one per task."""
        tasks = getattr(getattr(self.model, 'head', None), 'task_heads', None)
        return [self.output] if tasks is None else [f'{self.output}.{task}' for task in tasks]

    @property
    def channels(self):
        """Input channels, read from the first convolution."""
        return next(x.in_channels for x in self.model.modules() if isinstance(x, nn.Conv2d))

    def describe(self, size):
        """Describe input, output, classes, and the size (height, width) of training images, for
        users of the file: dict[str, str].
        """
        preprocessor = self.model.data_preprocessor
        order, values = 'bands as loaded', 'values as loaded'
        if self.channels == 3:
            flags = (getattr(preprocessor, x, False) for x in ('_channel_conversion', 'to_rgb'))
            order = 'RGB' if any(flags) else 'BGR'  # OpenMMLab's loaders read BGR
            values = '0 to 255'
        if not self.normalize and hasattr(preprocessor, 'mean'):
            mean, std = (x.flatten().tolist() for x in (preprocessor.mean, preprocessor.std))
            values = f'{values}, minus {mean}, divided by {std}'
        meta = getattr(self.model, 'dataset_meta', None) or {}
        dtype = str(next(self.parameters()).dtype).removeprefix('torch.')
        return dict(
            input=f'(batch, {self.channels}, height, width) {dtype}, {order}, {values}',
            output=self.output,
            **{key: json.dumps(meta.get(key)) for key in ('classes', 'palette')},
            trained_at=json.dumps(list(size)),
            mmvil=__version__,
        )


# -- Decision rules --------------------------------------------------------------------------------
#
# The libraries decide in a loop over images, which exporters cannot trace, so their rules are
# repeated here for a batch. A rule is used only if the model runs the very methods that it
# reproduces: subclasses that override one of them are rejected.


def decision(model, output):
    """Return the function that derives an output, one of ``OUTPUTS``, from what the head of a
    segmentor or classifier returns. Raises ValueError if its rule is unknown.
    """
    if hasattr(model, 'encode_decode'):
        return segmentor_decision(model, output)
    from mmpretrain.models import ImageClassifier, MultiTaskHead

    head = getattr(model, 'head', None)
    if head is None or not _runs(model, ImageClassifier, 'forward', 'predict'):
        return _unknown_decision(model, output)
    if not _runs(head, MultiTaskHead, 'forward', 'predict'):
        return head_decision(head, output)
    tasks = {task: head_decision(each, output) for task, each in head.task_heads.items()}
    return lambda scores: {f'{output}.{task}': rule(scores[task]) for task, rule in tasks.items()}


def segmentor_decision(model, output):
    """Find the rule for what ``encode_decode`` of a segmentor returns, see :func:`decision`."""
    from mmseg.models import BaseSegmentor, EncoderDecoder
    from mmseg.models.decode_heads import DAHead, EncHead
    from mmseg.models.decode_heads.cascade_decode_head import BaseCascadeDecodeHead
    from mmseg.models.decode_heads.decode_head import BaseDecodeHead

    if not (
        _runs(model, BaseSegmentor, 'postprocess_result')
        and _runs(model, EncoderDecoder, 'predict', 'inference', 'whole_inference')
    ):
        return _unknown_decision(model, output)
    heads = model.decode_head
    head = heads[-1] if isinstance(heads, nn.ModuleList) else heads
    if output == 'labels' and model.out_channels == 1 and not hasattr(heads, 'threshold'):
        raise ValueError(
            f"output 'labels': {type(model).__name__} with one logit has no threshold, its own "
            'predict fails; use probabilities'
        )
    kinds = BaseDecodeHead, BaseCascadeDecodeHead, DAHead, EncHead
    if output == 'probabilities' and not (
        _runs(head, BaseDecodeHead, 'predict_by_feat')  # others return scores that are not logits
        and any(_runs(head, kind, 'predict') for kind in kinds)
    ):
        return _unknown_decision(head, output)

    # Like ``BaseSegmentor.postprocess_result``, with the probabilities of ``SegTTAModel``.
    if model.out_channels > 1:
        return _rule(output, lambda x: x.softmax(1), lambda x: x.argmax(1))
    return _rule(output, torch.sigmoid, lambda x: (x.sigmoid() > heads.threshold).squeeze(1).long())


def head_decision(head, output):
    """Find the rule for what a head of mmpretrain returns."""
    from mmpretrain import models

    def labels(logits):
        """Like ``MultiLabelClsHead._get_predictions``, but as 0 and 1 (B, classes)."""
        probabilities = logits.sigmoid()
        if head.thr is not None:
            return (probabilities >= head.thr).long()
        highest = probabilities.topk(head.topk).indices
        return torch.zeros_like(probabilities, dtype=torch.long).scatter(1, highest, 1)

    any_labels = _rule(output, torch.sigmoid, labels)
    # Like ``ClsHead._get_predictions``.
    one_label = _rule(output, lambda x: x.softmax(1), lambda x: x.softmax(1).argmax(1))
    for kind, rule in (
        (models.ClsHead, one_label),
        (models.MultiLabelClsHead, any_labels),
        (models.ConformerHead, lambda branches: one_label(torch.add(*branches))),
    ):
        if _runs(head, kind, 'predict', '_get_predictions'):
            return rule
    return _unknown_decision(head, output)


def _rule(output, probabilities, labels):
    """Choose between the functions from logits to probabilities and to labels."""
    return dict(logits=lambda logits: logits, probabilities=probabilities, labels=labels)[output]


def _unknown_decision(module, output):
    """Return logits unchanged if they are a single tensor; raise for any other output."""
    name = type(module).__name__
    if output != 'logits':
        raise ValueError(
            f'output {output!r}: {name} has its own rule for what its predict returns, which '
            'export does not know; use logits and apply that rule to them'
        )

    def check(scores):
        if not isinstance(scores, torch.Tensor):
            raise ValueError(f'{name} returns a {type(scores).__name__}; export needs one tensor')
        return scores

    return check


def _runs(module, kind, *methods):
    """Whether a module uses these methods of the class ``kind`` unchanged."""
    return all(
        getattr(getattr(module, name, None), '__func__', None) is getattr(kind, name)
        for name in methods
    )


# -- Graph and file --------------------------------------------------------------------------------


def adaptive_avg_pool2d(x, output_size):
    """Adaptive average pooling of (..., H, W) as products with averaging matrices, for any size."""
    for dim, bins in zip((-1, -2), reversed(output_size)):
        size = x.shape[dim]
        index = torch.arange(bins, device=x.device).unsqueeze(1)
        start, end = index * size // bins, ((index + 1) * size + bins - 1) // bins
        place = torch.arange(size, device=x.device)
        means = ((place >= start) & (place < end)).to(x.dtype) / (end - start).to(x.dtype)
        x = torch.matmul(x, means.t()) if dim == -1 else torch.matmul(means, x)
    return x


DECOMPOSITIONS = {torch.ops.aten.adaptive_avg_pool2d.default: adaptive_avg_pool2d}
"""Replacements for operators that exporters support for fixed sizes only."""


def trace(model, size, static=False, chunk_size=None):
    """Trace a model.

    Args:
        model (Deployed): Model to trace; not modified.
        size (tuple[int, int]): Image size to trace with.
        static (bool): Fix the input to one image of that size. Default: False.
        chunk_size (int, optional): Tokens per chunk of the mLSTM.

    Returns:
        torch.export.ExportedProgram: Graph without operators of mmvil.
    """
    from torch.fx.experimental import _config as shapes

    model = copy.deepcopy(model)
    for block in model.modules():
        if isinstance(block, ViLBlock) and chunk_size:
            block.chunk_size = chunk_size
    # Traced with sizes that are unlikely to match special cases; the graph does not keep them.
    height, width = size if static else (size[0] + 5, size[1] + 3)
    weight = next(model.parameters())  # its dtype is that of the images
    example = weight.new_zeros(1 if static else 2, model.channels, height, width)
    free = torch.export.Dim.DYNAMIC
    dynamic = None if static else ({0: free, 2: free, 3: free},)
    # With this setting, torch does not restrict the graph to conditions that happen to hold for the
    # example's sizes, such as "more than one image".
    with torch.no_grad(), shapes.patch(backed_size_oblivious=not static):
        program = torch.export.export(model, (example,), dynamic_shapes=dynamic)
        program = program.run_decompositions(DECOMPOSITIONS)
    # The remaining conditions concern strides, not values; comparing the file tests them.
    program._guards_code.clear()
    return program


def save_onnx(program, out, names, description=None, opset=20):
    """Write a traced program to an ONNX file, with the names of its outputs and, as metadata, the
    description from :meth:`Deployed.describe`.

    Raises:
        ValueError: If PyTorch writes another opset, as its exporter does without saying so.
    """
    io = dict(input_names=['images'], output_names=names)
    with torch.no_grad():
        onnx_program = torch.onnx.export(
            program, dynamo=True, opset_version=opset, verbose=False, **io
        )
    if (written := onnx_program.model.opset_imports['']) != opset:
        raise ValueError(f'PyTorch cannot write opset {opset}, but could write {written}')
    onnx_program.model.metadata_props.update(description or {})
    onnx_program.save(out)


def save_pt2(program, out, description=None):
    """Write a file for ``torch.export.load``, with the description as ``description.json``."""
    torch.export.save(program, out, extra_files={'description.json': json.dumps(description)})


def load_exported(path, format='onnx'):
    """Load an exported file in the format 'onnx' or 'pt2'.

    Returns:
        Callable: Maps images (B, C, H, W) to a tensor, or to a dict of tensors by name.
    """
    if format == 'pt2':
        return torch.export.load(path).module()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    names = [output.name for output in session.get_outputs()]

    def outputs(images):
        arrays = session.run(None, {'images': images.numpy()})
        return {name: torch.from_numpy(array) for name, array in zip(names, arrays)}

    return outputs


def compare_output(actual, expected, are_labels=False):
    """Compare scores or labels of an exported file with those of PyTorch. Return the largest
    difference relative to the largest score, or the fraction of labels that differ, and a text that
    reports it. Raises ValueError if the shapes differ.
    """
    if actual.shape != expected.shape:
        raise ValueError(
            f'the exported file returns the shape {tuple(actual.shape)} where PyTorch returns '
            f'{tuple(expected.shape)}'
        )
    if are_labels:
        difference = (actual != expected).double().mean().item()
        return difference, f'{difference:.1e} of the labels differ'
    absolute = (actual.double() - expected.double()).abs().max().item()
    difference = absolute and absolute / expected.abs().max().item()
    summary = f'largest difference {absolute:.1e}, relative {difference:.1e}'
    if expected.dim() > 1 and expected.shape[1] > 1:
        same = (actual.argmax(1) == expected.argmax(1)).double().mean().item()
        summary += f', same class {same:.3%}'
    return difference, summary
