# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Segmentors and classifiers as one function of images, traced, saved and checked."""

import copy
import json
import time

import torch
from torch import nn

from .. import __version__
from ..layers import ViLBlock

# -- The model as one function of images -----------------------------------------------------------


class Deployed(nn.Module):
    """A segmentor or classifier from images to scores or labels.

    Args:
        model (nn.Module): An ``EncoderDecoder`` of mmseg or an ``ImageClassifier`` of mmpretrain.
        output (str): 'logits', 'probabilities' or 'labels'. Default: 'logits'.
        normalize (bool): Subtract the mean and divide by the standard deviation. Default: True.

    Raises:
        ValueError: If the model gets to ``output`` by a rule that is not known here.
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
        or (B,), or of several labels an image, 1 among 0 (B, classes). Tasks make a dict of them.
        """
        x = (images - self.mean) / self.std if self.normalize else images
        if hasattr(self.model, 'encode_decode'):
            return self.decide(self.model.encode_decode(x, [dict(img_shape=x.shape[2:])]))
        return self.decide(self.model(x, mode='tensor'))

    @property
    def names(self):
        """Of the outputs: one, or one for each task."""
        tasks = getattr(getattr(self.model, 'head', None), 'task_heads', None)
        return [self.output] if tasks is None else [f'{self.output}.{task}' for task in tasks]

    @property
    def channels(self):
        """Of the input: those that the first convolution reads."""
        return next(x.in_channels for x in self.model.modules() if isinstance(x, nn.Conv2d))

    @property
    def channel_order(self):
        """Of the input."""
        if self.channels != 3:
            return 'bands as loaded'
        preprocessor = self.model.data_preprocessor
        converts = getattr(preprocessor, '_channel_conversion', False) or getattr(
            preprocessor, 'to_rgb', False
        )
        return 'RGB' if converts else 'BGR'  # OpenMMLab's loaders read BGR


def describe(model, size):
    """What a user of the file has to know, as text by key."""
    meta = getattr(model.model, 'dataset_meta', None) or {}
    loaded = '0 to 255' if model.channels == 3 else 'values as loaded'
    if model.normalize or not hasattr(model.model.data_preprocessor, 'mean'):
        values = loaded
    else:
        mean, std = (
            getattr(model.model.data_preprocessor, name).flatten().tolist()
            for name in ('mean', 'std')
        )
        values = f'{loaded}, minus {mean}, divided by {std}'
    return dict(
        input=f'(batch, {model.channels}, height, width) float32, {model.channel_order}, {values}',
        output=model.output,
        classes=json.dumps(meta.get('classes')),
        palette=json.dumps(meta.get('palette')),
        trained_at=json.dumps(list(size)),
        mmvil=__version__,
    )


# -- The decision ----------------------------------------------------------------------------------
#
# The libraries' own code decides in a loop over images, which no exporter can trace, so its rules
# stand here once more, for a batch. A rule is used where the model runs the very methods that the
# rule was taken from, and nowhere else: a subclass that overrides one of them is refused.


def label_of_pixel(model, logits):
    """``BaseSegmentor.postprocess_result``, with the probabilities of ``SegTTAModel``."""
    if logits.shape[1] > 1:
        return dict(logits=logits, probabilities=logits.softmax(1), labels=logits.argmax(1))
    foreground = logits.sigmoid()
    labels = (foreground > model.decode_head.threshold).squeeze(1).long()
    return dict(logits=logits, probabilities=foreground, labels=labels)


def one_label(head, logits):
    """``ClsHead._get_predictions``."""
    probabilities = logits.softmax(1)
    return dict(logits=logits, probabilities=probabilities, labels=probabilities.argmax(1))


def any_labels(head, logits):
    """``MultiLabelClsHead._get_predictions``, the labels as 1 among 0 (B, classes)."""
    probabilities = logits.sigmoid()
    if head.thr is not None:
        labels = (probabilities >= head.thr).long()
    else:
        highest = probabilities.topk(head.topk).indices
        labels = torch.zeros_like(probabilities, dtype=torch.long).scatter(1, highest, 1)
    return dict(logits=logits, probabilities=probabilities, labels=labels)


def runs(module, kind, *methods):
    """Whether these methods of a module are those that the class ``kind`` has."""
    return all(
        getattr(getattr(module, name, None), '__func__', None) is getattr(kind, name)
        for name in methods
    )


