"""Families of kernels that are compiled for Hopper on a machine without a GPU, by ``cross_compile_families.py``."""

from __future__ import annotations

from typing import Any

import torch
from compiled_kernel import report, report_shared
from sparsetrain_kernels.block_decode.triton import configs as decode_configs
from sparsetrain_kernels.block_decode.triton import kernels as decode_kernels
from sparsetrain_kernels.block_pattern.hopper import forward as hopper_forward
from sparsetrain_kernels.block_pattern.hopper import fused_backward, fused_launch, grad_key_value, grad_query
from sparsetrain_kernels.block_pattern.triton import backward, fixed_point, forward
from sparsetrain_kernels.block_pattern.triton.configs import choose_configs
from sparsetrain_kernels.causal_selection.triton import (
    crossing_kernels,
    gradient_kernels,
    selection_kernels,
    statistics_kernels,
)
from sparsetrain_kernels.causal_selection.triton.crossing import CHUNK, STEP, WARPS
from sparsetrain_kernels.dense.hopper import grad_key_value as rows_grad_key_value
from sparsetrain_kernels.key_estimate.triton import bounds as page_bounds
from sparsetrain_kernels.key_estimate.triton import scores as key_scores
from sparsetrain_kernels.key_estimate.triton import weights as key_weights
from sparsetrain_kernels.key_estimate.triton.configs import choose_config, granules_of_a_tile, keys_of_a_tile
from sparsetrain_kernels.key_lists.triton.forward import key_lists_fwd_kernel
from sparsetrain_kernels.key_lists.triton.grad_rows import key_lists_bwd_rows_kernel
from sparsetrain_kernels.key_mirror.triton import kernels as mirror_kernels
from sparsetrain_kernels.list_decode.triton import kernels as listed_kernels
from sparsetrain_kernels.list_decode.triton.configs import MERGE_STEPS, choose_tiles
from sparsetrain_kernels.score_placement.triton import kernels as placement_kernels
from sparsetrain_kernels.selected_keys.triton import grad_key_value as selected_grad_key_value
from sparsetrain_kernels.selected_keys.triton import lists
from sparsetrain_kernels.selected_keys.triton.configs import choose_configs as choose_selected_configs
from sparsetrain_kernels.top_p_selection.triton import configs as select_configs
from sparsetrain_kernels.top_p_selection.triton import lists as position_lists
from sparsetrain_kernels.top_p_selection.triton import pooling, thresholds
from sparsetrain_kernels.top_p_selection.triton import short as short_rows
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

INTEGERS = {"far_ptr", "items_ptr", "exit_ptr", "list_ptr", "counts_ptr", "places_until_ptr"}
INTEGERS |= {"positions_ptr", "key_tiles_ptr"}
PATTERN = {"TPB": 2, "FAR": 16}
SINGLES = {
    *("lse_ptr", "delta_ptr", "partial_ptr", "padded_lse_ptr", "padded_delta_ptr", "padded_threshold_ptr"),
    *("scores_ptr", "threshold_ptr", "partial_scores_ptr", "grad_scores_ptr", "grad_threshold_ptr"),
}


def source(kind: Any, kernel: Any, dtype: str, constants: dict[str, Any], types: dict[str, str]) -> Any:
    """The kernel with the types and alignments that launches with ordinary tensors give its arguments."""
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in types:
            signature[name] = types[name]
        elif name.startswith("doc_"):
            # Without packed documents.
            signature[name], constants = "constexpr", {**constants, name: None}
        elif name.endswith("_ptr"):
            signature[name] = "*i32" if name in INTEGERS else "*fp32" if name in SINGLES else f"*{dtype}"
        else:
            signature[name] = "fp32" if name in ("scale", "softcap", "to_log2") else "i32"
        if name.endswith("_ptr") or "stride_" in name or name in ("padded_rows", "padded_tokens"):
            attributes[(place,)] = [["tt.divisibility", 16]]
    return kind(kernel, signature, constexprs=constants, attrs=attributes)


