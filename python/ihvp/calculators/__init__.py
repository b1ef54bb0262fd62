"""Calculators: what is asked of an IHVP object or of the net itself, one kind a file."""

from ihvp.calculators.base import InfluenceCalculator, SelfInfluenceCalculator
from ihvp.calculators.boundary import SampleBoundaryCalculator, WeightsBoundaryCalculator
from ihvp.calculators.bregman import ProximalBregmanCalculator
from ihvp.calculators.empirical_if import EmpiricalInfluence
from ihvp.calculators.first_order import FirstOrderInfluenceCalculator
from ihvp.calculators.multi_stage import MultiStageInfluenceCalculator
from ihvp.calculators.perturbation import input_gradients
from ihvp.calculators.representer_l2 import RepresenterPointL2
from ihvp.calculators.representer_lje import RepresenterPointLJE
from ihvp.calculators.second_order import GroupInfluence, SecondOrderInfluenceCalculator
from ihvp.calculators.top_k import Order
from ihvp.calculators.tracin import TracInCalculator

__all__ = [
    "EmpiricalInfluence",
    "FirstOrderInfluenceCalculator",
    "GroupInfluence",
    "InfluenceCalculator",
    "MultiStageInfluenceCalculator",
    "Order",
    "ProximalBregmanCalculator",
    "RepresenterPointL2",
    "RepresenterPointLJE",
    "SampleBoundaryCalculator",
    "SecondOrderInfluenceCalculator",
    "SelfInfluenceCalculator",
    "TracInCalculator",
    "WeightsBoundaryCalculator",
    "input_gradients",
]
