"""The public projection: checks its arguments, makes rows of them and chooses the implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetrain_kernels.arguments import check_number, check_tensors, is_integer
from sparsetrain_kernels.backend import TRITON_DTYPES, choose_backend
from sparsetrain_kernels.inputs import consecutive_rows
from sparsetrain_kernels.sparsek_projection.library import Sparsek

METHODS = ("sort", "bisect")


def sparsek(
    z: Tensor,
    k: float | Tensor,
    dim: int = -1,
    mask: Tensor | None = None,
    *,
    method: str = "sort",
    backend: str = "auto",
) -> Tensor:
    """The differentiable top-k (2406.16747, section 3.1): the point of ``{0 <= p <= 1, sum p = k}`` nearest to z.

    ``p = clip(z - tau, 0, 1)`` with the one tau for which p adds up to k. Its gradient is that of the entries strictly
    between 0 and 1, less their mean; entries at 0 and 1 have none. ``k=1`` is sparsemax. Computed in fp32, or fp64 for
    fp64, as differences to tau: what all scores have in common costs no precision.

    Args:
        z: ``[..., M, ...]``, floating point, with M entries along ``dim``.
        k: a positive number up to M, or a tensor of them that broadcasts to z's shape without ``dim``, ``[..., ...]``.
            Where a mask leaves at most k entries, all of them are 1. A tensor may require a gradient; its values are
            checked on a CPU only.
        dim: the dimension to project along.
        mask: bool, broadcasts to ``[..., M, ...]``: false entries are not there and 0 in p, as are entries of ``-inf``.
        method: how plain PyTorch finds tau: ``sort`` by sorting the kinks of the sum, ``bisect`` by halving an interval
            and solving once in the end, as Triton's kernels do.
        backend: ``triton`` (fp32, fp16 and bf16), ``reference`` (plain PyTorch), or ``auto``: Triton on CUDA where it
            can.

    Returns:
        p ``[..., M, ...]`` in the dtype of z. NaN or ``inf`` among the entries makes all of their row NaN.

    Raises:
        TypeError, ValueError, IndexError: an argument does not fit; the message names it and its value.
    """
    return _project(z, k, dim, mask, method, backend)[0]


def sparsek_threshold(z: Tensor, k: float | Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
    """The tau of :func:`sparsek` (2406.16747, section 3.1), without a gradient.

    Args:
        z: ``[..., M, ...]``, floating point, with M entries along ``dim``.
        k: a positive number up to M, or a tensor of them that broadcasts to z's shape without ``dim``, ``[..., ...]``.
        dim: the dimension to project along.
        mask: bool, broadcasts to ``[..., M, ...]``: false entries are not there.

    Returns:
        ``[..., ...]``, z's shape without ``dim``, fp32 or for fp64 fp64. ``-inf`` where there are at most k entries.
        Where several tau give the same p (k entries are ahead of the others by one or more), one of them.

    Raises:
        TypeError, ValueError, IndexError: an argument does not fit; the message names it and its value.
    """
    with torch.no_grad():
        _, tau, rest = _project(z, k, dim, mask, "sort", "auto")
    return tau + rest


def _project(
    z: Tensor, k: float | Tensor, dim: int, mask: Tensor | None, method: str, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """p in the shape of z, and the two parts of the threshold without ``dim``."""
    _check(z, k, dim, mask, method)
    triton = None if z.dtype in TRITON_DTYPES else f"its kernels take fp32, fp16 and bf16, not {z.dtype}"
    chosen = choose_backend(backend, z, {"gluon": "it has no Gluon kernels", "triton": triton})
    if mask is not None:
        z = z.masked_fill(~mask, -float("inf"))
    lined_up = z.movedim(dim, -1)
    others, entries = lined_up.shape[:-1], lined_up.shape[-1]
    if isinstance(k, Tensor):
        each = k.to(z.device).expand(others).reshape(-1)
    else:
        # fp32 holds no more of k than the computation does.
        each = z.new_full((), k, dtype=torch.promote_types(z.dtype, torch.float32)).expand(others.numel())
    rows = consecutive_rows(lined_up.reshape(-1, entries))
    needs_grad = torch.is_grad_enabled() and (rows.requires_grad or each.requires_grad)
    # Without a gradient, the plain operation: torch.compile cannot trace an autograd function that nothing needs.
    run = Sparsek.apply if needs_grad else torch.ops.sparsetrain.sparsek_fwd
    p, tau, rest = run(rows, each, method, chosen)
    return p.view(lined_up.shape).movedim(-1, dim), tau.view(others), rest.view(others)


def _check(z: Tensor, k: float | Tensor, dim: int, mask: Tensor | None, method: str) -> None:
    check_tensors(z=z)
    if not z.is_floating_point():
        raise TypeError(f"z has dtype {z.dtype}, expected a floating-point dtype")
    if not is_integer(dim):
        raise TypeError(f"dim={dim!r} is no integer")
    if not -z.dim() <= dim < z.dim():
        raise IndexError(f"dim={dim} does not exist: z has shape {tuple(z.shape)}")
    if 0 in z.shape:
        raise ValueError(f"z has shape {tuple(z.shape)} and no entries")
    if method not in METHODS:
        raise ValueError(f"method={method!r} does not exist; choose one of {', '.join(METHODS)}")
    if mask is not None:
        check_tensors(mask=mask)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask has dtype {mask.dtype}, expected bool, true where an entry is there")
        if not _broadcasts(mask, z.shape):
            raise ValueError(f"mask of shape {tuple(mask.shape)} does not broadcast to z's {tuple(z.shape)}")
    _check_k(z, k, dim, None if mask is not None else z.shape[dim])


def _check_k(z: Tensor, k: float | Tensor, dim: int, entries: int | None) -> None:
    if isinstance(k, Tensor):
        others = z.shape[: dim % z.dim()] + z.shape[dim % z.dim() + 1 :]
        if not _broadcasts(k, others):
            raise ValueError(
                f"k has shape {tuple(k.shape)}, expected one that broadcasts to z's without dim {dim}, {tuple(others)}"
            )
        if k.device.type != "cpu" or torch.compiler.is_compiling():
            return
        smallest, largest = k.min().item(), k.max().item()
    else:
        check_number("k", k)
        smallest = largest = k
    if not smallest > 0:
        raise ValueError(f"k={smallest} must be positive")
    if entries is not None and largest > entries:
        raise ValueError(f"k={largest} is more than the {entries} entries of z along dim {dim}; 1 is the most for each")


def _broadcasts(tensor: Tensor, shape: torch.Size) -> bool:
    return tensor.dim() <= len(shape) and all(own in (1, size) for own, size in zip(tensor.shape[::-1], shape[::-1]))
