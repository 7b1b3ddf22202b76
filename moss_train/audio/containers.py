"""Find out from the bytes of a file how much audio it holds.

libsndfile trusts wrong headers, treats an unknown length as no audio or as all the rest of the file, reads only the
first of several concatenated files, and silently shortens truncated Ogg files. So the bytes are scanned first: the
result is a list of pieces that libsndfile reads correctly, or a `DamagedError`.
"""

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from moss_train.audio.flac import scan_flac
from moss_train.audio.mp3 import id3_size, parse_header, scan_mp3
from moss_train.audio.window import DamagedError, Piece, Remark, Window

_UNKNOWN_SIZE = 0x7FFFF000  # sizes from here on are placeholders of a writer that did not know the length (a pipe)
_MAX_HEAD = 2**24  # longest header, in bytes, that is copied with a corrected size


@dataclass(frozen=True)
class ChunkFormat:
    """How a chunk-based file format stores the names and sizes of its chunks."""

    header: int  # bytes before the first chunk
    name: int  # bytes of a chunk name
    size: str  # a chunk size as a format of `struct`
    data: bytes  # name of the chunk with the audio
    alignment: int = 2
    counts_itself: bool = False  # whether a chunk size includes the bytes of its name and size
    prefix: int = 0  # bytes between the header of the audio chunk and the audio


_FORMATS = {
    b"RIFF": ChunkFormat(12, 4, "<I", b"data"),
    b"RIFX": ChunkFormat(12, 4, ">I", b"data"),
    b"RF64": ChunkFormat(12, 4, "<I", b"data"),
    b"BW64": ChunkFormat(12, 4, "<I", b"data"),
    b"FORM": ChunkFormat(12, 4, ">I", b"SSND", prefix=8),
    b"caff": ChunkFormat(8, 4, ">Q", b"data", alignment=1, prefix=4),
    b"riff": ChunkFormat(
        40, 16, "<Q", b"data" + bytes.fromhex("f3acd3118cd100c04f8edb8a"), alignment=8, counts_itself=True
    ),
}


def scan(window: Window) -> list[Piece]:
    """Find the pieces of an audio file. Raises DamagedError if it is cut off or its end is unknown."""
    begin = id3_size(window.at(0, 10)) if window.at(0, 3) == b"ID3" else 0
    while window.at(begin, 3) == b"ID3":
        begin += id3_size(window.at(begin, 10))
    if window.at(begin, 4) == b"OggS":
        return scan_ogg(window, begin)
    if _begins_mp3(window, begin):
        return scan_mp3(window, begin)
    pieces: list[Piece] = []
    position = begin
    while scanner := _SCANNERS.get(window.at(position, 4)):
        pieces.append(scanner(window, position))
        position = pieces[-1].end  # a concatenated file begins here, or after the tag of this one
        position += 128 if window.at(position, 3) == b"TAG" else 0
    return pieces or [Piece(0, window.size)]


def _begins_mp3(window: Window, begin: int) -> bool:
    """Whether two consecutive MP3 frames begin within the first few kilobytes."""
    if window.at(0, 4) in _SCANNERS or window.at(begin, 4) in _SCANNERS:
        return False
    end = min(window.size, begin + 8192)
    for place in window.find_all(b"\xff", begin, end):
        frame = parse_header(window.at(place, 4))
        following = None if frame is None else parse_header(window.at(place + frame.size, 4))
        if frame is not None and following is not None and following.kind == frame.kind:
            if place == begin or begin:
                return True
            position = place  # require a third and a fourth: two headers in a row do occur in random bytes
            for _ in range(4):
                frame = parse_header(window.at(position, 4))
                if frame is None:
                    return False
                position += frame.size
            return True
        if place > begin + 4096:
            break
    return False


