"""The reward model r_theta: how it starts, is loaded, and meets a backbone."""
