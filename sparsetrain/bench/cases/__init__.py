"""The benchmarks, a file each: its ``Options``, whose docstring is the help of the command, and ``case``.

A file here is a command of ``sparsetrain bench``. One that imports torch only inside its functions has instant help.
"""
