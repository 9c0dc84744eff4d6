"""Time tuning, decoding, classifying and serving beside their baselines, in turn in one run."""
