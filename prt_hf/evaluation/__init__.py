"""How well a reward fits a backbone, before and after anyone has paid for it."""

from .batches import batches
from .fit import Fit, check_fit
from .portability import Portability, measure_portability

__all__ = ["Fit", "Portability", "batches", "check_fit", "measure_portability"]
