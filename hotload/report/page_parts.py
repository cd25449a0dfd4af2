"""What pages are made of, as their templates take it: facts at the top, sections below."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from markupsafe import Markup


@dataclass(frozen=True, slots=True)
class Fact:
    """A number at the top of a page, with its unit; `detail` stands small below it."""

    name: str
    value: str
    detail: str = ""
    is_bad: bool = False


@dataclass(frozen=True, slots=True)
class Share:
    """A bar of so many percent of the width, with its name, its amount in words, its colour."""

    name: str
    amount: str
    percent: float
    tone: str


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a page."""

    heading: str
    why: str
    """What is seen."""
    chart: Markup = field(default=Markup())
    legend: tuple[tuple[str, str], ...] = ()
    """(Colour, name), what a colour of the chart stands for."""
    shares: tuple[Share, ...] = ()
    rows: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
