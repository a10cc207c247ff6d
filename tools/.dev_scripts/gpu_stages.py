# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Stages of tools/analysis_tools/gpu_report.py, which runs each part in a separate process.

python tools/.dev_scripts/gpu_stages.py --list
python tools/.dev_scripts/gpu_stages.py kernels --part '{"width": 96, "dtype": "bfloat16"}'
python tools/.dev_scripts/gpu_stages.py tiles --part '{"width": 96, "size": 1024, "seconds": 600}'

A part prints its results as JSON, one object per line, and an object with the key ``at`` before
each step that may crash or hang. It exits with status 3 if a number is wrong.
"""

import argparse
import contextlib
import faulthandler
import functools
import importlib.util
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

import mmvil
from mmvil.apis.measure import compare, synchronize, time_ratio

ROOT = Path(__file__).resolve().parents[2]
WRONG = 3
"""Exit status for a wrong number."""
WORKERS = min(14, max(1, (os.cpu_count() or 1) - 2))
"""Processes that compile kernels side by side."""
HEADS = 4
WIDTHS = dict(tiny=96, small=192, base=384)
"""Head widths, half the width of the model."""

FULL = dict(
    archs=tuple(WIDTHS),
    sizes={224: 128, 512: 16, 1024: 4},  # pixels: batch
    compiled=[('tiny', 512)],  # with CUDA graphs; takes a minute or more
    large=2**31,
    rounds=3,
    sweep=dict(size=512, seconds=15),  # for each head width
    upernet=dict(size=512, batch=4, steps=200, window=20),
)
QUICK = dict(
    archs=('tiny',),
    sizes={32: 2},
    compiled=[],
    large=2**12,
    rounds=1,
    sweep=dict(size=32, seconds=1),
    upernet=dict(size=64, batch=2, steps=4, window=2),
)


class WrongNumberError(Exception):
    """A kernel computed a wrong result."""


class Context:
    """Device and sizes of this run."""

    def __init__(self, device, quick):
        self.device, self.quick = torch.device(device), quick
        self.on_gpu = self.device.type == 'cuda'
        self.plan = QUICK if quick else FULL
        # Not 'auto', whose self-test takes a minute for each width; stage 1 runs it.
        self.backend = 'triton' if self.on_gpu or 'TRITON_INTERPRET' in os.environ else 'auto'

    def width(self, arch):
        """Width of a head."""
        return 16 if self.quick else WIDTHS[arch]

    def vil(self, arch, depth=None, **options):
        if self.quick or depth:
            arch = dict(embed_dims=2 * self.width(arch), depth=depth or 2)
        return mmvil.VisionLSTM(arch=arch, backend=self.backend, **options).to(self.device)

    def images(self, size, batch=None):
        return torch.randn(batch or self.plan['sizes'][size], 3, size, size, device=self.device)

    def milliseconds(self, function, *args, **kwargs):
        """Time a function; on a GPU its kernels from a CUDA graph, because a launch from Python
        takes about 0.1 ms, in which many of them would have ended.
        """
        if self.on_gpu:
            from triton.testing import do_bench

            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                function(*args, **kwargs)  # compiles
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                function(*args, **kwargs)
            return do_bench(graph.replay, return_mode='median')
        start = time.perf_counter()
        function(*args, **kwargs)
        return 1e3 * (time.perf_counter() - start)


def emit(**row):
    print(json.dumps(row), flush=True)


# -- 1. Every kernel once --------------------------------------------------------------------------


@contextlib.contextmanager
def intercept_launches(note):
    """Call ``note(label, launch, args, kwargs)`` before each launch of a kernel."""
    from triton.runtime.jit import KernelInterface

    def on_grid(kernel, grid):
        launch = functools.partial(kernel.run, grid=grid, warmup=False)

        def call(*args, **kwargs):
            flags = [name for name in ('GRAD', 'OPERAND') if kwargs.get(name)]
            note(' '.join([kernel.__name__, *flags]), launch, args, kwargs)
            return launch(*args, **kwargs)

        return call

    with mock.patch.object(KernelInterface, '__getitem__', on_grid):
        yield


def kernels(context, width, dtype='bfloat16', grid=None, ptxas='default', device=None):
    """Run the self-test, and name each kernel before its first launch."""
    from mmvil.ops.triton import self_test

    seen = set()

    def note(label, *_):
        if label not in seen:
            seen.add(label)
            emit(at=f'{label}, width {width}, {dtype}')

    cases = [self_test.Case(1, tuple(grid), True, 2)] if grid else self_test.CASES
    device = torch.device(device or context.device)
    with intercept_launches(note):
        problem = self_test.check(device, getattr(torch, dtype), width, cases)
    verdict = problem or 'right'
    emit(width=width, dtype=dtype, ptxas=ptxas, kernels=len(seen), verdict=verdict)
    if problem and ptxas == 'default':  # others are only tried for a recommendation
        raise WrongNumberError(problem)


def other_assemblers():
    """Paths by version of the ptxas on this machine that Triton does not select itself."""
    from triton.backends import nvidia

    from mmvil.ops.triton.verdict import assembler

    found = {}
    for folder in (*nvidia.__path__, '/usr/local', Path(torch.__file__).parents[1] / 'nvidia'):
        for path in Path(folder).glob('**/bin/ptxas*'):
            output = subprocess.run([path, '--version'], capture_output=True, text=True).stdout
            if number := re.search(r'\bV([\d.]+)', output):
                found[number.group(1)] = str(path)
    major, minor = torch.cuda.get_device_capability()
    found.pop(assembler(10 * major + minor)[0], None)
    return found


# -- 2. Correctness --------------------------------------------------------------------------------


def tests(context):
    """Run the tests that need a GPU."""
    targets = ['tests/test_ops/test_triton_mlstm.py']
    if context.on_gpu:  # those files alone, because collecting all takes a minute
        targets = [x for x in sorted(ROOT.glob('tests/**/*.py')) if 'mark.gpu' in x.read_text()]
    workers = ['-n', str(WORKERS)] if context.on_gpu else []
    command = [sys.executable, '-m', 'pytest', '-v', '-m', 'gpu', *workers, *targets]
    # Lines of the summary as long as they are; compilation fills the cores.
    environment = {**os.environ, 'COLUMNS': '300', 'OMP_NUM_THREADS': '1'}
    last, options = 'no output', dict(cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen(command, **options) as process:
        for line in filter(str.strip, process.stdout):
            print(line, end='', file=sys.stderr, flush=True)
            last = line.strip('= \n')
            if last.startswith(('FAILED ', 'ERROR ')):  # in the summary: test - message
                emit(**dict(zip(('check', 'verdict'), last.split(' - ', 1))))
            elif re.search('PASSED|FAILED|ERROR', last):
                emit(at=last)
    emit(check='pytest -m gpu', verdict=last)
    if process.returncode == 1:
        raise WrongNumberError(last)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


def sanitizer(context, tool, width):
    """Check for out-of-bounds accesses with NVIDIA's memory checker."""
    part = json.dumps(dict(width=width, grid=[20, 20]))
    command = [tool, '--error-exitcode', str(WRONG), sys.executable, __file__, 'kernels']
    command += ['--part', part, '--device', str(context.device)]
    status = subprocess.run(command, stdout=sys.stderr).returncode
    emit(check=f'{Path(tool).name}, width {width}', verdict=f'status {status}, see the log')
    if status == WRONG:
        raise WrongNumberError(f'{Path(tool).name} found an error')


