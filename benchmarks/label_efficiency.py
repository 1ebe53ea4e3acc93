"""The paper's comparison on a labelled set of yours: which labels to buy, at one budget, with CPS-Mars training.

    python benchmarks/label_efficiency.py --data PATH/mars --weights PATH/tf_efficientnet_lite0.safetensors

Rows are ways to buy ceil(n/32) labels of a pool of n after a start with ceil(n/64); each runs with several seeds. Trainings that rows share
run once, and every result is kept by digest under --cache: killed and started again the program goes on, and with --address its trainings
spread over a Ray cluster. With --fold K/N nothing but the pool is used: every Nth site group, from K, is measured on and the others are
bought from; that is where the protocol and every later choice were settled.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import yaml
from common import Claim, options, shown, write
from parts import lab as parts_lab, plain, probes, table
from parts.lab import Lab, Split, Training, with_
from parts.table import Found

from raysal.archive.uris import absolute, exists
from raysal.cluster import connected
from raysal.config import Config, load
from raysal.errors import InputError, RaysalError
from raysal.rounds.ledger import Ledger

PROTOCOL = Path(__file__).with_suffix(".yaml")
VARIANTS = Path(__file__).with_name("label_efficiency_variants.yaml")


@dataclass(frozen=True)
class Row:
    """One way to spend the budget.

    Attributes:
        name: As the table prints it.
        rounds: Query rounds at the same final budget.
        strategy: Of each query.
        batch: How a ranking becomes a batch.
        cold: Which labels come first.
        labels_of: Row whose final labels are used instead of buying; or "all".
        steps_multiple: Length of its trainings, in the protocol's.
        settings: More ``section: {knob: value}``.
        predict: Knobs of ``model`` that change only how the trained model predicts.
        paper: The published mIoU on S5Mars, where there is one.
        against: Rows that it is compared with, seed by seed; default: the row whose labels it uses, or Random.
        full: The row with all labels that trains as it does; None where there is none.
    """

    name: str
    rounds: int = 1
    strategy: str = "random"
    batch: str = "topk"
    cold: str = "random"
    labels_of: str | None = None
    steps_multiple: int = 1
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    predict: dict[str, Any] = field(default_factory=dict)
    paper: float | None = None
    against: tuple[str, ...] = ()
    full: str | None = table.FULL

    def references(self) -> tuple[str, ...]:
        """Rows that it is compared with."""
        return tuple(self.against) or ((self.labels_of,) if self.labels_of not in (None, "all") else (table.RANDOM,))


NO_CPS: dict[str, dict[str, Any]] = {"cps": {"weight": 0.0}}
ROWS = (
    Row("Random", paper=66.55),
    Row("BALD", strategy="bald", paper=70.76),
    Row("Uncertainty", strategy="uncertainty", paper=71.24),
    Row("Entropy", strategy="entropy", paper=73.82),
    Row("UEQ, 1 round", strategy="ueq", paper=75.00),
    Row("UEQ, 2 rounds", rounds=2, strategy="ueq", paper=75.13),
    Row("UEQ, 4 rounds", rounds=4, strategy="ueq", paper=76.73, against=(table.RANDOM, table.FULL, table.LONG)),
    Row("Margin", strategy="margin"),
    Row("k-center", batch="kcenter"),
    Row("Random, typical start", cold="typical"),
    Row("Labelled only, Random's labels", labels_of="Random", settings=NO_CPS),
    Row("Labelled only, labels of UEQ, 4 rounds", labels_of="UEQ, 4 rounds", settings=NO_CPS),
    Row("Full supervision", labels_of="all", settings=NO_CPS),
    Row("Full supervision, 6x steps", labels_of="all", steps_multiple=6, settings=NO_CPS, full=None),
)


@dataclass(frozen=True)
class Point:
    """A training on the way of a row, by the number of its labels."""

    labels: int
    record: dict


class Comparison:
    """Runs rows at one budget.

    Args:
        lab: Does and keeps the work.
        cfg: The protocol.
        split: What is bought from, and measured on.
        names: Of the pool, in order.
    """

    def __init__(self, lab: Lab, cfg: Config, split: Split) -> None:
        self.lab, self.cfg, self.split = lab, cfg, split
        self.names = tuple(item.name for item in split.open(cfg)[1])
        # The published budgets are 1/64 and 1/32 of the whole pool; a fold keeps their numbers, as what trains well depends on them.
        whole = len(Split(limit=split.limit).open(cfg)[1])
        self.initial, self.final = math.ceil(whole / 64), math.ceil(whole / 32)

    def config(self, row: Row, seed: int) -> Config:
        """The protocol with what a row changes."""
        cfg = with_(self.cfg, **row.settings) if row.settings else self.cfg
        each = -(-(self.final - self.initial) // row.rounds)
        cfg = with_(
            cfg,
            query={"strategy": row.strategy, "batch": row.batch}
            | ({"candidates_factor": -(-len(self.names) // each)} if row.name == "k-center" else {}),
            loop={"cold_start": row.cold},
            train={"steps": row.steps_multiple * cfg.train.steps},
        )
        return cfg.model_copy(update={"seed": seed})

    def run(self, row: Row, seed: int, rows: dict[str, Row]) -> list[Point]:
        """All trainings of a row, first labels first."""
        cfg = self.config(row, seed)
        if row.labels_of is not None:
            labels = self.names if row.labels_of == "all" else self.bought(rows[row.labels_of], seed)[-1][1]
            return [self._point(row, Training(cfg, labels, self.split))]
        return [self._point(row, training) for training in self.trainings(row, seed)]

    def trainings(self, row: Row, seed: int) -> list[Training]:
        """One on each set of labels that a row buys."""
        cfg = self.config(row, seed)
        return [Training(cfg.at_round(round_), labels, self.split, start) for round_, (start, labels) in enumerate(self.bought(row, seed))]

    def bought(self, row: Row, seed: int) -> list[tuple[Training | None, tuple[str, ...]]]:
        """Labels of each training of a row, and the training that it starts from where it starts warm."""
        cfg = self.config(row, seed)
        labels = self.lab.started_with(cfg, self.split, self.initial)
        steps: list[tuple[Training | None, tuple[str, ...]]] = [(None, labels)]
        for round_ in range(row.rounds):
            training = Training(cfg.at_round(round_), labels, self.split, steps[-1][0])
            target = self.initial + (self.final - self.initial) * (round_ + 1) // row.rounds
            labels = (*labels, *self.lab.asked(training, cfg, target - len(labels)))
            steps.append((training if cfg.loop.warm_start else None, labels))
        return steps

    def _point(self, row: Row, training: Training) -> Point:
        return Point(len(training.labels), self.lab.predicted(training, row.predict))


def compare(comparisons: list[Comparison], rows: list[Row], seeds: int, all_rows: dict[str, Row]) -> Found:
    """Runs rows x splits x seeds at once, as far as the cores go. By row: by split and seed: its points.

    A row that fails is told at once, and ends the others.
    """
    draws = [(comparison, seed) for comparison in comparisons for seed in range(seeds)]
    chains = [(row, k) for k in range(len(draws)) for row in sorted(rows, key=lambda r: -r.rounds * r.steps_multiple)]
    threads = ThreadPoolExecutor(len(chains))
    running = {(row.name, k): threads.submit(draws[k][0].run, row, draws[k][1], all_rows) for row, k in chains}
    try:
        wait(running.values(), return_when=FIRST_EXCEPTION)
        for (name, _), job in running.items():
            if job.done() and (error := job.exception()):
                raise RuntimeError(f"row {name!r} failed: {error}") from error
        return {row.name: [running[row.name, k].result() for k in range(len(draws))] for row in rows}
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


def tables(found: Found, rows: dict[str, Row], comparisons: list[Comparison], seeds: int) -> str:
    """What was compared, and the tables."""
    first = comparisons[0]
    folds = [c.split.fold for c in comparisons if c.split.fold]
    where = "val" if not folds else "folds of the pool's sites: " + ", ".join(f"{k}/{n}" for k, n in folds)
    train = first.cfg.train
    worth = table.worth_table(found, "the folds" if folds else "val")
    codes = sorted({p.record["commit"] for seeds_ in found.values() for points in seeds_ for p in points})
    longer = [f"{name} {rows[name].steps_multiple * train.steps:,}" for name in found if rows[name].steps_multiple > 1]
    passes = ", ".join(f"{train.steps * train.batch_labeled / len(c.names):.2f}" for c in comparisons)
    pairs = table.pairs_table(found, {name: rows[name].references() for name in found}, names_of_draws(comparisons, seeds))
    parts = [
        f"{', '.join(f'{len(c.names):,}' for c in comparisons)} images to buy from, {first.initial} labels at first, {first.final} at "
        f"last; measured on {where}; {seeds} seed{'s' if seeds > 1 else ''}; {train.steps} steps of {train.batch_labeled} labelled images "
        f"a training{' (longer: ' + ', '.join(longer) + ')' if longer else ''}; {train.steps} steps are {passes} passes over all labels. "
        f"± after an mIoU is the standard deviation over {'seeds and folds' if folds else 'seeds'}. Code: {', '.join(codes)}.",
        table.main_table(found, {name: rows[name].paper for name in found}, {name: rows[name].full for name in found}),
        f"The paper's reference is the official semi-supervised model with 5,000 labels, mIoU {table.PAPER_FULL:.2f}.",
        "Draw by draw, and 95% t intervals of the means over draws"
        + (" (draws of one seed or one fold are not independent)" if folds and seeds > 1 else "")
        + ":\n\n"
        + pairs
        if pairs
        else "",
        "IoU by class:\n\n" + table.class_table(found),
        "What was bought (means; the masks were looked at afterwards):\n\n" + table.bought_table(found),
        "Does a class gain where more labelled images show it? Spearman's rank correlation:\n\n" + worth if worth else "",
    ]
    return "\n\n".join(filter(None, parts))


def names_of_draws(comparisons: list[Comparison], seeds: int) -> list[str]:
    """What a column of one draw is called, in the order of `compare`."""
    folds = [f"fold {c.split.fold[0]}, " if c.split.fold else "" for c in comparisons]
    return [f"{fold_}seed {seed}" for fold_ in folds for seed in range(seeds)]


def keep(found: Found, rows: dict[str, Row], comparison: Comparison, text: str, args: argparse.Namespace) -> None:
    """Writes claims, tables, rows and pictures of the whole comparison."""
    n, folder = len(comparison.names), args.out / "label_efficiency"
    table.curves(found, folder / "curves.png", f"{comparison.final} of {n:,} labels, mean of seeds")
    table.heat(found, folder / "classes.png")
    of = f"{comparison.final} of {n:,} labels ({100 * comparison.final / n:.2f}%)"
    same, long = (table.relative(found, table.BEST, row) for row in (table.FULL, table.LONG))
    gap = (table.PAPER_BEST - table.PAPER_RANDOM) / table.PAPER_FULL
    order, chance = table.order(found, {name: rows[name].paper for name in found})
    claims = [
        Claim(f"mIoU of UEQ in 4 rounds with {of} / full supervision of six times the steps", long.mean, table.TARGET, "higher", "x"),
        Claim("the same, lower end of the 95% interval", long.low, table.TARGET, "higher", "x"),
        Claim("the same against full supervision of the same steps, lower end of the 95% interval", same.low, table.TARGET, "higher", "x"),
        Claim(
            "(UEQ in 4 rounds - Random, both CPS-Mars) / full supervision, the same steps",
            table.gain(found, table.BEST, table.RANDOM).mean / table.final(found, table.FULL).mean,
            gap,
            "higher",
            "x",
        ),
        Claim(f"rank correlation of the seven rows with the paper's order (p {chance:.2f})", order, None, "higher", ""),
    ]
    intervals = (
        f"95% t intervals over {len(same.values)} seeds: UEQ in 4 rounds / full supervision {same.mean:.3f} ± {same.half:.3f} with the "
        f"same steps, {long.mean:.3f} ± {long.half:.3f} with six times the steps. The paper: 0.957 and, for the gap to Random, {gap:.3f}."
    )
    places = {"DATA": args.data, "CACHE": args.cache} | ({"WEIGHTS": args.weights} if args.weights else {})
    pictures = "![learning curves](label_efficiency/curves.png)\n\n![IoU by class](label_efficiency/classes.png)"
    title = "Label efficiency on real images: the paper's comparison"
    (folder / "rows.json").write_text(json.dumps(table.rows_of(found, names_of_draws([comparison], args.seeds)), indent=1) + "\n")
    write("label_efficiency", title, claims, args.out, f"{intervals}\n\n{text}\n\n{pictures}", places)


def variant_rows(file: Path) -> list[Row]:
    """Rows of a YAML file: name -> fields of `Row`."""
    return [Row(name, **fields) for name, fields in yaml.safe_load(file.read_text()).items()]


def chosen(rows: dict[str, Row], names: list[str]) -> list[Row]:
    """Rows by name.

    Raises:
        InputError: A name is not known; lists those that there are.
    """
    if unknown := [name for name in names if name not in rows]:
        raise InputError(f"no row is called {unknown[0]!r}; there are:\n  " + "\n  ".join(rows))
    return [rows[name] for name in names]


def fold(text: str) -> tuple[int, int]:
    """K/N as two numbers."""
    k, slash, n = text.partition("/")
    if not (slash and k.isdigit() and n.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r}: expected K/N, for example 1/3")
    return int(k), int(n)


def seeds_(text: str) -> int:
    """A number of seeds, 1 or more."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, 1 or more")
    return int(text)


