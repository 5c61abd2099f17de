from __future__ import annotations

SCHEMES = ()


def opened(location):
    raise NotImplementedError


def find(text, where, declared):
    raise NotImplementedError
