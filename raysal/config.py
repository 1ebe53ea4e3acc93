"""One frozen, typed configuration tree. YAML in, ``--set a.b=c`` on top, a digest out.

Each knob says why it exists and when to turn it. Unknown keys are refused with the nearest valid name.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from raysal.errors import ConfigError

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]

Reader = Literal["synthetic", "folder", "s5mars", "ai4mars"]
Strategy = Literal[
    "random", "bald", "uncertainty", "entropy", "least_confidence", "margin", "disagreement",
    "ueq", "ueq_pixel", "ueq_gated", "ueq_product", "ueq_cascade",
]  # fmt: skip
Batch = Literal["topk", "kcenter", "product", "power"]
LossName = Literal["wce", "dice", "focal", "ohem", "lovasz"]
Method = Literal["cps_mars"]
WeightScheme = Literal["none", "sqrt_inverse", "inverse", "median_frequency", "enet", "effective_number"]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), validate_default=True, allow_inf_nan=False)


class SyntheticConfig(Section):
    """The generated archive of `reader: synthetic`; made once under the run folder, then read like any other."""

    images: Positive = 400  # pool size; more images make rare classes easier to find and the demo longer
    val_images: Positive = 64  # held-out scenes for the metrics
    size_px: Annotated[int, Field(ge=32, le=4096)] = 96  # height = width of a scene
    seed: Count = 0  # another seed is another planet day; the same seed gives the same bytes


class DataConfig(Section):
    """Where labelled images are, and how they are laid out."""

    reader: Reader = "synthetic"  # the layout on disk; `folder` is images/ + masks/ + splits.json
    root: str | None = None  # path or fsspec URI of the data set; not used by `synthetic`
    label_set: str | None = None  # s5mars, ai4mars, marsscapes or a JSON file; null: the reader's own (folder: classes.json)
    pool_split: str = "train"  # images that may be bought; no query sees a label that is not
    val_split: str = "val"  # images for metrics; never for choosing what to buy
    unlabeled_split: str | None = None  # more images for the unlabelled loss only, never bought (folder: "unlabeled")
    s5mars_preset: Literal["5400", "5000/200/800", "5000/500/500"] = "5000/200/800"  # which published split, see docs/datasets.md
    ai4mars_gold: Literal["min1", "min2", "min3"] = "min3"  # agreement of experts that the test masks need
    ai4mars_camera: Literal["ncam", "mcam"] = "ncam"  # grey navigation camera (the protocol's) or colour Mastcam
    input_scale: Annotated[float, Field(gt=0, le=4)] = 1.0  # images enter the network resized by this; masks leave at full size
    max_bytes: Positive = 256 * 2**20  # a larger file is refused before it is read (status "limit")
    max_pixels: Positive = 64 * 2**20  # a larger image is refused before it is decoded (status "limit")
    max_bands: Positive = 4  # an archive product of more is refused (status "limit"); raise it to use the first three bands of a cube
    max_seconds: PositiveFloat = 120.0  # an image of an archive that takes longer to fetch is given up (status "fetch")
    black_border: bool = True  # black areas at an image's edge are no data; off where the darkest pixels are measurements
    synthetic: SyntheticConfig = SyntheticConfig()


class AugmentConfig(Section):
    """Augmentation, drawn from (seed, draw number) alone: the same on every layout of workers."""

    crop_px: Positive = 512  # height = width of training crops, after input_scale; a multiple of 32 suits every encoder
    scale: tuple[PositiveFloat, PositiveFloat] = (0.5, 2.0)  # random resize; narrow it when objects have one typical size
    hflip: Fraction = 0.5  # probability of a left-right flip; vertical flips are never right under gravity
    augin: Fraction = 0.0  # probability of taking another image's channel mean and std (AugIN); helps across cameras and dust
    color_jitter: NonNegative = 0.0  # brightness/contrast/saturation strength; colour carries mineralogy here, so off

    @model_validator(mode="after")
    def _ordered(self) -> AugmentConfig:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale must be (low, high), got {self.scale}")
        return self


class ModelConfig(Section):
    """Two branches of one architecture."""

    arch: str = "DeepLabV3Plus"  # any segmentation-models-pytorch architecture
    encoder: str = "resnet50"  # any of its encoders, also "tu-<timm name>"
    encoder_weights: str | None = None  # hub name ("imagenet"), a .safetensors file, or any fsspec URI to one; null: random
    output_stride: Literal[8, 16, 32] | None = None  # encoder stride of DeepLab variants; 8 sees finer detail and costs 3x
    atrous_rates: tuple[Positive, ...] | None = None  # of DeepLab's pyramid, in cells of the last map; null: 12, 24, 36 (large images)
    dropout: Fraction = 0.5  # before the classifier where the architecture has none of its own; BALD needs it
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # RGB in 0..1; keep ImageNet's with ImageNet weights
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.229, 0.224, 0.225)  # as mean; the two belong together
    predict: Literal["mean", "branch1"] = "mean"  # one mask from both branches' mean, or branch 1 alone (half the time; CPS's authors)
    whole_pixels: Positive = 4 * 2**20  # a larger image is predicted in tiles; whole ones need more memory and see all at once
    tile_px: Annotated[int, Field(ge=32, le=2**14)] = 1024  # side of a tile, in the image's own pixels; some training crops wide is right
    overlap_px: Annotated[int, Field(ge=4)] = 256  # of neighbouring tiles; more hides seams better and takes longer
    flip: bool = False  # predict the mean of the image and its mirror image, for twice the time
    sync_bn: bool = False  # batch statistics over all workers; turn on when a worker holds under 8 images
    compile: bool = False  # torch.compile of both branches; pays on GPUs and long runs
    channels_last: bool = True  # memory layout that convolutions prefer

    @model_validator(mode="after")
    def _tiles_meet(self) -> ModelConfig:
        if self.tile_px < 3 * self.overlap_px:
            raise ValueError(f"tile_px is {self.tile_px}, overlap_px {self.overlap_px}; a tile needs three overlaps or more")
        return self


class LossConfig(Section):
    """The supervised loss of each branch: a weighted sum of terms over labelled pixels."""

    terms: dict[LossName, PositiveFloat] = {"wce": 1.0, "dice": 1.0}  # dice finds rare classes; add ohem where easy pixels dominate
    class_weights: WeightScheme = "sqrt_inverse"  # of wce and focal, from the labels bought so far
    weight_clip: tuple[PositiveFloat, PositiveFloat] = (0.2, 10.0)  # keeps the rarest class from drowning the rest
    effective_beta: Annotated[float, Field(gt=0, lt=1)] = 0.99  # of effective_number, on image counts
    focal_gamma: NonNegative = 2.0  # higher looks harder at wrong pixels
    ohem_threshold: Fraction = 0.7  # pixels above this probability of the truth count as easy
    ohem_min_kept: Positive = 100_000  # hardest pixels kept per worker and step, whatever the threshold

    @model_validator(mode="after")
    def _some(self) -> LossConfig:
        if not self.terms:
            raise ValueError("terms must name at least one of wce, dice, focal, ohem, lovasz")
        return self


class CpsConfig(Section):
    """Cross pseudo supervision: each branch learns from the other's hard labels."""

    weight: NonNegative = 1.5  # lambda; 0 turns the unlabelled loss off (labelled-only baseline)
    cutmix: bool = True  # mix boxes between two unlabelled batches; off: plain CPS on labelled and unlabelled images
    cutmix_boxes: Positive = 3  # boxes per mixed image
    cutmix_area: tuple[Fraction, Fraction] = (0.25, 0.5)  # share of the image that the boxes cover together
    ramp_fraction: Fraction = 0.0  # lambda * exp(-5 (1 - t/T)^2) over this share of the steps; 0.1 helps under 100 labels
    on_null: bool = True  # also on pixels of labelled images that the expert left blank
    weighted: bool = False  # pseudo labels weigh by class as hand labels do in wce; off, as in CPS: frequent classes teach loudest
    threshold: Fraction = 0.0  # pseudo labels less sure than this do not count; 0: all do, as in CPS
    class_threshold: bool = False  # threshold (above 0) scaled by how sure the branch is of each class: rare ones are let in earlier
    paste: Fraction = 0.0  # probability that a region of a labelled image, rare classes first, is pasted into an unlabelled one
    pseudo_dropout: bool = True  # pseudo labels drawn with the network's dropout; off: by the whole network, steadier
    ema: bool = False  # pseudo labels from a moving average of each branch; steadier, one more copy of the weights
    ema_decay: Annotated[float, Field(gt=0, lt=1)] = 0.996  # share of the old average kept at each step

    @model_validator(mode="after")
    def _fit_together(self) -> CpsConfig:
        if self.paste and not self.cutmix:
            raise ValueError("paste mixes into CutMix images; set cutmix: true, or paste: 0")
        return self