def parse() -> argparse.Namespace:
    parser = options(__doc__)
    parser.add_argument("--data", required=True, help="labelled set, in the layout of the protocol's data.reader")
    parser.add_argument("--weights", help="encoder weights, a .safetensors file")
    parser.add_argument("--config", default=str(PROTOCOL), help="the protocol")
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help="changes the protocol for all rows"
    )
    parser.add_argument(
        "--seeds", type=seeds_, default=3, help="draws of the first labels and of everything random in training; 3 unless told"
    )
    parser.add_argument("--rows", nargs="*", help="some rows by name; default: all")
    parser.add_argument("--variants", nargs="*", help="instead of the table, rows of label_efficiency_variants.yaml; no name: all")
    parser.add_argument("--fold", nargs="*", type=fold, help="K/N ...: measure on every Nth site group of the pool, from K, instead of val")
    parser.add_argument("--keep-as", metavar="NAME", help="also write the tables to label_efficiency/NAME.md under --out")
    parser.add_argument("--cache", default="runs/label_efficiency", help="folder or URI that keeps every result")
    parser.add_argument("--address", help="Ray cluster that does the trainings; default: this machine's cores")
    return parser.parse_args()


def run(args: argparse.Namespace) -> None:
    """Runs what was asked for, and writes it."""
    for name in ("cache", "data", "weights"):  # tasks run in folders of their own
        setattr(args, name, getattr(args, name) and absolute(getattr(args, name)))
    limit = 48 if args.quick else None
    splits = [Split(fold, limit) for fold in args.fold] if args.fold else [Split(None, limit)]
    quick = ["train.steps=2", "augment.crop_px=64", "data.input_scale=0.25"] if args.quick else []
    weights = [f"model.encoder_weights={args.weights}"] if args.weights else []
    if args.weights and not exists(args.weights):
        raise InputError(f"--weights {args.weights}: no such file")
    cfg = load(args.config, [f"data.root={args.data}", *weights, *quick, *args.overrides])
    cfg = with_(cfg, compute={"address": args.address, "local_cpus": cfg.compute.local_cpus or parts_lab.cores()})
    variants = variant_rows(VARIANTS)
    rows = {row.name: row for row in (*ROWS, *variants)}
    wanted = chosen(rows, args.rows) if args.rows else [*ROWS] if args.variants is None else chosen(rows, args.variants) or variants
    kept, seeds = args.out / "label_efficiency" / "kept.jsonl", 1 if args.quick else args.seeds
    data = parts_lab.fingerprint(cfg)  # reads the data set: what is wrong with it is told before Ray starts
    for module in (plain, parts_lab):
        ray.cloudpickle.register_pickle_by_value(module)  # other nodes need raysal alone, not this folder
    with Ledger(args.cache).lock(), connected(cfg.compute):
        lab = Lab(args.cache, data, kept)
        comparisons = [Comparison(lab, cfg, split) for split in splits]
        try:
            found = compare(comparisons, wanted, seeds, rows)
        finally:
            if not args.quick:
                lab.export(kept)
    text = tables(found, rows, comparisons, seeds)
    print(text)
    if args.keep_as:
        changed = f"Changes of the protocol: {', '.join(map(shown, args.overrides))}.\n\n" if args.overrides else ""
        (kept.parent / f"{args.keep_as}.md").write_text(f"# {args.keep_as.replace('-', ' ')}\n\n{changed}{text}\n")
    if not args.quick:
        (kept.parent / "probes.md").write_text(probes.told(kept))
    if wanted == [*ROWS] and not args.fold and not args.quick:
        keep(found, rows, comparisons[0], text, args)


def main() -> None:
    args = parse()
    try:
        run(args)
    except RaysalError as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
