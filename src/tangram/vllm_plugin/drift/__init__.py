"""How far traffic is from calibration: sampled in the worker, read in the engine core."""
