"""Studies of many runs: configs, seeds, one table, one figure for each claim.

`jevb-study` runs a study file, or one setting's values from the command line; see `jevb_study.run`.
"""

from jevb_study.spec import Comparison, Curves, Logged, Result, Study, Sweep, load_study

__all__ = ["Comparison", "Curves", "Logged", "Result", "Study", "Sweep", "load_study"]
