"""Where Raylway keeps things: folders, and buckets of `s3://` and `gs://`, behind one small surface.

A `Place` is a `Path` or an `Address` of a bucket. Both have `/`, `name`, `parent`, `str`, `exists`, `read_bytes`,
`read_text`, `unlink` and `iterdir`; all else that is done to places is here. What is written is whole or absent, also
when the process is killed between any two instructions, and what matters has a checksum.
"""

from raylway.storage.buckets import Address
from raylway.storage.folders import scratch_folder, staged_folder, sync_folder, writing
from raylway.storage.places import (
    Place,
    checksum,
    children,
    existing_root,
    here,
    local,
    made,
    move,
    place,
    prepare_root,
    read_range,
    read_record,
    remove,
    scratch,
    size,
    write_bytes,
    write_record,
    write_sealed,
    written,
)

__all__ = [
    "Address",
    "Place",
    "checksum",
    "children",
    "existing_root",
    "here",
    "local",
    "made",
    "move",
    "place",
    "prepare_root",
    "read_range",
    "read_record",
    "remove",
    "scratch",
    "scratch_folder",
    "size",
    "staged_folder",
    "sync_folder",
    "write_bytes",
    "write_record",
    "write_sealed",
    "writing",
    "written",
]
