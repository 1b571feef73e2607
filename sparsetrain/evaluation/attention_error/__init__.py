"""What an attention method leaves out of full attention, on sampled rows, beside oracles of equal size."""
