"""A controlled study on the small model: does MODA help, by how much, and what does it do to the deficit?

``moda-ext study`` trains the variants of :mod:`moda_ext.study.variants` under the same conditions with several seeds,
asks them the same questions (:mod:`moda_ext.study.runs`), and compares each with the baseline
(:mod:`moda_ext.study.tables`).
"""

from moda_ext.study.runs import Plan, Run, read_runs, run_study
from moda_ext.study.tables import write_tables
from moda_ext.study.variants import VARIANTS, Variant

__all__ = ["VARIANTS", "Plan", "Run", "Variant", "read_runs", "run_study", "write_tables"]
