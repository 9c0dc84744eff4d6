"""Deal with other people's models: the only room that touches their internals."""

from . import zero_shot  # noqa: F401, makes its model known to the Auto classes
