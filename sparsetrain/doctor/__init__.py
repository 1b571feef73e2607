"""``sparsetrain doctor``: find problems of this machine or recipe before a run starts, with fixes."""

from sparsetrain.doctor.diagnosis import diagnose, run_checks

__all__ = ["diagnose", "run_checks"]
