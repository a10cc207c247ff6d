# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Predict the memory of training from shapes alone, and measure it on a GPU."""

import copy
import sys
import time
import warnings
from contextlib import ExitStack, nullcontext
from unittest import mock

import torch
import torch.nn.functional as F
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, OPTIMIZERS, init_default_scope
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ..engine.config_nodes import dicts, type_name
from ..layers import DropPath
from ..ops import projections
from .swap.probe import MASKED_ALGORITHM, training_size

GIB = 2**30
BLOCK = 512
"""Block size of torch's CUDA allocator in bytes."""
BATCHES = 64, 128
"""Batch sizes whose difference gives the cost of an image. In smaller batches gradients outweigh
activations, and the peak is at the end of a step.
"""


class TrainingMemory:
    """Memory of training in bytes, as far as it follows from shapes.

    Args:
        cfg (Config): Training config of mmseg or mmpretrain.
        gpus (int): With more than one, data-parallel training buffers the gradients. Default: 1.
        size (tuple[int, int], optional): Height and width of training images. Default: read from
            the config by :func:`training_size`.

    Attributes:
        fixed_bytes (dict[str, int]): Bytes that do not depend on the batch size, by purpose.
        accumulates (bool): Whether gradients of earlier steps are kept in a step; initially False.

    Raises:
        ValueError: If the config is of another library, or has no image size.
    """

    def __init__(self, cfg, gpus=1, size=None):
        scope = cfg.get('default_scope')
        if scope not in ('mmseg', 'mmpretrain'):
            raise ValueError(
                f'expected a config of mmseg or mmpretrain, but default_scope is {scope}'
            )
        self.cfg, self.size = cfg, size or training_size(cfg)
        self.model = build_training_model(cfg)
        weights = sum(tensor.nbytes for tensor in self.model.state_dict().values())
        trained = sum(p.nbytes for p in self.model.parameters() if p.requires_grad)
        optimizer = int(optimizer_state(cfg) * trained)
        self.fixed_bytes = {'weights': weights, 'optimizer state': optimizer}
        hooks = [cfg.get('custom_hooks'), cfg.get('default_hooks')]
        if any(type_name(node) == 'EMAHook' for node in dicts(hooks)):
            self.fixed_bytes['averaged weights (EMA)'] = weights
        if gpus > 1:
            self.fixed_bytes['buffers of gradients (DDP)'] = trained
        self.accumulates, self._steps = False, {}
        self._mode = FakeTensorMode()
        with FakeCopyMode(self._mode):
            self.model = copy.deepcopy(self.model)  # on the meta device

    def step(self, batch):
        """Peak bytes of a step of ``batch`` images: input, activations, temporaries, gradients."""
        key = batch, self.accumulates
        if key not in self._steps:
            counter = _AllocationCounter([*self.model.parameters(), *self.model.buffers()])
            with self._mode, _without_accuracy(), _without_tiles(), counter:
                for weight in self.model.parameters():
                    if self.accumulates and weight.requires_grad:
                        weight.grad = torch.zeros_like(weight)
                train_step(self.model, self.cfg, batch, size=self.size)
            self.model.zero_grad(set_to_none=True)
            self._steps[key] = counter.peak
        return self._steps[key]

    def total(self, batch):
        """Bytes of training with ``batch`` images per GPU."""
        return sum(self.fixed_bytes.values()) + self.step(batch)

    def per_image(self):
        """Bytes of each additional image."""
        small, large = BATCHES
        return (self.step(large) - self.step(small)) / (large - small)

    def largest_batch(self, limit):
        """Largest number of images per batch whose training fits into ``limit`` bytes."""
        batch = int((limit - self.total(BATCHES[0])) / self.per_image()) + BATCHES[0]
        while batch > 0 and (excess := self.total(max(batch, 2)) - limit) > 0:
            batch -= max(1, int(excess / self.per_image()))
        return max(batch, 0)


def measure_training(cfg, batch, size=None, warmup=1, rounds=5):
    """Train on batches of random images on the GPU, with arguments as in :class:`TrainingMemory`,
    and measure ``rounds`` steps after ``warmup`` steps, the first of which creates the optimizer
    state.

    Returns:
        tuple[float, float]: Peak bytes allocated by torch, and images per second.
    """
    model = build_training_model(cfg).cuda()
    optimizer = OPTIMIZERS.build({**cfg.optim_wrapper.optimizer, 'params': model.parameters()})
    for number in range(warmup + rounds):
        if number == warmup:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
        train_step(model, cfg, batch, 'cuda', size)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(), rounds * batch / (time.perf_counter() - start)


def build_training_model(cfg):
    """Build the model of a config in training mode, without stochastic depth in ViL."""
    init_default_scope(cfg.default_scope)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # deprecations inside the libraries
        model = revert_sync_batchnorm(MODELS.build(cfg.model)).train()
    for module in model.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0
    return model


