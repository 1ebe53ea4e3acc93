"""`raysal plan`: its arithmetic holds for any numbers, its constants are those of the code and of the results that are kept, and the table
in docs/operations.md is what it says."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import statistics
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings, strategies as st

from raysal import plan as plans
from raysal.archive.tables import manifest_schema, write_table
from raysal.config import ModelConfig
from raysal.datasets.synthetic import write_archive
from raysal.errors import InputError, ResourceError
from raysal.labels import S5MARS
from raysal.model.checkpoint import ModelInfo, save
from raysal.model.network import TwoBranch
from raysal.plan import MEASURED, Node, Rate, Work, block_rows, hours_on, nodes_for, row_bytes
from tests.helpers import Call

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
kept = pytest.mark.skipif(not RESULTS.is_dir(), reason="benchmarks/ is part of a checkout only")

OWN = Rate(2.0, "core", "as given")
images, some_nodes = st.integers(1, 10**9), st.integers(1, 2000)
rates = st.floats(0.01, 1000).map(lambda r: dataclasses.replace(OWN, images_per_second=r))
machines = st.builds(Node, st.integers(1, 128), price=st.floats(0, 100))


# --- arithmetic -------------------------------------------------------------------------------------------------------


@given(images, some_nodes, rates, machines, st.floats(0, 0.9))
def test_a_run_is_the_sum_of_its_parts_and_costs_its_node_hours(n: int, nodes: int, rate: Rate, node: Node, spare: float) -> None:
    plan = hours_on(nodes, Work(n, 100.0, 1000.0), node, rate, spare)
    assert plan.hours * 3600 == pytest.approx(sum(plan.seconds.values()))
    assert plan.cost == pytest.approx(nodes * plan.hours * (node.price or 0))
    assert plan.actors * rate.images_per_second * (1 - spare) * plan.seconds["images"] == pytest.approx(n)
    assert (plan.bytes_read, plan.bytes_written) == (1000 * n, 100 * n)
    assert plan.actors == min(max(1, nodes * node.cores - 1), plan.blocks), "the job's own process has a core"


@settings(deadline=None)
@given(st.integers(1, 10**8), rates, machines, st.floats(0.05, 1000))
def test_the_fewest_nodes_within_some_hours_are_enough_and_one_fewer_is_not(n: int, rate: Rate, node: Node, hours: float) -> None:
    try:
        plan = nodes_for(hours, Work(n), node, rate)
    except InputError:
        assert hours_on(1, Work(n), node, rate).hours > hours
        return
    assert plan.hours <= hours
    assert plan == hours_on(plan.nodes, Work(n), node, rate)
    assert plan.nodes == 1 or hours_on(plan.nodes - 1, Work(n), node, rate).hours > hours


@given(images, some_nodes, rates)
def test_more_images_take_longer_and_more_memory(n: int, nodes: int, rate: Rate) -> None:
    few, many = (hours_on(nodes, Work(k), Node(8), rate) for k in (n, 2 * n))
    assert few.hours < many.hours and few.driver_bytes < many.driver_bytes and few.blocks <= many.blocks


@given(images, st.integers(1, 10**6), st.integers(1, 64))
def test_blocks_hold_all_images_and_are_neither_dust_nor_huge(n: int, actors: int, batch: int) -> None:
    rows = block_rows(n, actors, batch)
    assert min(batch, plans.LARGEST_BLOCK) <= rows <= plans.LARGEST_BLOCK
    assert rows == plans.LARGEST_BLOCK or rows == batch or rows * actors * plans.BLOCKS_PER_ACTOR >= n


@given(st.floats(16, 10_000), st.floats(16, 10_000))
def test_a_rate_goes_by_pixels_whatever_the_way(px: float, other: float) -> None:
    rate = dataclasses.replace(OWN, px=256)
    assert rate.at(px).images_per_second * px**2 == pytest.approx(2.0 * 256**2)
    assert rate.at(other).at(px).images_per_second == pytest.approx(rate.at(px).images_per_second)
    assert OWN.at(px) is OWN, "a rate of the user's own images is for images of their size"


@pytest.mark.parametrize(("memory_gb", "each"), [(None, 16), (64, 14), (32, 7), (6, 1)])
def test_a_node_has_as_many_actors_as_its_memory_holds(memory_gb: int | None, each: int) -> None:
    node = Node(16, 0, None if memory_gb is None else int(memory_gb * 1e9))
    plan = hours_on(2, Work(10**6, px=1024), node, OWN)
    assert plan.actors == 2 * each - 1
    assert memory_gb is None or plan.node_bytes <= memory_gb * 1e9
    assert ("the memory of a node" in " ".join(plan.warnings)) == (each < 16)
    assert plan.settings[:2] == (f"compute.score_actors={plan.actors}", "compute.min_actors=1")
    assert each * plan.cpus_per_actor <= 16 < (each + 1) * plan.cpus_per_actor, "as many fit on a node, and no more"


def test_larger_images_take_more_memory_up_to_the_largest_forward_pass() -> None:
    sizes = [hours_on(1, Work(10, px=px), Node(1), OWN).node_bytes for px in (64, 256, 1024, 4096)]
    assert sizes[0] < sizes[1] < sizes[2] == sizes[3] == hours_on(1, Work(10), Node(1), OWN).node_bytes


@pytest.mark.parametrize(
    ("node", "rate", "said"),
    [
        (Node(8, 0, int(1e9)), OWN, "has no room for a model actor of 3.0 GB"),
        (Node(8), dataclasses.replace(OWN, of="GPU"), "the rate is of a GPU, but a node has none"),
    ],
)
def test_nodes_that_can_do_nothing_are_refused(node: Node, rate: Rate, said: str) -> None:
    with pytest.raises(ResourceError, match=re.escape(said)):
        hours_on(4, Work(1000), node, rate)


def test_more_actors_than_are_known_to_work_are_told() -> None:
    assert not hours_on(10, Work(10**7), Node(16), OWN).warnings
    (told,) = hours_on(100, Work(10**7), Node(16), OWN).warnings
    assert "1,599 actors are more than the 500" in told


# --- where the numbers are from ---------------------------------------------------------------------------------------


def test_its_constants_are_those_of_the_code() -> None:
    output, worker = (importlib.import_module(f"raysal.stream.{name}") for name in ("output", "worker"))
    assert plans.SHARD_READERS == output.READERS
    assert plans.FORWARD_PIXELS == worker.FORWARD_PIXELS


def test_no_rate_of_a_gpu_comes_with_raysal() -> None:
    assert {rate.of for rate in MEASURED.values()} == {"core"}


@kept
def test_its_rates_are_those_of_the_kept_results() -> None:
    for like, result in (("resnet18", "scoring.md"), ("resnet18-bfloat16", "scoring_bfloat16.md")):
        steady = re.search(r"\| raysal \| [^|]+ \| ([^|]+) \|", (RESULTS / result).read_text())
        scored = statistics.median(map(float, steady[1].split(","))) / 2
        assert MEASURED[like].images_per_second == pytest.approx(scored, rel=0.05)
    whole = re.findall(r"\(([\d.]+), [\d.]+\)", (RESULTS / "corrupt.md").read_text())
    assert MEASURED["mobilenetv3"].images_per_second == pytest.approx(statistics.median(map(float, whole)) / 2, rel=0.05)


@kept
@pytest.mark.parametrize(
    ("program", "claim", "value", "within"),
    [
        ("one_sol", "the same with Ray started for it: seconds to the first committed labels", plans.START_S, 0.05),
        ("large_cluster", "reading a manifest's ids: time an image", 1e6 * plans.IDS_S, 0.5),
        ("large_cluster", "comparing ids with the rows that are there: time an image", 1e6 * plans.ROWS_S, 0.5),
        ("large_cluster", "reading a manifest's ids: memory an image", plans.ID_BYTES, 0.25),
        ("large_cluster", "memory of the driver before it reads anything", plans.DRIVER_BYTES / 1e9, 0.15),
        ("large_cluster", "looking into a shard: time", 1e3 * plans.SHARD_S, 0.5),
        ("large_cluster", "looking into a shard: requests to S3", plans.SHARD_ANSWERS, 0),
        ("large_cluster", "memory of an actor of its own, without what an image adds", plans.ACTOR_BYTES / 1e9, 0.15),
        ("large_cluster", "memory of an actor for each pixel of a forward pass", plans.FORWARD_BYTES, 0.25),
        ("large_cluster", "memory that the actors of a node share", plans.SHARED_BYTES / 1e9, 0.15),
        ("large_cluster", "a row of scores on disk", plans.SCORE_BYTES, 0.1),
        ("large_cluster", "a row of labels on disk, without its mask", plans.LABEL_BYTES, 0.5),
        ("large_cluster", "a mask of 1,024 px on disk for each pixel of its side", plans.SIDE_BYTES, 0.1),
    ],
)
def test_its_constants_are_those_of_the_kept_results(program: str, claim: str, value: float, within: float) -> None:
    claims = {c["claim"]: c["value"] for c in json.loads((RESULTS / f"{program}.json").read_text())}
    assert value == pytest.approx(claims[claim], rel=within), "the results changed: look at the constants of raysal/plan.py"


@pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="docs/ are part of a checkout only")
def test_the_table_of_the_docs_is_what_it_says() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    sides = [int(px.replace(",", "")) for px in re.search(r"\| images \| hours \| (.+) px \|", text)[1].split(" px | ")]
    lines = re.findall(r"^\| ([\d,]+) \| (\d+) \| (.+) \|$", text, re.MULTILINE)
    assert len(lines) >= 5 and len(sides) == 3
    for n, hours, shown in lines:
        for px, nodes in zip(sides, shown.split(" | "), strict=True):
            work = Work(int(n.replace(",", "")), row_bytes("label", px), None, px)
            plan = nodes_for(float(hours), work, Node(16, 0, 64 * 10**9), MEASURED["resnet18"].at(px))
            assert plan.nodes == int(nodes.replace(",", "")), f"{n} images of {px} px in {hours} h"


@pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="docs/ are part of a checkout only")
def test_the_metrics_that_the_docs_name_are_metrics_of_ray() -> None:
    named = set(re.findall(r"`(ray_(?!raysal_)[a-z_]+)`", (ROOT / "docs" / "operations.md").read_text()))
    panels = importlib.import_module("ray.dashboard.modules.metrics.dashboards").__path__[0]
    known = "".join(file.read_text() for file in Path(panels).glob("*_panels.py"))
    assert named and all(re.search(rf"\b{name}\b", known) for name in named)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "n"), [("700000", 700_000), ("22,000,000", 22_000_000), ("22M", 22_000_000), ("0.7M", 700_000), ("5k", 5000)]
)
def test_images_are_counted_as_people_write_them(raysal: Call, written: str, n: int) -> None:
    code, out, err = raysal("plan", written, "--nodes", 3, "--px", 256, "--json")
    assert code == 0, err
    assert json.loads(out)["work"]["images"] == n


def test_hours_give_nodes_and_these_nodes_give_hours(raysal: Call) -> None:
    options = ("--px", 512, "--cores", 16, "--memory", "64G", "--price", 0.5, "--image-bytes", "200k", "--json")
    there = json.loads(raysal("plan", "22M", "--hours", 24, *options)[1])
    back = json.loads(raysal("plan", "22M", "--nodes", there["nodes"], *options)[1])
    assert there == back and 0 < there["hours"] <= 24
    assert there["bytes_read"] == 22_000_000 * 200_000
    assert there["cost"] == pytest.approx(there["node_hours"] * 0.5)


def test_a_person_reads_all_that_matters_and_where_the_rate_is_from(raysal: Call) -> None:
    code, out, _ = raysal("plan", "22M", "--hours", 24, "--px", 512, "--cores", 16, "--price", 0.8)
    assert code == 0
    text = " ".join(out.split())
    for words in ("22,000,000 images: 29 nodes of 16 cores", "to read: unknown", "85,938 shards", "a node", "for the job", "cost: ",
                  "benchmarks/results/scoring.md", "scaled by pixels from 256 px to 512 px"):  # fmt: skip
        assert words in text, text


@pytest.mark.parametrize(("of", "option", "per_node"), [("core", "--rate", 8), ("GPU", "--gpu-rate", 2)])
def test_a_rate_of_ones_own_needs_no_size(raysal: Call, of: str, option: str, per_node: int) -> None:
    code, out, err = raysal("plan", "1M", "--nodes", 4, "--gpus", 2 if of == "GPU" else 0, option, 50, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["actors"] == 4 * per_node - (of == "core")
    assert found["rate"] == {"images_per_second": 50.0, "of": of, "source": "as given", "px": None}
    assert found["bytes_written"] is None, "what nobody knows is not made up"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("5k", "--px", 256), "give --hours to learn how many nodes it takes, or --nodes"),
        (("5k", "--px", 256, "--hours", 1, "--nodes", 2), "give --hours to learn how many nodes it takes, or --nodes"),
        (("5k", "--hours", 1), "say how large images are (--px 1024"),
        (("5k", "--hours", 1, "--rate", 3, "--gpu-rate", 4), "give one of them"),
        (("5k", "--hours", 1, "--gpus", 1, "--px", 256), "we measured no GPU"),
        (("5k", "--hours", 1, "--gpu-rate", 4), "the rate is of a GPU, but a node has none"),
        (("22M", "--hours", 0.1, "--px", 256), "too short for any number of nodes; the shortest is"),
        (("0", "--hours", 1, "--px", 256), "at least one image"),
        (("5k", "--hours", 1, "--measure", "model"), "give a manifest or a place instead of 5k"),
        (("nowhere", "--hours", 1, "--px", 256), "nowhere: does not exist"),
        (("5k", "--hours", 1, "--px", 256, "--memory", "much"), "--memory 'much' is no size"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_the_fix(raysal: Call, arguments: tuple, said: str) -> None:
    code, out, err = raysal("plan", *arguments)
    assert (code, out) == (2, "") and said in err and "Traceback" not in err


def test_a_manifest_tells_images_and_the_size_of_their_files(tmp_path: Path, raysal: Call) -> None:
    for part, sizes in enumerate([(100, 300), (None, 200)]):
        rows = [{"id": f"{part}{i}", "uri": f"/{part}{i}.jpg", "size": size} for i, size in enumerate(sizes)]
        write_table(str(tmp_path / "manifest" / f"part-{part}.parquet"), pa.Table.from_pylist(rows, schema=manifest_schema()))
    found = json.loads(raysal("plan", tmp_path / "manifest", "--nodes", 1, "--px", 64, "--json")[1])
    assert (found["work"]["images"], found["work"]["image_bytes"], found["bytes_read"]) == (4, 200.0, 800)


@pytest.mark.parametrize("verb", ["label", "score"])
def test_a_model_is_measured_on_some_of_the_images_and_nothing_is_changed(tmp_path: Path, raysal: Call, verb: str) -> None:
    write_archive(str(tmp_path / "scenes"), 6, 0, 32, 0)
    model = ModelConfig(arch="Unet", encoder="tu-mobilenetv3_small_050")
    save(str(tmp_path / "model"), TwoBranch(model, S5MARS.n_classes, 0), ModelInfo(S5MARS, model, 1.0, 32))
    before = sorted(tmp_path.rglob("*"))
    arguments = ("--nodes", 2, "--verb", verb, "--measure", tmp_path / "model", "--set", "runtime.kind=eager", "--json")
    code, out, err = raysal("plan", tmp_path / "scenes" / "images", *arguments)
    assert code == 0, err
    found, files = json.loads(out), list((tmp_path / "scenes" / "images").iterdir())
    assert found["work"]["images"] == 6 and found["rate"]["images_per_second"] > 0
    assert found["bytes_read"] == sum(file.stat().st_size for file in files)
    assert found["bytes_written"] > 0 and "6 of the images tried here" in found["rate"]["source"]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_model_that_can_use_no_image_gives_no_rate(tmp_path: Path, raysal: Call) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.jpg").write_bytes(b"no image")
    model = ModelConfig(arch="Unet", encoder="tu-mobilenetv3_small_050")
    save(str(tmp_path / "model"), TwoBranch(model, S5MARS.n_classes, 0), ModelInfo(S5MARS, model, 1.0, 32))
    code, _, err = raysal("plan", tmp_path / "bad", "--nodes", 1, "--measure", tmp_path / "model", "--set", "runtime.kind=eager")
    assert code == 2 and "not one of 1 images could be used" in err
