"""Which keys chosen rows of a sequence give the most weight, for other rows to read."""

from sparsetrain_kernels.key_choice.op import top_k_keys, top_p_keys

__all__ = ["top_k_keys", "top_p_keys"]
