"""Damaged copies of valid files, each decided by the numbers of its random stream."""

import gzip
import io
import re
import struct
import zipfile
import zlib

INTERESTING = (
    *(0, 1, 2, 3, 7, 8, 15, 16, 31, 32, 64, 100, 127, 128, 255, 256, 512, 1000, 1024, 4096),
    *(32767, 32768, 65535, 65536, 2**20, 2**24, 2**30, 2**31 - 1, 2**31, 2**32 - 1, 2**32),
    *(2**40, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1),
)
WORDS = (
    *(
        b"NaN",
        b"inf",
        b"-1",
        b"1e999",
        b"null",
        b"true",
        b"{}",
        b"[]",
        b'""',
        b"0",
        b"-0",
        b"1e308",
    ),
    *(b"9" * 5000, b"1" + b"0" * 400, b"[" * 3000, b"{" * 3000, b"\xff\xfe", b"\x00" * 64, b","),
    *(b"\n", b"\r\n", b'"', b"\\", b"\xc3\x28", "\ud7ff".encode(), b"%s%n", b"../../", b"file://"),
)
_NUMBER = re.compile(rb"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")


def mutate(data, other, rng):
    """A damaged copy of ``data`` with pieces of ``other``; its container may be kept whole."""
    if rng.random() < 0.6:  # else checksums would hide what is behind them
        if data.startswith(b"PK\x03\x04"):
            return _mutate_zip(data, other, rng)
        if data.startswith(b"\x1f\x8b"):
            return gzip.compress(_mutate_bytes(gzip.decompress(data), other, rng), 1)
        if data.startswith(b"\x89PNG"):
            return _mutate_png(data, other, rng)
    return _mutate_bytes(data, other, rng)


def _mutate_bytes(data, other, rng):
    data = bytearray(data)
    for _ in range(rng.geometric(0.6)):
        _ACTIONS[rng.integers(len(_ACTIONS))](data, other, rng)
    return bytes(data)


def _place(data, rng):
    """A place in the data; most of what decides is at the beginning."""
    size = len(data) if rng.random() < 0.5 else min(len(data), 512)
    return int(rng.integers(size)) if size else 0


def _flip(data, _, rng):
    if data:
        data[_place(data, rng)] ^= 1 << int(rng.integers(8))


def _set(data, _, rng):
    if data:
        data[_place(data, rng)] = int(rng.integers(256))


def _overwrite(data, _, rng):
    form = "<>"[rng.integers(2)] + "BHIQ"[rng.integers(4)]
    size = struct.calcsize(form)
    value = INTERESTING[rng.integers(len(INTERESTING))] % (1 << 8 * size)
    at = _place(data, rng)
    data[at : at + size] = struct.pack(form, value)


def _truncate(data, _, rng):
    del data[int(rng.integers(len(data) + 1)) :]


def _delete(data, _, rng):
    at = _place(data, rng)
    del data[at : at + int(rng.integers(1, 64))]


def _repeat(data, _, rng):
    at = _place(data, rng)
    piece = bytes(data[at : at + int(rng.integers(1, 64))])
    data[at:at] = piece * int(rng.integers(1, 8))


def _splice(data, other, rng):
    begin, at = _place(other, rng), _place(data, rng)
    piece = other[begin : begin + int(rng.integers(1, 256))]
    data[at : at + (len(piece) if rng.random() < 0.5 else 0)] = piece


def _swap(data, _, rng):
    one, two, size = _place(data, rng), _place(data, rng), int(rng.integers(1, 32))
    first, second = bytes(data[one : one + size]), bytes(data[two : two + size])
    data[one : one + size], data[two : two + size] = second, first


def _insert_word(data, _, rng):
    at = _place(data, rng)
    data[at:at] = WORDS[rng.integers(len(WORDS))]


def _replace_number(data, _, rng):
    found = list(_NUMBER.finditer(data[:4096]))
    if found:
        match = found[rng.integers(len(found))]
        word = str(INTERESTING[rng.integers(len(INTERESTING))]).encode()
        data[match.start() : match.end()] = (
            WORDS[rng.integers(len(WORDS))]
            if rng.random() < 0.5
            else b"-"[: rng.integers(2)] + word
        )


_ACTIONS = (
    *(_flip, _set, _overwrite, _overwrite, _truncate, _delete, _repeat, _splice, _swap),
    *(_insert_word, _replace_number),
)


def _mutate_zip(data, other, rng):
    """One member damaged, or what the zip says of it, with checksums that hold."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(info, archive.read(info)) for info in archive.infolist()]
    chosen = int(rng.integers(len(members)))
    what = rng.integers(8)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for k, (info, content) in enumerate(members):
            if k == chosen:
                if what == 0:
                    continue
                if what == 1:
                    info.filename = info.filename[: int(rng.integers(len(info.filename)))] or "x"
                elif what == 2:
                    info.compress_type = (0, 8, 12, 14)[rng.integers(4)]
                else:
                    content = _mutate_bytes(content, other, rng)
            fresh = zipfile.ZipInfo(info.filename)
            archive.writestr(fresh, content, info.compress_type)
    whole = bytearray(out.getvalue())
    if what == 3 and (at := whole.rfind(b"PK\x01\x02")) >= 0:  # encrypted, odd methods and sizes
        _overwrite_within(whole, at + 6, 40, rng)
    return bytes(whole)


def _overwrite_within(data, begin, size, rng):
    at = begin + int(rng.integers(size))
    data[at : at + 2] = struct.pack("<H", INTERESTING[rng.integers(len(INTERESTING))] & 0xFFFF)


def _mutate_png(data, other, rng):
    """Chunks damaged, with checksums that hold."""
    chunks, at = [], 8
    while at + 8 <= len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += size + 12
    chosen = int(rng.integers(len(chunks)))
    out = [data[:8]]
    for k, (kind, content) in enumerate(chunks):
        if k == chosen:
            content = _mutate_bytes(content, other, rng)
        for _ in range(2 if k == chosen and rng.random() < 0.1 else 1):
            check = zlib.crc32(kind + content)
            out.append(struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check))
    return b"".join(out)
