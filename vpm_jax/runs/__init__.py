"""A run on disk and on many machines: its folder, checkpoints, locks, logs, interrupts and hosts."""
