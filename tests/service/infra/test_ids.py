from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

from app.infra.ids import id_pattern, new_id


def test_ids_rise_strictly_within_a_process() -> None:
    made = [new_id("job") for _ in range(20_000)]
    assert made == sorted(set(made))


def test_ids_of_several_threads_are_distinct() -> None:
    with ThreadPoolExecutor(4) as pool:
        made = [
            one for many in pool.map(lambda _: [new_id("x") for _ in range(5_000)], range(4)) for one in many
        ]
    assert len(set(made)) == len(made)


def test_an_id_is_a_uuid_of_version_7() -> None:
    text = new_id("ds").removeprefix("ds_")
    value = 0
    for character in text:
        value = value * 32 + "0123456789abcdefghjkmnpqrstvwxyz".index(character)
    assert (value >> 76) & 0xF == 7
    assert (value >> 62) & 0b11 == 0b10
    assert re.fullmatch(id_pattern("ds"), f"ds_{text}")