def _scan_chunks(window: Window, begin: int) -> Piece:
    form = _FORMATS[window.at(begin, 4)]
    overhead = form.name + struct.calcsize(form.size)
    position = begin + form.header
    wide: tuple[int, int] | None = None  # position and value of the audio size in a ds64 chunk
    while True:
        head = window.at(position, overhead)
        if len(head) < overhead:
            if window.at(begin + 8, 4) not in (b"WAVE", b"AIFF", b"AIFC") and form.header == 12:
                return Piece(begin, window.size)  # an unknown kind of file: libsndfile decides
            raise DamagedError("is cut off: it has no chunk with audio")
        (size,) = struct.unpack(form.size, head[form.name :])
        if head[: form.name] == form.data:
            break
        if head[:4] == b"ds64":
            wide = position + 16, struct.unpack("<Q", window.at(position + 16, 8).ljust(8, b"\0"))[0]
        position += _padded(size + (0 if form.counts_itself else overhead), form.alignment)
    place, width = position + form.name, overhead - form.name
    if wide is not None and size == 0xFFFFFFFF:
        place, size, width = wide[0], wide[1], 8
    start = position + (0 if form.counts_itself else overhead)  # the size counts bytes from here on
    audio, there = position + overhead + form.prefix, window.size - start
    is_nothing = size <= form.prefix + (overhead if form.counts_itself else 0)
    is_too_much = size >= (_UNKNOWN_SIZE if width == 4 else 2**62) and (size > there or size == 0xFFFFFFFF)
    if (
        (is_nothing or is_too_much)
        and window.size > audio
        # Not if only chunks follow up to the end: then there is no audio. Zeros count as audio, not as chunks.
        and not (window.at(audio, 4).strip(b"\0") and _next_file(window, audio, form) == window.size)
    ):
        if audio - begin > _MAX_HEAD:
            raise DamagedError("has a header that does not say how much audio there is, and is too long to be mended")
        # The audio is all the rest of the file; it follows a copy of the header with its real size.
        order: Literal["little", "big"] = "little" if form.size[0] == "<" else "big"
        header = bytearray(window.at(begin, audio - begin))
        header[place - begin : place - begin + width] = min(there, 2 ** (8 * width) - 1).to_bytes(width, order)
        if form.header == 12 and header[:4] != b"RF64":
            header[4:8] = min(len(header) + window.size - audio - 8, 0xFFFFFFFF).to_bytes(4, order)
        return Piece(audio, window.size, bytes(header), remark=Remark.LENGTH_UNKNOWN)
    if size > there:
        raise DamagedError(f"is cut off: {max(0, there)} of {size} bytes of audio are there")
    end = min(window.size, start + _padded(size, form.alignment))
    following = _next_file(window, end, form)
    if following is None:
        # Some writers leave out the padding.
        following = _next_file(window, start + size, form)
    if following is None:
        raise DamagedError(
            f"has {window.size - end} bytes behind the {size} bytes of audio of its header, which are no chunks"
        )
    return Piece(begin, following)


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _next_file(window: Window, position: int, form: ChunkFormat) -> int | None:
    """Return where the chunks from `position` on end: at a concatenated file or the end; None if it is not chunks."""
    overhead = form.name + struct.calcsize(form.size)
    while position < window.size:
        head = window.at(position, overhead)
        if head[:4] in _FORMATS and len(window.at(position, form.header)) == form.header:
            return position
        if head[:3] == b"TAG" and window.size - position == 128:
            return window.size
        if head[:3] == b"ID3" or not window.at(position, min(window.size - position, _MAX_HEAD)).strip(b"\0"):
            return window.size
        is_name = len(head) == overhead and all(32 <= byte < 127 for byte in head[:4])
        size = struct.unpack(form.size, head[form.name :])[0] if is_name else 0
        position += _padded(size + (0 if form.counts_itself else overhead), form.alignment)
        if not is_name or position > window.size + form.alignment - 1 or (size == 0 and form.counts_itself):
            return None
    return window.size


def _scan_au(window: Window, begin: int) -> Piece:
    offset, size = struct.unpack(">II", window.at(begin + 4, 8).ljust(8, b"\0"))
    audio = begin + offset
    there = window.size - audio
    if size >= _UNKNOWN_SIZE or (size == 0 and there > 0):
        head = window.at(begin, min(offset, _MAX_HEAD))
        head = head[:8] + struct.pack(">I", min(there, 0xFFFFFFFF)) + head[12:]
        return Piece(audio, window.size, head, remark=Remark.LENGTH_UNKNOWN)
    return _sized(window, begin, audio, size, b".snd")


