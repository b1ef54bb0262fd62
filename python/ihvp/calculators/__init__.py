"""Calculators: what is asked of an IHVP object, one kind a file."""

from ihvp.calculators.first_order import FirstOrderInfluenceCalculator
from ihvp.calculators.top_k import Order

__all__ = ["FirstOrderInfluenceCalculator", "Order"]
