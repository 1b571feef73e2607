"""Compiles families of kernels for Hopper, as many as lines ``FAMILY DTYPE`` come in; a line says when each is done."""

from __future__ import annotations

import sys

import cross_compile
import cross_compile_segments

if __name__ == "__main__":
    for line in sys.stdin:
        family, dtype = line.strip().rsplit(" ", 1)
        (cross_compile.FAMILIES | cross_compile_segments.FAMILIES)[family](dtype)
        print(f"compiled {family} {dtype}", flush=True)
