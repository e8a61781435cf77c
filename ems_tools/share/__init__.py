"""Share statistics files and find them again: identity of checkpoints, folders, collections, the Hub, workflows."""

from .identity import ModelIdentity
from .library import Library, safe_name

__all__ = ["Library", "ModelIdentity", "safe_name"]
