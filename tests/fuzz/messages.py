"""Random protobuf messages, made from their descriptors."""

from __future__ import annotations

import random
import struct
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from tests.fuzz import values

_F = FieldDescriptor
_MOST_DEPTH = 5
_BITS = {
    _F.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    _F.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    _F.CPPTYPE_UINT32: (0, 2**32 - 1),
    _F.CPPTYPE_UINT64: (0, 2**64 - 1),
}


def random_message(chance: random.Random, descriptor: Descriptor, depth: int = 0) -> Message:
    """A message with some of its fields set to anything."""
    message: Message = GetMessageClass(descriptor)()
    keep = chance.choice((0.15, 0.5, 0.9))
    for field in descriptor.fields:
        if chance.random() < keep:
            _fill(chance, message, field, depth)
    return message


def changed_message(chance: random.Random, message: Message) -> Message:
    """A copy with one field, perhaps of a message within, set to anything, or cleared."""
    copy = type(message)()
    copy.CopyFrom(message)
    target = copy
    while True:
        inner = [
            value
            for field, value in target.ListFields()
            if field.cpp_type == _F.CPPTYPE_MESSAGE and not field.is_repeated
        ]
        if not inner or chance.random() < 0.5:
            break
        target = chance.choice(inner)
    fields: list[Any] = list(target.DESCRIPTOR.fields)
    if not fields:
        return copy
    field = chance.choice(fields)
    if chance.random() < 0.25 or field.is_repeated:
        target.ClearField(field.name)
    if chance.random() < 0.8:
        _fill(chance, target, field, 1)
    return copy


def _fill(chance: random.Random, message: Message, field: FieldDescriptor, depth: int) -> None:
    if field.is_repeated:
        options = field.message_type.GetOptions() if field.message_type else None
        if options is not None and options.map_entry:
            return  # none of the requests has one
        count = chance.choice((0, 1, 1, 2, 3, 20)) if depth < _MOST_DEPTH else 0
        target: Any = getattr(message, field.name)
        for _ in range(count):
            if field.message_type is not None:
                target.append(random_message(chance, field.message_type, depth + 1))
            else:
                target.append(_scalar(chance, field))
    elif field.message_type is not None:
        if depth < _MOST_DEPTH:
            inner = random_message(chance, field.message_type, depth + 1)
            getattr(message, field.name).CopyFrom(inner)
    else:
        setattr(message, field.name, _scalar(chance, field))


def _scalar(chance: random.Random, field: FieldDescriptor) -> Any:
    kind = field.cpp_type
    if kind == _F.CPPTYPE_BOOL:
        return chance.random() < 0.5
    if kind == _F.CPPTYPE_ENUM and field.enum_type is not None:
        known = [value.number for value in field.enum_type.values]
        return chance.choice((*known, *known, 99, -1, 2**31 - 1))
    if kind in (_F.CPPTYPE_FLOAT, _F.CPPTYPE_DOUBLE):
        odd = (float("nan"), float("inf"), -1.0, 0.0, 1e-30, 0.7, 3.4e38)
        return chance.choice((*odd, chance.uniform(0, 2)))
    if field.type == _F.TYPE_BYTES:
        return random_bytes(chance)
    if kind == _F.CPPTYPE_STRING:
        return values.text(chance)
    low, high = _BITS[kind]
    small = chance.choice((0, 1, 2, 3, 5, 16, 200))
    return chance.choice((small, small, low, high, chance.randint(low, high)))


def random_bytes(chance: random.Random) -> bytes:
    """Bytes, sometimes little-endian int32 as token ids are."""
    count = chance.choice((0, 1, 3, 4, 8, 30, 200))
    act = chance.randrange(4)
    if act == 0:
        return chance.randbytes(count)
    if act == 1:
        return bytes(count)
    high = chance.choice((2, 60, 600, 2**31 - 1))
    low = 0 if act == 2 else -high
    return struct.pack(f"<{count}i", *(chance.randint(low, high) for _ in range(count)))
