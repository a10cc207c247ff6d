# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Time and memory of models that take turns."""

import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..ops.flops import flop_formulas

SECONDS = 0.2
"""A measurement repeats short steps for about that long."""


# -- Measurements ---------------------------------------------------------------------------------


def forward(model, image, amp):
    if amp is None:
        return model(image)
    with torch.autocast(image.device.type, dtype=amp):
        return model(image)


def backward(outputs):
    outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
    sum(output.float().mean() for output in outputs).backward()


def step(model, image, mode, amp):
    """One forward pass for inference, or one forward and backward pass."""
    if mode == 'forward':
        with torch.no_grad():
            forward(model, image, amp)
    else:
        model.zero_grad(set_to_none=True)
        backward(forward(model, image, amp))


def seconds(model, image, mode, amp, repeats=1):
    """Mean time of a step."""
    model.train(mode == 'training')
    synchronize(image.device)
    start = time.perf_counter()
    for _ in range(repeats):
        step(model, image, mode, amp)
    synchronize(image.device)
    return (time.perf_counter() - start) / repeats


def synchronize(device):
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def peak_bytes(model, image, mode, amp):
    """Memory that a step needs beside weights and image, gradients included; None on a CPU."""
    if image.device.type != 'cuda':
        return None
    model.zero_grad(set_to_none=True)
    before = torch.cuda.memory_allocated(image.device)
    torch.cuda.reset_peak_memory_stats(image.device)
    seconds(model, image, mode, amp)
    return torch.cuda.max_memory_allocated(image.device) - before


def saved_bytes(model, image, amp=None):
    """What autograd keeps between forward and backward, parameters not counted.

    Returns:
        tuple[int, list[Tensor]]: Bytes in distinct storages, and the model's outputs, which hold
        the graph.
    """
    parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = forward(model, image, amp)
    return sum(kept.values()), outputs


def count(model, image, modes, amp):
    """Saved bytes, and multiply-adds by mode, of a batch."""
    model.train('training' in modes)
    with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter:
        saved, outputs = saved_bytes(model, image, amp)
        multiply_adds = dict(forward=counter.get_total_flops() // 2)
        if 'training' in modes:
            backward(outputs)
            multiply_adds['training'] = counter.get_total_flops() // 2
    model.zero_grad(set_to_none=True)
    return saved, multiply_adds


def compare(contenders, size, batch, args, progress):
    """Measure all contenders at one image size.

    Returns:
        list[dict]: A record for each contender and mode. Contenders that run out of memory have
        none.
    """
    amp = getattr(torch, args.amp) if args.amp else None
    image = torch.randn(batch, 3, size, size, device=args.device)
    models, counts = {}, {}
    for name, build in contenders.items():
        progress(f'{size} x {size}: building and counting {name}')
        try:
            models[name] = build(size).to(args.device)
            # The numbers of compiled models are those of their eager twins.
            if not name.endswith(' compiled'):
                counts[name] = count(models[name], image[:1].clone(), args.modes, amp)
        except RuntimeError as error:
            drop_if_out_of_memory(models, name, error)

    records = []
    for mode in args.modes:
        repeats, peaks, times = {}, {}, {}
        if args.compile:  # else versions of earlier modes and sizes fill the compiler's cache
            torch.compiler.reset()
        for name in list(models):
            progress(f'{size} x {size}, {mode}: warming up {name}')
            try:
                seconds(models[name], image, mode, amp)
                repeats[name] = max(1, int(SECONDS / seconds(models[name], image, mode, amp)))
                peaks[name] = peak_bytes(models[name], image, mode, amp)
                times[name] = []
            except RuntimeError as error:
                drop_if_out_of_memory(models, name, error)
        for number in range(args.rounds):
            progress(f'{size} x {size}, {mode}: round {number + 1} of {args.rounds}')
            for name in times:
                times[name].append(seconds(models[name], image, mode, amp, repeats[name]) / batch)
        for name in times:
            saved, multiply_adds = counts.get(name, (None, {}))
            records.append(
                dict(
                    model=name,
                    size=size,
                    batch=batch,
                    mode=mode,
                    seconds_per_image=times[name],
                    peak_bytes=peaks[name],
                    saved_bytes_per_image=saved,
                    multiply_adds_per_image=multiply_adds.get(mode),
                )
            )
    return records


def drop_if_out_of_memory(models, name, error):
    """Go on without a model that needs too much memory; raise any other error."""
    if 'memory' not in str(error):
        raise error
    models.pop(name, None)
    print(f'{name}: out of memory', flush=True)
