"""The Serve application of one bundle: `serve run serve_app.app:build bundle=FOLDER`, or `raylway serve RUN`.

Each replica loads the bundle, checks itself against the examples in it, and takes requests only then.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from ray import serve
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import LoggingConfig

from raylway import storage
from raylway.bundle import contents, examples
from raylway.bundle.predictor import Predictor
from raylway.errors import UserError
from serve_app import exports
from serve_app import keys as api_keys
from serve_app.recent import Recorded
from serve_app.service import PATIENCE_S, Service
from serve_app.watch import Watch

DEPLOYMENT = "model"
DEFAULTS = {"min_replicas": 1, "max_replicas": 4, "max_batch": 64}
MAX_ONGOING_REQUESTS = 2048
"""Far more than the batcher needs to fill its batches: requests are to wait in our own queue, which is bounded and
answers 503, and not in Ray's, which are bounded differently in its two modes."""
UPSCALE_DELAY_S = 3.0
DOWNSCALE_DELAY_S = 60.0
"""A replica costs seconds to start and little to keep."""
TO_ZERO_DELAY_S = 300.0
"""Of the last one, where `min_replicas` is 0: the next request waits for a whole start."""
LOOK_BACK_S = 11.0
"""What the average is taken over; Ray collects the figures every 10 s and wants it to be longer."""
HEALTH_PERIOD_S, HEALTH_TIMEOUT_S = 5.0, 15.0
"""Three failures in a row and a replica is replaced."""
SURGE_PERCENT = 25
"""Replicas of a new version that may start before old ones stop, at least one: none stops before one has taken its
place."""


@serve.deployment(
    name=DEPLOYMENT,
    max_ongoing_requests=MAX_ONGOING_REQUESTS,
    max_surge_percent=SURGE_PERCENT,
    # A replica that goes answers what it has taken.
    graceful_shutdown_timeout_s=PATIENCE_S + 5,
    health_check_period_s=HEALTH_PERIOD_S,
    health_check_timeout_s=HEALTH_TIMEOUT_S,
    # A line a request costs a fifth of the throughput; counts and latencies are among Serve's metrics.
    logging_config=LoggingConfig(enable_access_log=False),
)
@serve.ingress()
class Model:
    """One replica."""

    def __init__(self, bundle: str, max_batch: int, keys: str | None) -> None:
        torch.set_num_threads(1)  # as every forward pass of the predictor needs it; replicas scale, not threads
        predictor = Predictor(contents.load(storage.place(bundle)))
        examples.check(predictor)
        self._service = Service(
            predictor,
            max_batch,
            api_keys.read(Path(keys) if keys else None),
            Watch(predictor.bundle.record, exports.access_log()),
            exports.metrics,
        )

    def __serve_build_asgi_app__(self) -> Service:
        return self._service

    def reconfigure(self, arguments: dict[str, Any]) -> None:
        """Called by Serve, which wants it where there is a `user_config`; the constructor has all that it needs."""

    async def check_health(self) -> None:
        """Called by Serve in the event loop of the requests: one that is stuck does not answer.

        Raises:
            RuntimeError: The model is stuck in a batch.
        """
        self._service.check_health()

    async def recorded(self) -> list[Recorded]:
        """A sample of the recent requests that were answered, for a bundle that is to take this one's place."""
        return self._service.recent.all()


def build(args: dict[str, Any]) -> serve.Application:
    """The application of one bundle; checks its arguments and touches nothing, since Ray may call it on any node.

    Args:
        args: `bundle`, the folder, or `s3://…` or `gs://…`, which each node fetches once; `keys`, the file of the API
            keys (`serve_app.keys`) if not everybody may ask; and, as numbers or their text, `min_replicas` (0: none
            while nobody asks), `max_replicas`, `max_batch` (rows in one pass through the model) and `cpus` (what Ray
            keeps free for a replica, which computes on one; 1 unless told otherwise). Every node that may hold a
            replica must see the folder and the file. `before`: the arguments of the bundle that this one has replaced.

    Raises:
        UserError: An argument is missing, unknown or out of range.
    """
    return bound(args)


def bound(
    args: dict[str, Any], actor_options: dict[str, Any] | None = None, code_version: str | None = None
) -> serve.Application:
    """As `build`, with further options of Ray for the replicas, and Serve's version of those that may go on."""
    known = {"bundle", "before", "keys", "cpus", *DEFAULTS}
    unknown = sorted(args.keys() - known)
    if unknown or not args.get("bundle"):
        raise UserError(
            f"no such argument: {', '.join(unknown)}" if unknown else "an argument is missing: bundle",
            where="serve_app.app:build",
            expected="bundle=FOLDER, and if you like keys=FILE min_replicas=1 max_replicas=4 max_batch=64 cpus=1",
            found=", ".join(map(str, args)) or "none",
        )
    numbers = {name: _count(name, args.get(name, default)) for name, default in DEFAULTS.items()}
    low, high, max_batch = numbers.values()
    if low > high:
        raise UserError(
            "min_replicas is more than max_replicas", where="serve_app.app:build", found=f"{low} and {high}"
        )
    bundle = str(storage.place(args["bundle"], "serve_app.app:build, bundle"))
    keys = str(Path(args["keys"]).absolute()) if args.get("keys") else None
    cpus = _cpus(args.get("cpus", 1))
    settled = {"bundle": bundle, "keys": keys, "cpus": cpus, **numbers, "before": args.get("before")}
    scaled: serve.Deployment = Model.options(  # type: ignore[attr-defined] # the decorator has made it a Deployment
        autoscaling_config=_autoscaling(low, high, max_batch),
        ray_actor_options={"num_cpus": cpus, **(actor_options or {})},
        # Serve tells it to whoever asks what is served, also when no replica runs.
        user_config={name: value for name, value in settled.items() if value is not None},
    )
    if code_version:  # Serve makes one up otherwise; inside Serve, held by a test
        scaled = scaled.options(version=code_version, _internal=True)
    return scaled.bind(bundle, max_batch, keys)


def _autoscaling(low: int, high: int, max_batch: int) -> AutoscalingConfig:
    """A further replica when, on average, the batches of those that run are more than half full."""
    return AutoscalingConfig(
        min_replicas=low,
        initial_replicas=max(1, low),  # whether the bundle can be served is seen at the start
        max_replicas=high,
        target_ongoing_requests=max(1, max_batch // 2),
        look_back_period_s=LOOK_BACK_S,
        upscale_delay_s=UPSCALE_DELAY_S,
        downscale_delay_s=DOWNSCALE_DELAY_S,
        downscale_to_zero_delay_s=TO_ZERO_DELAY_S,
    )


def _count(name: str, value: Any) -> int:
    """A whole number from 1 (of replicas from 0), or its text as the `serve` command line passes it."""
    least = int(name != "min_replicas")
    text = str(value)
    if isinstance(value, bool) or not (text.isascii() and text.isdigit()) or int(text) < least:
        raise UserError(
            f"{name} must be a whole number from {least}", where=f"serve_app.app:build, {name}", found=repr(value)
        )
    return int(text)


def _cpus(value: Any) -> float:
    try:
        cpus = float("nan" if isinstance(value, bool) else value)
    except (TypeError, ValueError):
        cpus = -1.0
    if not 0 <= cpus <= 1024:
        raise UserError("cpus must be a number from 0", where="serve_app.app:build, cpus", found=repr(value))
    return cpus
