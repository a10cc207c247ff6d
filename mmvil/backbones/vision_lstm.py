# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Vision-LSTM as an OpenMMLab backbone.

Alkin, Beck, Poeppel, Hochreiter, Brandstetter: Vision-LSTM: xLSTM as Generic Vision Backbone, ICLR
2025 (arXiv 2406.04303).
"""

import re
from collections.abc import Sequence
from numbers import Integral

import torch
import torch.fx
from mmengine.logging import print_log
from mmengine.model import BaseModule, PretrainedInit
from mmengine.registry import MODELS, WEIGHT_INITIALIZERS
from torch import Tensor, nn

from ..checkpoints import is_official, vil_to_mmvil
from ..checkpoints.channels import PATCH_EMBED_WEIGHT, adapt_input_channels, input_channels
from ..checkpoints.compare import fits
from ..checkpoints.keys import part_of
from ..checkpoints.pretrained import check_pretrained, load_pretrained
from ..layers import BlockStack, FeaturePyramid, PatchEmbed, ViLBlock, resize_pos_embed
from ..layers.embed import tokens_to_map

torch.fx.wrap('resize_pos_embed')  # not traced symbolically, because it depends on sizes


@MODELS.register_module()
class VisionLSTM(BaseModule):
    """Vision-LSTM (ViL).

    A stack of mLSTM blocks over image patches. Blocks 0, 2, 4, ... read the tokens from the top
    left to the bottom right, blocks 1, 3, 5, ... in the opposite direction. Images may have any
    size of at least one patch: images that patches do not tile are zero-padded on the right and at
    the bottom, and the position embedding is resized to the token grid.

    Parameter names, which are stable: ``patch_embed.projection.*``, ``pos_embed`` (1, gh, gw, D),
    ``layers.{i}.skip`` and ``layers.{i}.{norm, proj_up, conv, q_proj, k_proj, v_proj, igate, fgate,
    out_norm, proj_down}.*``, ``norm.*`` (with ``final_norm``), ``pool_norm.*`` (with a bilateral
    ``out_type``), ``pyramid.levels.{i}.*`` (with ``pyramid``).

    Args:
        arch (str | dict): 'tiny' ('t'), 'small' ('s'), 'base' ('b'), 'tiny_plus' or 'small_plus';
            or a dict with ``embed_dims`` (a multiple of 8) and ``depth`` (number of mLSTM blocks).
            Default: 'base'.
        version (int): 2 for the final model of the paper, or 1 for its first version. Default: 2.
        img_size (int | tuple[int, int]): Image size, height first, that sets the grid of position
            embeddings. Default: 224.
        patch_size (int): Side of a patch in pixels. Default: 16.
        stride (int, optional): Step between patches in pixels; 8 for the long-sequence models.
            Default: ``patch_size``.
        in_channels (int): Default: 3.
        out_indices (int | Sequence[int]): 0-based indices of the blocks whose output is returned,
            ascending; negative ones count from the end. Later blocks are not built. Default: -1.
        final_norm (bool): LayerNorm on the last output; off in the UperNet recipe. Default: True.
        out_type (str): 'featmap' (B, D, gh, gw), 'raw' (B, N, D), 'bilateral_concat' (B, 2D): first
            and last token concatenated, or 'bilateral_avg' (B, D): their mean. On the last output,
            the bilateral types end with their own norm, so that a linear head completes the
            classifier (v2 was trained with 'bilateral_concat', v1 with 'bilateral_avg'). Default:
            'featmap'.
        pyramid (dict, optional): Rescale the feature maps to different strides. Keys: ``strides``,
            such as (4, 8, 16, 32), one per output or several for a single output, powers of two
            times the patch stride; ``out_channels`` (None | int | Sequence[int]), channels after a
            projection; ``norm_cfg``, default ``dict(type='BN')``. Maps are cropped to the image
            size divided by the stride, rounded up. Default: None.
        drop_path_rate (float): Stochastic depth rate. Default: 0.
        drop_path_mode (str): 'uniform', or 'linear' from 0 in the first block to the full rate in
            the last. Default: 'uniform'.
        frozen_stages (int): Freeze the embeddings and this number of blocks; 0 freezes the
            embeddings only, -1 nothing. Frozen blocks stay in evaluation mode. Default: -1.
        with_cp (bool): Use activation checkpointing, which saves only the inputs of blocks.
            Default: False.
        backend (str): Backend of the mLSTM, see :func:`mmvil.ops.mlstm`. Default: 'auto'.
        lean (bool | str): Memory saving, see :class:`mmvil.layers.ViLBlock`. Default: True.
        compile (bool | dict): Compile the blocks for training, with these arguments of
            :func:`torch.compile`; ``dict(mode='reduce-overhead')`` also makes CUDA graphs. For
            images of one size. Default: False.
        init_cfg (dict, optional): ``dict(type='Pretrained', checkpoint=..., prefix=...)`` loads
            mmvil's checkpoints (of a backbone or a whole model) and official ones (files, URLs, or
            short names such as ``mmvil://vil2_base16``), resizes position embeddings and adapts RGB
            weights to ``in_channels``. Default: None.

    Raises:
        ValueError: If a choice is unknown or sizes do not fit; the message gives possible values.
    """

    num_heads = 4
    num_extra_tokens = 0  # in addition to the patches; read by mmpretrain's tools

    arch_settings: dict[str, dict] = {
        **dict.fromkeys(['t', 'tiny'], dict(embed_dims=192, depth=24)),
        **dict.fromkeys(['s', 'small'], dict(embed_dims=384, depth=24)),
        **dict.fromkeys(['b', 'base'], dict(embed_dims=768, depth=24)),
        'tiny_plus': dict(embed_dims=192, depth=29),
        'small_plus': dict(embed_dims=384, depth=26),
    }

    OUT_TYPES = ('featmap', 'raw', 'bilateral_concat', 'bilateral_avg')

    def __init__(
        self,
        arch: str | dict = 'base',
        version: int = 2,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        stride: int | None = None,
        in_channels: int = 3,
        out_indices: int | Sequence[int] = -1,
        final_norm: bool = True,
        out_type: str = 'featmap',
        pyramid: dict | None = None,
        drop_path_rate: float = 0.0,
        drop_path_mode: str = 'uniform',
        frozen_stages: int = -1,
        with_cp: bool = False,
        backend: str = 'auto',
        lean: bool | str = True,
        compile: bool | dict = False,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        self.embed_dims, depth = self._parse_arch(arch)
        if version not in (1, 2):
            raise ValueError(f'version must be 1 or 2, but is {version!r}.')
        if out_type not in self.OUT_TYPES:
            raise ValueError(f'Unknown out_type {out_type!r}; choose from {self.OUT_TYPES}.')
        if drop_path_mode not in ('uniform', 'linear'):
            raise ValueError(
                f"drop_path_mode must be 'uniform' or 'linear', but is {drop_path_mode!r}."
            )
        self.version = version
        self.patch_size = patch_size
        self.stride = patch_size if stride is None else stride
        self.in_channels = in_channels
        self.frozen_stages = frozen_stages
        for name in ('patch_size', 'stride', 'in_channels', 'frozen_stages'):
            if not isinstance(value := getattr(self, name), Integral):
                raise ValueError(f'{name} must be one integer, but is {value!r}.')
        if in_channels < 1:
            raise ValueError(f'in_channels must be at least 1, but is {in_channels}.')
        if self.stride < 1 or self.stride > patch_size:
            raise ValueError(
                f'stride must be between 1 and the patch size {patch_size}, but is {self.stride}.'
            )
        sides = _integers('img_size', img_size)
        if len(sides) not in (1, 2) or min(sides) < patch_size:
            raise ValueError(
                f'img_size must be one or two sides of at least one patch ({patch_size}), but is '
                f'{img_size}.'
            )
        self.out_indices = self._parse_out_indices(out_indices, depth)
        built = self.out_indices[-1] + 1
        if not -1 <= frozen_stages <= built:
            raise ValueError(
                f'frozen_stages must be between -1 and the number of blocks {built}, '
                f'but is {frozen_stages}.'
            )
        self.out_type = out_type
        self.with_cp = with_cp

        self.patch_embed = PatchEmbed(in_channels, self.embed_dims, patch_size, self.stride)
        # One embedding per non-overlapping patch, even if patches overlap: these models resize it.
        self.pos_embed = nn.Parameter(
            torch.empty(1, sides[0] // patch_size, sides[-1] // patch_size, self.embed_dims)
        )
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

        rates = [drop_path_rate] * depth
        if drop_path_mode == 'linear':
            rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.layers = BlockStack(
            ViLBlock(
                self.embed_dims,
                num_heads=self.num_heads,
                reverse=i % 2 == 1,
                version=version,
                drop_path_rate=rates[i],
                backend=backend,
                lean=lean,
            )
            for i in range(built)
        )
        if compile:
            self._compile(**(compile if isinstance(compile, dict) else {}))

        self.norm = None
        if final_norm:
            eps = 1e-6 if version == 2 else 1e-5
            self.norm = nn.LayerNorm(self.embed_dims, eps=eps, bias=version == 2)
        self.pool_norm = None
        if out_type.startswith('bilateral'):
            width = 2 * self.embed_dims if out_type == 'bilateral_concat' else self.embed_dims
            self.pool_norm = nn.LayerNorm(width, eps=1e-5 if version == 2 else 1e-6)

        self.pyramid = None
        if pyramid is not None:
            self.pyramid_strides, self.pyramid = self._build_pyramid(**pyramid)
        self._register_load_state_dict_pre_hook(self._check_loaded_channels)
        self._register_load_state_dict_pre_hook(self._resize_loaded_pos_embed)
        self._freeze()

    # ---------------------------------------------------------------- arguments

    @classmethod
    def _parse_arch(cls, arch: str | dict) -> tuple[int, int]:
        if isinstance(arch, str):
            if arch not in cls.arch_settings:
                raise ValueError(
                    f'Unknown arch {arch!r}; choose from {sorted(cls.arch_settings)} or give a '
                    "dict with 'embed_dims' and 'depth'."
                )
            arch = cls.arch_settings[arch]
        if set(arch) != {'embed_dims', 'depth'}:
            raise ValueError(
                "A custom arch is a dict with the keys 'embed_dims' and 'depth', "
                f'but has {sorted(arch)}.'
            )
        embed_dims, depth = _integers('arch', (arch['embed_dims'], arch['depth']))
        if depth < 1:
            raise ValueError(f'depth must be at least 1 block, but is {depth}.')
        if embed_dims < 1:
            raise ValueError(f'embed_dims must be at least 1, but is {embed_dims}.')
        return embed_dims, depth

    @staticmethod
    def _parse_out_indices(out_indices: int | Sequence[int], depth: int) -> tuple[int, ...]:
        given = _integers('out_indices', out_indices)
        indices = tuple(index + depth if index < 0 else index for index in given)
        if not indices or min(indices) < 0 or max(indices) >= depth:
            raise ValueError(
                f'out_indices must name blocks between 0 and {depth - 1} (or {-depth} to -1), '
                f'but are {given}.'
            )
        if list(indices) != sorted(set(indices)):
            raise ValueError(f'out_indices must be ascending without repeats, but are {given}.')
        return indices

    def _build_pyramid(
        self,
        strides: Sequence[int],
        out_channels: int | Sequence[int] | None = None,
        norm_cfg: dict | None = None,
    ):
        if self.out_type != 'featmap':
            raise ValueError(
                "A pyramid is made of feature maps: it needs out_type='featmap', "
                f'not {self.out_type!r}.'
            )
        strides = _integers('pyramid.strides', strides)
        if min(strides) < 1:
            raise ValueError(f'pyramid.strides must be at least 1 pixel, but are {strides}.')
        outputs, levels = len(self.out_indices), len(strides)
        if outputs not in (1, levels):
            raise ValueError(
                f'pyramid.strides must name one stride for each of the {outputs} out_indices, '
                f'but is {strides}.'
            )
        if isinstance(out_channels, int):
            out_channels = (out_channels,) * levels
        if out_channels is not None and len(out_channels) != levels:
            raise ValueError(
                f'pyramid.out_channels must be one number or {levels} of them, '
                f'but is {out_channels}.'
            )
        from mmcv.cnn import build_norm_layer  # only pyramids need mmcv

        norm_cfg = dict(type='BN') if norm_cfg is None else norm_cfg
        return strides, FeaturePyramid(
            self.embed_dims,
            scales=[self.stride / stride for stride in strides],
            out_channels=out_channels,
            norm_layer=lambda channels: build_norm_layer(norm_cfg, channels)[1],
        )

    def _compile(self, **options) -> None:
        if torch.__version__ < '2.5':
            raise ValueError(f'compile needs PyTorch 2.5 or later, not {torch.__version__}.')
        try:
            self.layers.compile(**options)
        except (TypeError, RuntimeError) as error:
            raise ValueError(f'compile={options} is invalid: {error}') from error

    # ---------------------------------------------------------------- forward

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Extract features.

        Args:
            x (Tensor): Images, shape (B, C, H, W).

        Returns:
            tuple[Tensor]: One output per entry of ``out_indices``, or per stride of ``pyramid``,
            shaped by ``out_type`` and ``pyramid``.

        Raises:
            ValueError: As :meth:`embed` does.
        """
        return self.encode(*self.embed(x), x.shape[2:])

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Embed images: patches and positions.

        Args:
            x (Tensor): Images, shape (B, C, H, W).

        Returns:
            tuple[Tensor, tuple[int, int]]: Tokens in row-major order (B, N, D), and the token grid.

        Raises:
            ValueError: If x is not a batch of images with ``in_channels`` channels, at least one
                patch large.
        """
        x, grid = self.patch_embed(x)
        return self.add_positions(x, grid), grid

    def add_positions(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Add the position embedding, resized to the token grid, to tokens (B, N, D)."""
        return x + resize_pos_embed(self.pos_embed, grid).flatten(1, 2)

    def encode(
        self, x: Tensor, grid: tuple[int, int], image_size: tuple[int, int]
    ) -> tuple[Tensor, ...]:
        """Run the blocks on embedded tokens.

        Args:
            x (Tensor): Tokens with positions, shape (B, N, D), row-major.
            grid (tuple[int, int]): Token grid.
            image_size (tuple[int, int]): Height and width of the images, which determine how the
                maps of a ``pyramid`` are cropped.

        Returns:
            tuple[Tensor]: Features, as returned by :meth:`forward`.
        """
        # In evaluation, images and batches of other sizes would be compiled again.
        run = self.layers if self.training else self.layers.forward
        *others, last = run(x, grid, self.out_indices, self.with_cp)
        outputs = [self._format(y, grid, last=False) for y in others]
        outputs.append(self._format(last, grid, last=True))
        if self.pyramid is not None:
            outputs = [
                y[:, :, : (image_size[0] - 1) // stride + 1, : (image_size[1] - 1) // stride + 1]
                for y, stride in zip(self.pyramid(outputs), self.pyramid_strides)
            ]
        return tuple(outputs)

    def _format(self, x: Tensor, grid: tuple[int, int], last: bool) -> Tensor:
        """Convert the tokens (B, N, D) after a block to ``out_type``; norms apply to the last
        output only.
        """
        if last and self.norm is not None:
            x = self.norm(x)
        if self.out_type == 'raw':
            return x
        if self.out_type == 'featmap':
            return tokens_to_map(x, grid)
        x = self.pool(x)
        return self.pool_norm(x) if last else x

    def pool(self, x: Tensor, out_type: str | None = None) -> Tensor:
        """Pool tokens (B, N, D) bilaterally: concatenate first and last (B, 2D), or average them
        (B, D) with ``out_type='bilateral_avg'``. Default: the backbone's ``out_type``.
        """
        first, last = x[:, 0], x[:, -1]
        if (out_type or self.out_type) == 'bilateral_avg':
            return (first + last) / 2
        return torch.cat([first, last], dim=1)

    # ---------------------------------------------------------------- training

    def _freeze(self) -> None:
        """Disable gradients of the frozen part and set it to evaluation mode."""
        if self.frozen_stages < 0:
            return
        self.pos_embed.requires_grad_(False)
        for module in (self.patch_embed, *self.layers[: self.frozen_stages]):
            module.eval()
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> 'VisionLSTM':
        """Set training mode; the frozen part stays in evaluation mode."""
        super().train(mode)
        self._freeze()
        return self

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Return the depth of a parameter for layer-wise learning rate decay, counted in pairs of
        blocks.

        Args:
            param_name (str): Name of the parameter.
            prefix (str): Prefix of the backbone's parameters in that name. Default: ''.

        Returns:
            tuple[int, int]: Layer id and number of layers. Embeddings are layer 0, pair p is layer
            p + 1, everything else is in the last layer. The learning rate is scaled by ``decay **
            (number - 1 - id)``.
        """
        num_layers = (len(self.layers) + 1) // 2 + 2
        if param_name.startswith((f'{prefix}pos_embed', f'{prefix}patch_embed.')):
            return 0, num_layers
        block = re.match(rf'{re.escape(prefix)}layers\.(\d+)\.', param_name)
        return (int(block[1]) // 2 + 1 if block else num_layers - 1), num_layers

    # ---------------------------------------------------------------- weights

    def reset_parameters(self) -> None:
        """Initialize all parameters like the constructor, for instance after ``to_empty`` of a
        model built on the meta device.
        """
        _, *modules = self.modules()
        for module in reversed(modules):  # submodules first: blocks reinitialize theirs
            if isinstance(module, nn.GroupNorm) and module.bias is None:
                nn.init.ones_(module.weight)  # torch < 2.12 would initialize the bias, too
            elif hasattr(module, 'reset_parameters'):
                module.reset_parameters()
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def init_weights(self) -> None:
        """Apply ``init_cfg``, checkpoints last; without it, keep the initial parameters."""
        init_cfg = self.init_cfg
        cfgs = init_cfg if isinstance(init_cfg, list) else [init_cfg] if init_cfg else []
        pretrained = [cfg for cfg in cfgs if _initializer(cfg) is PretrainedInit]
        others = [cfg for cfg in cfgs if cfg not in pretrained]
        if others or not pretrained:
            self.init_cfg = others  # mmengine's own way to load would not convert checkpoints
            super().init_weights()
            self.init_cfg = init_cfg
        for cfg in pretrained:
            load_pretrained(self, cfg['checkpoint'], cfg.get('prefix'))
        self._is_init = True

    def adapt_pretrained(
        self, state_dict: dict[str, Tensor], prefix: str = ''
    ) -> dict[str, Tensor]:
        """Adapt pre-trained RGB weights to ``in_channels``, and log it.

        ``load_state_dict`` does not do this, because a trained model has its own input channels.

        Args:
            state_dict (dict[str, Tensor]): Pre-trained weights; not modified.
            prefix (str): Prefix of the backbone's weights. Default: ''.

        Returns:
            dict[str, Tensor]: The weights; a new dict if any was adapted.

        Raises:
            ValueError: If the weights have neither 3 nor ``in_channels`` channels.
        """
        given = input_channels(state_dict, prefix)
        if given in (None, self.in_channels):
            return state_dict
        name = prefix + PATCH_EMBED_WEIGHT
        adapted = adapt_input_channels(state_dict[name], self.in_channels)
        print_log(f'Adapted {name} from {given} to {self.in_channels} input channels.', 'current')
        return {**state_dict, name: adapted}

    def _checkpoint_filter(self, state_dict: dict, prefix: str, *args) -> None:
        """Convert an official checkpoint before it is loaded into a whole classifier; called by
        mmpretrain's ``ImageClassifier``.
        """
        source = part_of(state_dict, prefix)
        if not is_official(source):
            return
        name = 'backbone.'
        converted = self.adapt_pretrained(vil_to_mmvil(source), name)
        check_pretrained(self, part_of(converted, name), 'The official checkpoint')
        for key in source:
            del state_dict[prefix + key]
        state_dict.update({prefix + key: value for key, value in converted.items()})

    def _check_loaded_channels(self, state_dict: dict, prefix: str, *args) -> None:
        """Reject weights for other input channels: mmengine would only warn and leave the patch
        embedding random.
        """
        given = input_channels(state_dict, prefix)
        if given in (None, self.in_channels):
            return
        raise ValueError(
            f'The checkpoint has {given} input channels, but the model has '
            f'in_channels={self.in_channels}. Test and resume with the in_channels of the '
            "checkpoint; weights to start from belong in the backbone's init_cfg, or in load_from "
            'with the hook mmvil.engine.AdaptInputChannelsHook, which tools/train.py has.'
        )

    def _resize_loaded_pos_embed(self, state_dict: dict, prefix: str, *args) -> None:
        """Resize a position embedding for another image size."""
        name = prefix + 'pos_embed'
        loaded = state_dict.get(name, self.pos_embed)
        if loaded.shape == self.pos_embed.shape or not fits(name, loaded, self.pos_embed):
            return
        before, grid = (tuple(x.shape[1:3]) for x in (loaded, self.pos_embed))
        print_log(f'Resized the position embedding from {before} to {grid} tokens.', 'current')
        state_dict[name] = resize_pos_embed(loaded, grid)


def _initializer(init_cfg: dict) -> type:
    """The class that an ``init_cfg`` names: by its registered or its dotted name, or itself."""
    kind = init_cfg['type']
    return WEIGHT_INITIALIZERS.get(kind) if isinstance(kind, str) else kind


def _integers(name: str, given: int | Sequence[int]) -> tuple[int, ...]:
    """Convert the option ``name``, one or several integers, to a tuple."""
    values = tuple(given) if isinstance(given, Sequence) else (given,)
    if not all(isinstance(value, Integral) for value in values):
        raise ValueError(f'{name} must be one or several integers, but is {given!r}.')
    return values
