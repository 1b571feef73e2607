"""The implementations that benchmarks compare, a file for those of each library."""
