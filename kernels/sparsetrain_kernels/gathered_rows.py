"""How Triton kernels read keys and values from a list of rows."""

import triton
import triton.language as tl


@triton.jit
def gather(key_ptr, value_ptr, index, key_stride_n, value_stride_n, dim, D: tl.constexpr, D_PAD: tl.constexpr):
    """Rows ``index`` of key and value, ``[BLOCK_N, D_PAD]``."""
    wide = index.to(tl.int64)
    key_cells = key_ptr + wide[:, None] * key_stride_n + dim[None, :]
    value_cells = value_ptr + wide[:, None] * value_stride_n + dim[None, :]
    if D == D_PAD:
        key = tl.load(key_cells)
        value = tl.load(value_cells)
    else:
        key = tl.load(key_cells, mask=(dim < D)[None, :], other=0.0)
        value = tl.load(value_cells, mask=(dim < D)[None, :], other=0.0)
    return key, value
