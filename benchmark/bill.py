"""What work costs: seconds, hours of a device, and money where a price is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cost:
    """What a cell will cost; times in seconds. `basis` says where the expectation comes from."""

    forwards: int
    backwards: int
    seconds: float
    seconds_at_most: float
    basis: str


@dataclass(frozen=True)
class Bill:
    """What a command will cost on a device: `hours` are GPU-hours, or core-hours on a CPU.

    Prices are in the currency of `price_per_hour`, that of the device, None where none was given. `images` are the
    samples that are attacked, `calibration` the seconds that it took to find out.
    """

    seconds: float
    seconds_at_most: float
    device: str
    threads: int
    images: int
    calibration: float
    price_per_hour: float | None = None

    @property
    def unit(self) -> str:
        """What hours are of."""
        return "core-hours" if self.device == "cpu" else "GPU-hours"

    def hours(self, seconds: float) -> float:
        """GPU-hours, or core-hours on a CPU."""
        return seconds / 3600 * (self.threads if self.device == "cpu" else 1)

    def price(self, seconds: float) -> float | None:
        """Of so many seconds; None without a price per hour."""
        return None if self.price_per_hour is None else seconds / 3600 * self.price_per_hour

    def price_per_1000(self, seconds: float) -> float | None:
        """Of so many seconds, per 1,000 images; None without a price per hour."""
        price = self.price(seconds)
        return None if price is None or self.images == 0 else price / self.images * 1000

    def to_json(self) -> dict[str, Any]:
        """As `--dry-run --json` prints it."""
        unit = self.unit.replace("-", "_").lower()
        return {
            "seconds": self.seconds,
            "seconds_at_most": self.seconds_at_most,
            unit: self.hours(self.seconds),
            f"{unit}_at_most": self.hours(self.seconds_at_most),
            "device": self.device,
            "price_per_hour": self.price_per_hour,
            "price": self.price(self.seconds),
            "price_at_most": self.price(self.seconds_at_most),
            "price_per_1000_images": self.price_per_1000(self.seconds),
            "price_per_1000_images_at_most": self.price_per_1000(self.seconds_at_most),
            "calibration_seconds": self.calibration,
        }


def together(bills: Sequence[Bill]) -> Bill:
    """The bill of several pieces of work on one device, at least one; images of different models count each."""
    first = bills[0]
    sums = {
        name: sum(getattr(bill, name) for bill in bills)
        for name in ("seconds", "seconds_at_most", "images", "calibration")
    }
    return Bill(device=first.device, threads=first.threads, price_per_hour=first.price_per_hour, **sums)
