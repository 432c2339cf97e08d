"""The version of this package."""

from importlib import metadata

try:
    VERSION = metadata.version("tangram-kv")
except metadata.PackageNotFoundError:  # a source tree on the path, not installed
    VERSION = "0+source"
