"""The people of the synthetic dataset: who they are (`people`), and how they are drawn (`figure`, on a `canvas`)."""
