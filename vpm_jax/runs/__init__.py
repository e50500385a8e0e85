"""A run on disk and across processes: workdir, checkpoints, locks, logs, interrupts and hosts."""