def train_step(model, cfg, batch, device='cpu', size=None):
    """Run the forward and backward pass of a batch of random images, in the config's precision."""
    inputs, samples = random_batch(cfg, batch, device, size)
    with _autocast(cfg, device):
        losses = model.loss(inputs, samples)
    model.parse_losses(losses)[0].backward()


def random_batch(cfg, batch, device='cpu', size=None):
    """Create a batch of the training size as the data preprocessor passes it to a model of mmseg or
    mmpretrain: normalized images (B, C, H, W), or a list of their views; and labels or masks.
    """
    size = size or training_size(cfg)
    shape = batch, cfg.model.backbone.get('in_channels', 3), *size
    views = [node.num_views for node in dicts(cfg) if type_name(node) == 'MultiView']
    if views:  # self-supervised pipelines
        number = views[0] if isinstance(views[0], int) else sum(views[0])
        inputs = [torch.randn(shape).to(device) for _ in range(number)]
    else:
        inputs = torch.randn(shape).to(device)
    classes = next((node.num_classes for node in dicts(cfg.model) if node.get('num_classes')), None)
    if cfg.default_scope == 'mmseg':
        from mmengine.structures import PixelData
        from mmseg.structures import SegDataSample

        labels = torch.randint(classes, (batch, 1, *size)).to(device)
        keys = 'img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape'
        meta = dict.fromkeys(keys, tuple(size))
        return inputs, [
            SegDataSample(gt_sem_seg=PixelData(data=label), metainfo=meta) for label in labels
        ]
    from mmpretrain.structures import DataSample

    if type_name(cfg.model) == MASKED_ALGORITHM:
        mask = torch.ones([side // cfg.model.head.patch_size for side in size]).to(device)
        return inputs, [DataSample(mask=mask) for _ in range(batch)]
    if classes is None:
        return inputs, [DataSample() for _ in range(batch)]
    scores = torch.rand(batch, classes).softmax(1).to(device)
    return inputs, [DataSample().set_gt_score(score) for score in scores]


def amp_dtype(cfg):
    """Dtype of autocast; None in float32."""
    if type_name(cfg.optim_wrapper) != 'AmpOptimWrapper':
        return None
    dtype = cfg.optim_wrapper.get('dtype') or 'float16'
    return dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)


def optimizer_state(cfg):
    """Number of values that the optimizer of a config stores per weight."""
    weight = torch.nn.Parameter(torch.zeros(1000))
    weight.grad = torch.ones_like(weight)
    optimizer = OPTIMIZERS.build({**cfg.optim_wrapper.optimizer, 'params': [weight]})
    optimizer.step()
    kept = [value for value in optimizer.state[weight].values() if torch.is_tensor(value)]
    return sum(value.numel() for value in kept if value.numel() > 1) / weight.numel()


class _AllocationCounter(TorchDispatchMode):
    """Track the peak bytes held by results of operations, except ``ignored`` tensors."""

    def __init__(self, ignored):
        super().__init__()
        self._now = self.peak = 0
        storages = [tensor.untyped_storage() for tensor in ignored]
        self._alive = {storage._cdata: (StorageWeakRef(storage), 0) for storage in storages}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._count, result)
        return result

    def _count(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata in self._alive:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        self._alive[storage._cdata] = StorageWeakRef(storage), size
        self._now += size
        if self._now > self.peak:  # frees only matter at a new peak
            for address, (reference, size) in list(self._alive.items()):
                if reference.expired():
                    del self._alive[address]
                    self._now -= size
            self.peak = max(self.peak, self._now)


def _autocast(cfg, device):
    """Mixed precision as on a GPU. Autocast on CPUs differs in two relevant ways: it supports
    bfloat16 (as many bytes as float16), and leaves the loss in half precision.
    """
    dtype, stack = amp_dtype(cfg), ExitStack()
    if dtype is not None and device == 'cpu':
        dtype, cross_entropy = torch.bfloat16, F.cross_entropy

        def in_float32(logits, *args, **kwargs):
            return cross_entropy(logits.float(), *args, **kwargs)

        stack.enter_context(mock.patch.object(F, 'cross_entropy', in_float32))
    stack.enter_context(torch.autocast(device, dtype=dtype, enabled=dtype is not None))
    return stack


def _without_tiles():
    """Compute block-diagonal products as on a GPU, instead of in thousands of tiles that fit into
    the cache of a CPU.
    """
    return mock.patch.object(projections, 'ROW_TILE', sys.maxsize)


def _without_accuracy():
    """Disable mmseg's logged accuracy, which selects pixels and so has a data-dependent shape."""
    decode_head = sys.modules.get('mmseg.models.decode_heads.decode_head')
    if decode_head is None:
        return nullcontext()
    return mock.patch.object(decode_head, 'accuracy', lambda pred, *_, **__: pred.new_zeros(1))
