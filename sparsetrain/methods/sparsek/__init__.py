"""SparseK attention: its config and method, the scorer and how it joins a layer, its fit, memory, costs and oracle."""
