from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class Call(_message.Message):
    __slots__ = ("function", "argument", "own_group")
    FUNCTION_FIELD_NUMBER: _ClassVar[int]
    ARGUMENT_FIELD_NUMBER: _ClassVar[int]
    OWN_GROUP_FIELD_NUMBER: _ClassVar[int]
    function: str
    argument: bytes
    own_group: bool
    def __init__(self, function: _Optional[str] = ..., argument: _Optional[bytes] = ..., own_group: bool = ...) -> None: ...

class Forked(_message.Message):
    __slots__ = ("pid",)
    PID_FIELD_NUMBER: _ClassVar[int]
    pid: int
    def __init__(self, pid: _Optional[int] = ...) -> None: ...

class Listening(_message.Message):
    __slots__ = ("ports",)
    class PortsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    PORTS_FIELD_NUMBER: _ClassVar[int]
    ports: _containers.ScalarMap[str, int]
    def __init__(self, ports: _Optional[_Mapping[str, int]] = ...) -> None: ...

class ServiceStart(_message.Message):
    __slots__ = ("command", "settings")
    COMMAND_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    command: str
    settings: str
    def __init__(self, command: _Optional[str] = ..., settings: _Optional[str] = ...) -> None: ...
