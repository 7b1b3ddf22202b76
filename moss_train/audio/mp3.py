"""Count the frames of an MP3 stream by reading all frame headers.

libsndfile takes the length from a Xing or Info header or guesses it from the file size, reads no further than that, and
seeks by estimate. So the frames are counted here, an Info header with the right count is put in front if the file has
none, and a read from the middle starts at a frame whose number is known.
"""

import struct
from array import array
from dataclasses import dataclass, field, replace
from functools import lru_cache

from moss_train.audio.window import DamagedError, Piece, Remark, Window

_BITRATES = {  # kbit/s by MPEG version 1 or 2 and layer, ISO 11172-3 and 13818-3
    (1, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (1, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (1, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (2, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (2, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_RATES = (44100, 48000, 32000)
_LONGEST_FRAME = 2881  # bytes: MPEG 2.5, layer 2 at 160 kbit/s and 8 kHz, padded
_INDEX_STEP = 32  # frames between two indexed positions
_PREROLL = 32  # frames read before the wanted one, which may borrow bits from them (bit reservoir)
_DECODER_DELAY = 529  # samples that decoders skip in addition to the encoder's delay


@dataclass(frozen=True)
class Frame:
    """The content of a frame header."""

    size: int  # bytes
    rate: int  # Hz
    num_samples: int  # per channel
    version: int  # 1, or 2 for 2 and 2.5
    layer: int
    is_mono: bool

    @property
    def kind(self) -> tuple[int, int, bool]:
        """Properties that are the same for all frames of a stream."""
        return self.rate, self.layer, self.is_mono

    @property
    def tag_offset(self) -> int:
        """Offset in bytes of a Xing or Info header from the start of its frame."""
        return 4 + ((17 if self.is_mono else 32) if self.version == 1 else (9 if self.is_mono else 17))


@lru_cache(maxsize=4096)
def parse_header(header: bytes) -> Frame | None:
    """Parse four bytes as a frame header; returns None if they are not one, or the size of the frame is unknown."""
    if len(header) < 4:
        return None
    (bits,) = struct.unpack(">I", header)
    version_bits, layer_bits = bits >> 19 & 3, bits >> 17 & 3
    bitrate_index, rate_index, padding = bits >> 12 & 15, bits >> 10 & 3, bits >> 9 & 1
    if bits >> 21 != 0x7FF or version_bits == 1 or layer_bits == 0 or bitrate_index in (0, 15) or rate_index == 3:
        return None
    layer, version = 4 - layer_bits, 1 if version_bits == 3 else 2
    rate = _RATES[rate_index] >> {3: 0, 2: 1, 0: 2}[version_bits]
    bitrate = _BITRATES[version, layer][bitrate_index - 1] * 1000
    num_samples = 384 if layer == 1 else 576 if layer == 3 and version == 2 else 1152
    size = (12 * bitrate // rate + padding) * 4 if layer == 1 else num_samples // 8 * bitrate // rate + padding
    return Frame(size, rate, num_samples, version, layer, bits >> 6 & 3 == 3)


@dataclass
class Mp3Stream:
    """The frames of one file, or of one of several concatenated files."""

    begin: int  # byte of the first frame, or of the Xing or Info header in front of it
    frame: Frame  # the first
    header: bytes  # of the first frame
    end: int = 0
    count: int = 0  # audio frames, not counting one that holds a Xing or Info header
    stated: int | None = None  # number of frames in the Xing or Info header
    stated_bytes: int | None = None
    delay: int = 0  # samples that a decoder skips at the start
    places: array = field(default_factory=lambda: array("Q"))  # byte position of every _INDEX_STEP-th frame

    def piece(self) -> Piece:
        """Return the stream as a piece that libsndfile reads in full: its header states the number of frames."""
        if self.stated == self.count:
            return Piece(self.begin, self.end, piece_at=self.piece_at)
        if self.frame.layer != 3:  # the other layers have no such headers
            return Piece(self.begin, self.end, piece_at=self.piece_at, num_samples=self.count * self.frame.num_samples)
        self.delay = _DECODER_DELAY  # libsndfile skips this many samples after such a header
        return self._piece_from(0)

    def piece_at(self, sample: int) -> tuple[Piece, int]:
        """Return the piece to read for the audio from `sample` on, and how many of its samples precede `sample`."""
        wanted = (sample + self.delay) // self.frame.num_samples
        step = max(0, wanted - _PREROLL) // _INDEX_STEP
        if step == 0 or self.frame.layer != 3:
            return self.piece(), sample
        skipped = step * _INDEX_STEP * self.frame.num_samples + _DECODER_DELAY
        return self._piece_from(step), sample + self.delay - skipped

    def _piece_from(self, step: int) -> Piece:
        """Return the stream from an indexed position on, preceded by an Info header with its frame and byte counts."""
        begin = self.places[step]
        (bits,) = struct.unpack(">I", self.header)
        bits = (bits | 1 << 16) & ~(1 << 9)  # without checksum and padding
        frame, header = self.frame, self.header
        for index in range(1, 15):
            header = struct.pack(">I", bits & ~(15 << 12) | index << 12)
            frame = parse_header(header) or self.frame
            if frame.size >= frame.tag_offset + 16:
                break
        counts = struct.pack(">III", 3, self.count - step * _INDEX_STEP, min(self.end - begin + frame.size, 0xFFFFFFFF))
        content = (header + bytes(frame.tag_offset - 4) + b"Info" + counts).ljust(frame.size, b"\0")
        return Piece(begin, self.end, content, piece_at=self.piece_at)


def scan_mp3(file: Window, begin: int) -> list[Piece]:
    """Find the streams of an MP3 file from byte `begin` on. Raises DamagedError when it is cut off or has gaps."""
    position, end = begin, _end_of_frames(file)
    remark: Remark | None = None
    streams: list[Mp3Stream] = []
    stream: Mp3Stream | None = None
    while position < end:
        head = file.at(position, 40)
        frame = parse_header(head[:4])
        if frame is None:
            following = _skip(file, position, end)
            if following < 0:
                raise DamagedError(f"is damaged: {end - position} bytes at its end are no MP3 frames")
            if not _is_filling(file, position, following):
                if streams or following - position > _LONGEST_FRAME:
                    raise DamagedError(f"is damaged: {following - position} bytes at byte {position} are no MP3 frames")
                remark = Remark.STARTS_INSIDE
            position, stream = following, None  # a tag, or the start of another file
            continue
        if position + frame.size > end:
            raise DamagedError(f"is cut off: {end - position} of {frame.size} bytes of its last frame are there")
        # A frame that holds a Xing, Info or VBRI header has no audio.
        tag = head[frame.tag_offset : frame.tag_offset + 4]
        is_tag = frame.layer == 3 and (tag in (b"Xing", b"Info") or head[36:40] == b"VBRI")
        if stream is None or frame.kind != stream.frame.kind or is_tag:
            stream = Mp3Stream(position, frame, head[:4])
            streams.append(stream)
            if is_tag:
                stream.stated, stream.stated_bytes, stream.delay = _read_tag(file, position, frame)
        if not is_tag:
            if stream.count % _INDEX_STEP == 0:
                stream.places.append(position)
            stream.count += 1
        position += frame.size
        stream.end = position
    streams = [item for item in streams if item.count]
    if not streams:
        raise DamagedError("has no MP3 frames")
    for item in streams:
        if item.stated is None or item.stated <= item.count:
            continue
        # Some encoders count the header as a frame: the stream is complete if it has all the stated bytes.
        all_there = item.stated_bytes is not None and item.stated_bytes <= item.end - item.begin
        if item.stated > item.count + 1 or not all_there:
            raise DamagedError(f"is cut off: {item.count} of {item.stated} frames are there")
    pieces = [item.piece() for item in streams]
    return [replace(pieces[0], remark=remark), *pieces[1:]]


def _read_tag(file: Window, position: int, frame: Frame) -> tuple[int | None, int | None, int]:
    """Return the number of frames and of bytes that a header states, or None, and the samples that a decoder skips."""
    place = position + frame.tag_offset
    tag = file.at(place, 156)
    if tag[:4] not in (b"Xing", b"Info"):
        return None, None, 0
    (flags,) = struct.unpack(">I", tag[4:8])
    values = struct.unpack(">II", tag[8:16])
    count = values[0] if flags & 1 else None
    num_bytes = values[flags & 1] if flags & 2 else None
    fields = 8 + 4 * (flags & 1) + 4 * (flags >> 1 & 1) + 100 * (flags >> 2 & 1) + 4 * (flags >> 3 & 1)
    lame = tag[fields : fields + 24]
    has_delay = len(lame) == 24 and place + fields + 24 <= position + frame.size and lame[:1] != b"\0"
    return count, num_bytes, (lame[21] << 4 | lame[22] >> 4) + _DECODER_DELAY if has_delay else 0


def _end_of_frames(file: Window) -> int:
    """Return where the audio ends and the tags after it begin."""
    end = file.size
    while True:
        if file.at(end - 128, 3) == b"TAG":
            end -= 128
        elif (footer := file.at(end - 32, 32))[:8] == b"APETAGEX":
            (size,), (flags,) = struct.unpack("<I", footer[12:16]), struct.unpack("<I", footer[20:24])
            end -= min(end, size + 32 * (flags >> 31))
        elif file.at(end - 9, 9) == b"LYRICS200" and file.at(end - 15, 6).isdigit():
            end -= min(end, int(file.at(end - 15, 6)) + 15)
        else:
            return end


def _skip(file: Window, position: int, end: int) -> int:
    """Return where to continue after bytes that are not a frame.

    That is the end of an ID3 tag, or the next frame that is followed by another one or by the end; `end` if only zeros
    remain, -1 if there is nothing to continue with.
    """
    if file.at(position, 3) == b"ID3":
        return min(end, position + id3_size(file.at(position, 10)))
    for place in file.find_all(b"\xff", position, end):
        frame = parse_header(file.at(place, 4))
        if frame is not None and place + frame.size <= end:
            following = parse_header(file.at(place + frame.size, 4))
            if place + frame.size == end or (following is not None and following.kind == frame.kind):
                return place
    return end if _is_filling(file, position, end) else -1


def _is_filling(file: Window, begin: int, end: int) -> bool:
    """Whether the bytes are an ID3 tag or zeros."""
    if file.at(begin, 3) == b"ID3":
        return True
    return end - begin < 2**20 and not file.at(begin, end - begin).strip(b"\0")


def id3_size(header: bytes) -> int:
    """Return the size in bytes of an ID3v2 tag from its first ten bytes."""
    if len(header) < 10:
        return len(header)
    size = header[6] << 21 | header[7] << 14 | header[8] << 7 | header[9]
    return size + (20 if header[5] & 0x10 else 10)
