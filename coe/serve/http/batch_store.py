"""What the endpoints of files and batches need: `coe.serve.batches.service.Batches`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any, Protocol

from coe.protocol.batches import ParsedBatch
from coe.serve.http.keyring import Access

if TYPE_CHECKING:  # its parser is loaded with `serve.batches` only
    from coe.serve.http.file_uploads import FileUploads

Body = Mapping[str, Any]


class Stored(Protocol):
    """An upload that may be committed."""

    def write(self, data: bytes) -> None:
        """Write what follows; blocks."""
        ...

    def discard(self) -> None:
        """Remove it, unless it was committed; blocks."""
        ...


class Batches(Protocol):
    """Files and batches, each seen by the key that made it. Ids that are not its own raise a 404."""

    uploads: FileUploads

    async def upload(self) -> Stored:
        """Begin a file."""
        ...

    async def commit(self, access: Access, upload: Stored, filename: str, purpose: str, keep_s: float | None) -> Body:
        """End a file."""
        ...

    async def files(self, access: Access) -> Sequence[Body]:
        """All files, the oldest first."""
        ...

    async def file(self, access: Access, file_id: str) -> Body:
        """A file."""
        ...

    async def delete(self, access: Access, file_id: str) -> None:
        """Delete a file."""
        ...

    async def content(self, access: Access, file_id: str) -> tuple[Body, IO[bytes]]:
        """A file, and its content."""
        ...

    async def create(self, access: Access, batch: ParsedBatch) -> Body:
        """Make a batch, which waits to run."""
        ...

    async def batches(self, access: Access) -> Sequence[Body]:
        """All batches, the oldest first."""
        ...

    async def batch(self, access: Access, batch_id: str) -> Body:
        """A batch."""
        ...

    async def cancel(self, access: Access, batch_id: str) -> Body:
        """Cancel a batch."""
        ...
