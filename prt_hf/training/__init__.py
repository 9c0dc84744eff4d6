"""Algorithm 1: tune a reward on a frozen backbone."""
