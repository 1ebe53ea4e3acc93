"""The configuration tree: what it refuses, what its digest promises, and that every knob says why it is there."""

from __future__ import annotations

import ast
import io
import os
import subprocess
import sys
import tokenize
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from hypothesis import given, strategies as st
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from raysal import config
from raysal.config import Config, build, digest_of, load, valid_keys
from raysal.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def leaf_keys() -> list[str]:
    keys = valid_keys()
    return [key for key in keys if not any(other.startswith(key + ".") for other in keys)]


def value_at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree[part] if isinstance(tree, dict) else getattr(tree, part)
    return tree


OTHER_VALUES: dict[str, Any] = {
    "name": "other",
    "run": "runs/other",
    "data.root": "s3://bucket/data",
    "data.label_set": "ai4mars",
    "data.pool_split": "other",
    "data.val_split": "other",
    "data.unlabeled_split": "unlabeled",
    "augment.scale": [0.75, 1.5],
    "model.arch": "Unet",
    "model.encoder": "resnet18",
    "model.encoder_weights": "imagenet",
    "model.output_stride": 8,
    "model.atrous_rates": [1, 2, 3],
    "model.mean": [0.5, 0.5, 0.5],
    "model.std": [0.2, 0.2, 0.2],
    "loss.terms": {"focal": 1.0},
    "loss.weight_clip": [0.5, 5.0],
    "cps.cutmix_area": [0.1, 0.2],
    "score.scores": ["entropy"],
    "label.precision": 0.9,
    "loop.target_miou": 0.5,
    "loop.final_steps": 10,
    "loop.full_miou": 0.5,
    "compute.address": "auto",
    "compute.local_cpus": 3,
}


def another_value(key: str, now: Any) -> Any:
    """A valid value other than the present one."""
    if key in OTHER_VALUES:
        return OTHER_VALUES[key]
    annotation = field_of(key).annotation
    if get_origin(annotation) is Literal:
        return next(value for value in get_args(annotation) if value != now)
    if isinstance(now, bool):
        return not now
    if isinstance(now, int):
        return now + 1
    if isinstance(now, float):
        return now / 2 if now else 0.25
    raise AssertionError(f"give {key} (now {now!r}) another valid value in OTHER_VALUES")


def field_of(key: str) -> FieldInfo:
    """The declaration of a knob by its dotted name."""
    *sections, leaf = key.split(".")
    owner: Any = Config
    for name in sections:
        owner = owner.model_fields[name].annotation
    return owner.model_fields[leaf]


def nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# ---- the files in configs/ ----


def test_the_four_configs_are_there() -> None:
    assert {"demo", "marsscapes", "s5mars", "ai4mars"} <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_loads_and_names_itself(path: Path) -> None:
    cfg = load(path)
    assert cfg.name == path.stem
    assert cfg.run == f"runs/{path.stem}"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_line_of_a_config_says_why(path: Path) -> None:
    bare = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        key, _, value = line.partition(":")
        is_section = not value.strip()
        if line.strip() and not line.lstrip().startswith("#") and not is_section and key not in ("name", "run") and "  # " not in line:
            bare.append(f"{number}: {line}")
    assert not bare, "lines without a reason:\n" + "\n".join(bare)


@pytest.mark.parametrize(("name", "labels"), [("s5mars", 169), ("ai4mars", 502), ("marsscapes", 32)])
def test_label_budgets_are_the_published_ones(name: str, labels: int) -> None:
    assert load(ROOT / "configs" / f"{name}.yaml").budget == labels


def test_the_demo_asks_for_a_small_share_of_its_pool() -> None:
    cfg = load(ROOT / "configs" / "demo.yaml")
    assert cfg.data.reader == "synthetic"
    assert cfg.loop.rounds >= 1
    assert cfg.budget <= 0.1 * cfg.data.synthetic.images


# ---- digest ----


def test_the_digest_is_the_same_in_another_process() -> None:
    program = "from raysal.config import load; print(load(None, ['loss.terms={dice: 1, wce: 2}']).digest())"
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert digests == {load(None, ["loss.terms={wce: 2, dice: 1}"]).digest() + "\n"}


