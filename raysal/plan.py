"""How an archive is cut into blocks, and what scoring or labelling it takes: nodes for so many hours, or hours on so many nodes.

Arithmetic on what was measured. Each constant says what it holds and which result in benchmarks/results/ it is from; tests hold the one to
the other.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from rich import filesize

from raysal.config import ScoreConfig
from raysal.errors import InputError, ResourceError
from raysal.words import duration

Verb = Literal["label", "score"]

BLOCKS_PER_ACTOR = 16
"""Blocks each actor gets: enough that all finish together and a death costs little, few enough that shards are not dust."""

LARGEST_BLOCK = 256
"""Rows of a block, and of a shard, in a large archive; what one death costs at most."""

BATCH = ScoreConfig().batch_size
"""Images of a forward pass."""

START_S = 38.0
"""From the command to the first rows where Ray starts for it: processes, and the model in every actor; one_sol.md. Machines that an
autoscaler has to bring first come on top."""

IDS_S, ROWS_S = 2.4e-6, 2.7e-6
"""Seconds an image in the driver: reading the ids of the manifest, and at the end comparing them with the rows that are there;
large_cluster.md."""

SHARD_S, SHARD_ANSWERS, SHARD_READERS, ANSWER_S = 0.003, 3, 16, 0.1
"""At the end the driver looks into each new shard: seconds of its processor, and requests to a store (large_cluster.md), of which so many
threads wait at once for one of S3's answers (docs.aws.amazon.com/AmazonS3/latest/userguide/optimizing-performance.html: 0.1 to 0.2 s)."""

ACTOR_BYTES, SHARED_BYTES, FORWARD_BYTES, FORWARD_PIXELS = 1.02e9, 0.48e9, 240.0, 8 * 2**20
"""Memory of an actor, of what all actors of a node share, and of each pixel that goes through the network at once, of which there are at
most so many; large_cluster.md: resnet18 by OpenVINO on 256 and 512 px."""

STORE_SHARE = 0.3
"""Of a node's memory that Ray sets aside for its object store, by its default."""

DRIVER_BYTES, ID_BYTES = 0.95e9, 115.0
"""Memory of the job's own process, and what each image adds to it at most; large_cluster.md."""

SCORE_BYTES, LABEL_BYTES, SIDE_BYTES = 340.0, 127.0, 10.2
"""Bytes of a row on disk: of scores with an embedding; of labels without the mask; and of a mask for each pixel of its image's side, as a
mask is its outlines. large_cluster.md: exact masks of synthetic scenes; those of a model may be rougher."""

DRIVER_CPUS = 1
"""Cores that the job's own process books on a cluster, where no actor can be."""

KNOWN_ACTORS = 500
"""Beyond so many actors of one stream Ray Data's driver was reported to fall behind (github.com/ray-project/ray/issues/54790)."""


@dataclass(frozen=True)
class Rate:
    """How fast images are scored or labelled.

    Attributes:
        images_per_second: Of one core, or of one GPU with the cores that feed it.
        of: Which of the two.
        source: Who measured it, and how.
        px: Side of the images, as the network sees them; None where they are the user's own.
    """

    images_per_second: float
    of: Literal["core", "GPU"]
    source: str
    px: float | None = None

    def at(self, px: float) -> Rate:
        """The rate for another size, where one is known: a network's work goes by the pixels (side squared)."""
        if self.px is None or px == self.px:
            return self
        source = f"{self.source}; scaled by pixels from {self.px:,.0f} px to {px:,.0f} px, so measure yours"
        return Rate(self.images_per_second * (self.px / px) ** 2, self.of, source, px)


MEASURED = {
    "resnet18": Rate(
        2.9,
        "core",
        "benchmarks/results/scoring.md: scores of 256 px scenes, DeepLabV3+ with resnet18, OpenVINO in float32, both cores of a small "
        "machine without AVX-512 (51 GFLOP/s a core)",
        256,
    ),
    "resnet18-bfloat16": Rate(
        10.9,
        "core",
        "benchmarks/results/scoring_bfloat16.md: scores of 256 px scenes, DeepLabV3+ with resnet18, OpenVINO in bfloat16, both cores of a "
        "small machine with AVX-512 BF16 (88 GFLOP/s a core in float32)",
        256,
    ),
    "mobilenetv3": Rate(
        20.0,
        "core",
        "benchmarks/results/corrupt.md: masks of 128 px scenes, DeepLabV3+ with mobilenetv3_small_100, OpenVINO in float32, start-up "
        "included, both cores of the same machine",
        128,
    ),
}
"""Rates that come with raysal, by the encoder, and the precision where it is not float32. None is of a GPU: none was measured on one."""


