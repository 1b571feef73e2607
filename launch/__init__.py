"""Entry points for the deepspeed launcher."""
