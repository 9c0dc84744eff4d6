"""What tuning and decoding cost, everything that is compared timed in turn in one run."""