@dataclass(frozen=True)
class Work:
    """What is to be done.

    Attributes:
        images: How many.
        row_bytes: Of a row on disk, mean; None where nobody knows.
        image_bytes: Of a file, mean; None where nobody knows.
        px: Side of an image as the network sees it; None: as large as images get within one forward pass.
    """

    images: int
    row_bytes: float | None = None
    image_bytes: float | None = None
    px: float | None = None


@dataclass(frozen=True)
class Node:
    """A machine of the cluster.

    Attributes:
        cores: Of it.
        gpus: Of it; with any, each has one actor, and cores only feed them.
        memory_bytes: Of it; None does not ask whether the actors fit.
        price: Of an hour, in any currency.
        cpus: As Ray counts them: two vCPUs of most clouds are one core. None: as many as cores.
    """

    cores: int
    gpus: int = 0
    memory_bytes: int | None = None
    price: float | None = None
    cpus: int | None = None


@dataclass(frozen=True)
class Plan:
    """What it takes.

    Attributes:
        work, node, rate: What was asked.
        nodes: Without the head.
        actors: Processes that hold the model, one a core or GPU.
        cpus_per_actor: Of Ray's CPUs, so that as many fit on a node as were counted.
        blocks: Shards, too.
        seconds: By part: start, ids, images, last_block, shards. Their sum is the run.
        spare: Share of the actors' time that is left for deaths, slow nodes and slow storage.
        node_bytes: Memory that a node needs.
        driver_bytes: Memory that the job's own process needs (`raysal submit --memory`).
        warnings: What to look at twice.
    """

    work: Work
    node: Node
    rate: Rate
    nodes: int
    actors: int
    cpus_per_actor: float
    blocks: int
    seconds: dict[str, float]
    spare: float
    node_bytes: float
    driver_bytes: float
    warnings: tuple[str, ...]

    @property
    def hours(self) -> float:
        return sum(self.seconds.values()) / 3600

    @property
    def cost(self) -> float | None:
        """Of all nodes for all hours, without the head; None without a price."""
        return None if self.node.price is None else self.nodes * self.hours * self.node.price

    @property
    def bytes_read(self) -> int | None:
        return None if self.work.image_bytes is None else int(self.work.images * self.work.image_bytes)

    @property
    def bytes_written(self) -> int | None:
        return None if self.work.row_bytes is None else int(self.work.images * self.work.row_bytes)

    @property
    def settings(self) -> tuple[str, ...]:
        """Of `raysal label` and `score`, so that the run grows to these actors from the first node that comes."""
        gpu = ("compute.use_gpu=true",) if self.rate.of == "GPU" else ()
        return (f"compute.score_actors={self.actors}", "compute.min_actors=1", f"compute.cpus_per_actor={self.cpus_per_actor:g}", *gpu)

    def to_dict(self) -> dict[str, Any]:
        more: dict[str, Any] = {"hours": self.hours, "node_hours": self.nodes * self.hours, "cost": self.cost}
        more |= {"bytes_read": self.bytes_read, "bytes_written": self.bytes_written, "settings": self.settings}
        return dataclasses.asdict(self) | more

    def text(self) -> str:
        """For people."""
        node, took = self.node, {part: duration(seconds) for part, seconds in self.seconds.items()}
        kind = _count(node.cores, "core") + (f" and {_count(node.gpus, 'GPU')}" if node.gpus else "")
        flow = "" if self.bytes_read is None else f" ({_size(self.bytes_read / self.seconds['images'])} a second)"
        lines = [
            f"{_count(self.work.images, 'image')}: {_count(self.nodes, 'node')} of {kind} for {duration(3600 * self.hours)}",
            f"time: start {took['start']}, ids {took['ids']}, images {took['images']} with {100 * self.spare:.0f}% to spare, "
            f"last block {took['last_block']}, looking at shards {took['shards']}",
            f"to read: {_size(self.bytes_read)}{flow}; to write: {_size(self.bytes_written)} in {_count(self.blocks, 'shard')}",
            f"memory: {_size(self.node_bytes)} a node, with {_count(self.actors, 'actor')} in all, {_size(self.driver_bytes)} for the job",
        ]
        if self.cost is not None:
            lines.append(f"cost: {self.cost:,.2f} for {self.nodes * self.hours:,.1f} node hours, without the head")
        lines.append(f"settings: {' '.join(f'--set {setting}' for setting in self.settings)}")
        lines.append(f"rate: {self.rate.images_per_second:.3g} images/s a {self.rate.of}; {self.rate.source}")
        return "\n".join([*lines, *(f"warning: {w}" for w in self.warnings)])


def block_rows(images: int, actors: int, batch: int) -> int:
    """Rows of a block: some blocks an actor, at least a batch."""
    return min(LARGEST_BLOCK, max(batch, math.ceil(images / (actors * BLOCKS_PER_ACTOR))))


