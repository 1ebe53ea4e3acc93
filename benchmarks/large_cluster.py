"""Where 100 to 1,000 nodes would meet their next bottleneck: a model, not a run.

    python benchmarks/large_cluster.py

What an image, a shard and a block cost is measured here, on the code itself, in one process and without Ray (`parts.costs`); rates of
listing and of the network are read from the results of other programs; what Ray and S3 carry is what they publish (`LIMITS`). From these
`raysal.plan` says how long labelling takes, and each thing that is asked of the driver, of Ray and of the store is held against its limit.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from common import RESULTS, Claim, options, write
from parts.costs import Cost, apart

from raysal.plan import ANSWER_S, KNOWN_ACTORS, MEASURED, Node, Plan, Work, hours_on, row_bytes

IMAGES, NODES, SIDES_PX = (700_000, 22_000_000, 100_000_000), (100, 300, 1000), (256, 1024)
CORES, NODE_BYTES = 16, 64e9
LIST_PAGE = 1000
"""Objects in one answer of S3 to a listing."""

RAY = "https://github.com/ray-project/ray"
S3 = "https://docs.aws.amazon.com/AmazonS3/latest/userguide/optimizing-performance.html"
PER_PREFIX = f"S3, for each prefix that it keeps apart, {S3}"


@dataclass(frozen=True)
class Limit:
    """What somebody says that something carries.

    Attributes:
        value: In the unit of what is asked.
        source: Who says so.
        then: What there is to do beyond it.
    """

    value: float
    source: str
    then: str


LIMITS = {
    "actors of one stream": Limit(
        KNOWN_ACTORS,
        f"reported by users of Ray Data, {RAY}/issues/54790; 2.60 has taken part of the work off that thread since ({RAY}/pull/64378)",
        "in the design: `compute.score_actors` and `compute.cpus_per_actor` give one actor all cores of its node, which may use them less "
        "well (not measured on large nodes); or a job for each part of the manifest",
    ),
    "actors of the cluster": Limit(20_000, f"Ray's nightly test on 2,000 nodes, {RAY}/pull/32131", "as for one stream"),
    "nodes": Limit(2_000, f"the same test, {RAY}/pull/32131", "several clusters, each with a part of the manifest"),
    "blocks a second through the driver": Limit(
        500,
        f"2 ms of Ray Data's scheduling thread for a block, before 2.60 moved part of it to another thread, {RAY}/pull/63701",
        "in the library: `rows_per_shard` makes larger blocks; the command has no option for it",
    ),
    "share of the run in which only the driver works": Limit(
        0.1,
        "our own: a tenth of all nodes' hours are paid for nothing",
        "a limit of the design: at its end a run looks into each shard that it wrote, 16 at a time, from one process; larger shards make "
        "that shorter. A run that was cut off does it once more at its start",
    ),
    "hours of listing against hours of labelling": Limit(
        1.0,
        "our own: the archive takes longer to list than to label",
        "a limit of the design: one process lists a place. It is done once, later runs list again but write only what is new; parts of an "
        "archive can be listed side by side into manifests of their own",
    ),
    "GB of memory in the job's own process": Limit(
        0.5 * NODE_BYTES / 1e9,
        "our own: half of a node of 64 GB, on which it runs beside actors",
        "`raysal submit --memory` books it; a job for each part of the manifest",
    ),
    "thousand shards in one folder": Limit(
        100, "our own: more are slow to list on file systems", "object stores do not mind; on a file system a job for each part, as above"
    ),
    "reads of images a second against one prefix of S3": Limit(
        5500,
        PER_PREFIX,
        "S3 splits busy prefixes by itself in time, and answers 503 meanwhile; an archive that lies in folders by sol has many. What was "
        "not to be had is a row of status `fetch`, done again by `--retry-failed`",
    ),
    "reads of the output's folder a second": Limit(5500, PER_PREFIX, "larger blocks, as above"),
    "writes to the output's folder a second": Limit(3500, PER_PREFIX, "larger blocks, as above"),
}


def measured(quick: bool) -> dict[str, Cost]:
    """What things cost on this machine."""
    many, few = (20_000, 10) if quick else (2_000_000, 200)
    return {
        "ids": apart("ids", many),
        "rows": apart("rows", many),
        "shards": apart("shards", few),
        "requests": apart("requests", 8),
        "actor, 256 px": apart("actor", 64 if quick else 256),
        "actor, 512 px": apart("actor", 64 if quick else 512),
        "written": apart("written", 64 if quick else 1024),
    }


def listing_s(images: int) -> float:
    """Seconds that `raysal index` takes for an archive on S3: its own work on each file, and S3's answers, page after page."""
    claims = json.loads((RESULTS / "manifest.json").read_text())
    row_us = next(c["value"] for c in claims if c["claim"].startswith("indexing ") and c["claim"].endswith("time a row"))
    return images * (row_us / 1e6 + ANSWER_S / LIST_PAGE)


def planned(images: int, nodes: int, px: int) -> Plan:
    """What labelling takes, by all cores and without reserve: who asks what breaks first asks of the fastest."""
    work = Work(images, row_bytes("label", px), None, px)
    return hours_on(nodes, work, Node(CORES, 0, int(NODE_BYTES)), MEASURED["resnet18"].at(px), spare=0.0)