def decision(model, output):
    """Find how a model goes on from the scores of its head.

    Args:
        model (nn.Module): A segmentor or classifier.
        output (str): 'logits', 'probabilities' or 'labels'.

    Returns:
        Callable: Maps what the model's head returns to the output.

    Raises:
        ValueError: If it does so by a rule that is not known here.
    """
    if hasattr(model, 'encode_decode'):
        return segmentor_decision(model, output)
    if getattr(model, 'head', None) is None:
        return head_decision(model, output)
    from mmpretrain.models import ImageClassifier, MultiTaskHead

    if not runs(model, ImageClassifier, 'forward', 'predict'):
        return no_decision(model, output)
    if not runs(model.head, MultiTaskHead, 'forward', 'predict'):
        return head_decision(model.head, output)
    tasks = {task: head_decision(head, output) for task, head in model.head.task_heads.items()}
    return lambda scores: {
        f'{output}.{task}': decide(scores[task]) for task, decide in tasks.items()
    }


def segmentor_decision(model, output):
    """:func:`decision` of what ``encode_decode`` returns."""
    from mmseg.models import BaseSegmentor, EncoderDecoder
    from mmseg.models.decode_heads import DAHead, EncHead
    from mmseg.models.decode_heads.cascade_decode_head import BaseCascadeDecodeHead
    from mmseg.models.decode_heads.decode_head import BaseDecodeHead

    if not (
        runs(model, BaseSegmentor, 'postprocess_result')
        and runs(model, EncoderDecoder, 'predict', 'inference', 'whole_inference')
    ):
        return no_decision(model, output)
    heads = model.decode_head
    head = heads[-1] if isinstance(heads, nn.ModuleList) else heads
    if output == 'labels' and model.out_channels == 1 and not hasattr(heads, 'threshold'):
        raise ValueError(
            f'--output labels: {type(model).__name__} with one logit has no threshold, its own '
            'predict fails; use --output probabilities'
        )
    if output == 'probabilities' and not (
        runs(head, BaseDecodeHead, 'predict_by_feat')  # others return scores that are no logits
        and any(
            runs(head, kind, 'predict')
            for kind in (BaseDecodeHead, BaseCascadeDecodeHead, DAHead, EncHead)
        )
    ):
        return no_decision(head, output)
    return lambda logits: label_of_pixel(model, logits)[output]


def head_decision(head, output):
    """:func:`decision` of what a head of one task returns, or a classifier without a head."""
    from mmpretrain.models import (
        ClsHead,
        ConformerHead,
        HuggingFaceClassifier,
        MultiLabelClsHead,
        TimmClassifier,
    )

    if any(
        runs(head, kind, 'predict', '_get_predictions')
        for kind in (ClsHead, TimmClassifier, HuggingFaceClassifier)
    ):
        return lambda logits: one_label(head, logits)[output]
    if runs(head, MultiLabelClsHead, 'predict', '_get_predictions'):
        return lambda logits: any_labels(head, logits)[output]
    if runs(head, ConformerHead, 'predict', '_get_predictions'):
        return lambda branches: one_label(head, torch.add(*branches))[output]
    return no_decision(head, output)


def no_decision(module, output):
    """:func:`decision` of a module whose rule is not known: logits, if they are one tensor."""
    name = type(module).__name__
    if output != 'logits':
        raise ValueError(
            f'--output {output}: {name} has a rule of its own for what its predict returns, which '
            'export does not know; use --output logits and apply that rule to them'
        )

    def check(scores):
        if not isinstance(scores, torch.Tensor):
            raise ValueError(f'{name} returns a {type(scores).__name__}; export needs one tensor')
        return scores

    return check


# -- The graph -------------------------------------------------------------------------------------


def adaptive_avg_pool2d(x, output_size):
    """Adaptive average pooling as a product with the matrix of means, for any image size."""
    for dim, bins in zip((-1, -2), reversed(output_size)):
        size = x.shape[dim]
        index = torch.arange(bins, device=x.device).unsqueeze(1)
        start, end = index * size // bins, ((index + 1) * size + bins - 1) // bins
        place = torch.arange(size, device=x.device)
        means = ((place >= start) & (place < end)).to(x.dtype) / (end - start).to(x.dtype)
        x = torch.matmul(x, means.t()) if dim == -1 else torch.matmul(means, x)
    return x


DECOMPOSITIONS = {torch.ops.aten.adaptive_avg_pool2d.default: adaptive_avg_pool2d}
"""Operators that exporters know for fixed sizes only, in operators that they know for all."""


