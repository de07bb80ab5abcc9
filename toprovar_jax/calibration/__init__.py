"""Calibration: prompts and a target in, ToProVAR's settings for a checkpoint out."""
