"""No deadline for a single example: a busy machine is not a failure."""

from hypothesis import settings

settings.register_profile("geometry", deadline=None)
settings.load_profile("geometry")
