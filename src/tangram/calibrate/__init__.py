"""Calibration: what the samples say about every head, gathered into a profile."""

from tangram.calibrate.queries import QueryStatistics
from tangram.calibrate.recorder import DEFAULT_RATIOS, StatisticsRecorder

__all__ = ["DEFAULT_RATIOS", "QueryStatistics", "StatisticsRecorder"]
