# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Export a segmentor or classifier to ONNX or torch.export, and check the file against PyTorch.

python tools/deployment/export.py configs/upernet_vil_t_ade20k.py checkpoint.pth --out vil_t.onnx

The file takes any number of images of any size, in RGB from 0 to 255. See docs/deployment.md.
"""

import argparse
import copy
import json
import logging
import sys
import time
import warnings
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
import torch  # noqa: E402
from _common import DictAction, UserError, load_config, parse_args, run  # noqa: E402
from _models import build_model  # noqa: E402
from torch import nn  # noqa: E402

from mmvil import VisionLSTM, __version__  # noqa: E402
from mmvil.layers import ViLBlock  # noqa: E402
from mmvil.ops.traceable import mlstm_traceable  # noqa: E402

SUFFIXES = dict(onnx='.onnx', pt2='.pt2')
OUTPUTS = ('logits', 'probabilities', 'labels')


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', help='config file that the checkpoint was trained with')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--out', type=Path, help='file to write (default: CONFIG_NAME.onnx)')
    parser.add_argument(
        '--format', choices=SUFFIXES, help='(default: by the suffix of --out, else onnx)'
    )
    parser.add_argument(
        '--output', choices=OUTPUTS, default='logits', help='what the file returns (%(default)s)'
    )
    parser.add_argument(
        '--size',
        type=int,
        nargs=2,
        metavar=('HEIGHT', 'WIDTH'),
        help='image size to trace and check with (default: that of the position embedding)',
    )
    parser.add_argument(
        '--static', action='store_true', help='one image of exactly --size, for simpler runtimes'
    )
    parser.add_argument(
        '--normalized-input',
        action='store_true',
        help='leave mean and standard deviation to the caller',
    )
    parser.add_argument(
        '--chunk-size', type=int, help='tokens in a chunk of the mLSTM (default: by head width)'
    )
    parser.add_argument('--opset', type=int, default=20, help='of ONNX (%(default)s)')
    parser.add_argument(
        '--tolerance',
        type=float,
        default=1e-3,
        help='largest accepted difference to PyTorch, relative to the largest output; with '
        '--output labels: share of labels that differ (%(default)s)',
    )
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, default={}, metavar='KEY=VALUE'
    )
    parser.add_argument('--traceback', action='store_true', help='show the trace of an error')
    return parser


# -- The model as one function of images -----------------------------------------------------------


class Deployed(nn.Module):
    """A segmentor or classifier from images to scores.

    Args:
        model (nn.Module): An ``EncoderDecoder`` of mmseg or an ``ImageClassifier`` of mmpretrain.
        output (str): 'logits', 'probabilities' or 'labels'. Default: 'logits'.
        normalize (bool): Subtract the mean and divide by the standard deviation. Default: True.
    """

    def __init__(self, model, output='logits', normalize=True):
        super().__init__()
        self.model = model
        self.output = output
        preprocessor = model.data_preprocessor
        self.normalize = normalize and getattr(preprocessor, '_enable_normalize', False)
        if self.normalize:
            self.register_buffer('mean', preprocessor.mean.detach().clone())
            self.register_buffer('std', preprocessor.std.detach().clone())

    def forward(self, images):
        """Map images (B, 3, H, W) to scores (B, classes, H, W) or (B, classes), or labels without
        the dimension of classes.
        """
        x = (images - self.mean) / self.std if self.normalize else images
        if hasattr(self.model, 'encode_decode'):
            scores = self.model.encode_decode(x, [dict(img_shape=x.shape[2:])])
        else:
            scores = self.model(x, mode='tensor')
        binary = scores.shape[1] == 1  # a segmentor with one score, for the class 1
        if self.output == 'probabilities':
            return scores.sigmoid() if binary else scores.softmax(1)
        if self.output == 'labels':
            return (scores[:, 0] > 0).long() if binary else scores.argmax(1)
        return scores

    @property
    def channel_order(self):
        """Of the input."""
        preprocessor = self.model.data_preprocessor
        converts = getattr(preprocessor, '_channel_conversion', False) or getattr(
            preprocessor, 'to_rgb', False
        )
        return 'RGB' if converts else 'BGR'  # OpenMMLab's loaders read BGR


def describe(model, size):
    """What a user of the file has to know, as text by key."""
    meta = getattr(model.model, 'dataset_meta', None) or {}
    if model.normalize or not hasattr(model.model.data_preprocessor, 'mean'):
        values = '0 to 255'
    else:
        mean, std = (
            getattr(model.model.data_preprocessor, name).flatten().tolist()
            for name in ('mean', 'std')
        )
        values = f'0 to 255, minus {mean}, divided by {std}'
    return dict(
        input=f'(batch, 3, height, width) float32, {model.channel_order}, {values}',
        output=model.output,
        classes=json.dumps(meta.get('classes')),
        palette=json.dumps(meta.get('palette')),
        trained_at=json.dumps(list(size)),
        mmvil=__version__,
    )


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


DECOMPOSITIONS = {
    torch.ops.mmvil.mlstm.default: mlstm_traceable,
    torch.ops.aten.adaptive_avg_pool2d.default: adaptive_avg_pool2d,
}
"""What exporters do not know, or know for fixed sizes only, in operators that they know."""


def trace(model, size, static=False, chunk_size=None):
    """Trace a model.

    Args:
        model (nn.Module): Maps images (B, 3, H, W) to a tensor; not changed.
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
            head_width = len(block.skip) // block.num_heads
            block.lean, block.backend = False, 'chunkwise'
            block.chunk_size = chunk_size or max(64, head_width // 2)
    # Traced with sizes that no rule of thumb fits; these sizes are then forgotten.
    height, width = size if static else (size[0] + 5, size[1] + 3)
    example = torch.zeros(1 if static else 2, 3, height, width)
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


def save_onnx(program, out, opset, description):
    """Write an ONNX file with a description in its metadata."""
    with torch.no_grad():
        onnx_program = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            input_names=['images'],
            output_names=[description['output']],
            verbose=False,
        )
    onnx_program.model.metadata_props.update(description)
    onnx_program.save(out)