def test_the_digest_of_a_value_never_changes() -> None:
    # Computed once with `printf '{"a":[1,2.5,null],"b":"\\u00fc"}' | sha256sum`: old runs must stay resumable.
    assert digest_of({"b": "ü", "a": [1, 2.5, None]}) == "689a78f0dfb540e6e17c62bc6480b95ac63d58c4735f9e9bc486c2bdbf7cdcaa"


@pytest.mark.parametrize("key", [key for key in leaf_keys() if key != "method"])  # one method so far
def test_the_digest_changes_with_what_decides_results_and_with_nothing_else(key: str) -> None:
    now = value_at(Config(), key)
    changed = build(nested(key, another_value(key, now)))
    assert value_at(changed, key) != now, "the test must change something"
    decides_nothing = key in ("name", "run") or key.startswith("compute.")
    assert (changed.digest() == Config().digest()) is decides_nothing


def test_the_digest_does_not_see_how_a_value_was_written() -> None:
    assert load(None, ["optim.lr=1e-2", "train.steps=30_000", "data.val_split=val"]).digest() == Config().digest()


# ---- what is refused ----


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("train.step=5", "train.steps"),
        ("query.stratgy=ueq", "query.strategy"),
        ("lr=0.1", "optim.lr"),
        ("trian={}", "train"),
        ("data.synthetic.size=64", "data.synthetic.size_px"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(override: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=rf"unknown key .*did you mean '{meant}'\?"):
        load(None, [override])


@given(st.data())
def test_one_missing_letter_names_the_key_that_was_meant(data: st.DataObject) -> None:
    key = data.draw(st.sampled_from([k for k in leaf_keys() if "." in k and len(k.rpartition(".")[2]) >= 4]))
    section, _, leaf = key.rpartition(".")
    place = data.draw(st.integers(0, len(leaf) - 1))
    typo = f"{section}.{leaf[:place]}{leaf[place + 1 :]}"
    if typo not in valid_keys():
        with pytest.raises(ConfigError, match=f"did you mean '{key}'"):
            build(nested(typo, 1))


def test_a_key_like_nothing_lists_the_sections() -> None:
    with pytest.raises(ConfigError, match=r"valid sections: .*train.*loop"):
        load(None, ["zzzzqqqq=1"])


def test_every_wrong_key_of_a_file_is_named_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "train: {stepz: 5}\nquery: {strategy: best}\n")
    with pytest.raises(ConfigError) as caught:
        load(path)
    message = str(caught.value)
    assert str(path) in message and "train.stepz" in message and "query.strategy" in message and "'best'" in message


