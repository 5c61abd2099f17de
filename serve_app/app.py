"""The Serve application: `serve run serve_app.app:build bundle=FOLDER`, or `raylway serve RUN`.

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
from serve_app.service import Service
from serve_app.watch import Watch

DEFAULTS = {"min_replicas": 1, "max_replicas": 4, "max_batch": 64}
MAX_ONGOING_REQUESTS = 2048
"""Far more than the batcher needs to fill its batches: requests are to wait in our own queue, which is bounded and
answers 503, and not in Ray's, which are bounded differently in its two modes."""
UPSCALE_DELAY_S = 3.0
DOWNSCALE_DELAY_S = 60.0
"""A replica costs seconds to start and little to keep."""
LOOK_BACK_S = 11.0
"""What the average is taken over; Ray collects the figures every 10 s and wants it to be longer."""


@serve.deployment(
    name="model",
    max_ongoing_requests=MAX_ONGOING_REQUESTS,
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


def build(args: dict[str, Any]) -> serve.Application:
    """The application of one bundle; checks its arguments and touches nothing, since Ray may call it on any node.

    Args:
        args: `bundle`, the folder, or `s3://…` or `gs://…`, which each node fetches once; `keys`, the file of the API
            keys (`serve_app.keys`) if not everybody may ask; and, as numbers or their text, `min_replicas`,
            `max_replicas` and `max_batch` (rows in one pass through the model). Every node that may hold a replica must
            see the folder and the file.

    Raises:
        UserError: An argument is missing, unknown or out of range.
    """
    known = {"bundle", "keys", *DEFAULTS}
    unknown = sorted(args.keys() - known)
    if unknown or not args.get("bundle"):
        raise UserError(
            f"no such argument: {', '.join(unknown)}" if unknown else "an argument is missing: bundle",
            where="serve_app.app:build",
            expected="bundle=FOLDER, and if you like keys=FILE min_replicas=1 max_replicas=4 max_batch=64",
            found=", ".join(map(str, args)) or "none",
        )
    numbers = {name: _count(name, args.get(name, default)) for name, default in DEFAULTS.items()}
    low, high, max_batch = numbers.values()
    if low > high:
        raise UserError(
            "min_replicas is more than max_replicas", where="serve_app.app:build", found=f"{low} and {high}"
        )
    scaled: serve.Deployment = Model.options(  # type: ignore[attr-defined] # the decorator has made it a Deployment
        autoscaling_config=_autoscaling(low, high, max_batch)
    )
    bundle = storage.place(args["bundle"], "serve_app.app:build, bundle")
    keys = args.get("keys")
    return scaled.bind(str(bundle), max_batch, str(Path(keys).absolute()) if keys else None)


def _autoscaling(low: int, high: int, max_batch: int) -> AutoscalingConfig:
    """A further replica when, on average, the batches of those that run are more than half full."""
    return AutoscalingConfig(
        min_replicas=low,
        max_replicas=high,
        target_ongoing_requests=max(1, max_batch // 2),
        look_back_period_s=LOOK_BACK_S,
        upscale_delay_s=UPSCALE_DELAY_S,
        downscale_delay_s=DOWNSCALE_DELAY_S,
    )


def _count(name: str, value: Any) -> int:
    """A whole number from 1, or its text as the `serve` command line passes it."""
    text = str(value)
    if isinstance(value, bool) or not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise UserError(
            f"{name} must be a whole number from 1", where=f"serve_app.app:build, {name}", found=repr(value)
        )
    return int(text)