def _scan_sphere(window: Window, begin: int) -> Piece:
    lines = window.at(begin, 1024).split(b"\n")
    values = {}
    for line in lines:
        name, _, value = line.partition(b" -i ")
        if value.strip().isdigit():
            values[name] = int(value)
    length = int(lines[1]) if len(lines) > 1 and lines[1].strip().isdigit() else 1024
    count = values.get(b"sample_count", 0) * values.get(b"sample_n_bytes", 2) * values.get(b"channel_count", 1)
    if count == 0 or b"shorten" in window.at(begin, length):
        return Piece(begin, window.size)
    return _sized(window, begin, begin + length, count, b"NIST")


def _sized(window: Window, begin: int, audio: int, size: int, magic: bytes) -> Piece:
    """Return the piece of a file that consists of a header, which states the size of the audio, and the audio."""
    end = audio + size
    if end > window.size:
        raise DamagedError(f"is cut off: {max(0, window.size - audio)} of {size} bytes of audio are there")
    rest = window.size - end
    if rest > 1 and window.at(end, 4) != magic and window.at(end, min(rest, _MAX_HEAD)).strip(b"\0"):
        raise DamagedError(f"has {rest} bytes behind the {size} bytes of audio of its header")
    return Piece(begin, end)


_SCANNERS: dict[bytes, Callable[[Window, int], Piece]] = {
    **dict.fromkeys(_FORMATS, _scan_chunks),
    b"fLaC": scan_flac,
    b".snd": _scan_au,
    b"NIST": _scan_sphere,
}
"""By the first four bytes of a file: the function that finds its end, after which another file may follow."""


_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def page_checksum(page: bytes) -> int:
    """Return the checksum of an Ogg page: CRC-32 with the bits of every byte, and those of the result, reversed."""
    blank = page[:22] + bytes(4) + page[26:]
    value = zlib.crc32(blank.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{value:032b}"[::-1], 2)


def scan_ogg(window: Window, begin: int) -> list[Piece]:
    """Find the links of a chained Ogg file: the first page of a stream, after any page that is not one, starts a link.

    Raises DamagedError when pages are cut, altered or missing.
    """
    position, link = begin, begin
    pieces: list[Piece] = []
    numbers: dict[int, int] = {}  # sequence number of the last page, by stream
    is_open: dict[int, bool] = {}  # by stream of the link: whether it has had no end mark yet
    in_front, last = True, begin
    while position < window.size:
        head = window.at(position, 27)
        if head[:4] != b"OggS":
            rest = window.at(position, min(2**24, window.size - position))
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
            pieces.append(_ogg_link(window, link, last, position, is_open))
            link, numbers, is_open = position, {}, {}
        if not flags & 2 and serial in numbers and number != (numbers[serial] + 1) & 0xFFFFFFFF:
            raise DamagedError(f"is damaged: pages of Ogg are missing in front of byte {position}")
        in_front, numbers[serial], is_open[serial], last = bool(flags & 2), number, not flags & 4, position
        position += size
    return [*pieces, _ogg_link(window, link, last, position, is_open)]


def _ogg_link(window: Window, begin: int, last: int, end: int, is_open: dict[int, bool]) -> Piece:
    """Return the link whose last page is at byte `last`; sets that page's end mark if it is the only one missing."""
    still_open = [stream for stream, still in is_open.items() if still]
    if not still_open:
        return Piece(begin, end)
    page = bytearray(window.at(last, end - last))
    if still_open != [struct.unpack("<I", page[14:18])[0]]:
        return Piece(begin, end, remark=Remark.NO_END_MARK)
    page[5] |= 4  # the end mark; without it libsndfile rejects the file as malformed
    page[22:26] = struct.pack("<I", page_checksum(bytes(page)))
    return Piece(begin, last, tail=bytes(page), remark=Remark.NO_END_MARK)
