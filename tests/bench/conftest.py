from __future__ import annotations

import torch

# Tiny tensors are slower on several threads, and much slower when other processes want the cores.
torch.set_num_threads(1)