def save_pt2(program, out, description):
    """Write a file for ``torch.export.load``, which needs torch alone."""
    torch.export.save(program, out, extra_files={'description.json': json.dumps(description)})


# -- The check -------------------------------------------------------------------------------------


def load(path, output_format):
    """An exported file as a function of a tensor."""
    if output_format == 'pt2':
        module = torch.export.load(path).module()
        return lambda images: module(images)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    return lambda images: torch.from_numpy(session.run(None, {'images': images.numpy()})[0])


def timed(function, images):
    """The result, and the seconds of a second call."""
    with torch.no_grad():
        result = function(images)
        start = time.perf_counter()
        function(images)
    return result, time.perf_counter() - start


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
    worst = 0.0
    for shape in shapes:
        images = torch.rand(shape, generator=generator) * 255
        if not model.normalize:
            images = images / 64 - 2
        expected, seconds = timed(model, images)
        actual, exported_seconds = timed(exported, images)
        if actual.shape != expected.shape:
            raise UserError(
                f'the exported file returns the shape {tuple(actual.shape)} for images of shape '
                f'{shape}, but PyTorch {tuple(expected.shape)}'
            )
        if model.output == 'labels':
            difference = (actual != expected).double().mean().item()
            said = f'{difference:.1e} of the labels differ'
        else:
            absolute = (actual.double() - expected.double()).abs().max().item()
            difference = absolute / expected.abs().max().item()
            said = f'largest difference {absolute:.1e}, relative {difference:.1e}'
            if expected.dim() > 1 and expected.shape[1] > 1:
                same = (actual.argmax(1) == expected.argmax(1)).double().mean().item()
                said += f', same class {same:.3%}'
        times = f'{exported_seconds * 1e3:.0f} ms, PyTorch {seconds * 1e3:.0f} ms'
        print(f'  {"x".join(map(str, shape)):>16}: {said}; {times}')
        worst = max(worst, difference)
    return worst


# -- Command line ----------------------------------------------------------------------------------


def check_installation(output_format):
    """Make sure that PyTorch and the packages for ONNX are there."""
    if not hasattr(torch.compiler, 'is_exporting'):
        raise UserError(
            f'export needs a newer PyTorch than {torch.__version__} (2.15 is known to work). '
            'Checkpoints are the same on both lines of OpenMMLab: install the maintained one in '
            "another environment, pip install '.[onedl]', and export there"
        )
    if output_format == 'onnx':
        for package in ('onnx', 'onnxscript', 'onnxruntime'):
            try:
                __import__(package)
            except ImportError as error:
                raise UserError(
                    f'ONNX needs {package}: pip install onnx onnxscript onnxruntime'
                ) from error


def training_size(model):
    """The image size that the position embedding was made for."""
    for backbone in model.modules():
        if isinstance(backbone, VisionLSTM):
            return tuple(side * backbone.patch_size for side in backbone.pos_embed.shape[1:3])
    raise UserError('the model has no VisionLSTM; give the image size by --size HEIGHT WIDTH')


def main():
    args = parse_args(make_parser())
    output_format = args.format
    if output_format is None:
        suffix = args.out.suffix if args.out else '.onnx'
        formats = {value: key for key, value in SUFFIXES.items()}
        if suffix not in formats:
            raise UserError(
                f'--out ends with {suffix!r}; .onnx or .pt2 says the format, or --format does'
            )
        output_format = formats[suffix]
    check_installation(output_format)
    cfg = load_config(args.config, args.cfg_options)
    out = args.out or Path(Path(args.config).stem + SUFFIXES[output_format])

    model = Deployed(
        build_model(cfg, args.checkpoint), args.output, normalize=not args.normalized_input
    ).eval()
    size = tuple(args.size or training_size(model))
    description = describe(model, size)
    print(f'Tracing at {size[0]}x{size[1]} ...')
    logging.getLogger('torch').setLevel(logging.ERROR)
    warnings.simplefilter('ignore')  # of exporters, to their own developers
    start = time.perf_counter()
    program = trace(model, size, args.static, args.chunk_size)
    out.parent.mkdir(parents=True, exist_ok=True)
    if output_format == 'onnx':
        save_onnx(program, out, args.opset, description)
    else:
        save_pt2(program, out, description)
    print(f'Wrote {out} ({out.stat().st_size / 1e6:.1f} MB, {time.perf_counter() - start:.0f} s)')
    print(f'  input  {description["input"]}\n  output {args.output}')

    print('Compared with PyTorch:')
    shapes = [(1, 3, *size)]
    if not args.static:  # a second size that the patches do not tile, larger and smaller than both
        shapes.append((3, 3, size[0] * 5 // 4 + 1, max(size[1] * 3 // 4 - 1, 16)))
    worst = check(model, load(out, output_format), shapes)
    if not worst <= args.tolerance:
        raise UserError(
            f'{out} differs from PyTorch by {worst:.1e}, more than --tolerance {args.tolerance:g}'
        )


if __name__ == '__main__':
    run(main)
