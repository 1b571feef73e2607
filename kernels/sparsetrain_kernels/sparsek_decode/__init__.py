"""A step of generation with SparseK: one token joins the slots of a layer, and its query reads them."""

from sparsetrain_kernels.sparsek_decode.op import sparsek_decode_attention, sparsek_decode_update
from sparsetrain_kernels.sparsek_decode.reference import buffer_threshold
from sparsetrain_kernels.sparsek_decode.slots import EMPTY, SparseKSlots

__all__ = ["EMPTY", "SparseKSlots", "buffer_threshold", "sparsek_decode_attention", "sparsek_decode_update"]
