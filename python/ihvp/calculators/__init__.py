"""Calculators: what is asked of an IHVP object, one kind a file."""

from ihvp.calculators.first_order import FirstOrderInfluenceCalculator, Order

__all__ = ["FirstOrderInfluenceCalculator", "Order"]
