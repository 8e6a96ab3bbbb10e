"""Calibration: walks the decoder layers of a model with a method from quant/methods."""
