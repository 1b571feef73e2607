"""Estimate the memory and step time of a recipe without running it: no torch, no network, no GPU."""

from sparsetrain.plan.estimate import Plan, plan_recipe

__all__ = ["Plan", "plan_recipe"]