@pytest.mark.parametrize(
    "override",
    [
        "train.steps=0",
        "train.steps=many",
        "train.batch_labeled=-1",
        "optim.lr=0",
        "augment.hflip=1.5",
        "augment.scale=[2.0, 0.5]",
        "loss.terms={}",
        "loss.terms={cross_entropy: 1}",
        "train.keep_checkpoints=1",
        "model.output_stride=12",
        "data.input_scale=.nan",
        "train=5",
    ],
)
def test_a_value_out_of_range_is_refused_by_name(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, [override])
    assert all(part in str(caught.value) for part in override.partition("=")[0].split("."))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", "expected KEY=VALUE"),
        ("=5", "expected KEY=VALUE"),
        ("name.first=x", "name: Input should be a valid string"),
        ("train.steps=[1", "not valid YAML"),
    ],
)
def test_a_malformed_override_says_what_was_expected(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(None, [override])


def test_an_override_into_a_value_of_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'train' is a value, not a section"):
        load(write(tmp_path, "train: 5\n"), ["train.steps=5"])


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words", "a: [1\n", "!!python/object/apply:os.getcwd []"])
def test_a_file_that_is_no_tree_of_sections_is_refused(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=str(path)):
        load(path)


@pytest.mark.parametrize("make", [lambda p: p / "missing.yaml", lambda p: p], ids=["missing", "folder"])
def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path: Path, make: Any) -> None:
    with pytest.raises(ConfigError, match="can't be read"):
        load(make(tmp_path))


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(b"\xff\xfe\x00name")
    with pytest.raises(ConfigError, match="can't be read"):
        load(path)


# ---- reading, overriding, writing ----


def test_nothing_at_all_gives_the_defaults(tmp_path: Path) -> None:
    assert load() == load(write(tmp_path, "")) == Config()


def test_overrides_win_over_the_file_and_later_ones_over_earlier(tmp_path: Path) -> None:
    path = write(tmp_path, "train: {steps: 10, log_every: 7}\n")
    cfg = load(path, ["train.steps=20", "train.steps=30", "augment.scale=[1, 1]", "data.root=s3://a/b=c", "loss.terms={dice: 2}"])
    assert (cfg.train.steps, cfg.train.log_every, cfg.augment.scale, cfg.data.root) == (30, 7, (1.0, 1.0), "s3://a/b=c")
    assert cfg.loss.terms == {"dice": 2.0}


def test_an_override_can_set_null() -> None:
    assert load(None, ["loop.final_steps=5"]).loop.final_steps == 5
    assert load(None, ["loop.final_steps=5", "loop.final_steps=null"]).loop.final_steps is None


def test_a_config_cannot_be_changed_in_place() -> None:
    cfg = Config()
    with pytest.raises(ValidationError):
        cfg.train.steps = 5  # type: ignore[misc]


fraction = st.floats(0, 1)
configs = st.builds(
    lambda name, run, seed, steps, lr, hflip, area, terms, scores, address: build(
        {
            "name": name,
            "run": run,
            "seed": seed,
            "train": {"steps": steps},
            "optim": {"lr": lr},
            "augment": {"hflip": hflip, "scale": [0.5 + hflip, 2.0]},
            "cps": {"cutmix_area": area},
            "loss": {"terms": terms},
            "score": {"scores": scores},
            "compute": {"address": address},
        }
    ),
    name=st.text(max_size=20),
    run=st.text(max_size=20),
    seed=st.integers(0, 2**63),
    steps=st.integers(1, 10**9),
    lr=st.floats(1e-12, 1e6),
    hflip=fraction,
    area=st.tuples(fraction, fraction),
    terms=st.dictionaries(st.sampled_from(["wce", "dice", "focal", "ohem", "lovasz"]), st.floats(1e-9, 1e9), min_size=1),
    scores=st.lists(st.text(max_size=8), max_size=4),
    address=st.none() | st.text(max_size=20),
)


@given(cfg=configs)
def test_yaml_gives_back_the_same_tree_and_digest(cfg: Config) -> None:
    again = build(yaml.safe_load(cfg.to_yaml()))
    assert again == cfg
    assert again.digest() == cfg.digest()


def test_a_written_config_can_be_loaded(tmp_path: Path) -> None:
    cfg = load(ROOT / "configs" / "marsscapes.yaml")
    assert load(write(tmp_path, cfg.to_yaml())) == cfg


def test_valid_keys_name_every_value_once() -> None:
    keys = valid_keys()
    assert len(keys) == len(set(keys))
    assert {"seed", "train", "train.steps", "data.synthetic.size_px"} <= set(keys)


# ---- every knob says why ----


def test_every_knob_has_a_comment() -> None:
    """A comment on the field's own lines, or on the line above it."""
    source = Path(config.__file__).read_text(encoding="utf-8")
    comments = {t.start[0] for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT}
    alone = {n for n, line in enumerate(source.splitlines(), 1) if line.lstrip().startswith("#")}
    bare, seen = [], 0
    for node in ast.parse(source).body:
        owner = getattr(config, node.name, None) if isinstance(node, ast.ClassDef) else None
        if not (isinstance(owner, type) and issubclass(owner, BaseModel)):
            continue
        for field in node.body if isinstance(node, ast.ClassDef) else []:
            if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
                continue
            annotation = owner.model_fields[field.target.id].annotation
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                continue  # a section: its docstring speaks
            seen += 1
            lines = set(range(field.lineno, (field.end_lineno or field.lineno) + 1))
            if not lines & comments and field.lineno - 1 not in alone:
                bare.append(f"{node.name}.{field.target.id} (line {field.lineno})")
    assert seen == len(leaf_keys())
    assert not bare, "knobs without a word of why and when: " + ", ".join(bare)
