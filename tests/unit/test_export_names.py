"""File names of exports: readable, safe, no two alike, and independent of the order of the table."""

from __future__ import annotations

import random
import unicodedata

import pytest
from hypothesis import given, settings, strategies as st

from raysal.errors import InputError
from raysal.export.names import Names
from tests.unit.exports import id_of, uris


def names_of(addresses: list[str], extension: bool = False, below: str | None = None) -> dict[str, str]:
    with Names(extension, below) as names:
        names.see((id_of(u), u) for u in addresses)
        return {u: names.of(id_of(u), u) for u in addresses}


def shown(name: str) -> bool:
    """Whether a name is one line of what can be seen."""
    return len(name.splitlines()) == 1 and "".join(" " if c.isspace() else c for c in name).isprintable()


def test_a_name_is_the_path_below_the_folder_that_all_images_share() -> None:
    found = names_of(["s3://mars/msl/sol 12/a b.jpg", "s3://mars/msl/sol 13/b.c.IMG", "s3://mars/msl/ä/火.png"])
    assert list(found.values()) == ["sol 12/a b", "sol 13/b.c", "ä/火"]
    assert list(names_of(["/x/only.jpg"]).values()) == ["only"]
    assert list(names_of(["/x/a.jpg", "/y/a.jpg"]).values()) == ["x/a", "y/a"]


def test_another_folder_to_count_from_can_be_named() -> None:
    assert list(names_of(["/d/mars/x/a.jpg"], below="/d/mars/").values()) == ["x/a"]
    with pytest.raises(InputError, match=r"/e/a\.jpg does not lie below /d/mars"):
        names_of(["/d/mars/a.jpg", "/e/a.jpg"], below="/d/mars")
    with pytest.raises(InputError, match="does not lie below"):
        names_of(["/d/marsh/a.jpg"], below="/d/mars")


def test_images_that_would_share_a_file_carry_their_ids_and_others_do_not() -> None:
    found = names_of(["/m/x/a.jpg", "/m/x/a.png", "/m/x/A.tif", "/m/x/b.jpg", "/m/y/a.jpg"])
    assert found.pop("/m/x/b.jpg") == "x/b" and found.pop("/m/y/a.jpg") == "y/a"
    assert all(name == f"x/{uri[5]}~{id_of(uri)}" for uri, name in found.items())


def test_extensions_tell_images_apart_where_they_are_kept() -> None:
    assert list(names_of(["/m/a.jpg", "/m/a.png"], extension=True).values()) == ["a.jpg", "a.png"]


def test_an_image_that_is_named_like_another_ones_way_out_gets_its_own() -> None:
    """Whoever knows an image's id could otherwise have its mask overwritten."""
    plain = ["/m/a.jpg", "/m/a.png"]
    found = names_of([*plain, f"/m/a~{id_of(plain[0])}.jpg"])
    assert len(set(found.values())) == 3


@settings(deadline=None, max_examples=60)
@given(uris, st.booleans())
def test_names_are_safe_and_distinct_on_every_file_system(addresses: list[str], extension: bool) -> None:
    found = names_of(addresses, extension)
    assert len({unicodedata.normalize("NFC", n).casefold() for n in found.values()}) == len(addresses)
    for name in found.values():
        assert name == name.strip() and not name.startswith(("/", "#")) and shown(name)
        for part in name.split("/"):
            assert part not in ("", ".", "..") and not part.startswith(".") and not part.endswith((" ", "."))
            assert not set(part) & set('\\:*?"<>|') and len(part.encode()) < 200
            assert part.partition(".")[0].lower() not in {"con", "nul", "com1"}
        assert len(name.encode()) < 1000
    folders = {n.rpartition("/")[0].lower() for n in found.values()}
    assert not folders & {f"{n.lower()}.png" for n in found.values()}, "a mask would lie where a folder is"


@settings(deadline=None, max_examples=60)
@given(uris, st.randoms())
def test_names_do_not_depend_on_the_order_of_the_table(addresses: list[str], shuffled: random.Random) -> None:
    other = list(addresses)
    shuffled.shuffle(other)
    assert names_of(addresses) == names_of(other)


@pytest.mark.parametrize(
    "uri",
    ["/m/../../etc/passwd.jpg", "s3://b/../../x.jpg", "..\\..\\x.jpg", "/m/\u202egpj.exe", "/m/" + "x" * 5000,
     "/m" + "/y" * 3000 + "/z.jpg", "http://host/a.jpg?token=../../x", "/", "", "/m/a\nb\r\u2028c.jpg"],
)  # fmt: skip
def test_hostile_addresses_get_harmless_names(uri: str) -> None:
    (name,) = names_of([uri]).values()
    assert name and shown(name) and len(name.encode()) < 1000
    assert not {"..", ""} & set(name.split("/")) and "\\" not in name


def test_long_paths_with_one_last_part_stay_apart() -> None:
    long = "/m/" + "y/" * 2000
    assert len(set(names_of([f"{long}1/a.jpg", f"{long}2/a.jpg", "/m/b.jpg"]).values())) == 3


def test_repeated_ids_are_counted_over_all_batches() -> None:
    with Names(extension=False) as names:
        names.see([("a", "/a.jpg"), ("b", "/b.jpg")])
        assert names.repeated_ids() == 0
        names.see([("a", "/c.jpg")])
        assert names.repeated_ids() == 1
