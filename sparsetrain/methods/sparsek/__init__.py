"""SparseK attention: config, method, scorer and its installation in a layer, fit, KV memory, costs and oracle."""
