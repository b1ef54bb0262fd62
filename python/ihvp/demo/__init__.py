"""The main job on real data: which training digits have a wrong label, and which made the model predict as it does?

An MLP is trained on scikit-learn's digits after 5 % of the training labels were flipped. Nothing but the evaluation
knows which.
"""

from ihvp.demo.steps import DemoResult, run

__all__ = ["DemoResult", "run"]
