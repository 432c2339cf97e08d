"""The profile: the file that calibration writes and that budgets and scorers read."""

from tangram.profile.identity import ModelIdentity, text_config
from tangram.profile.profile import Profile
from tangram.profile.statistics import (
    ERROR_CURVE,
    MASS_CURVE,
    QUERY_COVARIANCE,
    QUERY_MEAN,
    ROPE_FREQUENCIES,
    ROW_WEIGHTS,
    threshold_share,
)
from tangram.profile.store import SCHEMA_VERSION

__all__ = [
    "ERROR_CURVE",
    "MASS_CURVE",
    "QUERY_COVARIANCE",
    "QUERY_MEAN",
    "ROPE_FREQUENCIES",
    "ROW_WEIGHTS",
    "SCHEMA_VERSION",
    "ModelIdentity",
    "Profile",
    "text_config",
    "threshold_share",
]
