"""TensorBoard event files: length-framed protobuf records with masked CRC-32C. No library.

A record is its length (uint64), the length's checksum, the payload, the payload's checksum. The payload is
an Event: 1 wall_time (double), 2 step (int64), 3 file_version (string), 5 summary; a summary holds values
(1), each with tag (1) and simple_value (2, float).
"""

import struct
from functools import cache
from pathlib import Path

from common import append_text

EVENTS_NAME = "events.out.tfevents.0"  # TensorBoard looks for "tfevents" in names
CRC_POLYNOMIAL = 0x82F63B78  # of CRC-32C, reflected
MASK_DELTA = 0xA282EAD8


@cache
def crc_table() -> list[int]:
    """Return the remainder of each byte."""
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (CRC_POLYNOMIAL if value & 1 else 0)
        table.append(value)
    return table


def masked_crc(data: bytes) -> int:
    """Return the CRC-32C of bytes, rotated by 15 bits and shifted: checksums of checksums stay useful."""
    table, crc = crc_table(), 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 255] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return (crc >> 15 | crc << 17) + MASK_DELTA & 0xFFFFFFFF


def varint(value: int) -> bytes:
    """Spell an unsigned number in groups of seven bits, lowest first."""
    groups = bytearray()
    while value > 127:
        groups.append(value & 127 | 128)
        value >>= 7
    return bytes([*groups, value])


def chunk(field: int, data: bytes) -> bytes:
    """Spell a length-delimited protobuf field."""
    return varint(field << 3 | 2) + varint(len(data)) + data


def frame(payload: bytes) -> bytes:
    """Frame a record."""
    size = struct.pack("<Q", len(payload))
    return size + struct.pack("<I", masked_crc(size)) + payload + struct.pack("<I", masked_crc(payload))


def append_scalars(path: Path, wall_time: float, event: dict) -> None:
    """Append the numbers of a log's event {"kind", "step", ...} as kind/name; begins the file if need be."""
    scalars = {
        f"{event['kind']}/{name}": value for name, value in event.items() if name not in ("kind", "step")
    }
    when = b"\x09" + struct.pack("<d", wall_time)
    values = (
        chunk(1, chunk(1, tag.encode()) + b"\x15" + struct.pack("<f", value))
        for tag, value in scalars.items()
    )
    head = b"" if path.is_file() else frame(when + chunk(3, b"brain.Event:2"))
    record = when + b"\x10" + varint(event["step"]) + chunk(5, b"".join(values))
    append_text(path, head + frame(record))