def trace(model, size, static=False, chunk_size=None):
    """Trace a model.

    Args:
        model (Deployed): Maps images (B, C, H, W) to a tensor; not changed.
        size (tuple[int, int]): Image size to trace with.
        static (bool): One image of that size only. Default: False.
        chunk_size (int, optional): Tokens in a chunk of the mLSTM.

    Returns:
        torch.export.ExportedProgram: Without operators of mmvil.
    """
    from torch.fx.experimental import _config as shapes

    model = copy.deepcopy(model)
    for block in model.modules():
        if isinstance(block, ViLBlock):
            block.chunk_size = chunk_size or block.chunk_size
    # Traced with sizes that no rule of thumb fits; these sizes are then forgotten.
    height, width = size if static else (size[0] + 5, size[1] + 3)
    example = torch.zeros(1 if static else 2, model.channels, height, width)
    free = torch.export.Dim.DYNAMIC
    dynamic = None if static else ({0: free, 2: free, 3: free},)
    # With this setting, torch does not tie the graph to what happens to hold for the example's
    # sizes, such as "more than one image".
    with torch.no_grad(), shapes.patch(backed_size_oblivious=not static):
        program = torch.export.export(model, (example,), dynamic_shapes=dynamic)
        program = program.run_decompositions(DECOMPOSITIONS)
    # What is left of such conditions concerns strides, not values; the check below tries it.
    program._guards_code.clear()
    return program


def save_onnx(program, out, opset, names, description):
    """Write an ONNX file with names of its outputs and a description in its metadata."""
    with torch.no_grad():
        onnx_program = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            input_names=['images'],
            output_names=names,
            verbose=False,
        )
    onnx_program.model.metadata_props.update(description)
    onnx_program.save(out)


def save_pt2(program, out, description):
    """Write a file for ``torch.export.load``, which needs torch alone."""
    torch.export.save(program, out, extra_files={'description.json': json.dumps(description)})


# -- The check -------------------------------------------------------------------------------------


def load(path, output_format):
    """An exported file as a function from images to a tensor, or to tensors by name."""
    if output_format == 'pt2':
        module = torch.export.load(path).module()
        return lambda images: module(images)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    names = [output.name for output in session.get_outputs()]

    def outputs(images):
        arrays = session.run(None, {'images': images.numpy()})
        return {name: torch.from_numpy(array) for name, array in zip(names, arrays)}

    return outputs


def timed(function, images):
    """The result, and the seconds of a second call."""
    with torch.no_grad():
        result = function(images)
        start = time.perf_counter()
        function(images)
    return result, time.perf_counter() - start


def by_name(result, names):
    """Outputs as a dict, also where there is one only."""
    return result if isinstance(result, dict) else {names[0]: result}


def compare(actual, expected, are_labels):
    """The difference of an output to that of PyTorch, see :func:`check`, as number and text."""
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
    said = f'largest difference {absolute:.1e}, relative {difference:.1e}'
    if expected.dim() > 1 and expected.shape[1] > 1:
        same = (actual.argmax(1) == expected.argmax(1)).double().mean().item()
        said += f', same class {same:.3%}'
    return difference, said


def check(model, exported, shapes):
    """Compare an exported file with PyTorch on random images.

    Args:
        model (nn.Module): The model as it was built.
        exported (Callable): Of :func:`load`.
        shapes (list[tuple]): Of the images.

    Returns:
        float: The largest difference, relative to the largest output; of labels, the largest share
        that differs.
    """
    generator = torch.Generator().manual_seed(0)
    differences = []
    for shape in shapes:
        images = torch.rand(shape, generator=generator) * 255
        if not model.normalize:
            images = images / 64 - 2
        expected, seconds = timed(model, images)
        actual, exported_seconds = timed(exported, images)
        times = f'{exported_seconds * 1e3:.0f} ms, PyTorch {seconds * 1e3:.0f} ms'
        expected, actual = by_name(expected, model.names), by_name(actual, model.names)
        for name in model.names:
            difference, said = compare(actual[name], expected[name], model.output == 'labels')
            task = f'{name}: ' if len(model.names) > 1 else ''
            print(f'  {"x".join(map(str, shape)):>16}: {task}{said}; {times}')
            differences.append(difference)
    return torch.tensor(differences).max().item()  # NaN, if there is one
