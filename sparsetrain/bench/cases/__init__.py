"""The benchmarks, a file each: its ``Options``, whose docstring is the help of the command, and ``run``.

A file here is a command of ``sparsetrain bench``. It imports torch only inside its functions, so that help is instant.
"""
