"""What a recipe will need and how long a step will take, before anything runs: no torch, no network, no GPU."""

from sparsetrain.plan.estimate import Plan, plan_recipe

__all__ = ["Plan", "plan_recipe"]
