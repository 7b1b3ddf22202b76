"""Find the number of samples in a FLAC file whose header does not state it or states too few.

The header of the last frame gives its position and length in samples, and its checksum shows whether it is complete. A
concatenated file starts with a file header of its own.
"""

import re
import struct
from collections.abc import Iterator

from moss_train.audio.window import DamagedError, Piece, Remark, Window

_FLAC_SYNC = re.compile(rb"\xff[\xf8\xf9]")
_FLAC_GUESSES = 4  # candidates for the last frame to check: other bytes may look like a frame header


def scan_flac(window: Window, begin: int) -> Piece:
    """Find the FLAC file that starts at byte `begin` and ends before a concatenated one.

    Raises DamagedError if it is cut off.
    """
    info = window.at(begin, 42)
    if len(info) < 42 or info[4] & 0x7F != 0:
        return Piece(begin, window.size)
    stated = int.from_bytes(info[18:26], "big") & (2**36 - 1)
    starts = (b"\x00\x00\x00\x22", b"\x80\x00\x00\x22")
    places = window.find_all(b"fLaC", begin + 42, window.size)
    end = next((place for place in places if window.at(place + 4, 4) in starts), window.size)
    if window.at(end - 128, 3) == b"TAG":
        end -= 128
    fixed = struct.unpack(">H", info[8:10])[0]
    for count, (place, last) in enumerate(_last_flac_frames(window, begin, end, fixed)):
        if stated and last == stated:
            return Piece(begin, end)
        # The header states too few samples, or none: accept a frame that ends with the file and has a valid checksum.
        if last > stated and count < _FLAC_GUESSES and not _crc(window.at(place, end - place), 16):
            break
    else:
        if stated:
            return Piece(begin, end)  # fewer samples than stated: reading will show where they end
        raise DamagedError("is cut off in its last frame, and does not say in its header how long it is")
    head = bytearray(info)
    head[18:26] = (int.from_bytes(info[18:26], "big") & ~(2**36 - 1) | last).to_bytes(8, "big")
    if stated:
        head[26:42] = bytes(16)  # the stored checksum covers only the stated samples
    return Piece(begin + 42, end, bytes(head), remark=Remark.LENGTH_UNKNOWN)


def _last_flac_frames(window: Window, begin: int, end: int, fixed_size: int) -> Iterator[tuple[int, int]]:
    """Yield the position and the end in samples of everything that looks like a frame header, last one first."""
    done = end
    for tail in (2**16, 2**20):  # bytes at the end that are searched for the last frame
        origin = max(begin, end - tail)
        block = window.at(origin, end - origin)
        for found in reversed(list(_FLAC_SYNC.finditer(block, 0, done - origin))):
            last = _flac_frame_end(block[found.start() : found.start() + 16], fixed_size)
            if last is not None:
                yield origin + found.start(), last
        done = origin


def _flac_frame_end(header: bytes, fixed_size: int) -> int | None:
    """Return the number of samples up to the end of a frame; None if the bytes are not a frame header."""
    if len(header) < 6 or header[3] & 1 or header[3] >> 1 & 7 in (3, 7) or header[3] >> 4 > 10:
        return None
    is_variable, size_code, rate_code = header[1] & 1, header[2] >> 4, header[2] & 15
    if size_code == 0 or rate_code == 15:
        return None
    first = header[4]
    length = 1 if first < 0x80 else 8 - (first ^ 0xFF).bit_length()
    if (0x80 <= first < 0xC0) or length > 7 or len(header) < 4 + length + 5:
        return None
    number = first if length == 1 else first & (0x7F >> length)
    for byte in header[5 : 4 + length]:
        number = number << 6 | byte & 0x3F
    position = 4 + length
    if size_code in (6, 7):
        width = size_code - 5
        block_size = int.from_bytes(header[position : position + width], "big") + 1
        position += width
    else:
        block_size = 192 if size_code == 1 else 576 << size_code - 2 if size_code < 6 else 256 << size_code - 8
    position += {12: 1, 13: 2, 14: 2}.get(rate_code, 0)
    if len(header) <= position or _crc(header[:position], 8) != header[position]:
        return None
    return (number if is_variable else number * fixed_size) + block_size


def _crc(content: bytes, width: int) -> int:
    """Return the CRC of 8 or 16 bits; 0 for a complete FLAC frame, which ends with the CRC-16 of its other bytes."""
    table, mask, shift, value = _CRC_TABLES[width], (1 << width) - 1, width - 8, 0
    for byte in content:
        value = (value << 8 & mask) ^ table[value >> shift ^ byte]
    return value


def _crc_table(polynomial: int, width: int) -> tuple[int, ...]:
    table = []
    for byte in range(256):
        value = byte << width - 8
        for _ in range(8):
            value = (value << 1) ^ (polynomial if value >> width - 1 else 0)
        table.append(value & (1 << width) - 1)
    return tuple(table)


_CRC_TABLES = {8: _crc_table(0x107, 8), 16: _crc_table(0x18005, 16)}
