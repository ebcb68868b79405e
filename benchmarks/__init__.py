"""Measurements that the documentation quotes. Each writes JSON with device, versions and commit to `results/`."""
