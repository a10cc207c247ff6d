# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Vision-LSTM as timm models, registered on import, for instance by :func:`mmvil.register_models`.

``timm.list_models('mmvil*')`` lists them: 'mmvil_base_patch16_224' is version 2, 'mmvil1_…' the
paper's first version.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import resample_patch_embed, to_2tuple, trunc_normal_
from timm.models import (
    build_model_with_cfg,
    checkpoint,
    generate_default_cfgs,
    register_model,
    register_notrace_function,
    register_notrace_module,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.fx import Proxy

from ..backbones import VisionLSTM
from ..checkpoints import OFFICIAL_CHECKPOINTS, OfficialCheckpoint, adapt_input_channels, weights_of
from ..layers import PatchEmbed, ViLBlock, resize_pos_embed
from ..layers.embed import tokens_to_map
from ..ops.compat import static_shape

try:
    from timm.models._input import update_model_input_size
except ImportError:  # timm < 1.0.31 does not save model arguments, and thus no changed sizes

    def update_model_input_size(model: nn.Module, img_size: Any, **kwargs: Any) -> None:
        pass


__all__ = ['TimmVisionLSTM']

POOLS = ('bilateral_concat', 'bilateral_avg', 'avg', '')

UNUSED_ARGUMENTS = {'out_indices', 'out_type', 'pyramid', 'with_cp', 'compile', 'init_cfg'}
"""Arguments of :class:`mmvil.VisionLSTM` for which timm has its own ways."""

# Leaves of symbolic traces (torch.fx), because they depend on the image size.
register_notrace_module(PatchEmbed)
register_notrace_module(ViLBlock)
register_notrace_function(tokens_to_map)


class TimmVisionLSTM(nn.Module):
    """:class:`mmvil.VisionLSTM` with the interface of timm's models. Features are maps (B, D, h,
    w).

    Args:
        arch, img_size: As in :class:`mmvil.VisionLSTM`.
        in_chans (int): Default: 3.
        num_classes (int): 0 for no classifier. Default: 1000.
        global_pool (str, optional): 'bilateral_concat' (first and last token concatenated),
            'bilateral_avg' (their mean), 'avg' (mean of all) or '' (none). Default: as published,
            'bilateral_concat' for version 2 and 'bilateral_avg' for version 1.
        drop_rate (float): Dropout before the classifier. Default: 0.
        strict_img_size (bool, optional): Only accept images of size ``img_size``. Default: False,
            unless ``dynamic_img_size`` is False.
        dynamic_img_size (bool, optional): Accept images of any size; True overrides
            ``strict_img_size``, as in timm. Default: not ``strict_img_size``.
        dynamic_img_pad (bool): Zero-pad images that patches do not tile, on the right and at the
            bottom; False rejects such images, and such an ``img_size``. Default: True.
        device, dtype: Of the parameters.
        **kwargs: Further arguments of :class:`mmvil.VisionLSTM`, such as version, patch_size,
            stride, drop_path_rate and backend.

    Raises:
        ValueError: If a choice is unknown or sizes do not fit, here and in ``forward``.
    """

    output_fmt = 'NCHW'

    def __init__(
        self,
        arch: str | dict = 'base',
        *,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = None,
        drop_rate: float = 0.0,
        strict_img_size: bool | None = None,
        dynamic_img_size: bool | None = None,
        dynamic_img_pad: bool = True,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if unused := UNUSED_ARGUMENTS & kwargs.keys():
            raise TypeError(
                f'TimmVisionLSTM does not take {", ".join(sorted(unused))}; timm has '
                'features_only, global_pool, set_grad_checkpointing() and pretrained for these, '
                'and torch.compile compiles any model.'
            )
        with nullcontext() if device is None else torch.device(device):
            self.backbone = VisionLSTM(arch, img_size=img_size, in_channels=in_chans, **kwargs)
        if strict_img_size is None:
            strict_img_size = dynamic_img_size is False
        self.dynamic_img_size = bool(dynamic_img_size or not strict_img_size)
        self.dynamic_img_pad = dynamic_img_pad
        self._traits = dict(fixed_input_size=not self.dynamic_img_size)  # read by timm
        self.img_size = to_2tuple(img_size)
        self._check_tiling(self.img_size, self.backbone.patch_size, self.backbone.stride)
        self.in_chans = in_chans
        self.num_features = self.embed_dim = self.backbone.embed_dims
        self.grad_checkpointing = False
        reduction = self.backbone.stride
        self.feature_info = [
            dict(module=f'backbone.layers.{i}', num_chs=self.num_features, reduction=reduction)
            for i in range(len(self.backbone.layers))
        ]
        self.to(dtype)
        self.head_drop = nn.Dropout(drop_rate)
        self.global_pool = None
        if global_pool is None:
            global_pool = 'bilateral_concat' if self.backbone.version == 2 else 'bilateral_avg'
        self.reset_classifier(num_classes, global_pool)

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | None = None
    ) -> None:
        """Resize the position embedding and resample the patch embedding for another image or patch
        size; the stride changes with the patch size in proportion.

        Raises:
            ValueError: If sizes do not fit. The model is then unchanged.
        """
        backbone = self.backbone
        img_size = self.img_size if img_size is None else to_2tuple(img_size)
        patch_size = backbone.patch_size if patch_size is None else patch_size
        stride, rest = divmod(backbone.stride * patch_size, backbone.patch_size)
        if rest or not stride:
            raise ValueError(
                f'patch_size must give a whole stride at {backbone.stride} pixels for a patch of '
                f'{backbone.patch_size}, but is {patch_size}.'
            )
        if min(img_size) < patch_size:
            raise ValueError(
                f'img_size must be at least one patch ({patch_size}), but is {img_size}.'
            )
        self._check_tiling(img_size, patch_size, stride)

        pos_embed, grid = backbone.pos_embed, tuple(side // patch_size for side in img_size)
        if grid != tuple(pos_embed.shape[1:3]):
            resized = resize_pos_embed(pos_embed.detach(), grid)
            backbone.pos_embed = nn.Parameter(resized, pos_embed.requires_grad)
        if patch_size != backbone.patch_size:
            projection = backbone.patch_embed.projection
            weight = resample_patch_embed(projection.weight.detach(), [patch_size, patch_size])
            projection.weight = nn.Parameter(weight, projection.weight.requires_grad)
            projection.kernel_size, projection.stride = (patch_size,) * 2, (stride,) * 2
            backbone.patch_size, backbone.stride = patch_size, stride
            for info in self.feature_info:
                info['reduction'] = stride
        self.img_size = img_size
        update_model_input_size(self, img_size, patch_size=patch_size, stride=stride)

    def _check_image(self, x: Tensor) -> None:
        size = static_shape(x)[2:]
        if not self.dynamic_img_size and size != self.img_size:
            raise ValueError(
                'Images must be {} x {} large, but are {} x {}; resize them, call set_input_size, '
                'or create the model with dynamic_img_size=True.'.format(*self.img_size, *size)
            )
        self._check_tiling(size, self.backbone.patch_size, self.backbone.stride)

    def _check_tiling(self, size: tuple[int, int], patch_size: int, stride: int) -> None:
        if not self.dynamic_img_pad and any((side - patch_size) % stride for side in size):
            raise ValueError(
                f'With dynamic_img_pad=False, patches of {patch_size} pixels at stride {stride} '
                f'must tile the image, but it is {size[0]} x {size[1]}; resize it, or create the '
                'model with dynamic_img_pad=True.'
            )

    @property
    def head_hidden_size(self) -> int:
        """Width of the classifier's input."""
        return self.num_features * (2 if self.global_pool == 'bilateral_concat' else 1)

    def _new(self, kind: type[nn.Module], *sizes: int, **options: Any) -> nn.Module:
        """Create a module with the device, dtype and mode of the model."""
        weight = self.backbone.pos_embed
        module = kind(*sizes, device=weight.device, **options)
        return module.to(weight.dtype).train(self.training)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, and the pooling if one is given."""
        if global_pool not in (None, self.global_pool):
            if global_pool not in POOLS:
                raise ValueError(f'Unknown global_pool {global_pool!r}; choose from {POOLS}.')
            self.global_pool = global_pool
            self.fc_norm = nn.Identity()
            if global_pool:
                eps = 1e-5 if self.backbone.version == 2 else 1e-6
                self.fc_norm = self._new(nn.LayerNorm, self.head_hidden_size, eps=eps)
        self.num_classes = num_classes
        self.head = nn.Identity()
        if num_classes > 0:
            self.head = self._new(nn.Linear, self.head_hidden_size, num_classes)
            trunc_normal_(self.head.weight, std=2e-5)
            nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images (B, C, H, W): logits (B, classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the normalized map after the last block, shape (B, D, h, w)."""
        x, grid, _ = self._run_blocks(x)
        return tokens_to_map(self._norm(x), grid)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool a map (B, D, h, w) and classify it."""
        if self.global_pool == 'avg':
            x = x.mean(dim=(2, 3))
        elif self.global_pool:
            x = self.backbone.pool(x.flatten(2).transpose(1, 2), self.global_pool)
        elif self.num_classes > 0 and not pre_logits:
            raise ValueError(
                "The classifier needs a pooling, but global_pool is ''; choose another one, or "
                'num_classes=0.'
            )
        x = self.head_drop(self.fc_norm(x))
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Compute features after several blocks.

        Args:
            x (Tensor): Images, shape (B, C, H, W).
            indices (int | Sequence[int], optional): Blocks, or how many of the last. Default: all.
            norm (bool): Apply the final norm to all of them. Default: False.
            stop_early (bool): Do not run the blocks after the last index. Default: False.
            output_fmt (str): 'NCHW' maps or 'NLC' tokens. Default: 'NCHW'.
            intermediates_only (bool): Do not return the final features. Default: False.

        Returns:
            list[Tensor] | tuple[Tensor, list[Tensor]]: The features, preceded by the final ones.
        """
        if output_fmt not in ('NCHW', 'NLC'):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', but is {output_fmt!r}.")
        take, last = feature_take_indices(len(self.backbone.layers), indices)
        x, grid, intermediates = self._run_blocks(x, take, last if stop_early else None)
        if norm:
            intermediates = [self._norm(y) for y in intermediates]
        if output_fmt == 'NCHW':
            intermediates = [tokens_to_map(y, grid) for y in intermediates]
        if intermediates_only:
            return intermediates
        return tokens_to_map(self._norm(x), grid), intermediates

    def _run_blocks(
        self, x: Tensor, take: Sequence[int] = (), last: int | None = None
    ) -> tuple[Tensor, tuple[int, int], list[Tensor]]:
        """Return tokens (B, N, D) after the last block, their grid, and those after ``take``."""
        backbone = self.backbone
        if not isinstance(x, Proxy):  # symbolic, without a size
            self._check_image(x)
        x, grid = backbone.embed(x)
        intermediates = []
        with_checkpoints = (
            self.grad_checkpointing and torch.is_grad_enabled() and not torch.jit.is_tracing()
        )
        for index, layer in enumerate(backbone.layers):
            x = checkpoint(layer, x, grid) if with_checkpoints else layer(x, grid)
            if index in take:
                intermediates.append(x)
            if index == last:
                break
        return x, grid, intermediates

    def _norm(self, x: Tensor) -> Tensor:
        return x if self.backbone.norm is None else self.backbone.norm(x)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove everything that the features after these blocks do not need."""
        take, last = feature_take_indices(len(self.backbone.layers), indices)
        self.backbone.layers = self.backbone.layers[: last + 1]
        if prune_norm:
            self.backbone.norm = None
        if prune_head:
            self.reset_classifier(0, '')
        return take

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Set activation checkpointing, which saves only the inputs of blocks for backward."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def no_weight_decay(self) -> set:
        """Return the parameters without weight decay, in addition to one-dimensional ones."""
        return {'backbone.pos_embed'}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return groups for layer-wise learning rates: embeddings, pairs of blocks, the rest."""
        depth, layers = len(self.backbone.layers), r'^backbone\.layers'
        pairs = [(rf'{layers}\.(?:{i}|{i + 1})\.', (i // 2,)) for i in range(0, depth, 2)]
        stem = r'^backbone\.(?:patch_embed|pos_embed)'
        return dict(stem=stem, blocks=layers if coarse else pairs)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Rename weights of official checkpoints and of our classifiers for the timm model. The norm of
    another pooling is omitted: it is reinitialized like the classifier after it.

    Raises:
        ValueError: If the weights have neither 3 input channels nor those of the model.
    """
    norm = model.fc_norm.state_dict(prefix='fc_norm.')
    renamed = {}
    for name, value in weights_of(state_dict).items():
        name = name.replace('backbone.pool_norm.', 'fc_norm.').replace('head.fc.', 'head.')
        if not name.startswith('fc_norm.') or name in norm and value.shape == norm[name].shape:
            renamed[name] = value
    weight = renamed.get('backbone.patch_embed.projection.weight')
    if weight is not None:
        # timm adapts RGB weights by the same rule after this, but may leave others random.
        adapt_input_channels(weight, model.in_chans)
    return renamed


def _model_name(official: OfficialCheckpoint) -> str:
    """'mmvil_base_patch16_224' of version 2, 'mmvil1_base_patch16_stride8_224' of version 1."""
    prefix = 'mmvil' if official.version == 2 else 'mmvil1'
    stride = '' if official.stride == 16 else f'_stride{official.stride}'
    return f'{prefix}_{official.arch.replace("_", "")}_patch16{stride}_224'


def _register(name: str, official: OfficialCheckpoint) -> None:
    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        settings = dict(arch=official.arch, version=official.version)
        if official.stride != 16:
            settings['stride'] = official.stride
        return build_model_with_cfg(
            TimmVisionLSTM,
            name,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg=dict(out_indices=kwargs.pop('out_indices', 3), feature_cls='getter'),
            **{**settings, **kwargs},
        )

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f'ViL, version {official.version}, arch {official.arch!r}.'
    globals()[name] = register_model(build)


# Several checkpoints of one model differ in their tag, as in 'mmvil_tiny_patch16_224.e400_in1k';
# the first is the default.
default_cfgs = generate_default_cfgs(
    {
        f'{_model_name(official)}.e{official.epochs}_in1k': dict(
            url=official.url,
            num_classes=1000,
            input_size=(3, 224, 224),
            pool_size=((224 - 16) // official.stride + 1,) * 2,
            crop_pct=1.0,
            interpolation='bicubic',
            mean=IMAGENET_DEFAULT_MEAN,
            std=IMAGENET_DEFAULT_STD,
            first_conv='backbone.patch_embed.projection',
            classifier='head',
            origin_url='https://github.com/NX-AI/vision-lstm',
            paper_ids='arXiv:2406.04303',
        )
        for official in OFFICIAL_CHECKPOINTS
    }
)
for _name, _official in {_model_name(each): each for each in OFFICIAL_CHECKPOINTS}.items():
    _register(_name, _official)
