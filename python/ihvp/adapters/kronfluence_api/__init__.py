"""The Analyzer of kronfluence, over ihvp: the same tasks, arguments, names and results, and nothing of it installed.

    from ihvp.adapters.kronfluence_api import Analyzer, prepare_model    # in the place of kronfluence.analyzer

    model = prepare_model(model, task)
    analyzer = Analyzer("mnist", model, task)
    analyzer.fit_all_factors("ekfac", train_dataset, per_device_batch_size=64)
    analyzer.compute_pairwise_scores("scores", "ekfac", query_dataset, train_dataset, per_device_query_batch_size=16)
    scores = analyzer.load_pairwise_scores("scores")["all_modules"]      # (Q,N)

Tasks and arguments may be kronfluence's own objects or those here. Scores have the sign "proponent". What only trades
memory or time there has no effect on numbers and none here: partitions, accumulation steps, dtypes, offloading, full or
low-rank SVD. One process; what is missing raises NotImplementedError.
"""

from ihvp.adapters.kronfluence_api.analyzer import Analyzer, prepare_model
from ihvp.adapters.kronfluence_api.translation import FactorArguments, ScoreArguments, Task

__all__ = ["Analyzer", "FactorArguments", "ScoreArguments", "Task", "prepare_model"]
