"""What is refused of files and batches.

InvalidRequest
├── NoSuchFile, NoSuchBatch   no such id, or one of another API key (404)
├── FileInUse                 a batch that has not ended reads the file (409)
└── StorageFull               all files together would exceed their limit (507)

TooManyBatches                too many batches wait (429)
"""

from __future__ import annotations

from coe.errors import InvalidRequest, Overloaded


class NoSuchFile(InvalidRequest, status=404, code="file_not_found"):
    """There is no file with that id, or it belongs to another API key."""


class NoSuchBatch(InvalidRequest, status=404, code="batch_not_found"):
    """There is no batch with that id, or it belongs to another API key."""


class FileInUse(InvalidRequest, status=409, code="file_in_use"):
    """A batch that has not ended reads the file."""


class StorageFull(InvalidRequest, status=507, code="storage_full"):
    """All files together would exceed their limit."""


class TooManyBatches(Overloaded):
    """Too many batches wait or run."""
