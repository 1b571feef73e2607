"""Which keys a token of generation attends to: the least sets that hold a share of the weight, or a number of keys."""

from sparsetrain_kernels.top_p_selection.op import top_k_lists, top_p_lists
from sparsetrain_kernels.top_p_selection.selection import PositionLists

__all__ = ["PositionLists", "top_k_lists", "top_p_lists"]
