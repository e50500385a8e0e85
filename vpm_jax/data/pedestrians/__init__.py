"""The people of the synthetic dataset: their appearance (`people`) and how to draw them (`figure`, on a `canvas`)."""
