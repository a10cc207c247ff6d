# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Memory of a training step, counted on shapes alone or measured on a GPU."""

import time
import warnings
from contextlib import contextmanager, nullcontext
from unittest import mock

import torch
import torch.nn.functional as F
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, OPTIMIZERS, init_default_scope
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ..layers import DropPath

GIB = 2**30
BLOCK = 512
"""torch's CUDA allocator hands out memory in blocks of that many bytes."""
BATCHES = 64, 128
"""Two batches that tell what an image costs. In small ones the gradients outweigh the activations,
and a step takes the most memory at its end.
"""


# -- Memory ----------------------------------------------------------------------------------------


class AllocationCounter(TorchDispatchMode):
    """Follow how many bytes the results of operations hold, now (freed ones included) and at
    most.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._alive = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._count, result)
        return result

    def ignore(self, tensors):
        """Leave out the storages of tensors that are counted elsewhere."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._alive[storage._cdata] = StorageWeakRef(storage), 0

    def _count(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self._alive:
            size = -(-storage.nbytes() // BLOCK) * BLOCK
            self._alive[storage._cdata] = StorageWeakRef(storage), size
            self.now += size
            if self.now > self.peak:  # only then does it matter what was freed
                self._forget_freed()
                self.peak = max(self.peak, self.now)

    def _forget_freed(self):
        for address, (reference, size) in list(self._alive.items()):
            if reference.expired():
                del self._alive[address]
                self.now -= size


def step_bytes(model, cfg, batch, device='cpu'):
    """The most that one training step holds at a time, beside weights and optimizer state.

    Args:
        model (nn.Module): On ``device``, or with fake weights inside its FakeTensorMode.
        cfg (Config): Of the training.
        batch (int): Number of images.
        device (str): Default: 'cpu'.

    Returns:
        int: Bytes of input, activations, temporaries and gradients.
    """
    counter = AllocationCounter()
    counter.ignore([*model.parameters(), *model.buffers()])
    with counter:
        train_step(model, cfg, batch, device)
    model.zero_grad(set_to_none=True)
    return counter.peak


def train_step(model, cfg, batch, device):
    """Forward and backward pass of a batch of random images."""
    inputs, samples = random_batch(cfg, batch, device)
    with autocast(cfg, device):
        losses = model.loss(inputs, samples)
    loss, _ = model.parse_losses(losses)
    loss.backward()


def random_batch(cfg, batch, device):
    """Normalized images (B, C, H, W) of the training size, and samples with labels."""
    height, width = crop_size(cfg)
    inputs = torch.randn(batch, cfg.model.backbone.get('in_channels', 3), height, width).to(device)
    if cfg.default_scope == 'mmseg':
        from mmengine.structures import PixelData
        from mmseg.structures import SegDataSample

        classes = heads(cfg)[0].num_classes
        labels = torch.randint(classes, (batch, 1, height, width)).to(device)
        return inputs, [SegDataSample(gt_sem_seg=PixelData(data=label)) for label in labels]
    from mmpretrain.structures import DataSample

    scores = torch.rand(batch, cfg.model.head.num_classes).softmax(1).to(device)
    return inputs, [DataSample().set_gt_score(score) for score in scores]


def crop_size(cfg):
    """Height and width of training images."""
    size = cfg.get('planned_shape') or cfg.model.get('data_preprocessor', {}).get('size')
    size = size or cfg.model.backbone.get('img_size')
    if size is None:
        raise ValueError('the config does not say how large training images are: give --shape')
    return (size, size) if isinstance(size, int) else tuple(size)


def heads(cfg):
    found = cfg.model.get('decode_head')
    return found if isinstance(found, list) else [found]


def amp_dtype(cfg):
    """The dtype of autocast; None in float32."""
    wrapper = cfg.optim_wrapper
    if wrapper.get('type') != 'AmpOptimWrapper':
        return None
    return getattr(torch, wrapper.get('dtype') or 'float16')


@contextmanager
def autocast(cfg, device):
    """Mixed precision as on a GPU.

    A CPU's autocast differs in two things that count: it knows bfloat16 (as many bytes as float16),
    and leaves the loss in half precision.
    """
    dtype = amp_dtype(cfg)
    if dtype is None or device != 'cpu':
        with torch.autocast(device, dtype=dtype) if dtype else nullcontext():
            yield
        return
    cross_entropy = F.cross_entropy

    def in_float32(logits, *args, **kwargs):
        return cross_entropy(logits.float(), *args, **kwargs)

    with (
        torch.autocast('cpu', dtype=torch.bfloat16),
        mock.patch.object(F, 'cross_entropy', in_float32),
    ):
        yield


class Memory:
    """Bytes of a training, as far as they follow from shapes.

    Args:
        cfg (Config): Of the training.
        gpus (int): More than one: data parallel training, which buffers the gradients.
    """

    def __init__(self, cfg, gpus=1):
        self.cfg = cfg
        self.model = build_model(cfg)
        self.mode = FakeTensorMode()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        weights = bytes_of(self.model.state_dict().values())
        hooks = [*cfg.get('custom_hooks', []), *cfg.get('default_hooks', {}).values()]
        averaged = any(hook and hook.get('type') == 'EMAHook' for hook in hooks)
        self.always = dict(weights=weights)
        self.always['optimizer state'] = int(optimizer_state(cfg) * bytes_of(trained))
        if averaged:
            self.always['averaged weights (EMA)'] = weights
        if gpus > 1:
            self.always['buffers of gradients (DDP)'] = bytes_of(trained)
        self._steps = {}
        with self.mode:
            make_fake(self.model)

    def step(self, batch):
        """Bytes that a step takes at most: input, activations, temporaries and gradients."""
        if batch not in self._steps:
            with self.mode, without_what_depends_on_data():
                self._steps[batch] = step_bytes(self.model, self.cfg, batch)
        return self._steps[batch]

    def total(self, batch):
        """Bytes of a training with that many images on a GPU."""
        return sum(self.always.values()) + self.step(batch)

    def per_image(self):
        """Bytes that an image more costs."""
        small, large = BATCHES
        return (self.step(large) - self.step(small)) / (large - small)

    def largest_batch(self, limit):
        """The largest number of images whose step fits into ``limit`` bytes."""
        batch = int((limit - self.total(BATCHES[0])) / self.per_image()) + BATCHES[0]
        while batch > 0 and self.total(max(batch, 2)) > limit:
            excess = self.total(max(batch, 2)) - limit
            batch -= max(1, int(excess / self.per_image()))
        return max(batch, 0)


def bytes_of(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def build_model(cfg):
    """The model of a config in training mode, with everything that is dropped at random kept."""
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    if cfg.get('default_scope') not in ('mmseg', 'mmpretrain'):
        raise ValueError('plan.py knows configs of mmseg and mmpretrain')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # the libraries' own deprecations
        model = revert_sync_batchnorm(MODELS.build(cfg.model)).train()
    for module in model.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0
    return model


def make_fake(model):
    """Replace weights and buffers by shapes. Inside a FakeTensorMode."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = torch.nn.Parameter(fake, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def without_what_depends_on_data():
    """mmseg's accuracy, for the log, selects the labelled pixels: a shape that data decide."""
    try:
        from mmseg.models.decode_heads import decode_head
    except ImportError:
        return nullcontext()
    return mock.patch.object(decode_head, 'accuracy', lambda pred, *_, **__: pred.new_zeros(1))


def optimizer_state(cfg):
    """How many numbers the optimizer keeps for each weight."""
    numel = 1000
    weight = torch.nn.Parameter(torch.zeros(numel))
    options = {**cfg.optim_wrapper.optimizer, 'params': [weight]}
    optimizer = OPTIMIZERS.build(options)
    weight.grad = torch.ones(numel)
    optimizer.step()
    kept = [value for value in optimizer.state[weight].values() if torch.is_tensor(value)]
    return sum(value.numel() for value in kept if value.numel() > 1) / numel


# -- Measurement -----------------------------------------------------------------------------------


def measure(cfg, batch, rounds=5):
    """One training on the GPU at hand.

    Returns:
        tuple[float, float]: Peak bytes that torch allocated, and images per second.
    """
    model = build_model(cfg).cuda()
    optimizer = OPTIMIZERS.build({**cfg.optim_wrapper.optimizer, 'params': model.parameters()})

    def step():
        train_step(model, cfg, batch, 'cuda')
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()  # makes the optimizer's state
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(rounds):
        step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(), rounds * batch / (time.perf_counter() - start)
