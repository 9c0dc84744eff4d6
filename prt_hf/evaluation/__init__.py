"""Prop. 3.2: whether a reward fits a backbone, and whether it is worth porting there."""

from .fit import Fit, check_fit, check_fits
from .fleet import Change, Fleet, compare, measure_fleet
from .portability import Portability, measure_portability
from .report import portability_report
from .results import PortabilityReport
from .rows import batches

__all__ = [
    "Change",
    "Fit",
    "Fleet",
    "Portability",
    "PortabilityReport",
    "batches",
    "check_fit",
    "check_fits",
    "compare",
    "measure_fleet",
    "measure_portability",
    "portability_report",
]
