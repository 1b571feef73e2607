"""``python -m sparsetrain.cli``, which launchers start."""

from sparsetrain.cli import script

if __name__ == "__main__":
    script()
