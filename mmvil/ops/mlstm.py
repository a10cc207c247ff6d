# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""mLSTM operator: one function for all forms, with its own backward pass.

Input checks, the dtype of the arithmetic and the choice of form are here and nowhere else.
"""

import math
import operator
from typing import NamedTuple

import torch
from torch import Tensor

from .chunkwise import chunk_length, chunkwise_backward, chunkwise_forward
from .compat import (
    is_compiling,
    is_exporting,
    is_tracing,
    is_transforming,
    static_shape,
    without_autocast,
)
from .layout import empty_like_tokens
from .mlstm_export import mlstm_traceable
from .reference import mlstm_reference
from .triton import default_chunk_size as default_triton_chunk_size
from .triton import is_usable as triton_is_usable
from .triton import unavailable_reason as triton_unavailable_reason

BACKENDS = ('auto', 'parallel', 'chunkwise', 'triton', 'reference')
"""``'parallel'`` is quadratic in the sequence length, ``'chunkwise'`` linear, ``'triton'`` has
kernels for both on GPUs; ``'auto'`` chooses the fastest; ``'reference'`` is the paper's loop over
time, for tests."""


class Form(NamedTuple):
    """Form of the operator: its last arguments."""

    chunk_size: int
    """Tokens per chunk; N or more is the parallel form."""
    triton: bool = False
    """Whether Triton kernels run instead of PyTorch."""


def default_chunk_size(length: int, head_width: int, on_cpu: bool = False) -> int:
    """Fastest number of tokens per chunk.

    Short sequences are fastest as one chunk, the parallel form. For longer ones, the work inside
    chunks, proportional to their length, is balanced against that on the (DH, DH) states between
    them. On a CPU, which has no launch overhead, two chunks come in between.
    """
    if length > max(256, head_width):
        return max(64, head_width // 2)
    return math.ceil(length / 2) if on_cpu and length > 2 * head_width else length


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    igate: Tensor,
    fgate: Tensor,
    reverse: bool = False,
    backend: str = 'auto',
    chunk_size: int | None = None,
) -> Tensor:
    r"""Apply the mLSTM cell (xLSTM, arXiv 2405.04517, section 2.3) to a sequence, in one of its
    equivalent forms.

    With :math:`F_t = \sum_{s\le t}\log\sigma(\tilde f_s)`, :math:`a_{tj} = F_t - F_j + \tilde i_j`
    and :math:`m_t = \max_{j \le t} a_{tj}`:

    .. math::
        S_{tj} = e^{a_{tj} - m_t}\, q_t \cdot k_j / \sqrt{d}, \qquad
        h_t = \frac{\sum_{j \le t} S_{tj} v_j}{\max(|\sum_j S_{tj}|,\, e^{-m_t}) + 10^{-6}}

    In float64 this agrees with :func:`mmvil.ops.reference.mlstm_reference`. Half-precision inputs
    are accumulated in float32, gate statistics always in float64; the result has the dtype of the
    inputs. First derivatives only.

    Args:
        q, k, v (Tensor): Queries, keys and values of one dtype and device, shape (B, NH, N, DH),
            any strides.
        igate, fgate (Tensor): Pre-activations of input and forget gates, shape (B, NH, N), any
            floating dtype.
        reverse (bool): Read the tokens from last to first; nothing is flipped in memory. Default:
            False.
        backend (str): One of :data:`BACKENDS`. Default: 'auto'.
        chunk_size (int, optional): Tokens per chunk of the chunkwise form. Default: chosen by
            sequence length and head width.

    Returns:
        Tensor: Hidden states h, shape (B, NH, N, DH).

    Raises:
        ValueError: If shapes or dtypes do not match, the backend is unknown or cannot run here, or
            ``chunk_size`` is below 1.
    """
    _check(q, k, v, igate, fgate, backend, chunk_size)
    if backend == 'reference':
        dtype = torch.promote_types(_accumulation_dtype(q.dtype), igate.dtype)
        with without_autocast(q):
            inputs = (x.to(dtype) for x in (q, k, v, igate, fgate))
            return mlstm_reference(*inputs, reverse).to(q.dtype)
    form = choose_form(q.device, q.dtype, *static_shape(q)[2:], backend, chunk_size)
    if is_exporting() or is_tracing():  # a graph that runs where mmvil is not installed
        with without_autocast(q):
            return mlstm_traceable(q, k, v, igate, fgate, reverse, form.chunk_size)[0]
    # Transforms need the rules of the autograd function, which dispatching would hide.
    function = _MLSTM.apply if is_transforming() else torch.ops.mmvil.mlstm
    return function(q, k, v, igate, fgate, reverse, *form)[0]


def choose_form(
    device: torch.device,
    dtype: torch.dtype,
    length: int,
    head_width: int,
    backend: str,
    chunk_size: int | None = None,
) -> Form:
    """Resolve a backend name to the form of the operator.

    Args:
        device, dtype: Device and dtype of the features.
        length (int): N.
        head_width (int): DH.
        backend (str): One of :data:`BACKENDS`, but not 'reference'.
        chunk_size (int, optional): Tokens in a chunk.

    Raises:
        ValueError: If the backend is 'triton' and cannot run.
    """
    if is_exporting() or is_tracing():
        if isinstance(length, torch.SymInt):  # dynamic
            return Form(chunk_size or max(64, head_width // 2))
        return Form(chunk_length(length, chunk_size or default_chunk_size(length, head_width)))
    if backend == 'parallel':
        return Form(length)
    if backend == 'triton' or (backend == 'auto' and device.type == 'cuda'):
        head_width = operator.index(head_width)  # a dynamic shape becomes a number
    if backend == 'triton':
        problem = triton_unavailable_reason(device, dtype, head_width)
        if problem:
            raise ValueError(
                f"backend='triton' cannot run: {problem}. Use 'auto', which chooses what can."
            )
    triton = backend == 'triton' or (
        backend == 'auto' and device.type == 'cuda' and triton_is_usable(device, dtype, head_width)
    )
    if chunk_size is None:
        if triton:
            chunk_size = default_triton_chunk_size(length)
        else:
            chunk_size = default_chunk_size(length, head_width, device.type == 'cpu')
    return Form(chunk_size, triton)


def _check(q, k, v, igate, fgate, backend, chunk_size) -> None:
    shape, *others = map(static_shape, (q, k, v))
    if len(shape) != 4 or any(other != shape for other in others):
        raise ValueError(
            'q, k and v must have the same shape (B, NH, N, DH), but are '
            f'{shape}, {others[0]} and {others[1]}.'
        )
    gates = [static_shape(gate) for gate in (igate, fgate)]
    if any(gate != shape[:3] for gate in gates):
        raise ValueError(
            f'igate and fgate must have the shape (B, NH, N) = {shape[:3]} of the '
            f'queries, but are {gates[0]} and {gates[1]}.'
        )
    if not q.is_floating_point() or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(
            f'q, k and v must share one floating dtype, but are {q.dtype}, {k.dtype} and {v.dtype}.'
        )
    if not igate.is_floating_point() or not fgate.is_floating_point():
        raise ValueError(
            f'igate and fgate must be floating point, but are {igate.dtype} and {fgate.dtype}.'
        )
    if backend not in BACKENDS:
        raise ValueError(f'Unknown mLSTM backend {backend!r}; choose from {BACKENDS}.')
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f'chunk_size must be at least 1 token, but is {chunk_size}.')


def reject_double_backward() -> None:
    """Raise instead of returning zero as the derivative of a backward pass."""
    raise NotImplementedError(
        "The mLSTM's backward pass cannot be differentiated (create_graph=True). For second "
        "derivatives use backend='reference', which is slow."
    )


# ------------------------------------------------------------------------------------------------
# Registration with torch: `torch.ops.mmvil.mlstm` and `torch.ops.mmvil.mlstm_backward`. The low
# level interface is used because torch.library.custom_op requires torch 2.4.

_library = torch.library.Library('mmvil', 'DEF')
_library.define(
    'mlstm(Tensor q, Tensor k, Tensor v, Tensor igate, Tensor fgate, bool reverse,'
    ' SymInt chunk_size, bool triton=False)'
    ' -> (Tensor h, Tensor normalizer)'
)
_library.define(
    'mlstm_backward(Tensor h_grad, Tensor q, Tensor k, Tensor v, Tensor igate, Tensor fgate,'
    ' Tensor h, Tensor normalizer, bool reverse, SymInt chunk_size, bool triton=False,'
    ' Tensor? delta=None)'
    ' -> (Tensor, Tensor, Tensor, Tensor, Tensor)'
)


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of sums over tokens, for which half precision lacks both range and digits."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def mlstm_forward(q, k, v, igate, fgate, reverse: bool, chunk_size: int, triton: bool = False):
    """Compute h (B, NH, N, DH) and the signed normalizer (B, NH, N), which the backward pass needs.
    The operator ``mmvil::mlstm`` without autograd; arguments as for :func:`mlstm` and in
    :class:`Form`.
    """
    if q.numel() == 0:
        return _mlstm_fake(q, k, v, igate, fgate, reverse, chunk_size)
    if triton:
        from .triton import mlstm_launch

        return mlstm_launch.mlstm_forward(q, k, v, igate, fgate, reverse, chunk_size)
    features = (x.to(_accumulation_dtype(q.dtype)) for x in (q, k, v))
    with without_autocast(q):
        h, normalizer = chunkwise_forward(*features, igate, fgate, reverse, chunk_size)
    return h.to(q.dtype), normalizer


def mlstm_backward(
    h_grad, q, k, v, igate, fgate, h, normalizer, reverse, chunk_size, triton=False, delta=None
):
    """Compute the gradients of q, k, v (B, NH, N, DH) and of igate, fgate (B, NH, N) from that of h
    and the results of :func:`mlstm_forward`. The operator ``mmvil::mlstm_backward``; the kernels
    compute ``delta``, the sum over channels of h times its gradient (B, NH, N), if it is None.
    """
    inputs = (q, k, v, igate, fgate)
    if q.numel() == 0:
        return tuple(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in inputs)
    if triton:
        from .triton import mlstm_launch

        return mlstm_launch.mlstm_backward(
            h_grad, *inputs, h, normalizer, reverse, chunk_size, delta
        )
    h_grad, q, k, v, h = (x.to(_accumulation_dtype(q.dtype)) for x in (h_grad, q, k, v, h))
    with without_autocast(q):
        grads = chunkwise_backward(
            h_grad, q, k, v, igate, fgate, h, normalizer, reverse, chunk_size
        )
    return tuple(grad.to(x.dtype) for grad, x in zip(grads, inputs))


def _mlstm_fake(q, k, v, igate, fgate, reverse, chunk_size, triton=False):
    return empty_like_tokens(q), q.new_empty(q.shape[:3], dtype=_accumulation_dtype(q.dtype))


def _mlstm_backward_fake(
    h_grad, q, k, v, igate, fgate, h, normalizer, reverse, chunk_size, triton=False, delta=None
):
    return (
        *(empty_like_tokens(x) for x in (q, k, v)),
        *(x.new_empty(x.shape) for x in (igate, fgate)),
    )


class _MLSTM(torch.autograd.Function):
    """Both operators as one differentiable function, which saves inputs, output and normalizer."""

    @staticmethod
    def forward(q, k, v, igate, fgate, reverse, *form):
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.mmvil.mlstm(q, k, v, igate, fgate, reverse, *form)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, igate, fgate, *ctx.settings = inputs
        h, normalizer = output
        ctx.save_for_backward(q, k, v, igate, fgate, h, normalizer)
        ctx.mark_non_differentiable(normalizer)

    @staticmethod
    def backward(ctx, h_grad, _):
        differentiable = torch.is_grad_enabled() and not is_compiling()
        backward = _MLSTMBackward.apply if differentiable else torch.ops.mmvil.mlstm_backward
        grads = backward(h_grad, *ctx.saved_tensors, *ctx.settings)
        return (*grads, *(None for _ in ctx.settings))

    @staticmethod
    def vmap(info, in_dims, *args):
        return _fold_into_batch(_MLSTM, info.batch_size, in_dims, args)

    @staticmethod
    def jvp(ctx, *_):
        raise NotImplementedError(
            'The mLSTM has no forward-mode derivatives (torch.func.jvp). Use reverse mode '
            "(torch.func.grad or vjp), or backend='reference', which is slow."
        )


class _MLSTMBackward(torch.autograd.Function):
    """Backward pass as a function that raises when differentiated."""

    @staticmethod
    def forward(*args):
        return torch.ops.mmvil.mlstm_backward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        reject_double_backward()

    @staticmethod
    def vmap(info, in_dims, *args):
        return _fold_into_batch(_MLSTMBackward, info.batch_size, in_dims, args)

    @staticmethod
    def jvp(ctx, *_):
        reject_double_backward()


def _fold_into_batch(function, size: int, in_dims, args):
    """Apply a function to vmapped tensors (B, NH, ...) as one batch of ``size`` * B."""

    def fold(x: Tensor, dim: int | None) -> Tensor:
        x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        return x.flatten(0, 1)

    folded = [fold(x, dim) if isinstance(x, Tensor) else x for x, dim in zip(args, in_dims)]
    outputs = function.apply(*folded)
    return tuple(y.unflatten(0, (size, len(y) // size)) for y in outputs), (0,) * len(outputs)


def _mlstm_autograd(*args):
    # Function.apply takes longer than a short sequence.
    return (_MLSTM.apply if torch.is_grad_enabled() else _MLSTM.forward)(*args)


_library.impl('mlstm', mlstm_forward, 'CompositeExplicitAutograd')
_library.impl('mlstm', _mlstm_autograd, 'Autograd')
_library.impl('mlstm_backward', mlstm_backward, 'CompositeExplicitAutograd')
_library.impl('mlstm', _mlstm_fake, 'Meta')
_library.impl('mlstm_backward', _mlstm_backward_fake, 'Meta')
