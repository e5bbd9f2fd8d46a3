"""The file of measured links and settings: it counts for its own key alone, and says what differs."""

import json
from pathlib import Path

import pytest

from megapre.plan import Link
from megapre.plan.comm_profile import find, path, read, write

KEY = {"device": "cuda", "hardware": "NVIDIA H100 80GB HBM3", "nodes": 1, "tp": 8, "dp": 2}
LINKS = {"tp": {"all_reduce": Link(1e-5, 3e11, 0.01, 0.1, {1024: 1.1e-5, 4096: 1.2e-5})}}
CHOSEN = {"bucket_elements": 2**22, "overlap_products": True, "options": {"tp": {"nccl": {"max_ctas": 8}}}}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "comm-profile.json"


def test_what_is_written_is_found_by_its_key_or_a_part_of_it(file: Path) -> None:
    write(file, KEY, LINKS, CHOSEN)
    for key in (KEY, {"hardware": "NVIDIA H100 80GB HBM3", "tp": 8}):
        profile, why = find(file, key, "links")
        assert profile is not None and why == ""
        assert (profile.key, profile.links, profile.chosen) == (KEY, LINKS, CHOSEN)


def test_another_key_is_refused_with_what_differs(file: Path) -> None:
    write(file, KEY, LINKS)
    profile, why = find(file, {**KEY, "nodes": 2, "driver": "580"}, "links")
    assert profile is None
    assert "nodes was 1 and is 2; driver was not given and is 580; measure again" in why


def test_each_part_replaces_what_was_said_of_the_same(file: Path) -> None:
    write(file, KEY, LINKS, CHOSEN)
    write(file, {**KEY, "dp": 4}, LINKS)
    newer = {"tp": {"all_gather": Link(2e-5, 2e11)}, "pp": {"send_recv": Link(3e-6, 5e10)}}
    write(file, KEY, newer)
    assert len(read(file)) == 2
    profile, _ = find(file, KEY, "links")
    assert profile is not None and profile.chosen == CHOSEN
    assert profile.links == {"tp": {**LINKS["tp"], **newer["tp"]}, "pp": newer["pp"]}
    write(file, KEY, chosen={})
    profile, _ = find(file, KEY, "links")
    assert profile is not None and profile.chosen == {} and "pp" in profile.links
    assert [entry.name for entry in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2 instead of 1"),
        ({"chosen": {"bucket_elements": "large"}}, "bucket_elements = 'large' is nothing that a profile chooses"),
        ({"chosen": {"colour": 1}}, "colour = 1 is nothing"),
        ({"links": {"tp": {"all_reduce": {"latency": -1, "bandwidth": 1}}}}, "is no link"),
        ({"links": {"tp": {"all_reduce": {"latency": 1, "bandwidth": 1, "times": {"8": 0}}}}}, "is no link"),
        ({"links": {"tp": {"gossip": {"latency": 1, "bandwidth": 1}}}}, "gossip is no collective"),
    ],
)
def test_what_is_no_profile_is_refused_and_written_anew(file: Path, change: dict[str, object], message: str) -> None:
    write(file, KEY, LINKS, CHOSEN)
    content = json.loads(file.read_text())
    (content if "format" in change else content["profiles"][0]).update(change)
    file.write_text(json.dumps(content))
    profile, why = find(file, KEY, "links")
    assert profile is None and message in why and "write it again" in why
    write(file, KEY, LINKS)
    assert find(file, KEY, "links")[0] is not None


def test_links_and_choices_are_found_apart_whatever_is_newer(file: Path) -> None:
    work = {**KEY, "dtype": "bf16", "hidden": 64}
    write(file, KEY, LINKS)
    write(file, work, chosen={})
    assert [find(file, KEY, what)[0] for what in ("links", "chosen")] == read(file)
    content = json.loads(file.read_text())["profiles"]
    assert [set(profile) for profile in content] == [{"key", "made", "links"}, {"key", "made", "chosen"}]
    profile, why = find(file, {**work, "hidden": 128, "ffn": 256}, "chosen")
    assert profile is None and "elsewhere: hidden was 64 and is 128; ffn was not given and is 256; measure again" in why


def test_a_choice_of_before_its_work_was_known_is_refused_in_numbers(file: Path) -> None:
    write(file, KEY, LINKS, CHOSEN)
    profile, why = find(file, {**KEY, "dtype": "bf16", "hidden": 64}, "chosen")
    assert profile is None and "dtype was not given and is bf16; hidden was not given and is 64" in why
    write(file, {"hardware": "other"}, LINKS)
    file.write_text(json.dumps({"format": 1, "profiles": json.loads(file.read_text())["profiles"][1:]}))
    assert find(file, KEY, "chosen")[1].endswith("has nothing of that kind; `megapre tune comm` measures it")


def test_nothing_there_says_what_makes_one(file: Path) -> None:
    assert find(file, KEY, "links") == (None, f"there is no {file}; `megapre bench comm --write-profile` makes one")
    assert find(file, KEY, "chosen") == (None, f"there is no {file}; `megapre tune comm` makes one")


def test_where_the_file_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEGAPRE_COMM_PROFILE", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", "/config")
    assert path() == path("auto") == Path("/config/megapre/comm-profile.json")
    monkeypatch.setenv("MEGAPRE_COMM_PROFILE", "/else.json")
    assert path("auto") == Path("/else.json") and path("mine.json") == Path("mine.json")
