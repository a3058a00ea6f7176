"""Budgets: how the slots are shared, and so which tokens survive. `BUDGETS` is the table of their names."""

from .base import Budget
from .uniform import UniformBudget

BUDGETS: dict[str, type[Budget]] = {"uniform": UniformBudget}

__all__ = ["BUDGETS", "Budget", "UniformBudget"]
