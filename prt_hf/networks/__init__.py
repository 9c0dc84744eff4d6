"""Deal with other people's models: the only room that touches their internals."""