class OptimConfig(Section):
    """Optimiser and schedule: lr * (1 - t/T)^poly_power."""

    name: Literal["sgd", "adamw"] = "sgd"  # adamw for transformers and for short runs on small batches
    lr: PositiveFloat = 0.01  # sgd 0.01 with pretrained encoders; adamw 1e-4 to 1e-3
    head_lr_multiple: PositiveFloat = 1.0  # decoder and head learn this much faster than a pretrained encoder
    momentum: Fraction = 0.9  # sgd only
    weight_decay: NonNegative = 5e-4  # suits sgd; adamw's is decoupled and wants about 0.01
    poly_power: NonNegative = 0.9  # 0 keeps the learning rate constant
    freeze_encoder: bool = False  # decoder and head alone learn, on the encoder's weights and norms as they came; half the time a step
    grad_clip: NonNegative = 8.0  # global gradient norm; 0 turns clipping off


class TrainConfig(Section):
    """Length, batches, checkpoints of one training. Batches are global: the same on 1 and on 64 workers."""

    steps: Positive = 30_000  # of one round; more labels and larger networks need more
    batch_labeled: Positive = 8  # labelled images per step over all workers
    batch_unlabeled: Positive = 8  # unlabelled images per step over all workers (CutMix reads twice as many)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 autocast on CUDA, float32 on CPU
    checkpoint_every: Positive = 1000  # steps; what a kill can cost
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2  # the last one, and the best by val mIoU
    eval_every: Count = 2000  # steps between evaluations on val; 0: only at the end
    eval_batch: Positive = 8  # images per forward pass in evaluations; lower it when memory is short
    log_every: Positive = 50  # steps between lines of metrics.jsonl


