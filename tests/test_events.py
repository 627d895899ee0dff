"""TensorBoard event files: what a reader of the format finds in them."""

import json
import struct

import pytest

import train_gpt
from formats.events import EVENTS_NAME, append_scalars, masked_crc
from formats.recipe import with_values
from train_gpt import Environment


def fields(data: bytes) -> list[tuple[int, object]]:
    """Read protobuf fields without a schema: varints as int, 8 and 4 bytes as numbers, the rest as bytes."""
    found, at = [], 0

    def varint() -> int:
        nonlocal at
        value, shift = 0, 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            found.append((number, varint()))
            continue
        size = {1: 8, 5: 4}.get(kind) or varint()
        raw, at = data[at : at + size], at + size
        found.append(
            (
                number,
                {1: lambda r: struct.unpack("<d", r)[0], 5: lambda r: struct.unpack("<f", r)[0]}.get(
                    kind, bytes
                )(raw),
            )
        )
    return found


def read_events(data: bytes) -> list[dict]:
    """Read an event file, checking every checksum."""
    events = []
    while data:
        (size,), (crc,) = struct.unpack("<Q", data[:8]), struct.unpack("<I", data[8:12])
        payload, (body_crc,) = data[12 : 12 + size], struct.unpack("<I", data[12 + size : 16 + size])
        assert (crc, body_crc) == (masked_crc(data[:8]), masked_crc(payload))
        data = data[16 + size :]
        event = dict(fields(payload))
        if 5 in event:
            values = [dict(fields(value)) for number, value in fields(event[5])]
            event[5] = {value[1].decode(): value[2] for value in values}
        events.append(event)
    return events


def test_checksums_are_crc_32c():
    """The check value of the catalogue, and an empty text; unmasked again."""
    for data, crc in ((b"123456789", 0xE3069283), (b"", 0), (bytes(32), 0x8A9136AA)):
        masked = masked_crc(data) - 0xA282EAD8 & 0xFFFFFFFF
        assert masked >> 17 | (masked << 15 & 0xFFFFFFFF) == crc


@pytest.mark.parametrize("step", [0, 127, 128, 200_000])
def test_events_hold_what_was_written(tmp_path, step):
    """Version first, then each event with step, time and scalars."""
    path = tmp_path / EVENTS_NAME
    append_scalars(path, 12.5, {"kind": "train", "step": step, "train_loss": 1.5, "train_ms": 3})
    append_scalars(path, 13.5, {"kind": "val", "step": step + 1, "val_loss": 0.25})
    version, first, second = read_events(path.read_bytes())
    assert version == {1: 12.5, 3: b"brain.Event:2"}
    assert first == {1: 12.5, 2: step, 5: {"train/train_loss": 1.5, "train/train_ms": 3.0}}
    assert second == {1: 13.5, 2: step + 1, 5: {"val/val_loss": 0.25}}


def test_a_run_writes_what_its_metrics_say(tiny_config, stand_in_program):
    """The same losses as metrics.jsonl; none without the switch; a new run of the name starts anew."""
    cfg = with_values(tiny_config, {"watch.tensorboard": True}, "test")
    for _ in range(2):
        train_gpt.run(cfg, Environment({}))
    folder = train_gpt.Path(cfg.run.out_dir) / "tiny"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [(line["step"], line["train_loss"]) for line in lines if line["kind"] == "train"]
    found = [
        (event[2], event[5]["train/train_loss"])
        for event in read_events((folder / EVENTS_NAME).read_bytes())[1:]
        if "train/train_loss" in event[5]
    ]
    assert found == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in losses] and losses
    (folder / EVENTS_NAME).unlink()
    train_gpt.run(tiny_config, Environment({}))
    assert not (folder / EVENTS_NAME).exists()
