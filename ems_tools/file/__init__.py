"""The statistics file: its records, its layout on disk, reading it without trust and writing it without loss."""

from .contents import EMSFile
from .layout import MAX_FILE_BYTES, SUFFIX
from .reader import EMSFileError, decode_ems_file, load_ems_file
from .rows import EMSMeta, EvidenceRow, FittedRow, RecommendedSetting, advice_by_case
from .storage import write_atomic, write_new

__all__ = [
    "MAX_FILE_BYTES",
    "SUFFIX",
    "EMSFile",
    "EMSFileError",
    "EMSMeta",
    "EvidenceRow",
    "FittedRow",
    "RecommendedSetting",
    "advice_by_case",
    "decode_ems_file",
    "load_ems_file",
    "write_atomic",
    "write_new",
]