class ScoreConfig(Section):
    """How images are scored; see docs/method.md for the formulas."""

    scores: tuple[str, ...] = ("entropy", "uncertainty", "least_confidence", "margin", "disagreement")  # columns to compute
    aggregate: Literal["mean", "sum", "top_q"] = "mean"  # from pixels to an image; top_q finds small odd things
    top_q: Annotated[float, Field(gt=0, le=1)] = 0.05  # share of the most uncertain pixels that top_q averages
    resolution: Literal["decoder", "full"] = "decoder"  # decoder: before the last upsampling, 16x less memory, nearly the same ranks
    temperature: PositiveFloat = 1.0  # logits are divided by it; above 1 a model that is too sure of itself tells degrees of doubt apart
    bald_passes: Annotated[int, Field(ge=2)] = 10  # T of MC dropout
    class_bonus: bool = False  # weight pixels by 1/sqrt(1 + labelled images that hold their class)
    ueq_alpha: Fraction = 0.5  # weight of branch uncertainty against entropy in every ueq variant
    embedding_dim: Count = 128  # of pooled encoder features for kcenter and product; 0: no embedding column
    batch_size: Positive = 8  # images of one size per forward pass


class RuntimeConfig(Section):
    """How the network runs when it scores, labels or is evaluated; in training and its own measurements it is eager PyTorch."""

    # auto: OpenVINO on CPUs where it is installed, else eager PyTorch. compile: torch.compile, a minute's start for long runs on GPUs.
    kind: Literal["auto", "eager", "compile", "openvino"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 where the hardware computes in it, else float32
    agreement: Fraction = 0.95  # share of pixels that must get the class that eager float32 gives them, or the runtime is refused


class LabelConfig(Section):
    """How an archive's masks are made."""

    precision: Annotated[float, Field(gt=0, lt=1)] | None = None  # share right that val promises, by class; other pixels are 255; null: off


class QueryConfig(Section):
    """What to ask experts for next."""

    strategy: Strategy = "ueq"  # the paper's; random is the baseline to beat
    batch: Batch = "topk"  # topk is the paper's; kcenter and product spread the batch where archives are redundant
    candidates_factor: Positive = 10  # kcenter chooses among the top (factor x budget) by score
    product_strength: NonNegative = 1.0  # product: score^strength * distance
    power_temperature: PositiveFloat = 1.0  # power: log score + Gumbel / temperature; lower is more random
    cascade_factor: Positive = 4  # ueq_cascade: keep (factor x budget) by entropy, then the budget by uncertainty
    group_cap: Count = 0  # at most this many images per site and drive and round; 0: no cap


class LoopConfig(Section):
    """Rounds of active learning: initial + rounds x per_round labels are bought."""

    initial: Positive = 85  # labels before any model exists
    per_round: Count = 21  # fewer labels a round and more rounds ask better and cost more trainings
    rounds: Count = 4  # query rounds; rounds + 1 trainings
    cold_start: Literal["typical", "random"] = "random"  # typical: one image per cluster of encoder features
    target_miou: Fraction | None = None  # stop once val reaches this
    no_gain_rounds: Count = 0  # stop after this many rounds without min_gain in val mIoU; 0: never
    min_gain: NonNegative = 0.002  # less than this is noise between seeds
    uncertainty_below: NonNegative = 0.0  # stop once the pool's mean branch uncertainty is under this; 0: never
    warm_start: bool = False  # start each round's training from the last round's weights instead of the encoder's
    frozen_rounds: Count = 0  # so many first trainings leave the encoder as it came (optim.freeze_encoder); the last one never does
    final_steps: Positive | None = None  # length of the last training; null: train.steps, and the last round's model is final
    audit: Count = 0  # random images that experts label at the end, never learnt from: they say how good the masks are; 30 is a fair start
    checkpoint: Literal["last", "best"] = "last"  # which checkpoint scores and labels; best peeks at val
    full_miou: Fraction | None = None  # full supervision's val mIoU where known: a line in the report

    @model_validator(mode="after")
    def _last_learns(self) -> LoopConfig:
        if self.frozen_rounds > self.rounds:
            raise ValueError(f"frozen_rounds is {self.frozen_rounds}, at most rounds ({self.rounds}): the last training is never frozen")
        return self


class ComputeConfig(Section):
    """Where work runs. Nothing here changes results beyond float rounding, so it is no part of the digest."""

    address: str | None = None  # Ray cluster; null: start Ray on this machine
    local_cpus: Positive | None = None  # logical CPUs of a local Ray; null: twice the cores (ingest mostly waits)
    train_workers: Count = 1  # 0: in this process; more than 1: DDP
    min_workers: Count = 0  # train with any number from this to train_workers, as nodes come and go; 0: always with train_workers
    resize_every_s: PositiveFloat = 60.0  # with min_workers: how often to look for more nodes; each change goes back to the last checkpoint
    cpus_per_worker: PositiveFloat = 1.0  # logical CPUs that Ray books for a train worker; raise it with loader_workers
    use_gpu: bool = False  # one GPU per train worker and per score actor
    threads: Count = 0  # torch threads per train worker; 0: the node's cores / workers
    loader_workers: Count = 0  # processes that decode labelled images per train worker
    max_failures: Annotated[int, Field(ge=-1)] = 3  # times a dead train worker is replaced; -1: for ever
    in_process: Count = 500  # images that are scored or labelled without Ray's actors, which take longer to start; not on several nodes
    score_actors: Count = 0  # model actors; 0: one per core (per GPU with use_gpu)
    min_actors: Count = 0  # score with any number from this to score_actors, as nodes come and go; 0: always with score_actors
    gpus_per_actor: Annotated[float, Field(gt=0, le=1)] = 1.0  # 0.5: two on a GPU, where a small network leaves it idle between images
    cpus_per_actor: PositiveFloat = 0.5  # under 1, so that read tasks always find a slot
    ingest_tasks: Count = 0  # tasks that decode unlabelled images at once; 0: a quarter of the cluster's logical CPUs
    grow_s: NonNegative = 0.0  # seconds to wait for an autoscaler to bring what a run needs; 600 where nodes come and go
    asynchronous_upload: bool = True  # train workers upload checkpoints while training goes on
    log_json: bool = False  # what a command says, and Ray's logs, as JSON lines with run and job ids; on where machines gather logs

    @model_validator(mode="after")
    def _elastic(self) -> ComputeConfig:
        for least, most in (("min_workers", "train_workers"), ("min_actors", "score_actors")):
            if (few := getattr(self, least)) > (many := getattr(self, most)) and (many or least == "min_workers"):
                raise ValueError(f"{least} is {few}, at most {most} ({many})")
        return self


class Config(Section):
    """Everything that one run does."""

    name: str = "raysal"  # heads the run's tables and its report
    seed: Count = 0  # of weights, draws, first labels and random queries
    method: Method = "cps_mars"  # the training method, see METHODS in raysal/train/loop.py
    run: str = "runs/raysal"  # folder or fsspec URI of everything the run leaves
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    cps: CpsConfig = CpsConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    score: ScoreConfig = ScoreConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    label: LabelConfig = LabelConfig()
    query: QueryConfig = QueryConfig()
    loop: LoopConfig = LoopConfig()
    compute: ComputeConfig = ComputeConfig()

    def at_round(self, round_: int) -> Config:
        """What a round's training goes by: the first ones may leave the encoder as it came (`loop.frozen_rounds`)."""
        if round_ >= self.loop.frozen_rounds:
            return self
        return self.model_copy(update={"optim": self.optim.model_copy(update={"freeze_encoder": True})})

    @property
    def budget(self) -> int:
        """Labels bought when no stopping rule ends the loop early."""
        return self.loop.initial + self.loop.rounds * self.loop.per_round

    def digest(self) -> str:
        """sha256 hex over what decides results: all but the run folder, its name, and where work runs."""
        return digest_of(self.model_dump(mode="json", exclude={"run", "name", "compute"}))

    def training_digest(self) -> str:
        """sha256 hex over what decides one training, given its labels: two runs that share it may share its checkpoints."""
        parts = {"seed", "method", "data", "augment", "model", "loss", "cps", "optim", "train"}
        return digest_of(self.model_dump(mode="json", include=parts))

    def to_yaml(self) -> str:
        """The whole tree as YAML that `load` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def digest_of(value: object) -> str:
    """sha256 hex of a JSON-able value in canonical form (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def load(path: str | Path | None = None, overrides: Iterable[str] = ()) -> Config:
    """Reads a YAML file and applies ``a.b=value`` overrides (values are YAML too).

    Args:
        path: A local YAML file; None starts from the defaults.
        overrides: For example ``["train.steps=200", "query.strategy=entropy"]``.

    Raises:
        ConfigError: The file can't be read, a key is unknown (the nearest valid name is given), or a value is refused.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            tree = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"config {path}: can't be read: {error}") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"config {path}: not valid YAML: {error}") from error
        if not isinstance(tree, dict):
            raise ConfigError(f"config {path}: expected sections such as 'train:', got a {type(tree).__name__}")
    for text in overrides:
        _override(tree, text)
    return build(tree, str(path) if path else "--set")


def build(tree: dict[str, Any], source: str = "config") -> Config:
    """Validates a tree of plain values. Raises ConfigError naming each wrong key and what it should be."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(source, e) for e in error.errors())) from error


def valid_keys(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """All dotted names of the tree, for example ``train.steps``."""
    keys: list[str] = []
    for name, info in section.model_fields.items():
        keys.append(prefix + name)
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            keys += valid_keys(info.annotation, f"{prefix}{name}.")
    return keys


def _override(tree: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {text!r}: expected KEY=VALUE, for example train.steps=200")
    *sections, leaf = key.strip().split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"--set {text!r}: {section!r} is a value, not a section")
    try:
        tree[leaf] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {text!r}: the value is not valid YAML: {error}") from error


def _explain(source: str, error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        keys = valid_keys()
        near = difflib.get_close_matches(key, keys, 1, 0.5) or difflib.get_close_matches(
            key.rpartition(".")[2], [k.rpartition(".")[2] for k in keys], 1, 0.6
        )
        full = next((k for k in keys if near and (k == near[0] or k.endswith("." + near[0]))), None)
        help_ = f"did you mean {full!r}?" if full else f"valid sections: {', '.join(Config.model_fields)}"
        return f"{source}: unknown key {key!r}; {help_}"
    return f"{source}: {key or 'config'}: {error['msg']} (got {error.get('input')!r})"