def compile_plain(dtype: str) -> None:
    """Every entry of the table for a dtype, with pattern blocks that its tiles divide."""
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    for head_dim in (64, 128, 256):
        configs = choose_configs(torch_dtype, head_dim, 256)
        shared = {"D": head_dim, "D_PAD": head_dim, "BLOCK": 256, "FAR": 16, "SOFTCAP": False, "PRECISION": "ieee"}
        kernels = (
            ("fwd", forward.block_pattern_fwd_kernel, {"HEADS": 32, "GROUP": 4, "SINK_LOGITS": False}),
            ("dq", backward.block_pattern_bwd_dq_kernel, {"HEADS": 32, "GROUP": 4, "PAD_BLOCK": 256}),
            (
                "dkv",
                backward.block_pattern_bwd_dkv_kernel,
                {"KV_HEADS": 8, "GROUP": 4, "PAD_BLOCK": 256, "PACKED": False},
            ),
        )
        for name, kernel, own in kernels:
            config = getattr(configs, name)
            constants = {**shared, **own, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
            options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
            told = report_shared if dtype == "fp32" else report
            told(f"{name} {dtype} {head_dim}", source(ASTSource, kernel, dtype, constants, {}), options)


def compile_selected(dtype: str) -> None:
    """Attention over a selection: every entry of its table for a dtype."""
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    over_rows = {"KV_HEADS": 8, "MEMBERS": 1, "GATE": "value", "SELECTED": True, "PACKED": False}
    over_rows |= {"LIST_ROWS": 128, "tiles_ptr": None}
    lists = dict.fromkeys(("keys_ptr", "whole_ptr"), "*i32")
    for head_dim in (64, 128, 256):
        configs = choose_selected_configs(torch_dtype, head_dim)
        shared = {"D": head_dim, "D_PAD": head_dim, "GROUP": 4, "SELECTIONS": 8, "PRECISION": "ieee"}
        kernels = (
            ("fwd", key_lists_fwd_kernel, over_rows | {"ROWS": configs.fwd.block_m}),
            ("dq", key_lists_bwd_rows_kernel, over_rows | {"ROWS": configs.dq.block_m, "partial_ptr": None}),
            (
                "stretch",
                selected_grad_key_value.selected_bwd_stretch_kernel,
                {"KV_HEADS": 8, "STRETCH": 2048, "GATE": "value"},
            ),
            ("dkv", selected_grad_key_value.selected_bwd_dkv_kernel, {"KV_HEADS": 8, "STRETCH": 2048, "PACKED": False}),
        )
        for name, kernel, own in kernels:
            config = getattr(configs, name)
            own_lists = lists if "keys_ptr" in kernel.arg_names else {}
            constants = {**shared, **own, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
            options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
            report(f"{name} {dtype} {head_dim}", source(ASTSource, kernel, dtype, constants, own_lists), options)


WIDE = {
    *("position_ptr", "first_ptr", "largest_ptr", "step_ptr", "running_ptr", "axis_ptr", "order_ptr", "gap_ptr"),
    *("arrival_ptr", "sums_ptr", "point_ptr", "counts_ptr", "mass_ptr", "key_ptr"),
    *("value_ptr", "slope_ptr", "ties_ptr", "fine_value_ptr"),
}
"""Of SparseK's kernels, int64."""
SOFT_ONLY = ("point_ptr", "slope_ptr", "ties_ptr", "fine_slope_ptr", "fine_ties_ptr")
"""What the search for crossings has of gates only."""
DOUBLES = {"total_ptr", "squares_ptr", "after_ptr", "squares_after_ptr", "threshold_sums_ptr", "means_ptr"}
FLOATS = {
    *("linear_ptr", "gain_ptr", "scores_ptr", "scores_or_inf_ptr", "grad_ptr", "grad_linear_ptr", "grad_gain_ptr"),
    *("grad_scores_ptr", "sorted_ptr", "threshold_ptr"),
}


def compile_sparsek(dtype: str) -> None:
    """What selects and places scores, counts and lists: everything around attention, none of it with products."""
    along = {"HEADS": 8, "EPSILON": 1e-5, "BLOCK": 2048}
    parts = {"PARTS": 256, "BLOCK": 1024}
    ages = {"AGE_1": 1, "AGE_2": 4}
    alone = {"PACKED": False, "BLOCK": 256}
    absent = ("parent_keys_ptr", "parent_counts_ptr", "whole_ptr", "scores_or_inf_ptr")
    long_list = {
        **dict.fromkeys((*absent, "seen_ptr")),
        "FROM_PARENT": False,
        "SINKS": False,
        "ROWS": 2048,
        "SEEN": False,
    }
    tile_list = {"FROM_PARENT": True, "SINKS": True, "ROWS": 128, "SEEN": True}
    kernels: list[tuple[Any, dict[str, Any], dict[str, str], int]] = [
        (placement_kernels.placement_fwd_kernel, {**along, "SLOPE": 1e-4}, {}, 8),
        (placement_kernels.placement_bwd_kernel, along, {}, 8),
        (placement_kernels.next_score_kernel, {"SLOPE": 1e-4, "BLOCK": 32}, {}, 1),
        *(
            (kernel, parts, {}, 4)
            for kernel in (gradient_kernels.gradient_largest_kernel, gradient_kernels.gradient_steps_kernel)
        ),
        (gradient_kernels.gradient_collect_kernel, parts, {}, 4),
        (
            statistics_kernels.statistics_sums_kernel,
            {**parts, **ages, "PACKED": False},
            {"sums_ptr": "*fp64"},
            4,
        ),
        (statistics_kernels.statistics_means_kernel, {"PARTS": 256}, {"sums_ptr": "*fp64"}, 4),
        (selection_kernels.selection_keys_kernel, {"BLOCK": 256}, {"doc_start_ptr": "*i32"}, 4),
        (selection_kernels.selection_gaps_kernel, alone, {}, 4),
        (selection_kernels.selection_points_kernel, alone, {}, 4),
        (selection_kernels.selection_intervals_kernel, alone, {}, 4),
        (selection_kernels.selection_thresholds_kernel, alone, {}, 4),
        (lists.select_keys_kernel, long_list, {}, 4),
        (lists.select_keys_kernel, tile_list, {}, 4),
    ]
    for soft in (True, False):
        own = {"CHUNK": CHUNK, "STEP": STEP, "SOFT": soft} | ({} if soft else dict.fromkeys(SOFT_ONLY))
        types = {} if soft else dict.fromkeys(("arrival_ptr", "value_ptr", "fine_value_ptr"), "*i32")
        crossing: tuple[tuple[Any, dict[str, Any]], ...] = (
            (crossing_kernels.crossing_corners_kernel, {}),
            (crossing_kernels.crossing_cells_kernel, {"ROW_CHUNKS": 128}),
            (crossing_kernels.crossing_rows_kernel, {}),
        )
        for kernel, more in crossing:
            constants = {name: each for name, each in (own | more).items() if name in kernel.arg_names}
            kernels.append((kernel, constants, types, WARPS))
    known = dict.fromkeys(WIDE, "*i64") | dict.fromkeys(DOUBLES, "*fp64") | dict.fromkeys(FLOATS, f"*{dtype}")
    known |= {"unit": "i64", "limit": "i64", "to_unit": "fp32"}
    for kernel, constants, types, warps in kernels:
        if kernel is lists.select_keys_kernel:
            constants = {**constants, "PARENT_ROWS": 2048, "SCAN": 1024, "FILL": 128, "PACKED": False}
        names = [name for name in kernel.arg_names if name.endswith("_ptr") and not name.startswith("doc_")]
        own = dict.fromkeys(names, "*i32") | known | types
        report(f"{kernel.__name__} {constants}", source(ASTSource, kernel, dtype, constants, own), {"num_warps": warps})


def tiles(dtype: str, rows: int, head_dim: int) -> str:
    block = [1, 1, rows, head_dim]
    element = {"bf16": gl.bfloat16, "fp16": gl.float16, "i32": gl.int32}[dtype]
    layout = gl.NVMMASharedLayout.get_default_for(block, element)
    return f"tensordesc<{dtype}[{','.join(map(str, block))}],{layout!r}>"


def compile_hopper(dtype: str) -> None:
    """The Gluon kernels for both head dims."""
    line = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    for head_dim in (64, 128):
        kernels: tuple[tuple[str, Any, dict[str, Any], dict[str, int], dict[str, Any]], ...] = (
            (
                "fwd",
                hopper_forward.block_pattern_fwd_kernel,
                {"GROUP": 4, "STAGES": 2},
                {"q": 64, "k": 128, "v": 128},
                {"maxnreg": 168},
            ),
            (
                "dq",
                grad_query.block_pattern_bwd_dq_kernel,
                {"BLOCK_N": 64, "STAGES": 4},
                {"q": 64, "k": 64, "v": 64, "do": 64},
                {},
            ),
            (
                "dkv",
                grad_key_value.block_pattern_bwd_dkv_kernel,
                {"BLOCK_M": 64, "STAGES": 4},
                {"q": 64, "k": 64, "v": 64, "do": 64},
                {},
            ),
            (
                "rows dkv",
                rows_grad_key_value.causal_rows_bwd_dkv_hopper_kernel,
                {"BLOCK_M": 64, "STAGES": 4},
                {"q": 64, "k": 64, "v": 64, "do": 64},
                {},
            ),
        )
        if head_dim == 128:
            fused = fused_backward.block_pattern_bwd_fused_kernel
            boxes = {"q": 64, "k": 128, "v": 128, "do": 64}
            own = {"BLOCK_M": fused_launch.ROWS, "STAGES": fused_launch.STAGES}
            kernels += (("fused", fused, own, boxes, {"maxnreg": 168}),)
        for name, kernel, own, boxes, options in kernels:
            types = {f"{tensor}_desc": tiles(dtype, rows, head_dim) for tensor, rows in boxes.items()}
            types |= dict.fromkeys(("lse_desc", "delta_desc", "scale_desc"), f"tensordesc<fp32[64],{line!r}>")
            types["dq_desc"] = tiles("i32", 64, head_dim // 2)
            constants = own | {name: size for name, size in PATTERN.items() if name in kernel.arg_names}
            report(
                f"{name} {dtype} {head_dim}",
                source(GluonASTSource, kernel, dtype, constants, types),
                {"num_warps": 4, "enable_fp_fusion": True, **options},
            )


def compile_query_sum(dtype: str) -> None:
    """What comes before and after the fused kernel."""
    shape = {"D": 128, "TPB": 2, "TILE": 128}
    rows = {"HEADS": 32, "GROUP": 4, "FAR": 16, "SCAN": 32, "ROWS": 32, "GRAD_LSE": True}
    integers = ("sum_ptr", "key_max_ptr", "value_max_ptr", "split_items_ptr")
    known = dict.fromkeys(integers, "*i32") | dict.fromkeys(("padded_scale_ptr", "grad_lse_ptr"), "*fp32")
    for kernel, own in (
        (fixed_point.tile_maxima_kernel, {"KV_HEADS": 8}),
        (fixed_point.fixed_point_rows_kernel, rows),
        (fixed_point.fixed_point_finish_kernel, {"HEADS": 32, "KV_HEADS": 8, "ROWS": 16, "SUMS": True}),
    ):
        types = {name: kind for name, kind in known.items() if name in kernel.arg_names}
        options = {"num_warps": 8}
        report(kernel.__name__, source(ASTSource, kernel, dtype, {**shape, **own}, types), options)


def compile_lists(dtype: str) -> None:
    """What chooses keys from the scores of one token, of type ``dtype``: rows of their own, and of candidate pages."""
    known = dict.fromkeys(("lse_ptr", "p_ptr"), "*fp32") | {"always_ptr": "*i64", "p": "fp32", "deviations": "fp32"}
    known |= dict.fromkeys(("scores_ptr", "rows_ptr", "pooled_ptr", "rank_ptr", "sifted_ptr", "own_ptr"), f"*{dtype}")
    known |= {"due_ptr": "*u8"}
    row = {"KV_HEADS": 8, "RECENTS": True, "DUE": True}
    many = {**row, "APART": select_configs.APART}
    short = {**row, "ROW": 8192, "P_HEADS": True}
    sample = {"SAMPLE": select_configs.SAMPLE, "PIECE": select_configs.PIECE}
    sample |= {"GUESSES": select_configs.GUESSES, "TURNS": select_configs.TURNS}
    whole = {"CHUNK": select_configs.SIFT, "CHUNKS_PAD": 128}
    whole |= {"GATHER": select_configs.GATHER, "TILE": select_configs.TILE}
    whole |= {"FEW": select_configs.FEW, "SOME": select_configs.SOME}
    chunk = {"CHUNK": select_configs.CHUNK, "KV_HEADS": 8}
    warps = 8192 // select_configs.SHORT_COLUMNS
    bounded = {"threshold_kernel": select_configs.REGISTERS, "short_threshold_kernel": select_configs.SHORT_REGISTERS}
    for pages in (False, True):
        kernels: list[tuple[Any, dict[str, Any], int]] = [
            (thresholds.guess_kernel, {**many, **sample, "HEADS": 32, "P_HEADS": True}, select_configs.GUESS_WARPS),
            (thresholds.sift_kernel, {**many, "GROUP": 4, "CHUNK": select_configs.SIFT}, select_configs.SIFT_WARPS),
            (thresholds.threshold_kernel, {**many, **whole, "HEADS": 32, "P_HEADS": True}, select_configs.NUM_WARPS),
            (
                pooling.pool_heads_kernel,
                {**chunk, "GROUP": 4, "MEAN": True, "DUE": True, "LSE": True},
                select_configs.NUM_WARPS,
            ),
            (pooling.pool_neighbours_kernel, {**chunk, "WIDTH": 7}, select_configs.NUM_WARPS),
            (
                position_lists.list_kernel,
                {**many, **whole, "GROUP": 4, "NEWEST": False},
                select_configs.NUM_WARPS,
            ),
            (
                position_lists.list_kernel,
                {**many, **whole, "GROUP": 1, "NEWEST": True},
                select_configs.NUM_WARPS,
            ),
            (short_rows.short_threshold_kernel, {**short, "HEADS": 32}, warps),
            (
                short_rows.short_list_kernel,
                {**short, "GROUP": 4, "LSE": True, "POOLED": False, "SEARCH": False, "NEWEST": False},
                warps,
            ),
            (
                short_rows.short_list_kernel,
                {**short, "GROUP": 1, "LSE": False, "POOLED": True, "SEARCH": True, "NEWEST": True},
                warps,
            ),
        ]
        for kernel, own, warps in kernels:
            constants = {**own, "PAGES": pages}
            types = {name: known.get(name, "*i32") for name in kernel.arg_names if name in known or "_ptr" in name}
            options = {"num_warps": warps, "maxnreg": bounded.get(kernel.__name__)}
            kind = {True: " newest", False: " union"}.get(own.get("NEWEST"), "")
            report(
                kernel.__name__ + kind + (" pages" if pages else ""),
                source(ASTSource, kernel, dtype, constants, types),
                options,
            )


def compile_mirror(dtype: str) -> None:
    """What keeps keys in 4 bits and reads them: 8 or 16 heads a program."""
    known = dict.fromkeys(("scale_low_ptr", "lengths_ptr", "table_ptr", "lists_ptr", "counts_ptr"), "*i32")
    known |= {"codes_ptr": "*u8", "due_ptr": "*u8", "lse_ptr": "*fp32", "partial_ptr": "*fp32"}
    known |= {f"{name}_ptr": "*fp32" for name in ("center", "spread", "bounds_center", "bounds_spread")}
    kernels: list[tuple[str, Any, dict[str, Any], dict[str, str], dict[str, int]]] = []
    for head_dim in (128, 256):
        shape = {"HALF": head_dim // 2, "HALF_PAD": head_dim // 2}
        for tile in (1, 16):
            for bounds in ("keys", "bytes"):
                own = {**shape, "KV_HEADS": 8, "PAGE": 256, "TILE": tile, "BOUNDS": bounds}
                own |= {"CACHE": True, "MIRROR": True}
                if bounds == "keys":
                    own |= dict.fromkeys(("bounds_center_ptr", "bounds_spread_ptr"))
                types = {"scale_low_ptr": "*fp16", "bounds_ptr": f"*{dtype}" if bounds == "keys" else "*u8"}
                warps = {"num_warps": 1 if tile == 1 else 4}
                kernels.append((f"append {tile} {bounds} {head_dim}", mirror_kernels.append_kernel, own, types, warps))
        for heads in (8, 16):
            for page, listed in ((256, 0), (16, 0), (256, 1), (256, 16))[:: 1 if heads == 8 else 3]:
                config = choose_config(head_dim // 2, heads, page, listed > 0)
                own = {**shape, "KV_HEADS": 8, "GROUP": 4, "HEADS": heads, "PAGE": page, "BLOCK_N": config.block_n}
                own |= {"LISTED": listed, "SOFTCAP": False, "PACKED": True, "STAGES": config.num_stages}
                own |= {"DUE": heads == 16}
                if not listed:
                    own |= dict.fromkeys(("lists_ptr", "counts_ptr"))
                options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
                name = f"estimate {heads} {page} {listed} {head_dim}"
                kernels.append((name, key_scores.estimate_kernel, own, {"scores_ptr": "*fp16"}, options))
        for in_bytes in (True, False):
            own = {"KV_HEADS": 8, "GROUP": 4, "HEADS": 8 if in_bytes else 16, "D": head_dim, "D_PAD": head_dim}
            own |= {"PAGE": 256, "BLOCK_G": granules_of_a_tile(1 if in_bytes else 2, head_dim), "BYTES": in_bytes}
            own |= {"PRECISION": "ieee", "DUE": in_bytes}
            own |= {} if in_bytes else dict.fromkeys(("center_ptr", "spread_ptr"))
            types = {"bounds_ptr": "*u8" if in_bytes else f"*{dtype}", "scores_ptr": "*fp32"}
            name = f"pages {in_bytes} {head_dim}"
            kernels.append((name, page_bounds.page_scores_kernel, own, types, {"num_warps": 4}))
        for softcap in (True, False):
            own = {"KV_HEADS": 8, "GROUP": 4, "HEADS": 16, "D": head_dim, "D_PAD": head_dim, "PAGE": 256}
            own |= {"BLOCK_N": keys_of_a_tile(4 if dtype == "fp32" else 2, head_dim), "DUE": softcap}
            own |= {"SOFTCAP": softcap, "PRECISION": "ieee"}
            types = {"lse_ptr": "*fp32", "weights_ptr": "*fp16"}
            name = f"weights {softcap} {head_dim}"
            kernels.append((name, key_weights.key_weights_kernel, own, types, {"num_warps": 4}))
    for tile in (1, 16):
        # Labels of 16 channels, whatever the head dim.
        absent = ("value", "key_cache", "value_cache", "bounds", "bounds_center", "bounds_spread")
        own = {"KV_HEADS": 8, "PAGE": 256, "TILE": tile, "CACHE": False, "MIRROR": True, "BOUNDS": "none"}
        own |= {"HALF": 8, "HALF_PAD": 32} | {f"{name}_ptr": None for name in absent}
        types, warps = {"scale_low_ptr": "*fp16"}, {"num_warps": 1 if tile == 1 else 4}
        kernels.append((f"append codes {tile}", mirror_kernels.append_kernel, own, types, warps))
    kernels.append(("add splits", key_scores.add_splits_kernel, {"SPLITS_PAD": 64, "DUE": True}, {}, {"num_warps": 1}))
    for name, kernel, constants, types, options in kernels:
        own = known | types
        report(name, source(ASTSource, kernel, dtype, constants, own), options)


def compile_listed(dtype: str) -> None:
    """Attention over lists, for a token and for the rows that need the wider tile, and the merge of its parts."""
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    known = dict.fromkeys(("lists_ptr", "counts_ptr", "lengths_ptr", "recents_ptr", "since_ptr", "table_ptr"), "*i32")
    known |= dict.fromkeys(("partial_ptr", "partial_lse_ptr", "lse_ptr"), "*fp32")
    for head_dim in (64, 128, 256):
        shape = {"KV_HEADS": 8, "GROUP": 4, "D": head_dim, "D_PAD": head_dim, "ITEMS_PAD": 64, "RECENTS": True}
        shape |= {"SINCE": True}
        for rows in (1, 16):
            config = choose_tiles(torch_dtype, head_dim, 4 * rows)
            own = {"PAGE": 256, "BLOCK_M": config.block_m, "SOFTCAP": False, "PRECISION": "ieee"}
            kernels: tuple[tuple[Any, dict[str, Any], int], ...] = (
                (listed_kernels.listed_decode_kernel, own, config.num_stages),
                (listed_kernels.merge_parts_kernel, {"SINK_LOGITS": True, "STEP": MERGE_STEPS[1]}, 3),
            )
            for kernel, more, num_stages in kernels:
                constants = {**shape, **more, "ROWS": rows, "BLOCK_N": config.block_n}
                types = {name: kind for name, kind in known.items() if name in kernel.arg_names}
                options = {"num_warps": 4, "num_stages": num_stages}
                report(
                    f"{kernel.__name__} {dtype} {head_dim} {rows}",
                    source(ASTSource, kernel, dtype, constants, types),
                    options,
                )


def compile_decode(dtype: str) -> None:
    """Steps of generation over listed blocks, for the rows of the narrow and of the wide tile."""
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    known = dict.fromkeys(("lengths_ptr", "table_ptr"), "*i32") | dict.fromkeys(("lse_ptr", "out_ptr"), "*fp32")
    for head_dim in (64, 128, 256):
        for rows in (1, 8):
            config = decode_configs.choose_config(torch_dtype, head_dim, 256, 4 * rows, paged=True)
            own = {"KV_HEADS": 8, "GROUP": 4, "ROWS": rows, "D": head_dim, "D_PAD": head_dim, "BLOCK": 256, "PAGE": 256}
            own |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "FAR": 16, "SOFTCAP": False}
            own |= {"SINK_LOGITS": False, "TOKEN_WINDOW": False, "PRECISION": "ieee", "sink_logits_ptr": None}
            options = {"num_warps": 4, "num_stages": config.num_stages}
            code = source(ASTSource, decode_kernels.decode_kernel, dtype, own, known)
            report(f"decode {dtype} {head_dim} {rows}", code, options)


FAMILIES = {
    "decode": compile_decode,
    "plain": compile_plain,
    "selected": compile_selected,
    "hopper": compile_hopper,
    "sparsek": compile_sparsek,
    "sum": compile_query_sum,
    "lists": compile_lists,
    "listed": compile_listed,
    "mirror": compile_mirror,
}
