"""As ``cross_compile.py``, for attention over lists by segments, of chosen rows, and of SparseK's selections and
projection."""

from __future__ import annotations

from typing import Any

import torch
from compiled_kernel import report
from cross_compile import source, tiles
from sparsetrain_kernels import row_statistics
from sparsetrain_kernels.dense.triton import keys, rows
from sparsetrain_kernels.dense.triton.configs import choose_configs as choose_row_configs
from sparsetrain_kernels.key_choice.triton import lists as choice_lists
from sparsetrain_kernels.key_choice.triton import weights as choice_weights
from sparsetrain_kernels.key_choice.triton.launch import HELD_BYTES, LIST_WARPS, TILE, choose_config
from sparsetrain_kernels.key_lists.triton.forward import key_lists_fwd_kernel
from sparsetrain_kernels.key_lists.triton.grad_rows import key_lists_bwd_rows_kernel
from sparsetrain_kernels.launching import Config
from sparsetrain_kernels.listed_keys.triton import grad_keys, skipped, work
from sparsetrain_kernels.listed_keys.triton.configs import choose_configs
from sparsetrain_kernels.listed_keys.triton.launch import PLACES
from sparsetrain_kernels.selected_keys.hopper import forward, grad_key_value, grad_query
from sparsetrain_kernels.selected_keys.hopper.launch import KEY_STAGES, STAGES, VALUE_STAGES
from sparsetrain_kernels.sparsek_projection.triton import kernels as projection
from sparsetrain_kernels.sparsek_projection.triton import launch as of_projection
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
INTEGERS = (
    "keys_ptr",
    "counts_ptr",
    "tiles_ptr",
    "key_tiles_ptr",
    "cu_ptr",
    "skip_ptr",
    "lists_ptr",
    "key_counts_ptr",
    "positions_ptr",
    "places_ptr",
    "order_ptr",
    "until_ptr",
    "lengths_ptr",
    "spans_ptr",
    "columns_ptr",
    "dropped_ptr",
)
NO_SELECTION = dict.fromkeys(
    ("whole_ptr", "scores_ptr", "threshold_ptr", "exit_ptr", "doc_start_ptr", "grad_threshold_ptr")
)
SINGLES = ("sums_ptr", "in_log2_ptr", "grad_lse_ptr", "lse_ptr", "delta_ptr")


def compile_one(
    name: str, kernel: Any, dtype: str, constants: dict[str, Any], config: Config | None, **types: str
) -> None:
    """Reports one kernel; the sizes of its tiles are the configuration's unless they are among the constants."""
    if config is not None:
        constants = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, **constants}
    constants = {name: constant for name, constant in constants.items() if name in kernel.arg_names}
    known = dict.fromkeys(INTEGERS, "*i32") | dict.fromkeys(SINGLES, "*fp32") | types
    own = {name: kind for name, kind in known.items() if name in kernel.arg_names}
    options = {} if config is None else {"num_warps": config.num_warps, "num_stages": config.num_stages}
    report(f"{name} {dtype}", source(ASTSource, kernel, dtype, constants, own), options)