def asked(plan: Plan, costs: dict[str, Cost]) -> dict[str, float]:
    """What a run asks of each of `LIMITS`, in its unit."""
    blocks_s, images_s = plan.blocks / plan.seconds["images"], plan.work.images / plan.seconds["images"]
    alone_s = sum(plan.seconds[part] for part in ("start", "ids", "shards"))
    needs = costs["requests"]
    return {
        "actors of one stream": plan.actors,
        "actors of the cluster": plan.actors,
        "nodes": plan.nodes,
        "blocks a second through the driver": blocks_s,
        "share of the run in which only the driver works": alone_s / (3600 * plan.hours),
        "hours of listing against hours of labelling": listing_s(plan.work.images) / (3600 * plan.hours),
        "GB of memory in the job's own process": plan.driver_bytes / 1e9,
        "thousand shards in one folder": plan.blocks / 1000,
        "reads of images a second against one prefix of S3": images_s * needs["image_reads"],
        "reads of the output's folder a second": blocks_s * needs["block_reads"],
        "writes to the output's folder a second": blocks_s * needs["block_writes"],
    }


def pressed(demand: dict[str, float]) -> list[tuple[float, str]]:
    """Limits that are passed, the furthest first, by how much."""
    return sorted(((n / LIMITS[what].value, what) for what, n in demand.items() if n > LIMITS[what].value), reverse=True)


def table(plans: list[Plan], costs: dict[str, Cost]) -> list[str]:
    """A line for each case."""
    lines = ["| px | images | nodes | hours | all nodes at work | shards | listing, h | driver, GB | passed, the furthest first |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for plan in plans:
        demand = asked(plan, costs)
        beyond = "; ".join(f"{what} ({ratio:.2g} x)" for ratio, what in pressed(demand)) or "nothing"
        alone = demand["share of the run in which only the driver works"]
        lines.append(
            f"| {plan.work.px:,} | {plan.work.images / 1e6:g} M | {plan.nodes:,} | {plan.hours:.3g} | {100 * (1 - alone):.0f}% | "
            f"{plan.blocks:,} | {listing_s(plan.work.images) / 3600:.2g} | {plan.driver_bytes / 1e9:.2g} | {beyond} |"
        )
    return lines


def main() -> None:
    args = options(__doc__).parse_args()
    costs = measured(args.quick)
    plans = [planned(images, nodes, px) for px in SIDES_PX for images in IMAGES for nodes in NODES]
    actor, smaller = costs["actor, 512 px"]["own"], costs["actor, 256 px"]["own"]
    a_pixel = (actor - smaller) / (8 * (512**2 - 256**2))
    claims = [
        Claim("reading a manifest's ids: memory an image", costs["ids"]["bytes"], None, "lower", "bytes"),
        Claim("reading a manifest's ids: time an image", 1e6 * costs["ids"]["seconds"], None, "lower", "us"),
        Claim("comparing ids with the rows that are there: memory an image", costs["rows"]["bytes"], None, "lower", "bytes"),
        Claim("comparing ids with the rows that are there: time an image", 1e6 * costs["rows"]["seconds"], None, "lower", "us"),
        Claim("memory of the driver before it reads anything", costs["ids"]["before"] / 1e9, None, "lower", "GB"),
        Claim("looking into a shard: time", 1e3 * costs["shards"]["seconds"], None, "lower", "ms"),
        Claim("looking into a shard: requests to S3", costs["requests"]["shard_reads"], None, "lower", ""),
        Claim("an image: requests to S3", costs["requests"]["image_reads"], None, "lower", ""),
        Claim("a block: reads of S3 besides its images", costs["requests"]["block_reads"], None, "lower", ""),
        Claim("a block: writes to S3", costs["requests"]["block_writes"], None, "lower", ""),
        Claim("memory of an actor of its own, without what an image adds", (smaller - a_pixel * 8 * 256**2) / 1e9, None, "lower", "GB"),
        Claim("memory of an actor for each pixel of a forward pass", a_pixel, None, "lower", "bytes"),
        Claim("memory that the actors of a node share", costs["actor, 256 px"]["shared"] / 1e9, None, "lower", "GB"),
        Claim("a row of scores on disk", costs["written"]["score"], None, "lower", "bytes"),
        Claim("a row of labels on disk, without its mask", costs["written"]["label"], None, "lower", "bytes"),
        Claim("a mask of 1,024 px on disk for each pixel of its side", costs["written"]["mask"] / 1024, None, "lower", "bytes"),
    ]
    for plan in plans:
        if plan.nodes == max(NODES):
            alone = asked(plan, costs)["share of the run in which only the driver works"]
            words = f"{plan.work.images / 1e6:g} M images of {plan.work.px} px on {plan.nodes:,} nodes"
            claims.append(Claim(f"{words}: share of the run in which all nodes work", 1 - alone, 0.9, "higher", ""))
    notes = [
        f"Nodes have {CORES} cores and {NODE_BYTES / 1e9:g} GB, an actor a core, and work without deaths or reserve at the rate of",
        f"{MEASURED['resnet18'].source} (other sizes scaled by pixels). Nothing of this ran on more than one machine.",
        "",
        *table(plans, costs),
        "",
        "What each limit is, and what there is to do beyond it:",
        "",
        *(
            f"- **{what}: {limit.value:g}.** {limit.source[0].upper()}{limit.source[1:]}. Then: {limit.then}."
            for what, limit in LIMITS.items()
        ),
        "",
        f"Not in the table: Ray started 20,000 actors in 248 s on such a cluster ({RAY}/pull/31990). Its documentation begins large",
        "clusters with a head of 8 CPUs and 32 GB, without work, on a network as good as an r5dn.16xlarge's",
        "(https://docs.ray.io/en/latest/cluster/vms/user-guides/large-cluster-best-practices.html). What a resumed run has done before",
        "lies in every node's object store once, 8 bytes an image.",
    ]
    write("large_cluster", "Large clusters, by a model", claims, args.out, "\n".join(notes))


if __name__ == "__main__":
    main()
