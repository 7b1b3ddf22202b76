"""The pages of an Ogg file: all there, one after the other, in one or more links of a chain.

libsndfile passes over damaged and missing pages, reads the first link only, and refuses files without an end flag.
"""

import struct
import zlib

from moss_train.audio.window import DamagedError, Piece, Remark, Window

_LOOK_AHEAD = 2**24  # bytes in which zeros are told from pages

_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def page_checksum(page: bytes) -> int:
    """The checksum of a page: CRC-32 with the bits of every byte, and of the result, the other way round."""
    blank = page[:22] + bytes(4) + page[26:]
    value = zlib.crc32(blank.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{value:032b}"[::-1], 2)


def scan_ogg(window: Window, begin: int) -> tuple[list[Piece], list[Remark]]:
    """Find the links of an Ogg file: a first page of a stream behind other pages begins another one.

    Raises DamagedError when pages are cut, altered or missing.
    """
    position, link = begin, begin
    pieces: list[Piece] = []
    remarks: list[Remark] = []
    numbers: dict[int, int] = {}  # of the last page, by stream
    is_open: dict[int, bool] = {}  # whether a stream of the link has not ended
    in_front, last = True, begin
    while position < window.size:
        head = window.at(position, 27)
        if head[:4] != b"OggS":
            rest = window.at(position, min(_LOOK_AHEAD, window.size - position))
            if not rest.strip(b"\0") or (rest[:3] == b"TAG" and len(rest) == 128):
                break
            if b"OggS".startswith(rest[:4]):
                raise DamagedError("is cut off in its last page")
            raise DamagedError(f"is damaged: byte {position} does not begin a page of Ogg")
        size = 27 + head[26] + sum(window.at(position + 27, head[26])) if len(head) == 27 else 27
        if position + size > window.size:
            raise DamagedError("is cut off in its last page")
        page = window.at(position, size)
        flags, (serial, number, checksum) = head[5], struct.unpack("<III", head[14:26])
        if page_checksum(page) != checksum:
            raise DamagedError(f"is damaged: the checksum of the page of Ogg at byte {position} differs")
        if flags & 2 and not in_front:
            pieces.append(_ogg_link(window, link, last, position, is_open, remarks))
            link, numbers, is_open = position, {}, {}
        if not flags & 2 and serial in numbers and number != (numbers[serial] + 1) & 0xFFFFFFFF:
            raise DamagedError(f"is damaged: pages of Ogg are missing in front of byte {position}")
        in_front, numbers[serial], is_open[serial], last = bool(flags & 2), number, not flags & 4, position
        position += size
    pieces.append(_ogg_link(window, link, last, position, is_open, remarks))
    return pieces, remarks


def _ogg_link(
    window: Window, begin: int, last: int, end: int, is_open: dict[int, bool], remarks: list[Remark]
) -> Piece:
    """One link of a chain, its last page at byte `last`; the end flag is set where it is missing."""
    if not any(is_open.values()):
        return Piece(begin, end)
    remarks.append(Remark.NO_END_MARK)
    page = bytearray(window.at(last, end - last))
    (serial,) = struct.unpack("<I", page[14:18])
    if [stream for stream, still in is_open.items() if still] != [serial]:
        return Piece(begin, end)
    page[5] |= 4  # libsndfile calls a file without it malformed
    page[22:26] = struct.pack("<I", page_checksum(bytes(page)))
    return Piece(begin, last, tail=bytes(page))
