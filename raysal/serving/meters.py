"""What the endpoint counts, for Prometheus."""

from typing import Any

SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0]
IMAGES = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]


class Meters:
    """Counts nothing; of use where there is no Serve."""

    def request(self, route: str, status: int, seconds: float) -> None:
        """One answer."""

    def refused(self, reason: str) -> None:
        """One answer that was a problem."""

    def in_flight(self, requests: int) -> None:
        """Requests at work now."""

    def stage(self, stage: str, seconds: float) -> None:
        """Part of an answer: read, wait, forward, encode."""

    def batch(self, images: int) -> None:
        """Images that went through the network together."""

    def model(self, digest: str, **about: str) -> None:
        """A model was taken into use."""

    def beat(self) -> None:
        """Now and then: tells again what stays as it is, as what was set once is forgotten once it was collected."""


class ServeMeters(Meters):
    """Counts by Ray Serve's metrics, which carry the deployment and the replica."""

    def __init__(self) -> None:
        from ray.serve import metrics as of_serve

        metrics: Any = of_serve  # its types say that there is one tag

        self._requests = metrics.Counter("raysal_requests_total", "Answers by route and status.", ("route", "status"))
        self._seconds = metrics.Histogram("raysal_request_seconds", "From a request's first byte to its answer.", SECONDS, ("route",))
        self._stages = metrics.Histogram("raysal_stage_seconds", "Parts of an answer: read, wait, forward, encode.", SECONDS, ("stage",))
        self._refused = metrics.Counter("raysal_rejected_total", "Requests answered with a problem, by reason.", ("reason",))
        self._in_flight = metrics.Gauge("raysal_in_flight", "Requests of a replica at work now.")
        self._batch = metrics.Histogram("raysal_batch_images", "Images that go through the network together.", IMAGES)
        self._model = metrics.Gauge("raysal_model_info", "1 for the model in use.", ("digest", "label_set", "runtime"))
        self._used: dict[str, Any] | None = None

    def request(self, route: str, status: int, seconds: float) -> None:
        self._requests.inc(tags={"route": route, "status": str(status)})
        self._seconds.observe(max(seconds, 1e-9), tags={"route": route})

    def refused(self, reason: str) -> None:
        self._refused.inc(tags={"reason": reason})

    def in_flight(self, requests: int) -> None:
        self._in_flight.set(requests)

    def stage(self, stage: str, seconds: float) -> None:
        self._stages.observe(max(seconds, 1e-9), tags={"stage": stage})

    def batch(self, images: int) -> None:
        self._batch.observe(images)

    def model(self, digest: str, **about: str) -> None:
        if self._used is not None:
            self._model.set(0, tags=self._used)
        self._used = {"digest": digest[:12], **about}
        self.beat()

    def beat(self) -> None:
        if self._used is not None:
            self._model.set(1, tags=self._used)
