"""Share statistics files and find them again: identity of checkpoints, folders, collections, the Hub, workflows."""

from .identity import ModelIdentity
from .library import SHARED, Library, safe_name

__all__ = ["SHARED", "Library", "ModelIdentity", "safe_name"]
