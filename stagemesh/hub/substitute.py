"""What lies in the place of a file that was not really downloaded. Pure."""

from __future__ import annotations

BEGIN_BYTES = 64
"""Bytes of a file's beginning that show it."""
LFS_POINTER = b"version https://git-lfs"


def in_its_place(begin: bytes) -> str:
    """Returns what a file is instead of what it should be, and what to do; "" if that is not known.

    `begin`: its first `BEGIN_BYTES`, or more.
    """
    if begin.startswith(LFS_POINTER):
        return "a Git LFS pointer, not the file itself: run `git lfs pull` in its folder, or download it again"
    if begin.lstrip()[:BEGIN_BYTES].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, not the file itself (perhaps the error page of a failed download): download it again"
    return ""