def row_bytes(verb: Verb, px: float) -> float:
    """Bytes of a row on disk, for images of a side in their own pixels."""
    return SCORE_BYTES if verb == "score" else LABEL_BYTES + SIDE_BYTES * px


def hours_on(nodes: int, work: Work, node: Node, rate: Rate, spare: float = 0.2) -> Plan:
    """What a run on so many nodes takes.

    Args:
        nodes: Without the head.
        work, node, rate: As there.
        spare: Share of the actors' time that is left over, in [0, 1).

    Raises:
        ResourceError: Not one actor fits into a node's memory, or there is no core or GPU for one.
    """
    each = _actors_of(node, work, rate)
    actors = max(1, nodes * each - (DRIVER_CPUS if rate.of == "core" else 0))
    rows = block_rows(work.images, actors, BATCH)
    blocks = math.ceil(work.images / rows)
    actors = min(actors, blocks)
    answers_s = SHARD_ANSWERS * ANSWER_S / SHARD_READERS
    seconds = {
        "start": START_S,
        "ids": IDS_S * work.images,
        "images": work.images / (actors * rate.images_per_second * (1 - spare)),
        "last_block": rows / rate.images_per_second,  # all others may wait for one that was begun last
        "shards": blocks * max(SHARD_S, answers_s) + ROWS_S * work.images,
    }
    driver = DRIVER_BYTES + ID_BYTES * work.images
    node_bytes = (SHARED_BYTES + each * _actor_bytes(work)) / (1 - STORE_SHARE)
    cpus = math.floor(100 * (node.cpus or node.cores) / each) / 100
    return Plan(work, node, rate, nodes, actors, cpus, blocks, seconds, spare, node_bytes, driver, _warnings(node, rate, each, actors))


def nodes_for(hours: float, work: Work, node: Node, rate: Rate, spare: float = 0.2) -> Plan:
    """The fewest nodes on which a run ends within so many hours. Arguments and errors as in `hours_on`.

    Raises:
        InputError: No number of nodes does it.
    """
    few, enough, shortest = 0, 1, math.inf
    while (plan := hours_on(enough, work, node, rate, spare)).hours > hours:
        shortest = min(shortest, plan.hours)
        if enough > work.images:  # more nodes than images; smaller blocks make more shards to look at, so this may take longer than fewer
            raise InputError(f"{hours:g} h are too short for any number of nodes; the shortest is {duration(3600 * shortest)}")
        few, enough = enough, enough + max(1, enough // 50)
    while enough - few > 1:
        middle = hours_on((few + enough) // 2, work, node, rate, spare)
        if middle.hours > hours:
            few = middle.nodes
        else:
            enough, plan = middle.nodes, middle
    return plan


def _actors_of(node: Node, work: Work, rate: Rate) -> int:
    """Actors on a node: one a core or GPU, as far as its memory goes."""
    places = node.gpus if rate.of == "GPU" else node.cores
    if places < 1:
        raise ResourceError(f"the rate is of a {rate.of}, but a node has none; give --cores or --gpus as the nodes have them")
    if node.memory_bytes is None:
        return places
    room = node.memory_bytes * (1 - STORE_SHARE) - SHARED_BYTES
    if room < _actor_bytes(work):
        raise ResourceError(
            f"a node of {_size(node.memory_bytes)} has no room for a model actor of {_size(_actor_bytes(work))} beside the "
            f"{100 * STORE_SHARE:.0f}% that Ray keeps for its object store; take larger nodes"
        )
    return min(places, int(room / _actor_bytes(work)))


def _actor_bytes(work: Work) -> float:
    pixels = FORWARD_PIXELS if work.px is None else min(BATCH * work.px**2, FORWARD_PIXELS)
    return ACTOR_BYTES + FORWARD_BYTES * pixels


def _warnings(node: Node, rate: Rate, each: int, actors: int) -> tuple[str, ...]:
    found, places = [], node.gpus if rate.of == "GPU" else node.cores
    if each < places:
        found.append(f"the memory of a node holds {each} actors, not {places}: give the settings above, or take larger nodes")
    if actors > KNOWN_ACTORS:
        found.append(
            f"{actors:,} actors are more than the {KNOWN_ACTORS} beyond which Ray Data's driver was reported to fall behind: give each a "
            "node (compute.score_actors, compute.cpus_per_actor; docs/operations.md), or take several jobs, each with a part of the archive"
        )
    return tuple(found)


def _size(n_bytes: float | None) -> str:
    return "unknown" if n_bytes is None else filesize.decimal(int(n_bytes))


def _count(n: int, thing: str) -> str:
    return f"{n:,} {thing}" + ("" if n == 1 else "s")
