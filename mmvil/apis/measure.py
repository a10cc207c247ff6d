# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Compare time and memory of models in alternating measurements.

Every round runs each model once, and ratios are taken within a round. Other load on the machine
then affects all models alike, so ratios are reliable even where times are not.
"""

import statistics
import time
from contextlib import contextmanager, nullcontext

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..engine.cpu import set_malloc_thresholds
from ..ops.flops import flop_formulas

MODES = ('forward', 'training')
SECONDS = 0.2
"""Duration of one measurement in seconds; short steps are repeated to fill it."""


def compare(builders, image, modes=MODES, amp=None, rounds=7, progress=print, count=True):
    """Measure models on the same images.

    Args:
        builders (dict[str, Callable]): Functions from an image size to a model, by name; ratios are
            relative to the first one. Names of compiled models end with ' compiled'.
        image (Tensor): Square images, shape (B, C, S, S).
        modes (Sequence[str]): 'forward' (inference), 'training' (forward and backward pass).
        amp (torch.dtype, optional): Dtype of autocast.
        rounds (int): Number of rounds. Default: 7.
        progress (Callable): Called with a line of text before each step. Default: print.
        count (bool): Count saved bytes and multiply-adds, too, with hooks. Default: True.

    Returns:
        list[dict]: One record per mode and model, except models that run out of memory.
    """
    if image.device.type == 'cpu':
        set_malloc_thresholds()  # as training and testing do
    size, batch = image.shape[-1], len(image)
    models, counts, records = {}, {}, []
    for name, build in builders.items():
        progress(f'{size} x {size}: building and counting {name}')
        with _drop_if_out_of_memory(models, name):
            models[name] = build(size).to(image.device)
            if count and not name.endswith(' compiled'):  # its eager twin has the same
                counts[name] = _count(models[name], image[:1].clone(), modes, amp)
    for mode in modes:
        if any(name.endswith(' compiled') for name in models):
            torch.compiler.reset()  # otherwise earlier modes and sizes fill its cache
        running, repeats = {}, {}
        for name, model in list(models.items()):
            progress(f'{size} x {size}, {mode}: warming up {name}')
            with _drop_if_out_of_memory(models, name):
                _seconds(model, image, mode, amp)
                repeats[name] = max(1, int(SECONDS / _seconds(model, image, mode, amp)))
                saved, multiply_adds = counts.get(name, (None, {}))
                running[name] = dict(
                    model=name,
                    size=size,
                    batch=batch,
                    mode=mode,
                    seconds_per_image=[],
                    peak_bytes=peak_bytes(model, image, mode, amp),
                    saved_bytes_per_image=saved,
                    multiply_adds_per_image=multiply_adds.get(mode),
                )
        for number in range(rounds):
            progress(f'{size} x {size}, {mode}: round {number + 1} of {rounds}')
            for name, record in running.items():
                duration = _seconds(models[name], image, mode, amp, repeats[name])
                record['seconds_per_image'].append(duration / batch)
        records += add_ratios(list(running.values()), next(iter(builders)))
    return records


def add_ratios(records, base):
    """Add to each record its :func:`time_ratio` to the model ``base``, None if that is missing."""
    other = next((record for record in records if record['model'] == base), None)
    for record in records:
        record['time_ratio'] = other and time_ratio(record, other)
        record['ratio_to'] = base
    return records


def time_ratio(record, other):
    """Median over rounds of the time of one record relative to another."""
    pairs = zip(record['seconds_per_image'], other['seconds_per_image'])
    return statistics.median(own / base for own, base in pairs)


def saved_bytes(model, image, amp=None):
    """Count the bytes that autograd saves for the backward pass, in distinct storages, without
    parameters.
    """
    parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _forward(model, image, amp)
    return sum(kept.values())


def peak_bytes(model, image, mode, amp=None):
    """Measure the peak memory of a step, gradients but not weights and images; None on a CPU."""
    if image.device.type != 'cuda':
        return None
    model.zero_grad(set_to_none=True)
    before = torch.cuda.memory_allocated(image.device)
    torch.cuda.reset_peak_memory_stats(image.device)
    _seconds(model, image, mode, amp)
    return torch.cuda.max_memory_allocated(image.device) - before


def synchronize(device):
    """Wait for the kernels of a device."""
    if torch.device(device).type == 'cuda':
        torch.cuda.synchronize(device)


def _forward(model, image, amp):
    with torch.autocast(image.device.type, dtype=amp) if amp else nullcontext():
        return model(image)


def _backward(outputs):
    outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
    sum(output.float().mean() for output in outputs).backward()


def _seconds(model, image, mode, amp, repeats=1):
    """Mean time of a step: a forward pass, for training followed by a backward pass."""
    training = mode == 'training'
    model.train(training)
    synchronize(image.device)
    start = time.perf_counter()
    for _ in range(repeats):
        if training:
            model.zero_grad(set_to_none=True)
            _backward(_forward(model, image, amp))
        else:
            with torch.no_grad():
                _forward(model, image, amp)
    synchronize(image.device)
    return (time.perf_counter() - start) / repeats


def _count(model, image, modes, amp):
    """Saved bytes, and multiply-adds by mode."""
    model.train('training' in modes)
    saved = saved_bytes(model, image, amp)
    # Not at the same time: the counter hooks all modules, so ViL calls them and saves more.
    with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter:
        outputs = _forward(model, image, amp)
        multiply_adds = dict(forward=counter.get_total_flops() // 2)
        if 'training' in modes:
            _backward(outputs)
            multiply_adds['training'] = counter.get_total_flops() // 2
    model.zero_grad(set_to_none=True)
    return saved, multiply_adds


@contextmanager
def _drop_if_out_of_memory(models, name):
    """Continue without a model that needs too much memory."""
    try:
        yield
    except RuntimeError as error:  # of a GPU, or a CPU; not an illegal memory access
        if not any(text in str(error) for text in ('out of memory', 'allocate memory')):
            raise
        models.pop(name, None)
        print(f'{name}: out of memory', flush=True)