def gradients(model, image):
    """Feature map of a model, and gradients of the image and of all parameters."""
    image = image.detach().requires_grad_()
    with torch.autocast(image.device.type, dtype=torch.bfloat16):
        output = model(image)[0]
    leaves = [image, *(p for p in model.parameters() if p.requires_grad)]
    # Samples are independent. The sum of squares would be constant, because of the last norm.
    weights = torch.linspace(-1, 1, output[0].numel(), device=output.device)
    loss = (output.float().flatten(1) * weights).mean(1).sum()
    return [output.detach(), *torch.autograd.grad(loss, leaves)]


def repeat(context, arch):
    """Check that two runs are bitwise equal, at real image sizes."""
    torch.backends.cudnn.deterministic = True
    for size in context.plan['sizes']:
        model, image = context.vil(arch, img_size=size).train(), context.images(size)
        same = all(map(torch.equal, gradients(model, image), gradients(model, image)))
        emit(check=f'ViL-{arch} at {size}, batch {len(image)}: same bits', verdict=same)
        if not same:
            raise WrongNumberError(f'ViL-{arch} at {size} gives different bits in a second run')


def large_layer(context, size):
    """Test offsets beyond 32 bits: in tensors with more than 2^31 elements, the last sample must
    give the same result as alone.
    """
    model = context.vil('base', depth=2, img_size=size).train()
    elements = 4 * model.embed_dims * (size // 16) ** 2  # of a sample after the up-projection
    image, batch = context.images(size, 1), context.plan['large'] // elements + 1
    together = gradients(model, image.expand(batch, -1, -1, -1))
    check_last('layer', together[:2], gradients(model, image))


def large_cell(context, width, tokens):
    """Run :func:`large_layer`'s test on the cell alone."""
    features = torch.randn(3, 1, tokens, HEADS, width, device=context.device).bfloat16()
    gates = torch.randn(2, 1, HEADS, tokens, device=context.device) + 3
    batch = context.plan['large'] // (tokens * HEADS * width) + 1

    def run(features, gates):
        q, k, v = (x.transpose(1, 2).detach().requires_grad_() for x in features)
        h = mmvil.ops.mlstm(q, k, v, igate=gates[0], fgate=gates[1], backend=context.backend)
        return [h.detach(), *torch.autograd.grad(h, (q, k, v), h.detach())]

    together = run(features.repeat(1, batch, 1, 1, 1), gates.repeat(1, batch, 1, 1))
    check_last('cell', together, run(features, gates))


def check_last(name, together, alone):
    for number, (many, one) in enumerate(zip(together, alone)):
        error = ((many[-1].float() - one[0].float()).norm() / one.float().norm()).item()
        emit(check=f'{name}, result {number}: error in sample {len(many)}', verdict=error)
        if not error < 5e-2:
            raise WrongNumberError(f'{name}: relative error {error:.1e} in sample {len(many)}')


# -- 3. Kernels relative to the limits of the GPU --------------------------------------------------


def limits(context):
    """Measure the GB/s of a copy and the TFLOP/s of a matrix product."""
    side = 8192 if context.on_gpu else 64
    x = torch.randn(side, side, device=context.device, dtype=torch.bfloat16)
    y = torch.empty_like(x)
    copy = 2 * x.nbytes / context.milliseconds(lambda: y.copy_(x)) / 1e6
    return copy, 2 * side**3 / context.milliseconds(lambda: torch.mm(x, x, out=y)) / 1e9


def cell_flops(label, kwargs, tokens):
    """FLOPs of the causal products of one kernel; None for kernels without."""
    width, chunk, length = (kwargs.get(name, 0) for name in ('DH', 'chunk', 'length'))
    state = 2 * tokens * width**2
    side = 2 * tokens * (min(chunk, length) + 1) * width + state * (chunk < length)
    if label.startswith('query_side'):
        return side
    if label.startswith('gradients'):  # of q, k and v
        return 3 * side
    if label.startswith('chunk_sums'):
        return state * (2 if kwargs['GRAD'] else 1)
    return None


def profile(context, arch):
    """Time the kernels of a layer at all image sizes, and the whole model at the smallest one."""
    copy, product = limits(context)
    emit(card='limits', **{'GB/s': copy, 'TFLOP/s': product})
    for size in context.plan['sizes']:
        layer_kernels(context, arch, size, copy, product)
    busy(context, arch, min(context.plan['sizes']))


def layer_kernels(context, arch, size, copy, product):
    """Time each Triton kernel of a layer separately. Bytes are those of its tensors, each counted
    once. Then all kernels of a training step of two layers, in which caches are warm.
    """
    found = {}

    def note(label, launch, args, kwargs):
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        nbytes = sum({x.data_ptr(): x.nbytes for x in tensors}.values())
        if label not in found or nbytes > found[label][0]:  # reversed views count as one token
            found[label] = nbytes, launch, args, kwargs

    model, image = context.vil(arch, depth=2, img_size=size).train(), context.images(size)
    with intercept_launches(note):
        gradients(model, image)
    for label, (nbytes, launch, args, kwargs) in found.items():
        emit(at=f'{label}, ViL-{arch} at {size}')
        ms = context.milliseconds(launch, *args, **kwargs)
        flops = cell_flops(label, kwargs, len(image) * HEADS * (size // 16) ** 2)
        row = dict(model=f'ViL-{arch}', size=size, kernel=label, us=1e3 * ms)
        row.update({'GB/s': nbytes / ms / 1e6, '% of copy': nbytes / ms / 1e4 / copy})
        row['TFLOP/s'] = flops / ms / 1e9 if flops else ''
        emit(**row, **{'% of product': flops / ms / 1e7 / product if flops else ''})
    step = f'ViL-{arch} at {size}, 2 layers'
    for name, (count, us) in kernel_times(context, gradients, model, image).items():
        emit(step=step, kernel=name[:80], count=count, us=us)


def kernel_times(context, function, *args):
    """Number of launches and total microseconds of all kernels of a function by name, longest
    first; on a CPU, of operators.
    """
    from torch.profiler import ProfilerActivity

    kind, key = ('CUDA', 'device') if context.on_gpu else ('CPU', 'cpu')
    with torch.profiler.profile(activities=[getattr(ProfilerActivity, kind)]) as profiler:
        function(*args)
        synchronize(context.device)
    rows = [(x.key, x.count, getattr(x, f'self_{key}_time_total')) for x in profiler.key_averages()]
    rows.sort(key=lambda row: -row[2])
    return {name: (count, us) for name, count, us in rows if us}


def busy(context, arch, size, steps=3):
    """Fraction of a training step in which the GPU is busy, and the longest kernels."""
    model, image = context.vil(arch, img_size=size).train(), context.images(size)

    def train():
        for _ in range(steps):
            gradients(model, image)
        synchronize(context.device)

    train()
    start = time.perf_counter()
    train()
    wall = 1e6 * (time.perf_counter() - start)  # without the profiler, which takes time to start
    times = {name: us for name, (_, us) in kernel_times(context, train).items()}
    for name, us in (('all', sum(times.values())), *list(times.items())[:12]):
        emit(step=f'ViL-{arch} at {size}', kernel=name[:80], **{'% of time': 100 * us / wall})


# -- 4. Models -------------------------------------------------------------------------------------


def flash_attention():
    """Context in which only flash attention is used. Raises if it is not available."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.FLASH_ATTENTION)


def models(context, arch, size, compiled=False):
    """Compare throughput and peak memory of ViL with DeiT with flash attention, also in CUDA graphs
    or, in a process without those, compiled.
    """
    import timm

    image = context.images(size)

    def deit(size):
        return timm.create_model(f'deit_{arch}_patch16_224', img_size=size, num_classes=0)

    def vil(size, **options):
        return context.vil(arch, img_size=size, out_type='bilateral_concat', **options)

    def graphed(build, mode):
        def build_and_capture(size):
            model = build(size).to(context.device).train(mode == 'training')
            with torch.autocast('cuda', dtype=torch.bfloat16, cache_enabled=False):
                return torch.cuda.make_graphed_callables(model, (image,))

        return build_and_capture

    deit_name, vil_name = f'DeiT-{arch} flash attention', f'ViL-{arch}'
    graphs = dict(mode='reduce-overhead')
    for mode in ['training'] if compiled else ['forward', 'training']:
        builders = {deit_name: deit, vil_name: vil}
        if compiled:
            builders[f'{deit_name} compiled'] = lambda size: torch.compile(deit(size), **graphs)
            builders[f'{vil_name} compiled'] = lambda size: vil(size, compile=graphs)
        elif context.on_gpu:
            builders |= {f'{n} CUDA graphs': graphed(f, mode) for n, f in builders.items()}
        options = dict(rounds=context.plan['rounds'], progress=lambda x: emit(at=x), count=False)
        with flash_attention():
            records = compare(builders, image, [mode], torch.bfloat16, **options)
        for row in model_rows(records, arch):
            emit(**row)
        measured = {record['model'] for record in records}
        for name in (x for x in builders if x not in measured):
            emit(model=name, size=size, batch=len(image), mode=mode, problem='out of memory')


def model_rows(records, arch):
    """Table rows, each ViL next to the DeiT that runs in the same way, with targets."""
    deits = {r['model'].partition('attention')[2]: r for r in records if 'DeiT' in r['model']}
    for record in records:
        deit = deits.get(record['model'].removeprefix(f'ViL-{arch}'), record)
        ratio = 1 / time_ratio(record, deit)
        peak, size = record['peak_bytes'], record['size']
        row = {name: record[name] for name in ('model', 'size', 'batch', 'mode')}
        row['images/s'] = 1 / statistics.median(record['seconds_per_image'])
        row['x DeiT'] = ratio
        graphs = 'graphs' in record['model']  # graphs allocate their memory at capture
        row['peak MB'] = None if peak is None or graphs else peak / 1e6
        bound = {224: 0.6, 512: 1.0, 1024: 1.5 if arch == 'base' else 2.0}.get(size)
        judged = bound and record['mode'] == 'training' and record['model'] == f'ViL-{arch}'
        row['target'] = f'>= {bound}: {"met" if ratio >= bound else "missed"}' if judged else ''
        if judged and peak and deit is not record:
            row['target'] += f', memory: {"met" if peak <= deit["peak_bytes"] else "missed"}'
        yield row


# -- 5, 6. The cell --------------------------------------------------------------------------------


def cell(context, arch):
    """Time the mLSTM, the attention of a DeiT of the same width, and NX-AI's kernels."""
    for size in context.plan['sizes']:
        time_cells(context, arch, size)


def time_cells(context, arch, size):
    width, tokens = context.width(arch), (size // 16) ** 2

    def features(heads, width):
        shape = (3, context.plan['sizes'][size], tokens, heads, width)
        x = torch.randn(shape, device=context.device, dtype=torch.bfloat16).transpose(2, 3)
        return [part.detach().requires_grad_() for part in x]

    wide, narrow = features(HEADS, width), features(max(1, width // 32), 64)
    igate, fgate = torch.randn(2, *wide[0].shape[:3], device=context.device) + 3
    mlstm = functools.partial(mmvil.ops.mlstm, igate=igate, fgate=fgate, backend=context.backend)
    functions = {'mmvil': (mlstm, wide)}
    functions['flash attention'] = F.scaled_dot_product_attention, narrow
    if importlib.util.find_spec('mlstm_kernels'):
        from mlstm_kernels.torch import get_mlstm_kernel

        nx_ai = get_mlstm_kernel('chunkwise--triton_xl_chunk')
        functions['mlstm_kernels'] = functools.partial(nx_ai, i=igate, f=fgate), wide

    def train(function, inputs):
        h = function(*inputs)
        torch.autograd.grad(h, inputs, h.detach())

    for name, (function, inputs) in functions.items():
        emit(at=f'{name}, width {width}, {tokens} tokens')
        with flash_attention():
            with torch.no_grad():
                forward = context.milliseconds(function, *inputs)
            training = context.milliseconds(train, function, inputs)
        row = dict(width=width, tokens=tokens, kernel=name)
        emit(**row, forward_ms=forward, training_ms=training)


def tiles(context, width, size, seconds, dtype='bfloat16'):
    """Time tiles of the mLSTM until the time is up, starting with the current choice. If you change
    it, note the GPU and versions next to it.
    """
    import triton

    from mmvil.ops.triton import shared_memory
    from mmvil.ops.triton.mlstm_launch import tiling

    dtype, end = getattr(torch, dtype), time.monotonic() + seconds
    usual = tiling(width, dtype, shared_memory(context.device))
    for choice in variants(usual):
        changes = (f'{k} {v}' for k, v in choice._asdict().items() if v != getattr(usual, k))
        text = ', '.join(changes) or 'current choice'
        emit(at=text)
        try:
            forward, backward = time_tiles(context, choice, width, size, dtype)
        except triton.runtime.errors.OutOfResources:
            continue
        emit(width=width, tiles=text, forward_ms=forward, backward_ms=backward)
        if time.monotonic() > end:
            break


def variants(usual):
    """Variants of a tiling in which no warp repeats another's work: itself first, then a few single
    changes, then all others.
    """
    promising = [
        dict(columns=64),
        dict(state=192 - usual.state),  # 64 or 128
        dict(step=usual.step // 2),
        dict(together=False),
        dict(rows=64, warps=4),
    ]
    grid = itertools.product((64, 128), (16, 32, 64), (1, 2, 3), {1, usual.parts})
    others = [
        dict(rows=rows, columns=columns, stages=stages, parts=parts, warps=rows // 16)
        for rows, columns, stages, parts in grid
    ]
    return dict.fromkeys(usual._replace(**change) for change in ({}, *promising, *others))


def time_tiles(context, tiles, width, size, dtype):
    """Time the forward and backward pass of the cell."""
    from mmvil.ops.triton import mlstm_launch

    batch, tokens = context.plan['sizes'][size], (size // 16) ** 2
    features = torch.randn(4, batch, tokens, HEADS, width, device=context.device, dtype=dtype)
    q, k, v, h_grad = features.transpose(2, 3)
    igate, fgate = torch.randn(2, batch, HEADS, tokens, device=context.device) + 3
    with mock.patch.object(mlstm_launch, 'tiling', lambda *_: tiles):
        inputs = (q, k, v, igate, fgate)
        h, normalizer = mlstm_launch.mlstm_forward(*inputs, False)
        return (
            context.milliseconds(mlstm_launch.mlstm_forward, *inputs, False),
            context.milliseconds(
                mlstm_launch.mlstm_backward, h_grad, *inputs, h, normalizer, False
            ),
        )


# -- 7. UperNet ------------------------------------------------------------------------------------


def upernet(context):
    """Train UperNet ViL-B on generated images, with the kernels and in plain PyTorch."""
    plan = context.plan['upernet']
    curves = {}
    for form in ('kernels', 'PyTorch'):
        os.environ['MMVIL_TRITON'] = str(int(form == 'kernels'))
        emit(at=f'training with {form}')
        backend = context.backend if form == 'kernels' else 'auto'
        curves[form], speed = train(context, **plan, backend=backend)
        for number, loss in enumerate(curves[form], start=1):
            emit(form=form, step=number * plan['window'], loss=loss)
        emit(form=form, **{'samples/s': speed})
    gaps = [abs(a / b - 1) for a, b in zip(*curves.values())]
    emit(check='largest difference of the losses', verdict=max(gaps))
    if not max(gaps) < 0.1:
        raise WrongNumberError(f'losses differ by {100 * max(gaps):.0f} %')


def train(context, size, batch, steps, window, backend):
    """Mean losses of each window of steps, and samples per second in the second half."""
    from mmengine.optim import build_optim_wrapper

    from mmvil.apis.training_memory import build_training_model, random_batch
    from mmvil.cli.config import load_config

    cfg = load_config(str(ROOT / 'configs/upernet_vil_b_ade20k.py'), {})
    cfg.model.backbone.update(init_cfg=None, backend=backend)
    if context.quick:
        cfg.model.backbone.arch = dict(embed_dims=16, depth=24)
        cfg.model.decode_head.update(in_channels=[16] * 4, channels=16)
        cfg.model.auxiliary_head.update(in_channels=16, channels=16)
    if not context.on_gpu:  # float16 needs a GPU
        cfg.optim_wrapper.type = 'OptimWrapper'
    torch.manual_seed(0)
    model = build_training_model(cfg).to(context.device)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper)
    colors = torch.randn(cfg.model.decode_head.num_classes, 3, device=context.device)
    losses = []
    for step in range(steps):
        if step == steps // 2:
            synchronize(context.device)
            start = time.perf_counter()
        noise, samples = random_batch(cfg, batch, context.device, (size, size))
        blocks = torch.randint(len(colors), (batch, 1, 8, 8), device=context.device)
        labels = F.interpolate(blocks.float(), (size, size)).long()
        for sample, label in zip(samples, labels):
            sample.gt_sem_seg.data = label
        inputs = colors[labels[:, 0]].permute(0, 3, 1, 2) + 0.1 * noise
        with optimizer.optim_context(model):
            loss, _ = model.parse_losses(model.loss(inputs, samples))
        optimizer.update_params(loss)
        losses.append(loss.detach().float())
    synchronize(context.device)
    speed = batch * (steps - steps // 2) / (time.perf_counter() - start)
    return torch.stack(losses).view(-1, window).mean(1).tolist(), speed


# -- The list of stages ----------------------------------------------------------------------------


def stages(context):
    """List all stages in order: names, titles, and parts with arguments and limits in seconds."""
    plan = context.plan
    interpreted = {} if context.on_gpu else dict(TRITON_INTERPRET='1')
    blocking = dict(CUDA_LAUNCH_BLOCKING='1', **interpreted)
    widths = [dict(width=context.width(arch)) for arch in plan['archs']]
    each = [dict(arch=arch) for arch in plan['archs']]
    size = max(plan['sizes'])

    def part(function, limit, environment=(), **arguments):
        name = function.__name__
        return dict(function=name, arguments=arguments, environment=dict(environment), limit=limit)

    grid = dict(grid=[2, 3]) if context.quick else {}
    once = [
        part(kernels, 240, blocking, **x, **grid, dtype=dtype)
        for x in widths
        for dtype in ('bfloat16', 'float16')
    ]
    for number, path in other_assemblers().items() if context.on_gpu else ():
        paths = dict.fromkeys(('TRITON_PTXAS_PATH', 'TRITON_PTXAS_BLACKWELL_PATH'), path)
        once.append(part(kernels, 240, {**blocking, **paths}, **widths[0], ptxas=number))
    once += [part(repeat, 180, **x) for x in each]
    checks = [part(tests, 300)]
    places = os.pathsep.join([os.environ['PATH'], '/usr/local/cuda/bin'])
    if context.on_gpu and (tool := shutil.which('compute-sanitizer', path=places)):
        checks.append(part(sanitizer, 120, tool=tool, **widths[0]))
    checks.append(part(large_layer, 120, size=size))
    checks.append(part(large_cell, 120, **widths[0], tokens=(size // 16) ** 2))
    if torch.cuda.device_count() > 1:
        checks.append(part(kernels, 240, **widths[0], device='cuda:1'))
    timed = [part(profile, 180, interpreted, **x) for x in each]
    compared = [part(models, 180, **x, size=size) for x in each for size in plan['sizes']]
    compared += [part(models, 300, arch=a, size=s, compiled=True) for a, s in plan['compiled']]
    swept = [part(tiles, 120, **x, **plan['sweep']) for x in widths]
    rows = [
        ('kernels', '1. Every kernel once', once, WORKERS),
        ('tests', '2. Tests', checks, 2),
        ('profile', '3. Time of kernels', timed, 1),
        ('models', '4. ViL and DeiT, bfloat16', compared, 1),
        ('cell', '5. The cell alone, bfloat16', [part(cell, 120, **x) for x in each], 1),
        ('tiles', '6. Tiles of the cell, bfloat16', swept, 1),
        ('upernet', '7. UperNet ViL-B, float16', [part(upernet, 300)], 1),
    ]
    return [dict(zip(('name', 'title', 'parts', 'workers'), row)) for row in rows]


def environment(context):
    """Hardware and versions, one per line."""
    gpu = torch.cuda.get_device_properties(context.device) if context.on_gpu else None
    hardware = '**No GPU**. These numbers are meaningless.'
    if gpu:
        hardware = f'**{gpu.name}**, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB'
    git = ['git', 'describe', '--always', '--dirty']
    run = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True)
    commit = shutil.which('git') and run(git).stdout.strip()
    installed = [name for name in ('triton', 'timm', 'mmengine') if importlib.util.find_spec(name)]
    software = [f'torch {torch.__version__}', f'CUDA {torch.version.cuda}']
    software += [f'{name} {importlib.import_module(name).__version__}' for name in installed]
    mmvil_line = f'mmvil {mmvil.__version__}, commit {commit or "unknown"}'
    return [hardware, mmvil_line, ', '.join(software)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('function', nargs='?', help='of a part')
    add('--part', type=json.loads, default={}, metavar='JSON', help='its arguments')
    add('--list', action='store_true', help='print environment and stages as JSON')
    add('--device', default='cuda')
    add('--quick', action='store_true')
    add('--wait', action='store_true', help='import, then wait for a line of input')
    args = parser.parse_args()
    if args.wait:
        sys.stdin.readline()
    context = Context(args.device, args.quick)
    if args.list:
        emit(environment=environment(context), stages=stages(context))
        return 0
    faulthandler.enable()
    torch.manual_seed(0)
    try:
        globals()[args.function](context, **args.part)
    except WrongNumberError as error:
        print(f'WrongNumberError: {error}', file=sys.stderr)
        return WRONG
    return 0


if __name__ == '__main__':
    sys.exit(main())
