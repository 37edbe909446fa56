"""The suite that every block device passes. Subclass it and give a fixture `device`; name the class `Test…`.

The device is open for writing and may hold anything at first. The suite compares it with a bytearray.
"""

from __future__ import annotations

import random
import threading

import pytest

from mullion.base.block import BlockDevice, ExtentKind
from mullion.base.errors import InvalidError

_LENGTHS = (1, 511, 512, 513, 4096, 65536, 300_000)


def read(device: BlockDevice, offset: int, length: int) -> bytes:
    """A range as bytes."""
    buffer = bytearray(length)
    device.pread(offset, buffer)
    return bytes(buffer)


def all_of(device: BlockDevice) -> bytearray:
    """The whole content, in pieces of a MiB."""
    step = 1 << 20
    content = bytearray()
    for offset in range(0, device.size_bytes, step):
        content += read(device, offset, min(step, device.size_bytes - offset))
    return content


class BlockDeviceContract:
    """What `mullion.base.block.BlockDevice` promises."""

    def test_it_is_a_block_device(self, device: BlockDevice) -> None:
        assert isinstance(device, BlockDevice)
        assert device.size_bytes > 0
        assert not device.read_only

    def test_random_requests_do_what_a_bytearray_does(self, device: BlockDevice) -> None:
        choose = random.Random(7)
        size = device.size_bytes
        model = all_of(device)
        for number in range(250):
            offset = choose.randrange(size)
            if number % 2:
                offset = offset // 4096 * 4096
            length = min(choose.choice(_LENGTHS), size - offset)
            match choose.choice(["read", "read", "write", "write", "zero", "discard", "flush"]):
                case "read":
                    assert read(device, offset, length) == model[offset : offset + length]
                case "write":
                    content = choose.randbytes(length)
                    device.pwrite(offset, content)
                    model[offset : offset + length] = content
                case "zero":
                    device.write_zeroes(offset, length)
                    model[offset : offset + length] = bytes(length)
                case "discard":
                    before = model[offset : offset + length]
                    device.discard(offset, length)
                    after = read(device, offset, length)
                    for old, new in zip(before, after, strict=True):
                        assert new in (old, 0)
                    model[offset : offset + length] = after
                case "flush":
                    device.flush()
        assert all_of(device) == model

    @pytest.mark.parametrize("buffer_type", [bytes, bytearray, memoryview])
    def test_any_kind_of_buffer_is_written(self, device: BlockDevice, buffer_type: type) -> None:
        device.pwrite(3, buffer_type(b"abcdef"))
        assert read(device, 3, 6) == b"abcdef"

    def test_a_part_of_a_buffer_is_filled_and_no_more(self, device: BlockDevice) -> None:
        device.pwrite(0, b"x" * 100)
        buffer = bytearray(b"." * 100)
        device.pread(0, memoryview(buffer)[10:20])
        assert buffer == b"." * 10 + b"x" * 10 + b"." * 80

    def test_first_and_last_byte(self, device: BlockDevice) -> None:
        last = device.size_bytes - 1
        device.pwrite(0, b"a")
        device.pwrite(last, b"z")
        assert read(device, 0, 1) + read(device, last, 1) == b"az"

    def test_empty_requests_do_nothing(self, device: BlockDevice) -> None:
        before = read(device, 0, 4096)
        for offset in (0, 100, device.size_bytes):
            device.pread(offset, bytearray())
            device.pwrite(offset, b"")
            device.write_zeroes(offset, 0)
            device.discard(offset, 0)
            assert list(device.extents(offset, 0)) == []
        assert read(device, 0, 4096) == before

    @pytest.mark.parametrize("where", ["past the end", "over the end", "before the start"])
    def test_what_is_outside_is_refused_whole(self, device: BlockDevice, where: str) -> None:
        size = device.size_bytes
        device.pwrite(size - 512, b"e" * 512)
        offset = {"past the end": size + 512, "over the end": size - 512, "before the start": -512}[where]
        for request in (
            lambda: device.pread(offset, bytearray(1024)),
            lambda: device.pwrite(offset, b"w" * 1024),
            lambda: device.write_zeroes(offset, 1024),
            lambda: device.discard(offset, 1024),
            lambda: list(device.extents(offset, 1024)),
        ):
            with pytest.raises(InvalidError):
                request()
        assert read(device, size - 512, 512) == b"e" * 512

    def test_extents_cover_the_range_and_tell_the_truth(self, device: BlockDevice) -> None:
        size = device.size_bytes
        device.pwrite(size // 3, b"d" * 10_000)
        device.write_zeroes(size // 2, 65536)
        content = all_of(device)
        at = 777
        for extent in device.extents(777, size - 777):
            assert extent.offset == at
            assert extent.length > 0
            at += extent.length
            if extent.kind is not ExtentKind.DATA:
                assert not any(content[extent.offset : at])
        assert at == size

    def test_zeroes_hide_what_was_there(self, device: BlockDevice) -> None:
        device.pwrite(0, b"x" * 40_000)
        device.write_zeroes(700, 30_000)
        assert read(device, 0, 40_000) == b"x" * 700 + bytes(30_000) + b"x" * 9_300

    def test_threads_do_not_disturb_each_other(self, device: BlockDevice) -> None:
        wrong: list[str] = []
        share = device.size_bytes // 4

        def work(number: int) -> None:
            choose = random.Random(number)
            base = number * share
            model = bytearray(read(device, base, share))
            for step in range(60):
                offset = choose.randrange(share)
                length = min(choose.choice((512, 700, 5000, 70_000)), share - offset)
                content = choose.randbytes(length)
                device.pwrite(base + offset, content)
                model[offset : offset + length] = content
                if step % 20 == 19:
                    device.flush()
                offset = choose.randrange(share)
                length = min(9000, share - offset)
                if read(device, base + offset, length) != model[offset : offset + length]:
                    wrong.append(f"thread {number}, step {step}")
            if read(device, base, share) != model:
                wrong.append(f"thread {number}, at the end")

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []

    def test_closing_twice_is_allowed(self, device: BlockDevice) -> None:
        device.pwrite(0, b"x")
        device.close()
        device.close()
