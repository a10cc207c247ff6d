# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Logistic function, for SiLU gates."""

import triton
import triton.language as tl

from .tiles import INTERPRETED


@tl.core.builtin
def _compiles_to_ptx(_semantic=None, _builder=None):
    builder = _builder or _semantic.builder  # of Triton before 3.4, and since
    return tl.constexpr(builder.options.backend_name == 'cuda')


@triton.jit
def sigmoid(x):
    """Compute 1 / (1 + exp(-x)) of float32 x in four instructions, two of them approximate to one
    or two units in the last place.

    The compiler assumes side effects of this assembly, so it runs once; it recomputes `tl.sigmoid`
    in every layout of the result that is needed.
    """
    if INTERPRETED:
        return tl.sigmoid(x)
    elif _compiles_to_ptx():
        return tl.inline_asm_elementwise(
            """
            {
                .reg .f32 y;
                mul.f32 y, $1, 0fBFB8AA3B;  // -log2(e)
                ex2.approx.ftz.f32 y, y;
                add.f32 y, y, 0f3F800000;
                rcp.approx.ftz.f32 $0, y;
            }
            """,
            '=f,f',
            [x],
            dtype=tl.float32,
            is_pure=False,
            pack=1,
        )
    else:
        return tl.sigmoid(x)
