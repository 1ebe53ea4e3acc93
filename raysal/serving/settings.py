"""What an operator settles about the endpoint. Each knob says why it exists and when to turn it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from raysal.config import Count, Fraction, Positive, PositiveFloat, RuntimeConfig, Section


class Gate(Section):
    """What a new checkpoint must show before it takes over."""

    reference: str | None = None  # folder of images, or a data set with a val split; null: made-up scenes, which find broken models only
    agreement: Fraction = 0.5  # share of the reference's pixels that must keep the class they had; lower it for a model of other labels
    made_up: Fraction = 0.2  # the same of made-up scenes, without a reference; good models of real ground agree on a quarter or more there
    miou_drop: Fraction = 0.02  # where the reference has masks (images/, masks/): mIoU may fall by this at most


class Limits(Section):
    """What one request may ask for. Past them it is refused, before the work is done."""

    max_bytes: Positive = 64 * 2**20  # of a request's body (413); rover images are under 10 MB, mosaics more
    max_pixels: Positive = 64 * 2**20  # of one image (413), looked up in its header before it is decoded
    max_bands: Positive = 4  # of an archive product (413)
    max_images: Positive = 16  # of one multipart request (413)
    upload_s: PositiveFloat = 30.0  # until the body is there (408); only then does a request take one of the places of in_flight
    uploads: Positive = 32  # bodies on their way to one replica (429); bytes held: (uploads + in_flight) x max_bytes at most
    deadline_s: PositiveFloat = 60.0  # from the body to the answer (408); a client may ask for less: X-Deadline-Seconds
    in_flight: Positive = 16  # requests of one replica at once; more are turned away (429) and told when to come back
    held_pixels: Positive = 256 * 2**20  # decoded pixels of one replica at once; what comes after waits, so that memory is bounded
    retry_after_s: Positive = 2  # what a 429 or 503 tells the client


class ModelSpec(Section):
    """The model in use: a deployment's ``user_config``. A new one is a hot swap."""

    checkpoint: str  # folder or URI that every node can read
    digest: str | None = None  # sha256 that it must have, or its first 12 digits or more; null: whatever is there
    precision: Annotated[float, Field(gt=0, lt=1)] | None = None  # pixels less sure abstain (255), by class, as in raysal label
    previous: ModelSpec | None = None  # what it takes over from; replicas that start later hold it against this one; null: args' model


class Settings(Section):
    """Arguments of the application, ``args`` of a Serve config file."""

    checkpoint: str  # the first model; a folder or URI that every node can read
    digest: str | None = None  # as in ModelSpec
    precision: Annotated[float, Field(gt=0, lt=1)] | None = None  # as in ModelSpec
    runtime: RuntimeConfig = RuntimeConfig()  # how the network runs
    use_gpu: bool = False  # replicas run on GPUs; ask for one in the deployment's ray_actor_options
    threads: Count = 0  # of a replica; 0: the CPUs that Ray gave it, at least 1
    black_border: bool = True  # black areas at an image's edge are no data; as data.black_border
    tokens_file: str | None = None  # one bearer token a line; read again when it changes. Or the environment: RAYSAL_TOKENS, by commas
    roots: tuple[str, ...] = ()  # URIs under which clients may name an image instead of sending it; empty: none
    limits: Limits = Limits()
    gate: Gate = Gate()

    @property
    def first(self) -> ModelSpec:
        """The model that the application was deployed with."""
        return ModelSpec(checkpoint=self.checkpoint, digest=self.digest, precision=self.precision)

    @field_validator("roots")
    @classmethod
    def _folders(cls, roots: tuple[str, ...]) -> tuple[str, ...]:
        for root in roots:
            if len(root.rstrip("/").partition("://")[2] or root.strip("/")) < 1:
                raise ValueError(f"{root!r} is the whole of a store; name a folder or a bucket")
        return roots