def compile_listed(dtype: str) -> None:
    """Entries of the table for a dtype, with the lines of short and of long segments."""
    for head_dim, lines in ((64, 64), (128, 64), (128, 128), (256, 64)):
        configs = choose_configs(DTYPES[dtype], head_dim, lines)
        shape = {"KV_HEADS": 8, "GROUP": 4, "D": head_dim, "D_PAD": head_dim, "ROWS": lines // 4}
        shape |= {"PRECISION": "ieee", "PACKED": False, "key_tiles_ptr": None}
        what = f"{head_dim} {lines}"
        partial = "*bf16" if dtype == "bf16" else "*fp32"
        over_rows = (
            shape
            | {"MEMBERS": 4, "SELECTIONS": 8, "SELECTED": False, "GATE": "straight", "LIST_ROWS": 1}
            | NO_SELECTION
        )
        compile_one(f"fwd {what}", key_lists_fwd_kernel, dtype, over_rows, configs.fwd)
        compile_one(f"rows {what}", key_lists_bwd_rows_kernel, dtype, over_rows, configs.rows, partial_ptr=partial)
        if (head_dim, lines) == (128, 128):
            order = {"SCAN": 1024, "BLOCK_N": 64, "key_tile_of_ptr": None}
            compile_one("order", grad_keys.listed_bwd_order_kernel, dtype, shape | order, None)
            places = {"TILES": PLACES[0], "BOUNDS": PLACES[1], "BLOCK_N": 64}
            compile_one("places", grad_keys.listed_bwd_places_kernel, dtype, shape | places, None)
            shape |= {"ENTRIES": configs.sums.block_m, "FIRST": False}
            sums = grad_keys.listed_bwd_sum_kernel
            compile_one(f"sums {head_dim}", sums, dtype, shape, configs.sums, partial_ptr=partial)
            compile_one(f"keys {head_dim}", grad_keys.listed_bwd_keys_kernel, dtype, shape, configs.keys)


def compile_rows(dtype: str) -> None:
    """Entries of the table of chosen rows for a dtype."""
    for head_dim in (64, 128):
        configs = choose_row_configs(DTYPES[dtype], head_dim)
        shape = {"HEADS": 32, "KV_HEADS": 8, "GROUP": 4, "D": head_dim, "D_PAD": head_dim}
        shape |= {"PRECISION": "ieee", "PACKED": False, "tiles_ptr": None}
        compile_one(f"fwd {head_dim}", rows.causal_rows_fwd_kernel, dtype, shape, configs.fwd)
        compile_one(f"dq {head_dim}", rows.causal_rows_bwd_dq_kernel, dtype, shape, configs.dq)
        compile_one(f"dkv {head_dim}", keys.causal_rows_bwd_dkv_kernel, dtype, shape, configs.dkv)


def compile_choice(dtype: str) -> None:
    """What weighs keys, for the largest of a group and for every head, and what lists them."""
    halves = {"weights_ptr": "*fp16", "peaks_ptr": "*fp16", "pooled_ptr": "*fp16"}
    for head_dim in (64, 128):
        for best in (True, False):
            shape = {"KV_HEADS": 8, "GROUP": 4, "D": head_dim, "D_PAD": head_dim, "BEST": best, "HELD": best}
            shape |= {"PRECISION": "ieee", "PACKED": False, "tiles_ptr": None}
            config = choose_config(DTYPES[dtype], head_dim, best, HELD_BYTES)
            name, kernel = f"weights {best} {head_dim}", choice_weights.log_weights_kernel
            compile_one(name, kernel, dtype, shape, config, **halves)
    own = {"HALF": 3, "TILE": TILE}
    compile_one("lists", choice_lists.top_keys_kernel, dtype, own, Config(0, 0, LIST_WARPS, 3), **halves)


def compile_work(dtype: str) -> None:
    """What comes before the kernels of both."""
    constants: dict[str, Any] = {"ROWS": 32, "PACKED": False, "SCAN": 1024, "GRANULE": 8}
    compile_one("tiles", work.segment_tiles_kernel, dtype, constants, None)
    compile_one("lists", work.ascending_keys_kernel, dtype, constants, None)
    constants = {"HEADS": 32, "D": 128, "D_PAD": 128, "BLOCK_M": 64, "GRAD_LSE": True}
    compile_one("statistics", row_statistics.row_statistics_kernel, dtype, constants, None)
    compile_one("skipped", skipped.clear_skipped_rows_kernel, dtype, constants, None)


def compile_selected(dtype: str) -> None:
    """The Gluon kernels of SparseK: over rows, over selected keys and over neighbouring ones."""
    line = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    singles = ("lse_ptr", "delta_ptr", "scores_ptr", "threshold_ptr", "grad_threshold_ptr")
    singles += ("partial_ptr", "partial_scores_ptr", "grad_scores_ptr")
    integers = ("keys_ptr", "seen_ptr", "counts_ptr", "whole_ptr", "exit_ptr", "places_until_ptr")
    known = dict.fromkeys(integers, "*i32") | dict.fromkeys(singles, "*fp32")
    known |= dict.fromkeys(("lse_desc", "delta_desc", "threshold_desc"), f"tensordesc<fp32[64],{line!r}>")
    shape = {"SHARED_SELECTION": False, "PACKED": False, "STRETCH": 2048, "STAGES": STAGES}
    shape |= {"KEY_STAGES": KEY_STAGES, "VALUE_STAGES": VALUE_STAGES}
    shape |= {"GATE": "value", "LISTED": True}
    neighbours: dict[str, Any] = {"LISTED": False, "GATE": "none", "threshold_desc": None}
    kernels: tuple[tuple[str, Any, int, dict[str, Any]], ...] = (
        ("fwd", forward.selected_fwd_hopper_kernel, 128, {}),
        ("dq", grad_query.selected_bwd_dq_hopper_kernel, 64, {}),
        ("dkv of selected keys", grad_key_value.selected_bwd_dkv_hopper_kernel, 64, {}),
        ("dkv of neighbours", grad_key_value.selected_bwd_dkv_hopper_kernel, 64, neighbours),
    )
    head_dim = 128
    for name, kernel, tile, own in kernels:
        types = known | {f"{tensor}_desc": tiles(dtype, 64, head_dim) for tensor in ("q", "do")}
        types |= {f"{tensor}_desc": tiles(dtype, tile, head_dim) for tensor in ("k", "v")}
        constants = {name: each for name, each in (shape | own).items() if name in kernel.arg_names}
        types = {name: each for name, each in types.items() if name in kernel.arg_names and name not in constants}
        code = source(GluonASTSource, kernel, dtype, constants, types)
        report(f"{name} {dtype} {head_dim}", code, {"num_warps": 4, "enable_fp_fusion": True})


def compile_projection(dtype: str) -> None:
    """SparseK's projection of rows that are held, up to the longest, and of longer ones."""
    singles = dict.fromkeys(("k_ptr", "tau_ptr", "rest_ptr", "grad_k_ptr"), "*fp32")
    for entries in (1000, of_projection.HELD, of_projection.HELD + 1):
        tile = of_projection.tile(entries)
        options = {"num_warps": tile.pop("num_warps")}
        for kernel in (projection.sparsek_fwd_kernel, projection.sparsek_bwd_kernel):
            types = {name: kind for name, kind in singles.items() if name in kernel.arg_names}
            report(f"{kernel.__name__} {entries}", source(ASTSource, kernel, dtype, tile, types), options)


FAMILIES = {
    "projection": compile_projection,
    "segments listed": compile_listed,
    "segments rows": compile_rows,
    "segments choice": compile_choice,
    "segments work": compile_work,
    "segments selected": compile_selected,
}
