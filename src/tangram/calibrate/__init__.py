"""Calibration: what the samples say about every head, gathered into a profile."""

from tangram.calibrate.recording.queries import QueryStatistics
from tangram.calibrate.recording.recorder import DEFAULT_RATIOS, StatisticsRecorder
from tangram.calibrate.texts.samples import Encoder, Sample, Text, held_back

__all__ = [
    "DEFAULT_RATIOS",
    "Encoder",
    "QueryStatistics",
    "Sample",
    "StatisticsRecorder",
    "Text",
    "held_back",
]
