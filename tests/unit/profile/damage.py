"""Damages a profile's file in ways that are drawn from a seed."""

import json
from collections.abc import Callable
from copy import deepcopy
from random import Random
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from tangram.profile import store

ODD = (
    None, True, False, -1, 0, 0.5, 1.5, 4.0, 10**30, -(10**30), 1e308, "", "4", "x",
    [], [1], [[]], {}, {"x": 1}, "\x1b[2J\x1b]0;title\x07", "a\nb", "\ud800", "\u202e", "\x00",
)  # fmt: skip
"""Values that few fields can have."""


class Damager:
    """One undamaged file, and a damaged one for every number.

    Args:
        whole: the bytes of the file.
        path: where it lies.
    """

    def __init__(self, path) -> None:
        self.whole = path.read_bytes()
        with safe_open(str(path), framework="numpy") as file:
            self.text = file.metadata()[store.METADATA_KEY]
            self.arrays = {name: file.get_tensor(name) for name in file.keys()}
        self.kinds: list[Callable[[Random], bytes]] = [
            self.flipped, self.cut_off, self.overwritten, self.claiming_more, self.swapped,
            self.odd_field, self.odd_field, self.odd_list, self.odd_entry, self.odd_entry,
            self.odd_pages, self.odd_array, self.odd_array, self.odd_text,
        ]  # fmt: skip

    def damaged(self, number: int) -> tuple[str, bytes]:
        """Name of the damage, and the file."""
        random = Random(number)
        kind = self.kinds[number % len(self.kinds)]
        return kind.__name__, kind(random)

    def signed(self, header: dict[str, Any], arrays: dict[str, np.ndarray] | None = None) -> bytes:
        """A file whose checksum is right, as far as there can be one."""
        arrays = self.arrays if arrays is None else arrays
        header = {name: value for name, value in header.items() if name != "sha256"}
        header["sha256"] = store._digest(header, arrays)
        return self.file(json.dumps(header), arrays)

    def file(self, text: str, arrays: dict[str, np.ndarray] | None = None) -> bytes:
        arrays = self.arrays if arrays is None else arrays
        return save(dict(arrays), metadata={store.METADATA_KEY: text})

    # Damages that come about by themselves: the checksum is that of the undamaged file.

    def flipped(self, random: Random) -> bytes:
        damaged = bytearray(self.whole)
        for _ in range(random.choice([1, 1, 3, 30])):
            damaged[random.randrange(len(damaged))] ^= 1 << random.randrange(8)
        return bytes(damaged)

    def cut_off(self, random: Random) -> bytes:
        return self.whole[: random.randrange(len(self.whole))]

    def overwritten(self, random: Random) -> bytes:
        begin, length = random.randrange(len(self.whole)), random.randrange(1, 400)
        return self.whole[:begin] + random.randbytes(length) + self.whole[begin + length :]

    def claiming_more(self, random: Random) -> bytes:
        """The library's own header with sizes and offsets that are not those of the arrays."""
        length = int.from_bytes(self.whole[:8], "little")
        header, rest = json.loads(self.whole[8 : 8 + length]), self.whole[8 + length :]
        name = random.choice(sorted(self.arrays))
        change = random.choice(["dtype", "shape", "data_offsets", "length"])
        if change == "dtype":
            header[name]["dtype"] = random.choice(["BF16", "F8_E4M3", "I64", "BOOL", "F4", "?"])
        elif change != "length":
            at = random.randrange(len(header[name][change]))
            header[name][change][at] = random.choice([0, -1, 1, 1 << 31, 1 << 62, 1 << 70])
        text = json.dumps(header).encode()
        claimed = random.choice([0, 1 << 30, 1 << 63, (1 << 64) - 1])
        size = claimed if change == "length" else len(text)
        return size.to_bytes(8, "little") + text + rest

    def swapped(self, random: Random) -> bytes:
        one, other = random.sample(sorted(self.arrays), 2)
        arrays = {**self.arrays, one: self.arrays[other], other: self.arrays[one]}
        return self.file(self.text, arrays)

    # Lies: the checksum is right.

    def odd_field(self, random: Random) -> bytes:
        header = json.loads(self.text)
        parents = [header, header["model"], header["scorer"], header["chunk"], header["data"]]
        parent = random.choice(parents)
        name = random.choice(sorted(parent))
        if random.random() < 0.2:
            del parent[name]
        else:
            parent[name] = deepcopy(random.choice(ODD))
        # Nothing that was measured is a profile too, and another one.
        header["extra"] = header.get("extra") or {"measured": None}
        return self.signed(header)

    def odd_list(self, random: Random) -> bytes:
        header = json.loads(self.text)
        grid = header[random.choice(["ratios", "shares"])]
        at = random.randrange(len(grid))
        grid[at] = random.choice([None, True, -1, 2, "0.5", [0.5], 10**400, grid[at - 1]])
        return self.signed(header)

    def odd_entry(self, random: Random) -> bytes:
        header = json.loads(self.text)
        entries = header["extra"]["measured"]
        entry = random.choice(entries)
        change = random.choice(["field", "field", "field", "missing", "further", "twice", "whole"])
        name = random.choice(sorted(set(entry) - {"n_sink_tokens", "window_size_tokens", "log"}))
        if change == "field":
            entry[name] = deepcopy(random.choice(ODD))
        elif change == "missing":
            del entry[name]
        elif change == "further":
            entry["more"] = 1
        elif change == "twice":
            entries.append(deepcopy(entry))
        else:
            odd = [value for value in ODD if value != []]
            entries[random.randrange(len(entries))] = deepcopy(random.choice(odd))
        return self.signed(header)

    def odd_pages(self, random: Random) -> bytes:
        """Budgets that are not those that their entry says they are."""
        header = json.loads(self.text)
        entry = random.choice(header["extra"]["measured"])
        layer = random.randrange(len(entry["pages"]))
        pages, heads = entry["pages"][layer], entry["heads"][layer]
        change = random.randrange(8)
        if change == 0:
            pages[random.randrange(len(pages))] += random.choice([1, -1, 1000, 10**30])
        elif change == 1:
            entry["pages"] = [[entry["chunk_size_tokens"] // 16] * len(pages)] * len(entry["pages"])
        elif change == 2:
            entry["page_group_size"] = random.choice([2, 4, 0, 1000])
        elif change == 3:
            entry["heads"] = [[sum(groups, [])] for groups in entry["heads"]]
            entry["pages"] = [[max(counts)] for counts in entry["pages"]]
        elif change == 4:
            heads[0] = list(heads[-1])
        elif change == 5:
            del pages[0], heads[0]
        elif change == 6:
            del entry["pages"][layer], entry["heads"][layer]
        else:
            pages[0] = pages[0] + random.choice([0.5, 0.0])
        return self.signed(header)

    def odd_array(self, random: Random) -> bytes:
        name = random.choice(sorted(self.arrays))
        array = self.arrays[name].copy()
        change = random.randrange(7)
        if change == 0:
            array.flat[random.randrange(array.size)] = random.choice([np.nan, np.inf, -np.inf])
        elif change == 1 and not name.startswith(("query", "rope")):
            array.flat[random.randrange(array.size)] = -5
        elif change == 2 and name.startswith(("mass", "threshold")):
            array.flat[random.randrange(array.size)] = 7
        elif change == 3:
            array = array.astype(random.choice([np.float16, np.int32, np.uint8]))
        elif change == 4:
            array = np.concatenate([array, array], axis=random.randrange(array.ndim))
        elif change == 5:
            array = array[None]
        else:
            array = array[:0]
        return self.signed(json.loads(self.text), {**self.arrays, name: array})

    def odd_text(self, random: Random) -> bytes:
        """JSON that no writer of ours makes."""
        depth = random.choice([40, 500, 5000, 100_000])
        value = random.choice(
            ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "[" * depth + "]" * depth,
             '{"a":' * depth + "1" + "}" * depth, '"\\ud800"', "", "}"]
        )  # fmt: skip
        place = random.choice(['"extra":', '"seed":', '"scorer":', '"schema_version":', '"data":'])
        begin = self.text.index(place) + len(place)
        return self.file(f'{self.text[:begin]}{value},{place[:-2]}_":{self.text[begin:]}')
