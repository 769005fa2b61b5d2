"""Make the two tables of an invented shop: items.csv and interactions.csv, as a shop might export them.

python examples/own_shop/make_tables.py examples/own_shop

Nobody bought any of this. Customers come with one or two hobbies, buy their way from the first things that one needs
to the rarer ones, and sometimes something else.
"""

from __future__ import annotations

import csv
import sys
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np

# Department: (maker, what a customer buys roughly in this order)
DEPARTMENTS = {
    "Camping": ("Larkfell", "tent for two, sleeping mat, down sleeping bag, gas stove, nesting pots, head torch, "
                            "water filter, camp chair, tarpaulin, trekking poles, dry bag, bear-proof canister"),
    "Baking": ("Mollyoven", "mixing bowls, kitchen scales, rolling pin, springform tin, proofing basket, "
                            "dough scraper, bread lame, sourdough crock, baking steel, piping set, "
                            "sugar thermometer, flour mill"),
    "Cycling": ("Wheelwright & Daughter", "helmet, bike lock, floor pump, rear light, water bottle cage, saddlebag, "
                "multi-tool, chain cleaner, bib shorts, clipless pedals, cycle computer, truing stand"),
    "Gardening": ("Potting Shed", "hand trowel, pruning shears, watering can, seed tray, kneeling pad, compost bin, "
                  "garden fork, cold frame, soil tester, grafting knife, drip hose, wildlife pond kit"),
    "Painting": ("Vermeel", "sketchbook, graphite pencils, watercolour set, round brushes, masking tape, easel, "
                 "gouache set, palette knife, stretched canvas, linseed oil, varnish, field paintbox"),
    "Coffee": ("Kettlesong", "pour-over cone, paper filters, hand grinder, gooseneck kettle, coffee scales, moka pot, "
               "milk jug, espresso tamper, knock box, cupping bowls, home roaster, refractometer"),
    "Climbing": ("Highgrit", "climbing shoes, chalk bag, harness, belay device, quickdraws, finger board, "
                 "dynamic rope, nut set, cam, approach pack, portaledge, ice axe"),
    "Sewing": ("Threadneedle Row", "fabric scissors, pin cushion, tape measure, cotton thread, seam ripper, iron, "
               "sewing machine, rotary cutter, dress form, overlocker, buttonhole foot, quilting frame"),
}  # fmt: skip
GRADES = ("basic", "classic")
CUSTOMERS, SEED = 360, 7


def items() -> list[dict[str, str]]:
    """Every product in two grades, department by department, in the order of need."""
    rows = []
    for department, (maker, products) in DEPARTMENTS.items():
        for product in products.split(", "):
            for grade in GRADES:
                title = f"{maker} {grade} {product}"
                number = f"{department[:3].lower()}-{len(rows):03}"
                rows.append({"sku": number, "title": title, "department": department, "maker": maker})
    return rows


def interactions(skus: list[str]) -> list[dict[str, str]]:
    """What customers bought, and when."""
    rng = np.random.default_rng(SEED)
    per, products = len(skus) // len(DEPARTMENTS), len(skus) // len(DEPARTMENTS) // len(GRADES)
    rows = []
    for customer in range(CUSTOMERS):
        hobbies = rng.choice(len(DEPARTMENTS), size=rng.integers(1, 3), replace=False, p=popularity())
        grade, when = rng.integers(len(GRADES)), datetime(2024, 1, 1) + timedelta(hours=float(rng.uniform(0, 4000)))
        reached = dict.fromkeys(hobbies.tolist(), 0.0)
        for _ in range(rng.integers(6, 17)):
            hobby = int(rng.choice(hobbies))
            reached[hobby] += rng.exponential(1.1)
            product = int(reached[hobby] - 0.5 + rng.normal(0, 0.4)) % products
            item = hobby * per + product * len(GRADES) + (grade if rng.random() < 0.85 else 1 - grade)
            if rng.random() < 0.05:  # a present, say
                item = rng.integers(len(skus))
            when += timedelta(hours=float(rng.exponential(60)))
            stars = int(np.clip(round(4.2 + rng.normal(0, 0.9)), 1, 5))
            at = when.isoformat(timespec="seconds")
            rows.append({"customer": f"c{customer:04}", "sku": skus[item], "bought_at": at, "stars": str(stars)})
    return rows


def popularity() -> np.ndarray:
    """Some hobbies are more common."""
    weights = 1 / np.arange(2, 2 + len(DEPARTMENTS))
    return weights / weights.sum()


def write(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, rows[0], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    catalogue = items()
    write(folder / "items.csv", catalogue)
    write(folder / "interactions.csv", interactions([row["sku"] for row in catalogue]))
